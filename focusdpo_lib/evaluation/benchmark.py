"""One loader for every benchmark in DreamBench's layout: the DreamBooth dataset with UNO's case lists, or the toybox's.

<folder>/dataset/<subject>/00.jpg …     <folder>/dataset/prompts_and_classes.txt     <folder>/cases_<kind>.json
<folder>/attributes.json (toybox only)
"""

import ast
import hashlib
import json
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from PIL import Image

from focusdpo_lib import pictures
from focusdpo_lib.evaluation import uno_cases, wording
from focusdpo_lib.params import DREAMBENCH_DIR

KINDS = {"single": 1, "multi": 2}  # references a case
HEADER = "subject_name,class"
SHOWN = 10  # problems of one list or folder; the others are counted
# What the toybox's attributes.json says of every subject.
ATTRIBUTES = {"class_name": str, "base": str, "accent": str, "pattern": str, "angle": int, "trim": str}


class BenchmarkError(ValueError):
    """A benchmark folder or case list that cannot be used; the message says what, where and what to do."""


@dataclass(frozen=True)
class Subject:
    name: str
    class_name: str
    photos: tuple[Path, ...]
    attributes: dict | None = None  # toybox: the identity's attributes


@dataclass(frozen=True)
class Case:
    """One prompt with a reference photo a subject, or with all of one's; `id` is its place in the case list."""

    id: str
    prompt: str
    subjects: tuple[str, ...]
    references: tuple[Path, ...]

    @property
    def unit(self) -> str:
        """The subjects as one name ("cat+mug"): what the bootstrap draws."""
        return "+".join(self.subjects)


@dataclass(frozen=True)
class Benchmark:
    folder: Path
    kind: str
    subjects: dict[str, Subject]
    cases: tuple[Case, ...]
    prompts: dict[str, list[str]]  # "object" and "live": templates such as "a {0} {1} in the snow"
    photo_hash: str

    @classmethod
    def load(cls, folder: str | Path, kind: str, cases: str | Path | None = None) -> "Benchmark":
        """Reads and checks a benchmark; `cases` is a list in UNO's format (none: the folder's own cases_<kind>.json;
        "uno": UNO's own, built from the dataset's prompts).

        Raises BenchmarkError for a missing or corrupt photo, an unknown subject, or references that do not match
        the subjects named in the prompt.
        """
        folder = Path(folder)
        if kind not in KINDS:
            raise BenchmarkError(f"benchmark kind '{kind}' is unknown: choose one of {', '.join(KINDS)}")
        classes, prompts = read_prompts_and_classes(folder / "dataset" / "prompts_and_classes.txt")
        attributes = _attributes(folder / "attributes.json")
        places = {_composed(p.name): p for p in (folder / "dataset").iterdir()}
        if others := sorted(n for n, p in places.items() if n not in classes and n[0] != "." and p.is_dir()):
            named = "prompts_and_classes.txt does not name"
            warnings.warn(f"{folder / 'dataset'} holds folders that {named}: {', '.join(others)}", stacklevel=2)
        wanted = ((places.get(n, folder / "dataset" / n), n, c, attributes.get(n)) for n, c in classes.items())
        found = _all(wanted, lambda of: _subject(*of))
        subjects = {subject.name: subject for subject, _ in found}
        if others := [name for _, names in found for name in names]:
            more = f" and {len(others) - 8} more" if others[8:] else ""
            warnings.warn(
                f"{folder / 'dataset'} holds what counts as no photo: {', '.join(others[:8])}{more}", stacklevel=2
            )
        photo_hash = _photo_hash(subjects.values())
        if cases == uno_cases.NAME:
            path = Path(f"UNO's {kind} cases of {folder}")
            if gone := uno_cases.missing(classes):
                raise BenchmarkError(f"{folder} lacks {', '.join(gone)} of UNO's cases: fetch the whole dataset")
            entries = uno_cases.entries(kind, classes, prompts)
        else:
            path = Path(cases) if cases else folder / f"cases_{kind}.json"
            entries = _read_json(path)
        return cls(folder, kind, subjects, _cases(entries, subjects, kind, path), prompts, photo_hash)

    @property
    def hash(self) -> str:
        """Of every photo's pixels and every case: two tables with the same hash were measured on the same task."""
        lines = [self.photo_hash, self.kind]
        lines += [f"{c.id}|{c.prompt}|{c.unit}|{'|'.join(r.name for r in c.references)}" for c in self.cases]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    @property
    def units(self) -> list[str]:
        """The subjects, or pairs of subjects, in the order of the case list."""
        return list(self.subjects_of)

    @property
    def subjects_of(self) -> dict[str, tuple[str, ...]]:
        """The names of the subjects of every unit."""
        return {case.unit: case.subjects for case in self.cases}

    @property
    def has_attributes(self) -> bool:
        """Whether the attributes of every subject in its cases are known, as the toybox's are."""
        return all(self.subjects[name].attributes for case in self.cases for name in case.subjects)

    @property
    def same_class_units(self) -> list[str]:
        """Pairs whose subjects share a class word: their prompts ("a dog and a dog") cannot tell which is which."""
        subjects = self.subjects_of.items()
        return [unit for unit, names in subjects if len({self.subjects[n].class_name for n in names}) < len(names)]

    def first_prompts(self, count: int | None) -> "Benchmark":
        """The same benchmark with the first `count` prompts of every unit (none: all); case ids stay as they are."""
        seen: Counter = Counter()
        kept = []
        for case in self.cases:
            seen[case.unit] += 1
            if count is None or seen[case.unit] <= count:
                kept.append(case)
        return replace(self, cases=tuple(kept))

    def with_all_photos(self) -> "Benchmark":
        """The same benchmark with every photo of the subject as a reference. Raises BenchmarkError for two subjects."""
        if self.kind != "single":
            raise BenchmarkError(
                "generation.references 'all' is for cases of one subject, as PatchDPO measured: set it to 'listed'"
            )
        cases = (replace(case, references=self.subjects[case.unit].photos) for case in self.cases)
        return replace(self, cases=tuple(cases))


