"""Run folders: files that are whole or absent, completion markers, provenance and resume.

A run's folder holds `params.yaml` (resolved), `inputs.json` (what it read, by content), its outputs,
`provenance.json` and, written last, `complete.json`. Only the main process of a multi-process run makes a `Run`.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from focusdpo_lib import provenance

PARAMS, INPUTS, PROVENANCE, MARKER = "params.yaml", "inputs.json", "provenance.json", "complete.json"
LOCK = ".lock"
TRAINING_LOCK = ".training"  # empty and hidden, but counted among what a training made ever since there are trainings
RECORDS = (PARAMS, INPUTS, PROVENANCE, MARKER, LOCK, "processes.json")
_READ: dict[tuple, str] = {}  # digests of files by path, size and time of change
PARTIAL = ".partial-"  # prefix of the folders that hold what is not whole yet
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Writers in C++, Rust and NumPy report a full disk without errno, in words of their own.
NO_SPACE_TEXT = re.compile(r"No space left|File too large|unexpected pos|StreamWriter failed|requested and \d+ written")


class RunError(RuntimeError):
    """A run or its files cannot be made or read; the message says what, where and what to do."""


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path of the same name; the file (or folder) made there becomes `path` if the block succeeds.

    On any failure `path` is as it was before. A full disk raises RunError.
    """
    path = Path(path)
    folder = None
    try:
        with full_disk_is_said(path):
            # A hidden folder next to `path`: same file system, and no `*.png` of the parent finds what is not whole.
            with _what_is_in_the_way_is_said(path.parent):
                path.parent.mkdir(parents=True, exist_ok=True)
                folder = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=path.parent))
            yield folder / path.name
            _replace(folder / path.name, path)
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def full_disk_is_said(path: Path) -> Iterator[None]:
    """Within this context a full disk raises RunError, whoever noticed it and in whatever words."""
    try:
        yield
    except Exception as error:
        if _is_full(error, path.parent):
            raise RunError(
                f"no space left to write {path}: free some disk space and run again; what was complete is kept"
            ) from error
        raise


@contextmanager
def _what_is_in_the_way_is_said(folder: Path) -> Iterator[None]:
    """Within this context, which makes `folder` and a first file in it, RunError where it cannot be made."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
        there = _nearest(folder)
        why = f"{there} is a file" if there.is_file() else f"{error.strerror} in {there}"
        raise RunError(f"the folder {folder} cannot be written ({why}): choose another place for the results") from None


def _nearest(folder: Path) -> Path:
    """The folder, or what is there of the path to it."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())


