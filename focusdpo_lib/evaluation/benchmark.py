"""One loader for every benchmark in DreamBench's layout: the DreamBooth dataset with UNO's case lists, or the toybox's.

<folder>/dataset/<subject>/00.jpg …     <folder>/dataset/prompts_and_classes.txt     <folder>/cases_<kind>.json
<folder>/attributes.json (toybox only)
"""

import ast
import hashlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from focusdpo_lib import pictures

KINDS = {"single": 1, "multi": 2}  # references a case


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
        """Reads and checks a benchmark; `cases` is a list in UNO's format (none: the folder's own cases_<kind>.json).

        Raises BenchmarkError for a missing or corrupt photo, an unknown subject, or references that do not match
        the subjects named in the prompt.
        """
        folder = Path(folder)
        if kind not in KINDS:
            raise BenchmarkError(f"benchmark kind '{kind}' is unknown: choose one of {', '.join(KINDS)}")
        classes, prompts = read_prompts_and_classes(folder / "dataset" / "prompts_and_classes.txt")
        attributes = _read_json(folder / "attributes.json") if (folder / "attributes.json").exists() else {}
        subjects = {n: _subject(folder / "dataset" / n, c, attributes.get(n)) for n, c in classes.items()}
        photo_hash = _photo_hash(subjects.values())
        path = Path(cases) if cases else folder / f"cases_{kind}.json"
        listed = tuple(_case(i, entry, subjects, kind, path) for i, entry in enumerate(_read_json(path)))
        return cls(folder, kind, subjects, listed, prompts, photo_hash)

    @property
    def hash(self) -> str:
        """Of every photo's pixels and every case: two tables with the same hash were measured on the same task."""
        lines = [self.photo_hash, self.kind]
        lines += [f"{c.id}|{c.prompt}|{c.unit}|{'|'.join(r.name for r in c.references)}" for c in self.cases]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    @property
    def units(self) -> list[str]:
        """The subjects, or pairs of subjects, in the order of the case list."""
        return list(dict.fromkeys(case.unit for case in self.cases))

    @property
    def has_attributes(self) -> bool:
        """Whether the attributes of every subject in its cases are known, as the toybox's are."""
        return all(self.subjects[name].attributes for case in self.cases for name in case.subjects)

    @property
    def same_class_units(self) -> list[str]:
        """Pairs whose subjects share a class word: their prompts ("a dog and a dog") cannot tell which is which."""
        return [u for u in self.units if len({self.subjects[n].class_name for n in u.split("+")}) < len(u.split("+"))]

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
    try:
        text = path.read_text()
    except OSError:
        raise BenchmarkError(
            f"{path} is missing: point at a folder whose 'dataset' is laid out as DreamBench"
        ) from None
    parts = re.fullmatch(r"\s*Classes(.*?)\nPrompts.*?Object Prompts(.*?)Live Subject Prompts(.*)", text, re.DOTALL)
    rows = re.findall(r"^([^,\n]+),([^,\n]+)$", parts[1], re.MULTILINE) if parts else []
    if not parts or not rows[1:]:
        raise BenchmarkError(f"{path} is not in DreamBench's syntax (Classes, Object Prompts, Live Subject Prompts)")
    classes = {name.strip(): class_name.strip() for name, class_name in rows[1:]}  # the first row is the header
    quoted = re.compile(r"""^('.*'|".*")\.format""", re.MULTILINE)
    object_prompts, live_prompts = ([ast.literal_eval(q) for q in quoted.findall(part)] for part in parts.groups()[1:])
    return classes, {"object": object_prompts, "live": live_prompts}


def open_image(picture: str | Path | Image.Image) -> Image.Image:
    """An RGB image as `pictures.read` has it; raises BenchmarkError where it cannot be used."""
    try:
        return pictures.read(picture)
    except pictures.PictureError as error:
        raise BenchmarkError(str(error)) from None


def _subject(folder: Path, class_name: str, attributes: dict | None) -> Subject:
    photos, others = pictures.photos(folder)
    if others:
        warnings.warn(f"{folder} holds what counts as no photo: {', '.join(others)}", stacklevel=4)
    if not photos:
        raise BenchmarkError(f"{folder} holds no photo of the subject '{folder.name}': fetch the dataset again")
    return Subject(folder.name, class_name, tuple(photos), attributes)


def _photo_hash(subjects: Iterable[Subject]) -> str:
    digest = hashlib.sha256()
    for subject in subjects:
        for path in subject.photos:
            image = open_image(path)  # decoded, so that a corrupt photo is found before anything is computed
            digest.update(f"{subject.name}/{path.name}/{image.size}/{subject.class_name}".encode() + image.tobytes())
    return digest.hexdigest()


def _case(index: int, entry: dict, subjects: dict[str, Subject], kind: str, where: Path) -> Case:
    """Checks one entry of a case list: {"prompt": …, "image_paths": [".../<subject>/<photo>", …]}."""
    case = f"case {index} of {where}"
    try:
        prompt, paths = entry["prompt"], [Path(p) for p in entry["image_paths"]]
    except (KeyError, TypeError):
        raise BenchmarkError(f"{case} needs a 'prompt' and a list 'image_paths', as in UNO's lists") from None
    if len(paths) != KINDS[kind]:
        raise BenchmarkError(
            f"{case} has {len(paths)} references where the '{kind}' list takes {KINDS[kind]}: correct it"
        )
    for path in paths:
        known = subjects.get(path.parent.name)
        if known is None or path.name not in {p.name for p in known.photos}:
            raise BenchmarkError(f"{case} refers to {path.parent.name}/{path.name}, which the dataset does not have")
    chosen = [subjects[path.parent.name] for path in paths]
    expected = Counter(subject.class_name for subject in chosen)
    if (named := _named(prompt, {s.class_name for s in subjects.values()})) != expected:
        raise BenchmarkError(
            f"{case} names {_count(named)} in '{prompt}' but its references show {_count(expected)}: "
            "give one reference for every subject that the prompt names"
        )
    references = tuple(subject.photos[0].parent / path.name for subject, path in zip(chosen, paths, strict=True))
    return Case(f"{index:04d}", prompt, tuple(s.name for s in chosen), references)


def _named(prompt: str, class_names: set[str]) -> Counter:
    """How often a prompt names each class as a subject: "a", at most two adjectives, and the class word."""
    words = "|".join(sorted(map(re.escape, class_names), key=len, reverse=True))
    return Counter(re.findall(rf"\ban?(?: \w+){{0,2}}? ({words})\b", prompt))


def _count(names: Counter) -> str:
    return " and ".join(f"{count} × {name}" for name, count in sorted(names.items())) or "no subject"


def _read_json(path: Path):
    try:
        return json.loads(path.read_text())
    except OSError:
        raise BenchmarkError(f"{path} is missing: write the benchmark again, or name the case list to use") from None
    except ValueError as error:
        raise BenchmarkError(f"{path} is not valid JSON ({error}): fetch or write it again") from None
