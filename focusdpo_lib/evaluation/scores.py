"""Scores by the protocol: every generated image against the real photos, the prompt and the true attributes.

A table of scores has one row for every image, metric and subject: case, index (of the image within the case), subjects
("cat+mug": the unit of the bootstrap), prompt, metric, subject ("" for the whole image), value, weight. `weight` is 1
but for leakage, where it is the number of attributes that could leak, and for leaning, where it is 0 of a subject that
was not found: of both, the rate is Σ value·weight / Σ weight.
`attrs["protocol"]` says how it was measured, `attrs["same_class_units"]` which pairs share a class word; they travel
with the table through parquet.
"""

from collections.abc import Mapping
from itertools import permutations
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image

from focusdpo_lib.evaluation import protocols, wording
from focusdpo_lib.evaluation.benchmark import Benchmark, BenchmarkError, Case, open_image
from focusdpo_lib.evaluation.detector import crop
from focusdpo_lib.evaluation.encoders import Encoders, to_pixels
from focusdpo_lib.params import Evaluation, Generation, Sampled

COLUMNS = ("case", "index", "subjects", "prompt", "metric", "subject", "value", "weight")
# The rest is for tables.
SCORING_SETTINGS = ("protocol", "references", "region", "clip_precision", "clip_text_weight", "clip_text_clamp")
SCORING_SETTINGS += ("clip_prompt", "unique_token")

Source = Path | tuple[Path, ...]  # an image file, or references to paste beside each other


def score_images(
    benchmark: Benchmark,
    folder: str | Path,
    encoders: Encoders,
    settings: Evaluation,
    generation: Generation | Sampled | None,
) -> pd.DataFrame:
    """Scores <folder>/<case>_<index>.png of every case; `generation` says how they were made (None: an anchor's).

    Raises FileNotFoundError that lists the missing images: none is skipped. BenchmarkError where `settings` tells the
    photos that went in from the others and all of them did.
    """
    check(benchmark, settings, generation)
    return _scored(benchmark, image_files(benchmark, folder, generation), encoders, settings, generation)


def image_files(
    benchmark: Benchmark, folder: str | Path, generation: Generation | Sampled | None
) -> dict[tuple[Case, int], Path]:
    """The images to score, <folder>/<case>_<index>.png. Raises FileNotFoundError that lists those that are missing."""
    folder, count = Path(folder), generation.images_per_prompt if generation else 1
    sources = {(case, k): folder / f"{case.id}_{k}.png" for case in benchmark.cases for k in range(count)}
    missing = [path.name for path in sources.values() if not path.is_file()]
    if missing:
        shown = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of {len(sources)} images ({shown}): generate them first"
        )
    return sources


def check(benchmark: Benchmark, settings: Evaluation, generation: Generation | Sampled | None) -> None:
    """Raises BenchmarkError where `settings` cannot score the cases, which can be said before an image is made."""
    if found := protocols.problems(settings, benchmark.kind, generation):
        raise BenchmarkError(
            f"evaluation.protocol '{settings.protocol}' does not fit ({'; '.join(found)}): change what it names, or "
            f"set evaluation.protocol to another, as '{protocols.CUSTOM}'"
        )
    if generation and generation.references == "all" and settings.references != "all":
        raise BenchmarkError(
            f"evaluation.references cannot be '{settings.references}' where every photo went in "
            "(generation.references all): set it to 'all'"
        )
    if generation and generation.references == "unknown" and settings.references != "all":
        raise BenchmarkError(
            f"evaluation.references cannot be '{settings.references}' where it is unknown which photos went in: say "
            "so under external.rows (sampling.references listed or all), or set it to 'all'"
        )
    for case in benchmark.cases:
        for name, reference in zip(case.subjects, case.references, strict=True):
            scoring_photos(benchmark, name, reference, settings.references)
        text_of(benchmark, case, settings)


