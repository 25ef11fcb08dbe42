"""A heavy stage in several processes, each with a GPU of its own: every one makes its share of the batches.

The processes are children on this machine or, where an engine's Ray cluster has the GPUs, its tasks (see `cluster`).

A stage hands over its *work*, a picklable callable `work(shard, progress)` that makes whatever its shard lacks and
leaves every batch on disk, whole. Shard (i, n) takes every n-th batch from the i-th on, of the batches that one
process would form, and computes with as many threads: so the result is that of one process, to the bit on a CPU.
"""

import gc
import multiprocessing
import os
import pickle
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from focusdpo_lib import cluster
from focusdpo_lib.runs import PARTIAL, RunError

Shard = tuple[int, int]  # its number and how many there are
WHOLE: Shard = (0, 1)
# Whether processes are forked: on Linux, without a GPU, which a process with GPU libraries may keep a hold on.
FORKS = sys.platform == "linux" and not any(Path(f"/dev/{name}").exists() for name in ("nvidiactl", "kfd"))
context = multiprocessing.get_context("forkserver" if FORKS else "spawn")
HEAVY = ("focusdpo_lib.stages", "focusdpo_lib.backbones.flux_uno", "focusdpo_lib.backbones.sdxl_ip", "torch")
_told = False  # what to import, the process that others are forked from
ERROR = "error"  # of a shard's notes: the exception that ended it, pickled


class WorkerError(RunError):
    """A process of a stage died twice; the message says at what, and what to do."""


class Progress(Protocol):
    """What a shard says of itself while it works."""

    def expects(self, count: int) -> None:
        """So many items are to be made."""

    def begins(self, item: str) -> None:
        """The next items, of which `item` is the first."""

    def done(self, count: int) -> None:
        """So many more are on disk."""


Work = Callable[[Shard, Progress], None]
Start = Callable[[Shard], BaseProcess | cluster.Task]


class Silent:
    """Progress that nobody looks at."""

    def expects(self, count: int) -> None:
        pass

    def begins(self, item: str) -> None:
        pass

    def done(self, count: int) -> None:
        pass


SILENT = Silent()


class Bar(Silent, AbstractContextManager):
    """A progress bar with the time left; `what` names the items, `unit` one of them."""

    def __init__(self, what: str, unit: str) -> None:
        self.bar = tqdm(desc=what, unit=unit, total=0, mininterval=5, delay=5, file=sys.stdout, ncols=90)

    def expects(self, count: int) -> None:
        self.bar.total += count

    def done(self, count: int) -> None:
        self.bar.update(count)

    def __exit__(self, *error) -> None:
        self.bar.close()


class Notes:
    """The progress of a shard in another process: a file a kind of news, which that process alone writes."""

    def __init__(self, folder: Path, shard: Shard) -> None:
        self.folder, self.name = folder, str(shard[0])

    def expects(self, count: int) -> None:
        self._write("expects", str(count))

    def begins(self, item: str) -> None:
        self._write("begins", item)

    def done(self, count: int) -> None:
        self._write("done", str(int(self.read("done") or 0) + count))

    def _write(self, news: str, text: str) -> None:
        file = self._file(news)
        partial = file.with_suffix(".new")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, file)

    def read(self, news: str) -> str | None:
        """The last word of a kind."""
        file = self._file(news)
        return file.read_text(encoding="utf-8") if file.exists() else None

    def _file(self, news: str) -> Path:
        return self.folder / f"{self.name}-{news}"

    def clear(self) -> None:
        for file in self.folder.glob(f"{self.name}-*"):
            file.unlink()


def run(work: Work, folder: Path, processes: int, what: str, unit: str, apart: bool = False) -> None:
    """Does the work in so many processes, with one progress bar; in this one where one is enough.

    `folder` is the stage's own. `apart`: never in this process, which would keep a hold on a GPU. A process that dies
    has its shard done once more, alone; WorkerError if it dies again. What a shard raises is raised here.
    """
    with Bar(what, unit) as bar:
        if processes == 1 and not apart:
            work(WHOLE, bar)
            return
        shards = [(i, processes) for i in range(processes)]
        with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=folder) as name:
            notes = Path(name).absolute()
            start = _in_cluster(work, notes) if cluster.serves(processes) else _here(work, notes, _devices(processes))
            for shard in _together(start, shards, notes, bar):
                _alone(start, shard, notes, what)


def _together(start: Start, shards: Sequence[Shard], notes: Path, bar: Bar) -> list[Shard]:
    """Starts a process a shard, shows how far they all are, and returns the shards whose process died."""
    children = {shard: start(shard) for shard in shards}
    try:
        while any(child.is_alive() for child in children.values()):
            _show(bar, [Notes(notes, shard) for shard in shards])
            for shard, child in children.items():
                if child.exitcode:
                    _raise(Notes(notes, shard))
            time.sleep(0.2)
        _show(bar, [Notes(notes, shard) for shard in shards])
    finally:
        for child in children.values():
            child.terminate()
    for shard in shards:
        _raise(Notes(notes, shard))
    return [shard for shard, child in children.items() if child.exitcode]


