"""The segmenter: the mask of a subject in a picture of the toybox world, by its class word.

It is to the world's exact masks what Grounding DINO with SAM 2 is to an annotator's: a trained model with errors of
its own. A small U-Net gives one map a class, all classes at once; the mask of a word is the map of its class.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from focusdpo_lib.toybox import world
from focusdpo_lib.toybox.batches import autocast, generator, to_pixels
from focusdpo_lib.toybox.fitting import fit

KINDS = ("one", "two", "reference")  # a winner with one subject, with two, and a halved photo
CHANNELS = (32, 48, 48)  # of the levels, from half the picture's size down to an eighth
SIDES = 8  # pixels that a picture's sides must be a multiple of
BLOCK = 2  # pixels a side that the U-Net takes as one: four times as fast
CONNECTED = {"in_channels": 3 * BLOCK**2, "out_channels": len(world.CLASSES) * BLOCK**2}


@dataclass(frozen=True)
class Shown:
    """Pictures of one kind: images (N, H, W, 3) uint8, masks (N, S, H, W) bool, classes (N, S) of CLASSES."""

    images: np.ndarray
    masks: np.ndarray
    classes: np.ndarray


def sample_shown(kind: str, count: int, seed: int, split: str = "train") -> Shown:
    """`count` pictures of a kind, of identities of a split: as the toybox's chain has winners and references."""
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    images, masks, classes = [], [], []
    for _ in range(count):
        subjects = world.sample_subjects(rng, 1 + (kind == "two"), split)
        if kind == "reference":
            photo, mask = world.photo_and_mask(subjects[0], int(rng.integers(2**31)))
            image, found = world.halve(photo), world.halve_mask(mask)[None]
        else:
            image, found = world.render(world.sample_scene(rng, subjects))
        images.append(image)
        masks.append(found)
        classes.append([world.CLASSES.index(subject.class_name) for subject in subjects])
    return Shown(np.stack(images), np.stack(masks), np.array(classes))


def build_segmenter(channels: Sequence[int] = CHANNELS) -> nn.Module:
    """The U-Net of `class_logits`, diffusers' UNet2DModel."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        **CONNECTED,
        block_out_channels=tuple(channels),
        down_block_types=("DownBlock2D",) * len(channels),
        up_block_types=("UpBlock2D",) * len(channels),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=16,
    )


def class_logits(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] → logits (B, 12, H, W), a map for each of CLASSES; H and W multiples of SIDES."""
    return F.pixel_shuffle(model(F.pixel_unshuffle(pixels, BLOCK), 0).sample, BLOCK)


@torch.no_grad()
def segment(model: nn.Module, images: np.ndarray, batch: int = 64) -> np.ndarray:
    """Images (N, H, W, 3) uint8 → (N, 12, H, W) bool: where the model sees each of CLASSES."""
    pixels = to_pixels(np.asarray(images)).to(model.device)
    return torch.cat([(class_logits(model, part) > 0).cpu() for part in pixels.split(batch)]).numpy()


def segmenter_loss(logits: torch.Tensor, masks: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every class's map (B, 12, H, W), summed over the classes; masks (B, S, H, W) of `classes`."""
    places = classes[..., None, None].expand(masks.shape)
    target = torch.zeros_like(logits).scatter(1, places, masks.to(logits.dtype))
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(1).mean()


def train_segmenter(
    folder: Path, steps: int = 1500, batch: int = 16, seed: int = 0, device: str = "cpu", *, pool: int = 6000,
    channels: Sequence[int] = CHANNELS, **options,
) -> tuple[nn.Module, list[dict]]:  # fmt: skip
    """Trains on `pool` pictures of each kind, `batch` of each a step. Resumable; `options` go to `fit`."""
    torch.manual_seed(seed)
    model = build_segmenter(channels).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    shown = [sample_shown(kind, pool, seed) for kind in KINDS]

    def loss_at(step):
        draw, losses = generator(seed, step), []
        for of in shown:
            at = torch.randint(pool, (batch,), generator=draw).numpy()
            with autocast(device):
                logits = class_logits(model, to_pixels(of.images[at]).to(device))
            masks, classes = (torch.from_numpy(value[at]).to(device) for value in (of.masks, of.classes))
            losses.append(segmenter_loss(logits.float(), masks, classes))
        return sum(losses), dict(zip(KINDS, (loss.item() for loss in losses), strict=True))

    curve = fit("segmenter", nn.ModuleDict({"model": model}), [optimizer], loss_at, steps, folder, **options)
    return model.eval(), curve


def save_segmenter(model: nn.Module, folder: Path) -> None:
    """A plain diffusers folder: `UNet2DModel.from_pretrained(folder)`; half the size, loaders give float32 again."""
    copy.deepcopy(model).half().save_pretrained(folder)


def iou(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Intersection over union of masks (…, H, W) bool, (…); 1 where both are empty."""
    union = (found | true).sum((-2, -1))
    return np.where(union, (found & true).sum((-2, -1)) / np.maximum(union, 1), 1.0)


def measure_segmenter(model: nn.Module, count: int = 600, seed: int = 1, split: str = "test") -> dict[str, float]:
    """IoU with the exact masks on held-out identities, by kind of picture.

    "*_iou" is the mean over subjects, "*_below_half" the share of subjects with less than 0.5. What needs no look at
    the picture: "*_chance" is the IoU of its class's mean mask in training pictures, where that is half of its highest;
    "two_union" that of both subjects together.
    """
    numbers = {}
    for kind in KINDS:
        known = sample_shown(kind, max(count, 300), seed)  # enough to show every class
        held = sample_shown(kind, count, seed, split)
        rows = np.arange(count)[:, None]
        scores = iou(segment(model, held.images)[rows, held.classes], held.masks)
        mean = np.stack([known.masks[known.classes == k].mean(0) for k in range(len(world.CLASSES))])
        blind = mean >= mean.max((-2, -1), keepdims=True) / 2
        numbers[f"{kind}_iou"] = scores.mean()
        numbers[f"{kind}_below_half"] = (scores < 0.5).mean()
        numbers[f"{kind}_chance"] = iou(blind[held.classes], held.masks).mean()
        if kind == "two":
            numbers["two_union"] = iou(held.masks.any(1, keepdims=True), held.masks).mean()
    return {name: round(float(value), 4) for name, value in numbers.items()}
