"""Folders of images as other systems write them, read as the images of a benchmark's cases.

uno       <case>_<image>.png, the case counted from 0 in the list, and beside it a .json of how it was made
          (inference.py of bytedance/UNO)
patchdpo  <subject>/<prompt>.png, one a prompt (inference_dreambooth.py of hqhQAQ/PatchDPO)
case      <case>_<image>.png or images/<case>_<image>.png, the case in four digits (this kit)

A picture may have any format and suffix that the kit reads. Whatever is wrong with a folder is said at once.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from focusdpo_lib import pictures
from focusdpo_lib.evaluation.benchmark import Benchmark, Case

SHOWN = 10  # of each kind of problem; the others are counted
# What UNO's script writes beside an image that says how it was sampled.
UNO_SETTINGS = ("model_type", "width", "height", "ref_size", "num_steps", "guidance", "seed", "pe", "concat_refs")

Place = tuple[Case, int]  # an image by its case and its number
Problems = dict[str, list[str]]  # what is wrong, in words, and which files are


class LayoutError(ValueError):
    """A folder that does not hold one usable image for every case; the message lists all that is wrong."""


@dataclass(frozen=True)
class Found:
    """The images of a folder by their places, their one size, and what the folder itself says of their sampling."""

    files: dict[Place, Path]
    size: tuple[int, int]
    settings: dict[str, str | int | float | bool] = field(default_factory=dict)


def read(
    folder: Path,
    layout: str,
    benchmark: Benchmark,
    count: int = 1,
    size: tuple[int, int] | None = None,
    prompts: int | None = None,
) -> Found:
    """The images of all cases, `count` a case; `size` (width, height) is what they must have.

    Without it they must be square and of one size. `prompts`: the first so many of every subject are looked at. Raises
    LayoutError that lists everything missing, doubled, of another size or mode or name, damaged, and made for another
    list of cases.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise LayoutError(f"{folder} is no folder of images: correct its path")
    few, problems = benchmark.first_prompts(prompts), Problems()
    places = LAYOUTS[layout](folder, benchmark, count)
    wanted = [(case, number) for case in few.cases for number in range(count)]
    files = _assigned(places, wanted, problems, folder, count)
    settings = _sidecars(files, problems) if layout == "uno" else {}
    found = _looked_at(files.values(), problems, folder)
    expected = size or _most(found.values())
    _check_sizes(found, expected, size is not None, problems, folder)
    if problems:
        head = f"{folder} cannot be scored as the images of {len(few.cases)} cases in the layout '{layout}'"
        raise LayoutError(f"{head}: {'; '.join(_said(problems))}. Correct all of it, and score again")
    return Found(files, expected, settings)


Named = list[tuple[Path, Place | None]]  # every picture of a folder, with the place that its name gives it


def _numbered(folder: Path, benchmark: Benchmark, count: int) -> Named:
    """The pictures named by case and number."""
    cases = {int(case.id): case for case in benchmark.cases}
    places: Named = []
    for path in pictures.photos(folder)[0]:
        match = re.fullmatch(r"(\d{1,9})_(\d{1,9})", _plain(path.stem), re.ASCII)
        case = cases.get(int(match[1])) if match else None
        places.append((path, (case, int(match[2])) if case else None))
    return places


def _kept(folder: Path, benchmark: Benchmark, count: int) -> Named:
    inner = folder / "images"
    return _numbered(inner if inner.is_dir() else folder, benchmark, count)


