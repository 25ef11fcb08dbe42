"""A benchmark's cases to images: one file an image, named by case and index, resumed where it stopped."""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image

from focusdpo_lib import params
from focusdpo_lib.backbones import Backbone
from focusdpo_lib.evaluation.benchmark import Benchmark, Case, open_image
from focusdpo_lib.runs import RunError, atomic, require_space
from focusdpo_lib.workers import SILENT, WHOLE, Progress, Shard

IMAGES = "images"
BYTES = 2  # a pixel of a PNG, about: three are what a picture of noise takes


def image_name(case: Case, index: int) -> str:
    return f"{case.id}_{index}.png"


def image_seed(base: int, case: Case, index: int) -> int:
    """The seed of one image: it depends on subjects, prompt and index alone, not on the order or number of cases."""
    return (base + index + zlib.crc32(f"{case.unit}|{case.prompt}".encode())) % 2**63


def save_images(pixels: torch.Tensor, paths: Sequence[Path]) -> None:
    """Writes pixels (B, 3, H, W) in [-1, 1] as PNG files, each whole or not at all.

    Raises RunError, and writes none, if one holds NaN or infinity: it would be a black picture like any other.
    """
    numbers = pixels.isfinite().flatten(1).all(1).tolist()
    if lost := [path.name for path, finite in zip(paths, numbers, strict=True) if not finite]:
        raise RunError(
            f"the image {lost[0]} came out as NaN or infinity: a weight of the model, a LoRA or the adapter is none or "
            "overflows; fetch or train it again, or set backbone.precision to float32"
        )
    arrays = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for array, path in zip(arrays, paths, strict=True):
        with atomic(path) as partial:
            Image.fromarray(array).save(partial)


def missing(benchmark: Benchmark, folder: Path, settings: params.Generation) -> list[tuple[Case, int]]:
    """The images, by case and index, that `folder/images` lacks."""
    images = ((case, index) for case in benchmark.cases for index in range(settings.images_per_prompt))
    return [image for image in images if not _path(folder, image).exists()]


def generate(
    backbone: Backbone,
    benchmark: Benchmark,
    folder: Path,
    settings: params.Generation,
    *,
    shard: Shard = WHOLE,
    progress: Progress = SILENT,
) -> Path:
    """Samples every case that has no image yet into `folder/images`; returns that folder.

    The batches are those of all cases, whatever is there already or falls to another shard: so an image is the same to
    the bit however often it was interrupted and however many processes share the work. Its noise comes from a CPU
    generator of its own seed.
    """
    todo = set(missing(benchmark, folder, settings))
    if not todo:
        return Path(folder) / IMAGES
    require_space(folder, len(todo) * settings.size**2 * BYTES, f"{len(todo)} images of {settings.size} pixels")
    photos = _photos(benchmark, settings, backbone)
    mine = _batches(benchmark, settings, photos)[shard[0] :: shard[1]]
    batches = [batch for batch in mine if not todo.isdisjoint(batch)]
    progress.expects(sum(len(batch) for batch in batches))
    for batch in batches:
        progress.begins(f"case {batch[0][0].id}")
        subjects = zip(*(case.references for case, _ in batch), strict=True)
        references = [torch.stack([photos[path] for path in same]) for same in subjects]
        conditioning = backbone.condition([case.prompt for case, _ in batch], references)
        seeds = [image_seed(settings.seed, case, index) for case, index in batch]
        size = (settings.size, settings.size)
        pixels = backbone.sample(conditioning, seeds, size, settings.steps, settings.guidance)
        save_images(pixels, [_path(folder, image) for image in batch])
        progress.done(len(batch))
    return Path(folder) / IMAGES


def _path(folder: Path, image: tuple[Case, int]) -> Path:
    return Path(folder) / IMAGES / image_name(*image)


def _batches(
    benchmark: Benchmark, settings: params.Generation, photos: Mapping[Path, torch.Tensor]
) -> list[list[tuple[Case, int]]]:
    """Batches of all images whose cases have references of the same number and sizes."""
    groups: dict[tuple, list[tuple[Case, int]]] = {}
    for case in benchmark.cases:
        same = groups.setdefault(tuple(photos[path].shape for path in case.references), [])
        same += [(case, index) for index in range(settings.images_per_prompt)]
    size = settings.batch_size
    return [images[at : at + size] for images in groups.values() for at in range(0, len(images), size)]


def _photos(benchmark: Benchmark, settings: params.Generation, backbone: Backbone) -> dict[Path, torch.Tensor]:
    """Every photo that goes in, as the backbone takes it."""
    found: dict[Path, torch.Tensor] = {}
    for case in benchmark.cases:
        side = settings.reference_size if len(case.references) == 1 else settings.references_size
        for path in case.references:
            if path not in found:
                found[path] = backbone.reference(open_image(path), side, settings.resampling)
    return found
