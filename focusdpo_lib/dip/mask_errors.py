"""Errors of segmentation, by stated amounts: the toybox's pairs as they were, had a segmenter got their masks wrong.

An error befalls every subject's mask in the winner and, at its own scale, that of its reference:

- *eroded*, *dilated*: by `amount` pixels of the picture; *shifted*: by so many, up, down, left or right;
- *wrong*: a share `amount` of the winner's masks is another's: of two subjects the other's, of one subject the mask as
  it is, pushed into the corner where it overlaps its subject least. References show one subject each on plain ground,
  where nothing else can be mistaken for it: theirs stay.

The loser follows from the mask, as in the chain of Figure 4: outside every mask it is the winner. Inside, where the
mask lies on a subject, it shows what the exact loser shows there; where the mask has missed it, an inpainting model
would draw the surroundings anew: another drawing of the same setting (`redrawn`; harsher than a model that goes on with
the lines it sees), or the very same pixels (`kept`; gentler than any). A subject that no mask covers stays as it was.
What is random depends on the pair's id alone: a mask that is wrong in a quarter of the pairs is so in a half of them.
Validation pairs keep their exact masks, so that what is measured on them is against the truth.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from focusdpo_lib.dip import toybox
from focusdpo_lib.dip.dataset import write_dataset
from focusdpo_lib.dip.models import seed_of
from focusdpo_lib.dip.pair import Pair
from focusdpo_lib.masks import prior_tokens
from focusdpo_lib.params import Dip, MaskError
from focusdpo_lib.runs import write_json
from focusdpo_lib.toybox.world import halve_mask, photo_and_mask, render, with_identities

FACTS = "mask_error.json"
TOKEN = 8  # pixels of a token's side, in winners and references: training refuses a mask that covers half of none
NO_TOKEN, SAME = "a mask covers half of no token", "the loser shows what the winner shows"
WAYS = ((0, 1), (1, 0), (0, -1), (-1, 0))  # of a shift


def build(settings: Dip, error: MaskError, folder: str | Path) -> None:
    """Writes train pairs with the error, and validation pairs without, to `folder`; what it did to them to FACTS there.

    Pairs that nobody could train on (NO_TOKEN) or that say nothing (SAME: curation leaves them out) are left out.
    """
    counts: Counter[str] = Counter()
    overlaps: list[tuple[float, float]] = []

    def usable() -> Iterator[Pair]:
        for index in range(settings.train_pairs):
            pair, exact = make_pair(settings, error, "train", index), toybox.make_pair(settings, "train", index)
            if (reason := unusable(pair)) is not None:
                counts[reason] += 1
                continue
            both = overlap(pair.masks, exact.masks), overlap(pair.reference_masks, exact.reference_masks)
            overlaps.extend(zip(*both, strict=True))
            counts["pairs"] += 1
            yield pair

    held_out = (toybox.make_pair(settings, "validation", index) for index in range(settings.validation_pairs))
    write_dataset(folder, {"train": usable(), "validation": held_out})
    iou, reference_iou = np.mean(overlaps, 0)
    facts = {"iou": iou, "reference_iou": reference_iou, "pairs": counts["pairs"]}
    facts |= {"no_token": counts[NO_TOKEN], "same": counts[SAME]}
    write_json(Path(folder) / FACTS, {name: float(value) for name, value in facts.items()})


def make_pair(settings: Dip, error: MaskError, split: str, index: int) -> Pair:
    """The pair number `index` of a split as it were with the error; fit to train on or not (see `unusable`)."""
    exact, drawn = toybox.make_pair(settings, split, index), toybox.draw(settings, split, index)
    photos = [photo_and_mask(*of)[1] for of in zip(drawn.scene.identities, drawn.seeds, strict=True)]
    masks = mistaken(exact.masks, error, f"{exact.id} winner")
    of_photos = photos if error.kind == "wrong" else mistaken(photos, error, f"{exact.id} references")
    around = exact.win
    if error.background == "redrawn":
        scene = replace(drawn.scene, seed=seed_of(exact.id, "surroundings"))
        around, _ = render(with_identities(scene, drawn.disturbed))
    on_subject, painted = np.any(exact.masks, 0)[..., None], np.any(masks, 0)[..., None]
    return replace(
        exact,
        masks=masks,
        reference_masks=tuple(map(halve_mask, of_photos)),
        lose=np.where(painted, np.where(on_subject, exact.lose, around), exact.win),
        provenance=exact.provenance | {"mask_error": error.model_dump()},
    )


def mistaken(masks: Sequence[np.ndarray], error: MaskError, key: str) -> tuple[np.ndarray, ...]:
    """The subjects' masks (H, W) of one picture with the error; `key` decides what is random."""
    rng = np.random.default_rng(seed_of(key))
    draws = [(WAYS[rng.integers(len(WAYS))], rng.uniform()) for _ in masks]
    found = []
    for i, (mask, ((down, right), chance)) in enumerate(zip(masks, draws, strict=True)):
        if error.kind in ("eroded", "dilated"):
            mask = grown(mask, error.amount if error.kind == "dilated" else -error.amount)
        elif error.kind == "shifted":
            mask = moved(mask, round(down * error.amount), round(right * error.amount))
        elif error.kind == "wrong" and chance < error.amount:
            mask = masks[(i + 1) % len(masks)] if len(masks) > 1 else cornered(mask)
        found.append(mask)
    return tuple(found)


