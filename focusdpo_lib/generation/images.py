"""A benchmark's cases to images: one file an image, named by case and index, resumed where it stopped."""

import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from focusdpo_lib import params
from focusdpo_lib.backbones import Backbone
from focusdpo_lib.evaluation.benchmark import Benchmark, Case, open_image
from focusdpo_lib.runs import atomic, require_space

IMAGES = "images"
BYTES = 2  # a pixel of a PNG, about: three are what a picture of noise takes


def image_name(case: Case, index: int) -> str:
    return f"{case.id}_{index}.png"


def image_seed(base: int, case: Case, index: int) -> int:
    """The seed of one image: it depends on subjects, prompt and index alone, not on the order or number of cases."""
    return (base + index + zlib.crc32(f"{case.unit}|{case.prompt}".encode())) % 2**63


def save_images(pixels: torch.Tensor, paths: Sequence[Path]) -> None:
    """Writes pixels (B, 3, H, W) in [-1, 1] as PNG files, each whole or not at all."""
    arrays = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for array, path in zip(arrays, paths, strict=True):
        with atomic(path) as partial:
            Image.fromarray(array).save(partial)


def generate(
    backbone: Backbone,
    benchmark: Benchmark,
    folder: Path,
    settings: params.Generation,
    *,
    shard: tuple[int, int] = (0, 1),
) -> Path:
    """Samples every case that has no image yet into `folder/images`; returns that folder.

    `shard` (i, n) takes every n-th case from the i-th on, one shard a process. An image is the same whichever batch or
    shard makes it: its noise comes from a CPU generator of its own seed.
    """
    out = Path(folder) / IMAGES
    todo = [
        (case, index)
        for case in benchmark.cases[shard[0] :: shard[1]]
        for index in range(settings.images_per_prompt)
        if not (out / image_name(case, index)).exists()
    ]
    require_space(out, len(todo) * settings.size**2 * BYTES, f"{len(todo)} images of {settings.size} pixels")
    bar = tqdm(total=len(todo), desc="images", unit="image", mininterval=5, file=sys.stdout, ncols=90, disable=not todo)
    for batch, references in _batches(todo, settings, backbone):
        conditioning = backbone.condition([case.prompt for case, _ in batch], references)
        seeds = [image_seed(settings.seed, case, index) for case, index in batch]
        size = (settings.size, settings.size)
        pixels = backbone.sample(conditioning, seeds, size, settings.steps, settings.guidance)
        save_images(pixels, [out / image_name(case, index) for case, index in batch])
        bar.update(len(batch))
    bar.close()
    return out


def _batches(
    todo: list[tuple[Case, int]], settings: params.Generation, backbone: Backbone
) -> Iterator[tuple[list, list]]:
    """Batches whose cases have references of the same number and sizes, with those references stacked by subject."""
    photos: dict[Path, torch.Tensor] = {}
    groups: dict[tuple, list[tuple[Case, int]]] = {}
    for case, index in todo:
        for path in case.references:
            if path not in photos:
                side = settings.reference_size if len(case.references) == 1 else settings.references_size
                photos[path] = backbone.reference(open_image(path), side, settings.resampling)
        sizes = tuple(photos[path].shape for path in case.references)
        groups.setdefault(sizes, []).append((case, index))
    for items in groups.values():
        for start in range(0, len(items), settings.batch_size):
            batch = items[start : start + settings.batch_size]
            subjects = zip(*(case.references for case, _ in batch), strict=True)
            yield batch, [torch.stack([photos[path] for path in same]) for same in subjects]