def read_prompts_and_classes(path: Path) -> tuple[dict[str, str], dict[str, list[str]]]:
    """DreamBench's prompts_and_classes.txt → {subject: class}, {"object": templates, "live": templates}."""
    text = _read(
        path,
        "point at a folder whose 'dataset' is laid out as DreamBench, "
        f"which `make data` fetches, or set {DREAMBENCH_DIR} to a copy of it",
    )
    parts = re.fullmatch(r"\s*Classes(.*?)\nPrompts.*?Object Prompts(.*?)Live Subject Prompts(.*)", text, re.DOTALL)
    if not parts:
        raise BenchmarkError(f"{path} is not in DreamBench's syntax (Classes, Object Prompts, Live Subject Prompts)")
    object_prompts, live_prompts = (_templates(part, path) for part in parts.groups()[1:])
    return _classes(parts[1], path), {"object": object_prompts, "live": live_prompts}


def _classes(text: str, path: Path) -> dict[str, str]:
    """{subject: class} of the lines "subject,class" below their header."""
    header, *rows = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    if header.replace(" ", "").lower() != HEADER:
        raise BenchmarkError(f"{path} begins its classes with {header!r}: put the line '{HEADER}' before them")
    found: dict[str, str] = {}
    for row in rows:
        name, *rest = (_composed(part.strip()) for part in row.split(","))
        if not name or len(rest) != 1 or not rest[0]:
            raise BenchmarkError(f"{path} has the line {row!r} among its classes: write it as '<subject>,<class>'")
        if name in found:
            raise BenchmarkError(f"{path} gives the class of {name} twice ({found[name]}, {rest[0]}): keep one line")
        found[name] = rest[0]
    if not found:
        raise BenchmarkError(f"{path} names no subject: write a line '<subject>,<class>' for each")
    return found


def _templates(text: str, path: Path) -> list[str]:
    """The prompts of a list in Python's syntax."""
    found = []
    for quoted in re.findall(r"""^('.*'|".*")\.format""", text, re.MULTILINE):
        try:
            found.append(ast.literal_eval(quoted))
        except SyntaxError as error:
            raise BenchmarkError(
                f"{path} holds the prompt {quoted}, which is no text ({error.msg}): correct it"
            ) from None
    return found


