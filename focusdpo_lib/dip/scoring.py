"""Automatic scores of a draft, by encoders of images and text; what is kept of them is for `curation` to say.

Subjects are compared as cut-outs: what a mask shows, on white, in a square about it, as references lie on white.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from focusdpo_lib import params
from focusdpo_lib.backbones import best_device
from focusdpo_lib.dip.chain import Draft, Maker
from focusdpo_lib.evaluation.encoders import ClipEncoder, DinoEncoder
from focusdpo_lib.params import shipped

NAME = "scoring"
HASH = 8  # bytes of a perceptual hash
# What each score is, in the order of `scores`; cosines are of the encoders of `params.Scoring`.
SCORES = {
    "similarity": "least likeness of a reference and its subject in the winner (DINO)",
    "drop": "largest loss of that likeness from winner to loser",
    "least_drop": "smallest loss of it, over the subjects",
    "context": "likeness of winner and loser with their subjects taken out (DINO)",
    "outside": "largest difference outside the masks, in grey levels",
    "smallest": "share of the image that the smallest subject covers",
    "covered": "share of the image that all subjects cover",
    "caption": "least agreement of a subject in the winner and its caption (CLIP-T)",
}


@dataclass(frozen=True)
class Scoring:
    """The stage that adds SCORES and a signature by which near-duplicates are found."""

    settings: params.Scoring
    name: str = NAME

    def open(self) -> Maker:
        use, device = self.settings, best_device()
        dino = DinoEncoder(shipped("dino", use.dino), device, use.batch_size, use.dino_revision)
        clip = ClipEncoder(shipped("clip", use.clip), device, use.batch_size, revision=use.clip_revision)
        return lambda drafts: scored(drafts, dino, clip)


def scored(drafts: Sequence[Draft], dino: DinoEncoder, clip: ClipEncoder) -> list[Draft]:
    """The drafts with their scores; each encoder takes the pictures of all of them together."""
    winners = [cutouts(draft.win, draft.masks) for draft in drafts]
    losers = [cutouts(draft.lose, draft.masks) for draft in drafts]
    references = [[cutout(*of) for of in zip(d.references, d.reference_masks, strict=True)] for d in drafts]
    contexts = [[without(image, draft.masks) for image in (draft.win, draft.lose)] for draft in drafts]
    win, lose, shown, context = (_together(dino.images, group) for group in (winners, losers, references, contexts))
    whole = dino.images([Image.fromarray(draft.win) for draft in drafts])
    seen, said = _together(clip.images, winners), _together(clip.texts, [draft.captions for draft in drafts])
    return [
        replace(
            draft,
            scores=_scores(draft, shown[i] @ win[i].T, shown[i] @ lose[i].T, context[i], (seen[i] * said[i]).sum(-1)),
            signature=perceptual_hash(draft.win) + whole[i].numpy().astype("<f2").tobytes(),
        )
        for i, draft in enumerate(drafts)
    ]


def _together(encode, groups: Sequence[Sequence]) -> list[torch.Tensor]:
    """One call for all groups, and the vectors of each."""
    return list(encode([item for group in groups for item in group]).split([len(group) for group in groups]))


def _scores(
    draft: Draft, win: torch.Tensor, lose: torch.Tensor, context: torch.Tensor, agreement: torch.Tensor
) -> dict[str, float]:
    """`win`, `lose`: likeness (S, S) of each reference with each subject; `context` (2, d); `agreement` (S,)."""
    like, drop = win.diagonal(), win.diagonal() - lose.diagonal()
    masks = np.stack(draft.masks)
    inside = masks.any(0)
    difference = np.abs(draft.win.astype(int) - draft.lose).max(-1)
    found = {
        "similarity": like.min(),
        "drop": drop.max(),
        "least_drop": drop.min(),
        "context": context[0] @ context[1],
        "outside": difference[~inside].max(initial=0),
        "smallest": masks.mean((1, 2)).min(),
        "covered": inside.mean(),
        "caption": agreement.min(),
    }
    return {name: round(float(value), 6) for name, value in found.items()}


def cutouts(image: np.ndarray, masks: Sequence[np.ndarray]) -> list[Image.Image]:
    return [cutout(image, mask) for mask in masks]


def cutout(image: np.ndarray, mask: np.ndarray) -> Image.Image:
    """What the mask (H, W) shows of the image (H, W, 3), on white, in the smallest square about it."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left, height, width = rows[0], columns[0], np.ptp(rows) + 1, np.ptp(columns) + 1
    part = np.s_[top : top + height, left : left + width]
    side = max(height, width)
    square = np.full((side, side, 3), 255, np.uint8)
    y, x = (side - height) // 2, (side - width) // 2
    square[y : y + height, x : x + width] = np.where(mask[part][..., None], image[part], 255)
    return Image.fromarray(square)


def without(image: np.ndarray, masks: Sequence[np.ndarray]) -> Image.Image:
    """The image with grey in place of its subjects."""
    return Image.fromarray(np.where(np.any(masks, 0)[..., None], np.uint8(128), image))


def perceptual_hash(image: np.ndarray) -> bytes:
    """64 bits: of 8 × 9 grey cells, whether each is brighter than its left neighbour (a difference hash)."""
    grey = np.asarray(Image.fromarray(image).convert("L").resize((9, 8), Image.Resampling.BOX), int)
    return np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes()
