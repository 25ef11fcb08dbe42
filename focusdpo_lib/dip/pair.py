"""One preference pair (c, x_r, x_0^w, x_0^l) with the prior of each subject, and what makes it fit to train on."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

REFERENCE_MASKS = "reference_masks"  # a column that a dataset may lack: only masks.pool subject needs it
EXTRA = ("identities", "scores")  # columns that the chain of Figure 4 adds, and that nothing needs
_PER_SUBJECT = ("references", "masks", "captions", "disrupted_captions")


class DatasetError(ValueError):
    """A DIP file or row that cannot be used; the message says which, what is wrong and what to do."""


@dataclass(frozen=True, eq=False)
class Pair:
    """One row, decoded. Images are uint8 (H, W, 3), references of any size; masks are bool (H, W).

    `reference_masks` are as large as the references, or none at all.
    """

    id: str
    prompt: str
    win: np.ndarray
    lose: np.ndarray
    references: tuple[np.ndarray, ...]
    masks: tuple[np.ndarray, ...]
    subjects: tuple[str, ...]
    captions: tuple[str, ...]
    disrupted_captions: tuple[str, ...]
    split: str
    reference_masks: tuple[np.ndarray, ...] = ()
    disruption: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    identities: tuple[str, ...] = ()  # who the subjects are, one each, or none where nobody says
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def prior(self) -> np.ndarray:
        """M_prior of each subject, (S, H, W) bool."""
        return np.stack(self.masks)


def defect(pair: Pair, tolerance: int = 0) -> str | None:
    """The first thing that is wrong with a pair, in words, or None.

    `tolerance`: grey levels (of 255) by which win and lose may differ outside the masks; 0 where the loser is drawn, a
    few where an inpainting model's autoencoder has touched the whole image.
    """
    if not (pair.prompt or "").strip():
        return "its prompt is empty"
    if not pair.subjects:
        return "it names no subject"
    if not all(name and name.strip() for name in pair.subjects):
        return f"one of its subjects has no name ({', '.join(map(repr, pair.subjects))})"
    for name in _PER_SUBJECT:
        count = len(getattr(pair, name))
        if count != len(pair.subjects):
            return f"it has {len(pair.subjects)} subject(s) ({', '.join(pair.subjects)}) but {count} {name}"
    sizes = {"win": pair.win, "lose": pair.lose} | {f"mask {i}": mask for i, mask in enumerate(pair.masks)}
    sizes = {name: array.shape[:2] for name, array in sizes.items()}
    if len(set(sizes.values())) > 1:
        return "sizes differ: " + ", ".join(f"{name} is {w}×{h}" for name, (h, w) in sizes.items())
    for subject, mask in zip(pair.subjects, pair.masks, strict=True):
        if not mask.any():
            return f"the mask of its subject {subject!r} is empty"
    difference = np.abs(pair.win.astype(np.int16) - pair.lose).max(-1)
    inside = pair.prior.any(0)
    if (difference[~inside] > tolerance).any():
        n = int((difference[~inside] > tolerance).sum())
        most = int(difference[~inside].max())
        places = f"win and lose differ outside the masks, at {n} pixel(s) by up to {most} levels ({tolerance} allowed"
        return f"{places}; JPEG and autoencoders touch the whole image: store PNG, or allow it in dip.tolerance)"
    if not (difference > tolerance).any():
        return "win and lose show the same image"
    return None


def reference_defect(pair: Pair, masked: bool) -> str | None:
    """What is wrong with its reference masks, where the pairs of its file are `masked`."""
    if not masked and not pair.reference_masks:
        return None
    if len(pair.reference_masks) != len(pair.references):
        return f"it has {len(pair.references)} references but {len(pair.reference_masks)} {REFERENCE_MASKS}"
    for subject, mask, image in zip(pair.subjects, pair.reference_masks, pair.references, strict=True):
        if mask.shape != image.shape[:2]:
            (h, w), (high, wide) = mask.shape, image.shape[:2]
            return f"the reference mask of its subject {subject!r} is {w}×{h}, but the reference is {wide}×{high}"
        if not mask.any():
            return f"the reference mask of its subject {subject!r} is empty"
    return None