def _attributes(path: Path) -> dict[str, dict]:
    """The attributes of subjects, where the file is there: {subject: {class_name, base, …}}."""
    found = _read_json(path) if path.exists() else {}
    if not isinstance(found, dict) or not all(isinstance(of, dict) for of in found.values()):
        raise BenchmarkError(f"{path} gives no attributes by subject: write {{'cat': {{'class_name': 'cat', …}}, …}}")
    for name, of in found.items():
        if wrong := sorted(of.keys() ^ set(ATTRIBUTES)):
            raise BenchmarkError(
                f"{path} lacks or should not have {', '.join(wrong)} of {name}: give {', '.join(ATTRIBUTES)}"
            )
        if wrong := [k for k, kind in ATTRIBUTES.items() if type(of[k]) is not kind]:
            raise BenchmarkError(
                f"{path} gives of {name} as {wrong[0]} {of[wrong[0]]!r}: give words, and a whole angle"
            )
    return found


def open_image(picture: str | Path | Image.Image) -> Image.Image:
    """An RGB image as `pictures.read` has it; raises BenchmarkError where it cannot be used."""
    try:
        return pictures.read(picture)
    except pictures.PictureError as error:
        raise BenchmarkError(str(error)) from None


def _subject(folder: Path, name: str, class_name: str, attributes: dict | None) -> tuple[Subject, list[str]]:
    """A subject, and the files of its folder that are no photos."""
    photos, others = pictures.photos(folder)
    if not photos:
        remedy = f"save what lies there ({', '.join(others)}) as JPEG or PNG" if others else "fetch the dataset again"
        raise BenchmarkError(f"{folder} holds no photo of the subject '{name}': {remedy}")
    return Subject(name, class_name, tuple(photos), attributes), [f"{name}/{other}" for other in others]


def _photo_hash(subjects: Iterable[Subject]) -> str:
    return _pixels_hash(tuple((s.name, s.class_name, path, _state(path)) for s in subjects for path in s.photos))