def score_copy(benchmark: Benchmark, encoders: Encoders, settings: Evaluation) -> pd.DataFrame:
    """The anchor `copy`: the reference itself as the output; two references side by side on white.

    Attributes are read from the pasted photos, which are plainer and, for one subject, larger than a scene.
    """
    return _scored(benchmark, {(case, 0): case.references for case in benchmark.cases}, encoders, settings, None)


def score_photos(benchmark: Benchmark, encoders: Encoders, settings: Evaluation) -> pd.DataFrame:
    """The anchor `photos` (the published oracle): every subject's real photos against each other, DINO and CLIP-I.

    A row a unit and subject: the mean cosine over all pairs of different photos, as in DreamBooth's "real images".
    """
    rows = []
    for metric, encoder in (("dino", encoders.dino), ("clip_i", encoders.clip)):
        embeddings = _photo_embeddings(benchmark, encoder)
        for unit, names in benchmark.subjects_of.items():
            for name in names:
                value = _mean_of_pairs(embeddings[name], name)
                rows.append((unit, 0, unit, "", metric, name, value, 1.0))
    return _table(rows, benchmark, encoders, settings, None)


def protocol(
    benchmark: Benchmark, encoders: Encoders, settings: Evaluation, generation: Generation | Sampled | None
) -> dict[str, Any]:
    """Everything but the model that a score depends on; `generation` is None for an anchor, which generates nothing."""
    sampling = None if generation is None else generation.model_dump(exclude={"batch_size", "prompts"})
    return {
        "benchmark": f"{benchmark.kind} {benchmark.hash}",
        "encoders": encoders.ids,
        "prompts that CLIP cuts": encoders.clip.cut(list(dict.fromkeys(case.prompt for case in benchmark.cases))),
        "evaluation": {name: getattr(settings, name) for name in SCORING_SETTINGS},
        "generation": sampling,  # how many prompts were taken is in the benchmark's hash
    }


def _scored(
    benchmark: Benchmark,
    sources: Mapping[tuple[Case, int], Source],
    encoders: Encoders,
    settings: Evaluation,
    generation: Generation | Sampled | None,
) -> pd.DataFrame:
    unique = list(dict.fromkeys(sources.values()))  # the copy of one reference serves all of its prompts
    place = {source: i for i, source in enumerate(unique)}
    at = [place[source] for source in sources.values()]
    pictures = [_paste(s) if isinstance(s, tuple) else s for s in unique]
    images = list(sources)
    rows, regions = [], None
    if settings.region == "detected":
        regions = _Regions.found(benchmark, images, [pictures[i] for i in at], encoders)
    for metric, encoder in (("dino", encoders.dino), ("clip_i", encoders.clip)):
        embeddings, photos = encoder.images(pictures)[at], _photo_embeddings(benchmark, encoder)
        if regions is None:
            compared = [
                [embedding] * len(case.subjects) for (case, _), embedding in zip(images, embeddings, strict=True)
            ]
        else:
            compared = regions.vectors(benchmark, images, encoder, photos)
        rows += _image_rows(metric, images, compared, benchmark, photos, settings)
        if regions is not None and metric == "dino":
            rows += _leaning_rows(images, compared, photos)
    rows += _text_rows(images, embeddings, benchmark, encoders, settings)  # the last embeddings are CLIP's
    if encoders.reader and benchmark.has_attributes:
        found = encoders.reader(to_pixels(pictures))
        rows += _attribute_rows(images, [found[i] for i in at], encoders, benchmark)
    return _table(rows, benchmark, encoders, settings, generation)


def _image_rows(metric, images, compared, benchmark, photos, settings) -> list[tuple]:
    """DINO or CLIP-I of every image with each of its subjects: mean cosine over the photos that `references` picks.

    `compared` has of every image a vector a subject, or None of one that was not found, which scores 0.
    """
    rows = []
    for (case, index), vectors in zip(images, compared, strict=True):
        for name, reference, vector in zip(case.subjects, case.references, vectors, strict=True):
            places = {photo: place for place, photo in enumerate(benchmark.subjects[name].photos)}
            chosen = scoring_photos(benchmark, name, reference, settings.references)
            against = photos[name][[places[photo] for photo in chosen]]
            value = 0.0 if vector is None else (against @ vector).mean().item()
            rows.append((case.id, index, case.unit, case.prompt, metric, name, value, 1.0))
    return rows


