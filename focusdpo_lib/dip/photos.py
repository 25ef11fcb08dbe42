"""A benchmark's photos as a model is shown them: as they are, cut to their subjects' boxes, or without background.

Scores are against the photos as they are, whatever a model was shown.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from focusdpo_lib import params, pictures
from focusdpo_lib.backbones import best_device
from focusdpo_lib.dip.chain import Unfit
from focusdpo_lib.dip.detectors import load_detector
from focusdpo_lib.dip.mask_rules import clean, from_background, require_area
from focusdpo_lib.evaluation.benchmark import SHOWN, Benchmark, BenchmarkError, open_image
from focusdpo_lib.evaluation.captions import BOXED
from focusdpo_lib.evaluation.detector import Detector
from focusdpo_lib.runs import atomic

Cut = Callable[[Image.Image, str, Path], np.ndarray]  # photo, class word, <subject>/<file> → mask (H, W) of what stays


def said(settings: params.Photos) -> str:
    """How photos were prepared, for a caption."""
    by = settings.segmentation
    if settings.cut == "box":
        return f"{BOXED} (by {by.detector})"
    source = {"files": "files", "background": "colour"}
    return f"cut out, on white (by {source.get(by.masks, by.masks)})"


def write(folder: Path, benchmark: Benchmark, settings: params.Photos) -> None:
    """Writes <folder>/<subject>/<name>.png of every photo that goes in.

    Raises BenchmarkError that lists all photos in which a subject is not found.
    """
    cut, lost = _cut(settings), []
    for name, photo in _going_in(benchmark):
        image = open_image(photo)
        try:
            mask = cut(image, benchmark.subjects[name].class_name, Path(name) / photo.name)
        except (Unfit, pictures.PictureError) as why:
            lost.append(f"{name}/{photo.name} ({why})")
            continue
        with atomic(place(folder, name, photo)) as partial:
            on_white(np.asarray(image), mask).save(partial)
    if lost:
        more = f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
        raise BenchmarkError(
            f"photos.cut = '{settings.cut}' is not possible for {', '.join(lost[:SHOWN])}{more}: change "
            "photos.segmentation, or give masks as files"
        )


def shown(benchmark: Benchmark, folder: Path) -> Benchmark:
    """The benchmark whose references are the photos that `write` wrote."""
    cases = []
    for case in benchmark.cases:
        names = case.subjects if len(case.subjects) == len(case.references) else case.subjects * len(case.references)
        photos = (place(folder, name, photo) for name, photo in zip(names, case.references, strict=True))
        cases.append(replace(case, references=tuple(photos)))
    return replace(benchmark, cases=tuple(cases))


def place(folder: Path, name: str, photo: Path) -> Path:
    return Path(folder) / name / f"{photo.stem}.png"


def on_white(image: np.ndarray, mask: np.ndarray) -> Image.Image:
    """What a mask (H, W) keeps of an image (H, W, 3), in the middle of a white square as large as its longer side."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    part = np.where(mask[..., None], image, 255)[box].astype(np.uint8)
    side = max(part.shape[:2])
    square = np.full((side, side, 3), 255, np.uint8)
    top, left = ((side - edge) // 2 for edge in part.shape[:2])
    square[top : top + part.shape[0], left : left + part.shape[1]] = part
    return Image.fromarray(square)


def _going_in(benchmark: Benchmark) -> list[tuple[str, Path]]:
    """Every photo that is some case's reference once, with its subject; of one subject all may be."""
    found = {}
    for case in benchmark.cases:
        names = case.subjects if len(case.subjects) == len(case.references) else case.subjects * len(case.references)
        found |= dict.fromkeys(zip(names, case.references, strict=True))
    return list(found)


def _cut(settings: params.Photos) -> Cut:
    by = settings.segmentation
    if settings.cut == "box":
        detector = Detector(by.detector, by.detector_revision, best_device(), by.threshold)
        return lambda image, word, name: _in_box(detector, image, word)
    if by.masks == "files":
        return lambda image, word, name: _fitting(image, _from_file(settings.masks, name))
    if by.masks == "background":
        return lambda image, word, name: _refined(by, from_background(np.asarray(image), by.tolerance, by.plain))
    models = load_detector(by, by.masks)

    def segmented(image: Image.Image, word: str, name: Path) -> np.ndarray:
        (found,) = models.segment([np.array(image)], [[word]], lambda boxes, scores: _best(by, scores))
        if isinstance(found, Unfit):
            raise found
        return _refined(by, found[0])

    return segmented


def _best(by: params.Segmentation, scores: np.ndarray) -> list[int]:
    """The box with the highest score: a benchmark's photo shows one subject."""
    if not len(scores) or scores.max() < by.threshold:
        raise Unfit("its subject was not found")
    return [int(scores[:, 0].argmax())]


def _in_box(detector: Detector, image: Image.Image, word: str) -> np.ndarray:
    (box,) = detector.boxes(image, [word])
    if box is None:
        raise Unfit("its subject was not found")
    left, top = (max(int(edge), 0) for edge in box[:2])
    mask = np.zeros((image.height, image.width), bool)
    mask[top : max(round(box[3]), top + 1), left : max(round(box[2]), left + 1)] = True
    return _fitting(image, mask)


def _from_file(folder: str, name: Path) -> np.ndarray:
    return pictures.read_mask((Path(folder) / name).with_suffix(".png"))


def _fitting(image: Image.Image, mask: np.ndarray) -> np.ndarray:
    if mask.shape != (image.height, image.width):
        raise Unfit("its mask is not as large as it")
    if not mask.any():
        raise Unfit("its mask is empty")
    return mask


def _refined(by: params.Segmentation, mask: np.ndarray) -> np.ndarray:
    mask = clean(mask, by.holes, by.specks)
    require_area(mask, by.least, by.most)
    return mask