def _state(path: Path) -> tuple[int, ...]:
    """What tells whether a file is still the one that it was."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


@lru_cache(maxsize=8)  # a notebook loads a benchmark several times
def _pixels_hash(photos: tuple[tuple[str, str, Path, tuple[int, ...]], ...]) -> str:
    """Of photos, each with its subject's name and class and its file's state."""
    digest = hashlib.sha256()

    def add(name: str, class_name: str, path: Path, state: tuple[int, ...]) -> None:
        image = open_image(path)  # decoded, so that a corrupt photo is found before anything is computed
        digest.update(f"{name}/{path.name}/{image.size}/{class_name}".encode() + image.tobytes())

    _all(photos, lambda photo: add(*photo))
    return digest.hexdigest()


def _cases(entries: list, subjects: dict[str, Subject], kind: str, path: Path) -> tuple[Case, ...]:
    """Checks a case list: [{"prompt": …, "image_paths": [".../<subject>/<photo>", …]}, …].

    An entry may say under "classes" by which words its prompt names the subjects, one a reference.
    """
    if not isinstance(entries, list) or not entries:
        raise BenchmarkError(f"{path} holds no list of cases: write [{{'prompt': …, 'image_paths': […]}}, …]")
    words = {s.class_name for s in subjects.values()}
    read = _all(enumerate(entries), lambda at: _case(*at, subjects, kind, words, path))
    cases, doubts = [case for case, _ in read], [doubt for _, doubt in read if doubt]
    _check_distinct(cases, path)
    if doubts:
        more = f" ({len(doubts) - 1} more cases are like it)" if doubts[1:] else ""
        warnings.warn(f"{path}: {doubts[0]}{more}; if other words mean them, list these as 'classes'", stacklevel=3)
    return tuple(cases)


def _case(
    index: int, entry, subjects: dict[str, Subject], kind: str, words: set[str], path: Path
) -> tuple[Case, str | None]:
    """The case of one entry, and a doubt about its wording."""
    where = f"case {index} of {path}"
    prompt, chosen, photos = _entry(entry, subjects, kind, where)
    expected = entry.get("classes") or [subject.class_name for subject in chosen]
    if not isinstance(expected, list) or len(expected) != len(chosen) or not all(map(_is_text, expected)):
        raise BenchmarkError(f"{where} gives as 'classes' {expected!r}: give one word for each of its references")
    found, certain = wording.problem(prompt, expected, words)
    found = found and f"{found} in '{prompt}' but its references show {wording.counted(Counter(expected))}"
    if found and certain:
        raise BenchmarkError(f"{where} {found}: give one reference for every subject that the prompt names")
    return Case(f"{index:04d}", prompt, tuple(s.name for s in chosen), photos), found and f"case {index} {found}"


def _all(items: Iterable, read: Callable) -> list:
    """What is read of every item. Raises one BenchmarkError for all that cannot be read."""
    made, problems = [], []
    for item in items:
        try:
            made.append(read(item))
        except BenchmarkError as error:
            problems.append(str(error))
    if problems:
        more = f"; and {len(problems) - SHOWN} more like these" if len(problems) > SHOWN else ""
        raise BenchmarkError("; ".join(problems[:SHOWN]) + more)
    return made


def _check_distinct(cases: list[Case], path: Path) -> None:
    """BenchmarkError where two cases are one, or two pairs of subjects bear one name."""
    seen: dict[tuple, str] = {}
    units: dict[str, tuple[str, ...]] = {}
    for case in cases:
        first = seen.setdefault((case.prompt, case.references), case.id)
        if first != case.id:
            raise BenchmarkError(f"case {int(case.id)} of {path} repeats case {int(first)}: leave one of the two out")
        subjects = units.setdefault(case.unit, case.subjects)
        if subjects != case.subjects:
            both = " and ".join(f"({', '.join(names)})" for names in (subjects, case.subjects))
            raise BenchmarkError(f"{path} pairs {both}, which both are called '{case.unit}': rename a subject")


def _entry(entry, subjects: dict[str, Subject], kind: str, where: str) -> tuple[str, list[Subject], tuple[Path, ...]]:
    """The prompt of one entry, its subjects and their reference photos."""
    prompt, paths = (entry.get("prompt"), entry.get("image_paths")) if isinstance(entry, dict) else (None, None)
    if not (_is_text(prompt) and isinstance(paths, list) and all(map(_is_text, paths))):
        raise BenchmarkError(f"{where} needs a text as 'prompt' and a list 'image_paths', as in UNO's lists")
    if len(paths) != KINDS[kind]:
        raise BenchmarkError(
            f"{where} has {len(paths)} references where the '{kind}' list takes {KINDS[kind]}: correct it"
        )
    chosen, photos = [], []
    for path in map(Path, paths):
        subject = subjects.get(_composed(path.parent.name))
        photo = (
            next((p for p in subject.photos if _composed(p.name) == _composed(path.name)), None) if subject else None
        )
        if photo is None:
            raise BenchmarkError(f"{where} refers to {path.parent.name}/{path.name}, which the dataset does not have")
        chosen.append(subject)
        photos.append(photo)
    return prompt, chosen, tuple(photos)


def _is_text(value) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _composed(name: str) -> str:
    """A name as it is typed: macOS writes an é in a file name as two letters."""
    return unicodedata.normalize("NFC", name)


def _read(path: Path, remedy: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # a byte-order mark is no letter
    except UnicodeDecodeError as error:
        raise BenchmarkError(f"{path} is no UTF-8 text ({error.reason}): save it as UTF-8") from None
    except OSError:
        raise BenchmarkError(f"{path} is missing: {remedy}") from None


def _read_json(path: Path):
    text = _read(path, "write the benchmark again, or name the case list to use")
    try:
        return json.loads(text, object_pairs_hook=_each_key_once)
    except (ValueError, RecursionError) as error:
        raise BenchmarkError(f"{path} is not valid JSON ({error}): fetch or write it again") from None


def _each_key_once(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object; of a key that stands twice the parser would keep the second value without a word."""
    counted = Counter(key for key, _ in pairs)
    if twice := [key for key, count in counted.items() if count > 1]:
        raise ValueError(f"the key {twice[0]!r} stands twice in one object")
    return dict(pairs)
