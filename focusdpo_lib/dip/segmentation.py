"""Segmentation: the mask of every subject, in the winner and in its reference (R20 needs both).

Where masks come from is a setting of each: `sam2` (boxes of the subjects' words by Grounding DINO, masks by SAM 2),
`sam3` (which takes the words itself), `files` (the source's own, such as a photographer's), `background` (one
subject on a plain ground, by colour: references lie on white), or `toybox` (the segmenter of its recipe, for what the
toybox draws). Rules, each with its threshold in the settings:

- Which detection is whose, and what if there are none or several: `mask_rules.choose`. Two subjects of the same words
  cannot be told apart by them; in files they can.
- Holes and specks smaller than `holes` and `specks` of the mask are filled and removed.
- A pixel that two subjects claim in the winner goes to the smaller mask; two that share more than `overlap` of the
  smaller one are the same thing.
- A mask smaller than `least` or larger than `most` of its picture is no subject.

What breaks a rule drops the draft with that reason. Masks are as large as their pictures, whatever a model works at.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from focusdpo_lib import params
from focusdpo_lib.dip.chain import Draft, Maker, Unfit
from focusdpo_lib.dip.detectors import DEFAULTS, load_detector
from focusdpo_lib.dip.mask_rules import apart, choose, clean, from_background, require_area

NAME = "segmentation"
Detector = Callable[[Sequence[np.ndarray], Sequence[Sequence[str]], Callable], list]
Found = list[np.ndarray] | Unfit  # a picture's masks in the order of its subjects, or why there are none


@dataclass(frozen=True)
class Segmentation:
    """The stage. Raises StageError, when it is opened, for a model that cannot be loaded."""

    settings: params.Segmentation
    name: str = NAME

    def open(self) -> Maker:
        sources = {self.settings.masks, self.settings.reference_masks} & set(DEFAULTS)
        detectors = {source: load_detector(self.settings, source) for source in sorted(sources)}
        return partial(make, self.settings, detectors)


def make(settings: params.Segmentation, detectors: dict, drafts: Sequence[Draft]) -> list[Draft]:
    """The drafts with `masks` and `reference_masks`, or dropped."""
    winners = _found(settings, settings.masks, detectors, [(d.win, d.subjects, d.masks) for d in drafts])
    photos = [
        (photo, (subject,), d.reference_masks[i : i + 1])
        for d in drafts
        for i, (photo, subject) in enumerate(zip(d.references, d.subjects, strict=True))
    ]
    references = iter(_found(settings, settings.reference_masks, detectors, photos))
    facts = {"masks": settings.masks, "reference_masks": settings.reference_masks}
    facts |= {source: detector.models for source, detector in detectors.items()}
    return [
        _finished(settings, draft, winner, [next(references) for _ in draft.subjects], facts)
        for draft, winner in zip(drafts, winners, strict=True)
    ]


def _found(settings: params.Segmentation, source: str, detectors: dict, asked: list[tuple]) -> list[Found]:
    """The raw masks of each (picture, its subjects' words, masks that came with it)."""
    if source in detectors:
        rule = partial(choose, threshold=settings.threshold, same=settings.same, rival=settings.rival)
        askable = [i for i, (_, words, _) in enumerate(asked) if len({word.lower() for word in words}) == len(words)]
        images, phrases = [asked[i][0] for i in askable], [asked[i][1] for i in askable]
        found = dict(zip(askable, detectors[source].segment(images, phrases, rule), strict=True))
        return [_listed(found.get(i, Unfit("two subjects have the same words"))) for i in range(len(asked))]
    read = {"files": _from_files, "background": partial(_alone, settings)}[source]
    return [_or_unfit(read, *each) for each in asked]


def _listed(masks: np.ndarray | Unfit) -> Found:
    return masks if isinstance(masks, Unfit) else list(masks)


def _or_unfit(read: Callable, *picture) -> Found:
    try:
        return read(*picture)
    except Unfit as reason:
        return reason


def _from_files(image: np.ndarray, words: Sequence[str], masks: Sequence[np.ndarray]) -> list[np.ndarray]:
    if len(masks) != len(words):
        raise Unfit("its source has no mask of it")
    if any(mask.shape != image.shape[:2] for mask in masks):
        raise Unfit("a mask is not as large as its picture")
    return list(masks)


def _alone(settings: params.Segmentation, image: np.ndarray, words: Sequence[str], masks) -> list[np.ndarray]:
    if len(words) > 1:
        raise Unfit("by its background, several subjects are one")
    return [from_background(image, settings.tolerance, settings.plain)]


def _finished(settings: params.Segmentation, draft: Draft, winner: Found, references: list[Found], facts) -> Draft:
    try:
        masks = _refined(settings, winner)
    except Unfit as reason:
        return draft.drop(NAME, f"{reason} (winner)")
    try:
        behind = [_refined(settings, found)[0] for found in references]
    except Unfit as reason:
        return draft.drop(NAME, f"{reason} (reference)")
    return replace(
        draft, masks=tuple(masks), reference_masks=tuple(behind), provenance=draft.provenance | {NAME: facts}
    )


def _refined(settings: params.Segmentation, found: Found) -> list[np.ndarray]:
    """A picture's masks as they are stored; raises Unfit."""
    if isinstance(found, Unfit):
        raise found
    masks = apart([clean(mask, settings.holes, settings.specks) for mask in found], settings.overlap)
    for mask in masks:
        require_area(mask, settings.least, settings.most)
    return masks