def _leaning_rows(images, compared, photos) -> list[tuple]:
    """How far each of two subjects leans to the other: a measure of leakage where attributes are unknown.

    What its part of the image has of DINO's cosine with the other's photos less that with its own, on a scale of which
    0 is what its own real photos have and 1 what the other's have. Against the toybox's exact leakage rate, subject by
    subject, its rank correlation is 0.85 where what is wrong is the other's, and 0.66 where half of it is nobody's (a
    low DINO alone: 0.38); see tests/test_evaluation_leaning.py. Weight 0 where a subject was not found, or where the
    photos of both look alike.
    """
    rows = []
    for (case, index), vectors in zip(images, compared, strict=True):
        for k, name in enumerate(case.subjects if len(case.subjects) == 2 else ()):
            own, other = photos[name], photos[case.subjects[1 - k]]
            across = (own @ other.T).mean().item()
            low, high = across - _likeness(own), _likeness(other) - across
            value, weight = 0.0, 0.0
            if vectors[k] is not None and high - low > 1e-4:
                leans = ((other @ vectors[k]).mean() - (own @ vectors[k]).mean()).item()
                value, weight = (leans - low) / (high - low), 1.0
            rows.append((case.id, index, case.unit, case.prompt, "leaning", name, value, weight))
    return rows


def _likeness(photos: torch.Tensor) -> float:
    """The mean cosine of a subject's photos with each other; 1 of a single one."""
    return _mean_of_pairs(photos, "") if len(photos) > 1 else 1.0


class _Regions:
    """The parts of every image in which its subjects were found, a subject's part None where it was not."""

    def __init__(self, crops: list[list[Image.Image | None]]):
        self.crops = crops
        self.assigned = False

    @classmethod
    def found(cls, benchmark: Benchmark, images, pictures, encoders: Encoders) -> "_Regions":
        """Raises BenchmarkError where an image cannot be read."""
        crops = []
        for (case, _), picture in zip(images, pictures, strict=True):
            image = picture if isinstance(picture, Image.Image) else open_image(picture)
            words = [benchmark.subjects[name].class_name for name in case.subjects]
            crops.append([crop(image, box) for box in encoders.finder.boxes(image, words)])
        return cls(crops)

    def vectors(self, benchmark: Benchmark, images, encoder, photos) -> list[list[torch.Tensor | None]]:
        """A vector a crop. The first encoder (DINO) also says, of subjects of one class word, which is which."""
        flat = [crop for crops in self.crops for crop in crops if crop is not None]
        made = iter(encoder.images(flat) if flat else [])
        vectors = [[None if crop is None else next(made) for crop in crops] for crops in self.crops]
        if not self.assigned:
            for i, (case, _) in enumerate(images):
                order = _order(benchmark, case, vectors[i], photos)
                vectors[i], self.crops[i] = ([of[k] for k in order] for of in (vectors[i], self.crops[i]))
            self.assigned = True
        return vectors


def _order(benchmark: Benchmark, case: Case, vectors, photos) -> list[int]:
    """Which crop is whose: as found or, of two subjects of one class word, as their photos together fit best."""
    words = [benchmark.subjects[name].class_name for name in case.subjects]
    if len(set(words)) == len(words):
        return list(range(len(words)))

    def fit(order) -> float:
        chosen = [(vectors[k], photos[name]) for k, name in zip(order, case.subjects, strict=True)]
        return sum((of @ vector).mean().item() for vector, of in chosen if vector is not None)

    return list(max(permutations(range(len(words))), key=fit))