def _by_prompt(folder: Path, benchmark: Benchmark, count: int) -> Named:
    """The pictures named by prompt in folders named by subject. Raises LayoutError for what that cannot name."""
    if benchmark.kind != "single" or count != 1:
        raise LayoutError(
            "the layout 'patchdpo' has one subject and one image a prompt: use 'case' for two subjects or more images"
        )
    cases = {(_plain(case.unit), _plain(case.prompt)): case for case in benchmark.cases}
    if len(cases) < len(benchmark.cases):
        raise LayoutError(
            f"{len(benchmark.cases) - len(cases)} cases have subject and prompt in common with another, which the "
            "layout 'patchdpo' cannot tell apart: use 'case'"
        )
    within = [p for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    places: Named = [(path, None) for path in pictures.photos(folder)[0]]
    for inner in within:
        for path in pictures.photos(inner)[0]:
            case = cases.get((_plain(inner.name), _plain(path.stem)))
            places.append((path, (case, 0) if case else None))
    return places


LAYOUTS: dict[str, Callable[[Path, Benchmark, int], Named]] = {"uno": _numbered, "patchdpo": _by_prompt, "case": _kept}


def _assigned(
    places: Named, wanted: Sequence[Place], problems: Problems, folder: Path, count: int
) -> dict[Place, Path]:
    """One file a place; what lacks one, has several, or belongs nowhere is a problem."""
    by_place: dict[Place, list[Path]] = {}
    for path, place in places:
        if place is None:
            _add(problems, "named as no case of this list", repr(_inside(path, folder)))
        elif place[1] >= count:
            _add(problems, f"beyond images_per_prompt = {count}", _inside(path, folder))
        else:
            by_place.setdefault(place, []).append(path)
    for place in wanted:
        if place not in by_place:
            _add(problems, "missing", _called(place))
        elif len(by_place[place]) > 1:
            names = " and ".join(_inside(path, folder) for path in by_place[place])
            _add(problems, "doubled", f"{_called(place)} is {names}")
    return {place: by_place[place][0] for place in wanted if place in by_place}


def _called(place: Place) -> str:
    case, number = place
    return f"{case.id}_{number} ({case.unit}: {case.prompt})"


def _looked_at(files: Sequence[Path], problems: Problems, folder: Path) -> dict[Path, tuple[int, int]]:
    """Decodes every picture: its size, upright. What is damaged or not 8-bit RGB is a problem."""
    sizes = {}
    for path in files:
        try:
            sizes[path] = pictures.read(path).size
            with Image.open(path, formats=pictures.FORMATS) as stored:
                mode = stored.mode
        except (pictures.PictureError, OSError) as error:
            _add(problems, "unreadable", str(error))
            continue
        if mode != "RGB":
            _add(problems, "not in RGB", f"{_inside(path, folder)} is {mode}")
    return sizes


def _most(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size that most pictures have; of several, the largest."""
    counted = Counter(sizes)
    return max(counted, key=lambda size: (counted[size], size)) if counted else (0, 0)


def _check_sizes(
    found: Mapping[Path, tuple[int, int]], expected: tuple[int, int], given: bool, problems: Problems, folder: Path
) -> None:
    """Another size than expected is a problem, and so is one that is not square where nobody said so."""
    for path, size in found.items():
        if size != expected:
            what = f"not of {expected[0]}×{expected[1]} pixels" + ("" if given else ", as most are")
            _add(problems, what, f"{_inside(path, folder)} is {size[0]}×{size[1]}")
    if found and not given and expected[0] != expected[1]:
        remark = "the scores see the square in their middle; give their size if that is meant, and for UNO's script"
        _add(problems, "not square", f"{expected[0]}×{expected[1]}: {remark} leave out concat_refs")


def _sidecars(files: Mapping[Place, Path], problems: Problems) -> dict[str, str | int | float | bool]:
    """How the images were sampled, by the .json that UNO's script writes beside each; images without one pass.

    What was made for another prompt or reference, or by other settings than most, is a problem.
    """
    said: dict[str, dict] = {}
    for place, path in files.items():
        beside = path.with_suffix(".json")
        if beside.is_file() and (found := _json(beside, problems)) is not None:
            if (other := _another_case(found, place[0])) is not None:
                _add(problems, "made for another list of cases", f"{beside.name} says {other}")
            said[beside.name] = {k: v for k in UNO_SETTINGS if isinstance(v := found.get(k), str | int | float)}
    counted = Counter(json.dumps(settings, sort_keys=True) for settings in said.values())
    common = json.loads(counted.most_common(1)[0][0]) if counted else {}
    for name, settings in said.items():
        if changed := [
            f"{k} = {settings.get(k)!r}" for k in {**common, **settings} if settings.get(k) != common.get(k)
        ]:
            _add(problems, "sampled in another way than most", f"{name} says {', '.join(changed)}")
    return common


def _json(path: Path, problems: Problems) -> dict | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        _add(problems, "unreadable", f"{path.name} ({error})")
        return None
    return value if isinstance(value, dict) else {}


def _another_case(found: Mapping, case: Case) -> str | None:
    """In which way a .json of UNO's is of another case; None where it is of this one, or does not say."""
    prompt, paths = found.get("prompt"), found.get("image_paths")
    if isinstance(prompt, str) and _plain(prompt) != _plain(case.prompt):
        return f"'{prompt}' where the list has '{case.prompt}'"
    if isinstance(paths, list) and all(isinstance(path, str) for path in paths):
        theirs = [tuple(map(_plain, Path(path.replace("\\", "/")).parts[-2:])) for path in paths]
        ours = [tuple(map(_plain, reference.parts[-2:])) for reference in case.references]
        if theirs != ours:
            shown = [" and ".join("/".join(parts) for parts in of) for of in (theirs, ours)]
            return f"{shown[0]} where the list has {shown[1]}"
    return None


def _plain(name: str) -> str:
    """A name as it is typed: composed letters, and without the line end that a CRLF list of prompts leaves on it."""
    return unicodedata.normalize("NFC", name).strip()


def _inside(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _add(problems: Problems, what: str, which: str) -> None:
    problems.setdefault(what, []).append(which)


def _said(problems: Problems) -> Iterator[str]:
    for what, which in problems.items():
        more = f", and {len(which) - SHOWN} more" if len(which) > SHOWN else ""
        yield f"{len(which)} {what} ({', '.join(which[:SHOWN])}{more})"
