"""A photo as a model's reference: scaled and cut as UNO does, or as CLIP's preprocessing does for an IP-Adapter."""

import numpy as np
import torch
from PIL import Image

RESAMPLING = {
    "box": Image.Resampling.BOX,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def long_side(photo: Image.Image, side: int, multiple: int, resampling: str) -> torch.Tensor:
    """Pixels (3, h, w) in [-1, 1] of an RGB photo: its long side scaled to `side`, centre-cropped to multiples.

    As UNO does (512 pixels for one reference, 320 for several, multiples of 16), rounding down as it does.
    """
    scale = side / max(photo.size)
    width, height = (side if edge == max(photo.size) else max(multiple, int(edge * scale)) for edge in photo.size)
    photo = photo.resize((width, height), RESAMPLING[resampling])
    return _cut(photo, width // multiple * multiple, height // multiple * multiple)


def centre_square(photo: Image.Image, side: int, resampling: str) -> torch.Tensor:
    """Pixels (3, side, side) in [-1, 1] of an RGB photo: its short side scaled to `side`, centre-cropped, as CLIP's."""
    short = min(photo.size)
    width, height = (side * edge // short for edge in photo.size)
    return _cut(photo.resize((width, height), RESAMPLING[resampling]), side, side)


def _cut(photo: Image.Image, width: int, height: int) -> torch.Tensor:
    left, top = (photo.width - width) // 2, (photo.height - height) // 2
    pixels = np.asarray(photo.crop((left, top, left + width, top + height)), np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1