def _alone(start: Start, shard: Shard, notes: Path, what: str) -> None:
    """Does a shard once more, now that the others are done."""
    said = Notes(notes, shard)
    child = start(shard)
    try:
        child.join()
    finally:
        child.terminate()
    _raise(said)
    if child.exitcode:
        why = "killed, most often for want of main memory" if child.exitcode == -9 else f"exit code {child.exitcode}"
        raise WorkerError(
            f"a process that makes {what} died twice ({why}), at {said.read('begins') or 'its start'}: close other "
            "programs or lower workers.processes, and run again; it goes on where it stopped"
        )


def _show(bar: Bar, notes: Sequence[Notes]) -> None:
    bar.bar.total = sum(int(note.read("expects") or 0) for note in notes)
    if done := sum(int(note.read("done") or 0) for note in notes) - bar.bar.n:
        bar.done(done)


def _raise(notes: Notes) -> None:
    error = notes.folder / f"{notes.name}-{ERROR}"
    if error.exists():
        raise pickle.loads(error.read_bytes())


def _devices(processes: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of every process. RunError where there are GPUs, but too few."""
    import torch

    count = torch.cuda.device_count()
    if not count:
        return [None] * processes
    if processes > count:
        raise RunError(f"workers.processes = {processes} on a machine with {count} GPU(s): lower it to {count}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (visible.split(",") if visible else list(map(str, range(count))))[:processes]


def _here(work: Work, notes: Path, devices: Sequence[str | None]) -> Start:
    """Starts children on this machine, each on its device.

    Where that may be, they are forked from one process that has imported once what this one has of the heavy libraries.
    """
    import torch

    if FORKS:
        preload([name for name in HEAVY if name in sys.modules])

    def start(shard: Shard) -> BaseProcess:
        words = (pickle.dumps(work), shard, notes, torch.get_num_threads(), devices[shard[0]], dict(os.environ))
        child = context.Process(target=_child, args=words)
        child.start()
        return child

    return start


def _in_cluster(work: Work, notes: Path) -> Start:
    """Starts tasks on the cluster's GPUs."""
    import torch

    words = pickle.dumps(work), os.getcwd(), notes, torch.get_num_threads()
    return lambda shard: cluster.Task(_task, *words, shard)


def _child(
    work: bytes, shard: Shard, notes: Path, threads: int, device: str | None, environment: Mapping[str, str]
) -> None:
    forked()
    os.environ.clear()  # of a process from which this one was forked
    os.environ.update(environment)
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    if not _do(work, shard, notes, threads):
        sys.exit(1)


def _task(work: bytes, cwd: str, notes: Path, threads: int, shard: Shard) -> None:
    os.chdir(cwd)
    with cluster.redirected(Path(os.devnull)):
        if not _do(work, shard, notes, threads):
            raise RuntimeError("its note says why")


def _do(work: bytes, shard: Shard, folder: Path, threads: int) -> bool:
    """The life of a process that knows its GPU, which is why the work is unpickled no earlier; says whether it is done.

    What it raises is kept as its last note.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read when torch is imported
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads)
    notes = Notes(folder, shard)
    notes.clear()  # of a process before it that died
    try:
        pickle.loads(work)(shard, notes)
    except Exception as error:
        error.add_note(traceback.format_exc())
        (folder / f"{notes.name}-{ERROR}").write_bytes(pickle.dumps(error))
        return False
    return True


def preload(modules: Sequence[str]) -> None:
    """The process that others are forked from imports these, or what it was told before: there is one, for all."""
    global _told
    if not _told:
        context.set_forkserver_preload(["focusdpo_lib.uncollected", *modules])
        _told = True


def forked() -> None:
    """How a process of `context` begins: it ends with its parent, and what was imported before it is never garbage."""
    end_with(multiprocessing.parent_process())
    gc.freeze()
    gc.enable()


@contextmanager
def importing() -> Iterator[None]:
    """Nothing is collected inside (see `uncollected`), and what has been imported at the end is never garbage."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def end_with(process: BaseProcess) -> None:
    """Ends this process when that one ends, however it does."""

    def wait() -> None:
        process.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def end_with_stdin() -> None:
    """Ends this process when its stdin does: when the process that holds the pipe's other end ends, however it does.

    Whatever stands between the two hands its stdin on.
    """

    def wait() -> None:
        while os.read(0, 1):  # not by sys.stdin, whose lock would be held when this process ends by itself
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