def grown(mask: np.ndarray, by: float) -> np.ndarray:
    """The mask (H, W) with every pixel within `by` pixels of it, or without those within `-by` of what it leaves out.

    The edge of the picture is none of the mask.
    """
    from scipy.ndimage import distance_transform_edt

    if by >= 0:
        return mask | (distance_transform_edt(~mask) <= by) if mask.any() else mask
    return mask if mask.all() else distance_transform_edt(mask) > -by


def moved(mask: np.ndarray, down: int, right: int) -> np.ndarray:
    """The mask (H, W) so many pixels further down and right; what leaves the picture is lost."""
    rows, columns = np.nonzero(mask)
    rows, columns, (h, w) = rows + down, columns + right, mask.shape
    inside = (rows >= 0) & (rows < h) & (columns >= 0) & (columns < w)
    found = np.zeros_like(mask)
    found[rows[inside], columns[inside]] = True
    return found


def cornered(mask: np.ndarray) -> np.ndarray:
    """The mask (H, W), whole, in the corner of the picture where it overlaps itself least."""
    (rows, columns), (h, w) = np.nonzero(mask), mask.shape
    ends = [(-rows.min(), h - 1 - rows.max()), (-columns.min(), w - 1 - columns.max())]
    places = [moved(mask, int(down), int(right)) for down in ends[0] for right in ends[1]]
    return min(places, key=lambda place: np.count_nonzero(place & mask))


def overlap(masks: Sequence[np.ndarray], exact: Sequence[np.ndarray]) -> list[float]:
    """IoU of each mask with the exact one."""
    return [np.count_nonzero(a & b) / np.count_nonzero(a | b) for a, b in zip(masks, exact, strict=True)]


def tokens(masks: Sequence[np.ndarray]) -> torch.Tensor:
    """The masks (H, W) on the token grid, (S, P_t)."""
    stack = torch.from_numpy(np.stack(masks))[None]
    return prior_tokens(stack, [side // TOKEN for side in stack.shape[-2:]])[0]


def unusable(pair: Pair) -> str | None:
    """Why a pair with wrong masks cannot be trained on, or says nothing; None where it can."""
    if not all(tokens(masks).any(1).all() for masks in (pair.masks, pair.reference_masks)):
        return NO_TOKEN
    return SAME if np.array_equal(pair.win, pair.lose) else None