@contextmanager
def locked(path: Path, waiting: str | None = None) -> Iterator[None]:
    """Holds a lock file, which the system lets go of however this process ends.

    Where another process holds it: raises BlockingIOError or, given what to say meanwhile, waits.
    """
    with _what_is_in_the_way_is_said(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is None:
                raise
            print(waiting, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def home(folder: str | Path) -> Path:
    """A folder of results; ~ is the user's own."""
    return Path(folder).expanduser()


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raises RunError where the disk that `folder` will lie on has less room than `what` takes, in bytes."""
    if (free := shutil.disk_usage(_nearest(folder)).free) < needed:
        raise RunError(
            f"{what} will take {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free where {folder} lies: free some "
            "disk space, or name another folder of results"
        )


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def sweep(folder: str | Path) -> None:
    """Removes what a killed process left unfinished anywhere under `folder`."""
    for partial in [p for p in Path(folder).rglob(PARTIAL + "*") if p.is_dir()]:
        shutil.rmtree(partial, ignore_errors=True)


def is_run(folder: str | Path) -> bool:
    """Whether the folder holds a run, complete or not."""
    return (Path(folder) / PARAMS).is_file()


def is_complete(folder: str | Path) -> bool:
    """Whether the folder holds a run that ended, whatever its parameters, and all files that it made.

    Raises RunError where the marker is damaged.
    """
    return is_run(folder) and (Path(folder) / MARKER).is_file() and not lost(folder)


def lost(folder: str | Path) -> list[str]:
    """The files that a run made before it ended and that are gone. RunError where the marker is damaged."""
    if not (Path(folder) / MARKER).is_file():
        return []
    return [name for name in _marker(Path(folder))["files"] if not (Path(folder) / name).exists()]


def _marker(folder: Path) -> dict[str, Any]:
    """What the marker says: the run's fingerprint, and the files that it made (none where an older kit wrote it)."""
    marker = {"files": []} | _read_json(folder / MARKER)
    if not isinstance(marker.get("fingerprint"), str) or not isinstance(marker["files"], list):
        raise _damaged(folder / MARKER, "it says of no run that it is complete")
    return marker


def settings(folder: str | Path) -> dict[str, Any]:
    """The resolved parameters of the run in a folder. Raises RunError where its record of them is gone or damaged."""
    path = Path(folder) / PARAMS
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _damaged(path, " ".join(str(error).split())) from None
    if not isinstance(values, dict):
        raise _damaged(path, "it holds no parameters")
    return values


def inputs(folder: str | Path) -> dict[str, dict[str, str]]:
    """What the run in a folder read, by name: `what` it was and its `hash`. RunError as of `settings`."""
    path = Path(folder) / INPUTS
    found = _read_json(path)
    if not all(isinstance(entry, dict) and {"what", "hash"} <= entry.keys() for entry in found.values()):
        raise _damaged(path, "it does not say what the run read")
    return found


def fingerprint(value: Path | str) -> str:
    """What an input is: a file or folder its content, a run folder what was asked and what came out, a text itself."""
    if isinstance(value, str):
        return value
    if not value.exists():
        raise RunError(f"the input {value} does not exist: make it first, or correct the path")
    if value.is_file():
        return _of_file(value)
    if is_run(value) and not is_complete(value):
        state = "has lost a file that it made" if (value / MARKER).is_file() else "is an unfinished run"
        raise RunError(f"the input {value} {state}: run it again (it goes on where it stopped)")
    files = {p.relative_to(value).as_posix(): p for p in _files(value)}
    if not is_run(value):
        return digest({name: _of_file(file) for name, file in files.items()})
    # The same run made again has other times and another machine in its records, but it was asked the same.
    asked = json.dumps({"fingerprint": _marker(value)["fingerprint"]}, indent=2) + "\n"
    files |= {TRAINING_LOCK: value / TRAINING_LOCK} if (value / TRAINING_LOCK).exists() else {}
    made = {name: _of_file(file) for name, file in files.items() if not _is_record(file)}
    return digest(made | {MARKER: hashlib.sha256(asked.encode()).hexdigest()})


def _files(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """The files under a folder, through links (but never in circles) and without hidden ones (.cache, .DS_Store)."""
    above |= {folder.resolve()}
    for path in (path for path in folder.iterdir() if not path.name.startswith(".")):
        if path.is_file():
            yield path
        elif path.is_dir() and path.resolve() not in above:
            yield from _files(path, above)


def _is_record(file: Path) -> bool:
    """Whether a file of a run says how it went, and is not what came out of it."""
    return file.name in RECORDS or file.suffix in (".csv", ".log", ".md")


def _of_file(path: Path) -> str:
    """SHA-256 of the content; read once a process while size and time of change are the same."""
    seen = path.stat()
    key = (path.resolve(), seen.st_size, seen.st_mtime_ns, seen.st_ino)
    if key not in _READ:
        with path.open("rb") as file:
            _READ[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _READ[key]


def digest(value: Any) -> str:
    """SHA-256 of plain values, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def plain(value: Any, name: str = "params") -> Any:
    """Sections, paths, tuples and NumPy scalars as what YAML and JSON can hold; RunError names what is neither."""
    if hasattr(value, "model_dump"):
        value = value.model_dump()
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{name}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Path):
        return value.as_posix()
    if type(value).__module__ == "numpy" and not getattr(value, "shape", (1,)):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise RunError(f"{name} is a {type(value).__name__}: give a number, a text, a list or a dict")


class Run:
    """One run's folder.

    `params`: every resolved setting. `inputs`: what the run reads, by name; a Path is fingerprinted by its content,
    a str (a model id and revision, say) by itself.

        run = Run(folder, params, inputs)
        if not run.complete:
            with run:
                ...                      # goes on from what the folder holds; files through `atomic`
                run.facts["model"] = …   # kept in provenance.json
    """

    def __init__(
        self, folder: str | Path, params: Mapping[str, Any], inputs: Mapping[str, Path | str] | None = None
    ) -> None:
        self.folder = home(folder)
        self.params = plain(params)
        self.inputs = {name: {"what": str(what), "hash": fingerprint(what)} for name, what in (inputs or {}).items()}
        hashes = {name: entry["hash"] for name, entry in self.inputs.items()}
        self.fingerprint = digest({"params": self.params, "inputs": hashes})
        self.facts: dict[str, Any] = {}
        self.passing: tuple[str, ...] = ()  # files that nobody misses once the run is complete
        self.resumed = False

    @property
    def complete(self) -> bool:
        """Whether this very run (same parameters, same inputs) has ended, and all that it made is there."""
        return is_complete(self.folder) and _marker(self.folder)["fingerprint"] == self.fingerprint

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Waits while another process makes this run, and keeps others waiting; look at `complete` within."""
        if self.complete:
            yield
        else:
            with locked(self.folder / LOCK, f"another process makes {self.folder}: waiting for it"):
                yield

    def start(self) -> None:
        """Writes params.yaml, or goes on with the unfinished run of the same parameters and inputs.

        Raises RunError if the folder holds another run, or this one complete.
        """
        self.started = time.time()
        if self.complete:
            raise RunError(f"{self.folder} holds this run complete: use it, or delete the folder to run it anew")
        self._refuse_another()
        self.resumed = is_run(self.folder)
        sweep(self.folder)
        if self.resumed:
            (self.folder / MARKER).unlink(missing_ok=True)  # of this run, which was whole until a file was lost
        else:
            write_json(self.folder / INPUTS, self.inputs)
            write_text(self.folder / PARAMS, yaml.safe_dump(self.params, sort_keys=False, allow_unicode=True))

    def finish(self, **facts: Any) -> None:
        """Writes provenance.json, then the marker that says the folder is whole."""
        write_json(self.folder / PROVENANCE, self._provenance() | plain(self.facts | facts, "facts"))
        names = {path.relative_to(self.folder).as_posix() for path in _files(self.folder)}
        made = sorted(name for name in names - {*RECORDS, *self.passing} if not name.endswith(".log"))
        write_json(self.folder / MARKER, {"fingerprint": self.fingerprint, "files": made})

    def __enter__(self) -> "Run":
        self.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.finish()

    def _refuse_another(self) -> None:
        if not is_run(self.folder):
            return
        found = [*differences(settings(self.folder), self.params), *changed(inputs(self.folder), self.inputs)]
        if found:
            raise RunError(
                f"{self.folder} holds a run of other parameters or inputs ({'; '.join(found[:4])}): "
                "choose another name, or delete that folder"
            )

    def _provenance(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint,
            "inputs": self.inputs,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
            "wall_seconds": round(time.time() - self.started, 1),  # of this process; see resumed
            "resumed": self.resumed,
            **provenance.facts(),
        }


def changed(there: Mapping[str, Mapping[str, str]], here: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The inputs (as of `inputs`) that are not the same by content, in words."""
    old, new = ({name: entry["hash"] for name, entry in given.items()} for given in (there, here))
    return [f"its input {name!r} has changed" for name in sorted(old | new) if old.get(name) != new.get(name)]


def differences(there: Any, here: Any, key: str = "") -> Iterator[str]:
    """What two runs' parameters differ in, in words."""
    if isinstance(there, dict) and isinstance(here, dict):
        for name in [*there, *(n for n in here if n not in there)]:
            inner = f"{key}.{name}" if key else name
            if name in there and name in here:
                yield from differences(there[name], here[name], inner)
            else:
                yield f"{inner} is given only {'there' if name in there else 'here'}"
    elif type(there) is not type(here) or there != here:
        yield f"{key} is {there!r} there, {here!r} here"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from None
    if not isinstance(value, dict):
        raise _damaged(path, f"it holds a {type(value).__name__}")
    return value


def _damaged(record: Path, why: str) -> RunError:
    return RunError(f"{record} cannot be read ({why}): delete the folder {record.parent} and run again")


def _is_full(error: Exception, folder: Path) -> bool:
    if isinstance(error, RunError):
        return False
    if isinstance(error, OSError) and error.errno is not None:  # whoever gives a number knows why
        return error.errno in NO_SPACE
    return bool(NO_SPACE_TEXT.search(str(error))) or shutil.disk_usage(_nearest(folder)).free == 0


def _replace(new: Path, path: Path) -> None:
    """Makes `new` durable, then gives it the name `path`; a folder that is there is moved out of the way first."""
    for file in [new, *new.rglob("*")]:
        if file.is_file():
            _sync(file)
    if path.is_dir():
        path.rename(new.parent / "replaced")
    os.replace(new, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