def scoring_photos(benchmark: Benchmark, name: str, reference: Path, references: str) -> list[Path]:
    """The photos of a subject that an image is scored against ("all", "used", "unused"), of which `reference` went in.

    Raises BenchmarkError where there are none.
    """
    photos = benchmark.subjects[name].photos
    chosen = [p for p in photos if references == "all" or (p.name == reference.name) == (references == "used")]
    if not chosen:
        raise BenchmarkError(f"subject {name} has one photo only: evaluation.references cannot be 'unused'")
    return chosen


def text_of(benchmark: Benchmark, case: Case, settings: Evaluation) -> str:
    """What an image of a case is compared with. Raises BenchmarkError where `settings` leave nothing of its prompt."""
    classes = [benchmark.subjects[name].class_name for name in case.subjects]
    if settings.clip_prompt == "class":
        return case.prompt
    if settings.clip_prompt == "token":
        return wording.with_token(case.prompt, classes, settings.unique_token)
    if not (scene := wording.without_subjects(case.prompt, classes)):
        raise BenchmarkError(
            f"case {case.id} ('{case.prompt}') says nothing but its subject: set evaluation.clip_prompt to 'class'"
        )
    return scene


def _text_rows(images, embeddings, benchmark: Benchmark, encoders: Encoders, settings: Evaluation) -> list[tuple]:
    asked = {case: text_of(benchmark, case, settings) for case, _ in images}
    prompts = list(dict.fromkeys(asked.values()))
    texts = dict(zip(prompts, encoders.clip.texts(prompts), strict=True))
    rows = []
    for (case, index), embedding in zip(images, embeddings, strict=True):
        cosine = (texts[asked[case]] @ embedding).item()
        value = settings.clip_text_weight * (max(cosine, 0.0) if settings.clip_text_clamp else cosine)
        rows.append((case.id, index, case.unit, case.prompt, "clip_t", "", value, 1.0))
    return rows


def _attribute_rows(images, found, encoders: Encoders, benchmark: Benchmark) -> list[tuple]:
    """Whatever the reader can say of an image whose subjects' attributes are known."""
    rows = []
    for (case, index), seen in zip(images, found, strict=True):
        expected = {name: benchmark.subjects[name].attributes for name in case.subjects}
        rows += [(case.id, index, case.unit, case.prompt, *score) for score in encoders.reader.scores(seen, expected)]
    return rows


def _photo_embeddings(benchmark: Benchmark, encoder) -> dict[str, torch.Tensor]:
    """{subject: unit vectors (photos, d)}, every photo in one batched pass."""
    names = [(subject.name, photo) for subject in benchmark.subjects.values() for photo in subject.photos]
    embeddings = encoder.images([photo for _, photo in names])
    return {
        name: torch.stack([e for (n, _), e in zip(names, embeddings, strict=True) if n == name])
        for name in benchmark.subjects
    }


def _mean_of_pairs(embeddings: torch.Tensor, name: str) -> float:
    n = len(embeddings)
    if n < 2:
        raise BenchmarkError(f"subject {name} has one photo only: real photos cannot be compared with each other")
    cosines = embeddings @ embeddings.T
    return ((cosines.sum() - cosines.trace()) / (n * (n - 1))).item()


def _paste(references: tuple[Path, ...]) -> Image.Image:
    """One reference as it is; several side by side, vertically centred, on a white square of the first one's width."""
    images = [open_image(path) for path in references]
    if len(images) == 1:
        return images[0]
    size = images[0].width
    canvas, cell = Image.new("RGB", (size, size), "white"), size // len(images)
    for i, image in enumerate(images):
        small = image.resize((cell, max(1, round(cell * image.height / image.width))), Image.Resampling.BOX)
        canvas.paste(small, (i * cell, (size - small.height) // 2))
    return canvas


def _table(rows, benchmark, encoders, settings, generation) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table.attrs["protocol"] = protocol(benchmark, encoders, settings, generation)
    table.attrs["same_class_units"] = benchmark.same_class_units
    return table
