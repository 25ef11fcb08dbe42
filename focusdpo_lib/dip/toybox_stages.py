"""The toybox as stages of the chain: each is exact, for the world knows what others must find.

Every stage draws the pair's chances anew from its settings, split and index, as `toybox.make_pair` does in one go.
Masks may be a model's instead (`chain.segmentation: models`): the loser then differs within what was found.
"""

from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace

import numpy as np

from focusdpo_lib.dip.chain import Draft, Maker, Unfit, one_by_one
from focusdpo_lib.dip.dataset import SPLITS
from focusdpo_lib.dip.toybox import Drawn, describe, disruption, draw, identifier, provenance
from focusdpo_lib.params import Dip
from focusdpo_lib.toybox.world import halve, halve_mask, photo, photo_and_mask, render, with_identities

DRAFT_BYTES = 11_000  # of a draft with all of it, about


def plan(settings: Dip) -> Iterator[Draft]:
    """Every draft of `toybox.build`, split by split."""
    counts = (settings.train_pairs, settings.validation_pairs, settings.validation_pairs)
    for split, count in zip(SPLITS, counts, strict=True):
        for index in range(count):
            yield planned(settings, split, index)


def planned(settings: Dip, split: str, index: int) -> Draft:
    drawn = draw(settings, split, index)
    return Draft(
        id=identifier(split, index),
        prompt=drawn.scene.caption,
        split=split,
        subjects=tuple(identity.class_name for identity in drawn.scene.identities),
        identities=tuple(" ".join(map(str, astuple(identity))) for identity in drawn.scene.identities),
        provenance=provenance(settings, index, drawn),
    )


def synthesis(draft: Draft, drawn: Drawn) -> Draft:
    """A photo of each identity, and the winner: a scene of them all."""
    photos = map(photo, drawn.scene.identities, drawn.seeds)
    return replace(draft, references=tuple(map(halve, photos)), win=render(drawn.scene)[0])


def segmentation(draft: Draft, drawn: Drawn) -> Draft:
    """The subjects' coverage, in the winner and in each reference."""
    shown = [photo_and_mask(*of)[1] for of in zip(drawn.scene.identities, drawn.seeds, strict=True)]
    return replace(draft, masks=tuple(render(drawn.scene)[1]), reference_masks=tuple(map(halve_mask, shown)))


def captioning(draft: Draft, drawn: Drawn) -> Draft:
    """The identities, written out."""
    return replace(draft, captions=tuple(map(describe, drawn.scene.identities)))


def disrupted(draft: Draft, drawn: Drawn) -> Draft:
    """The loser: the scene once more, with the disturbed identities in place, as far as a mask was found of them."""
    shown, _ = render(with_identities(drawn.scene, drawn.disturbed))
    lose = np.where(np.any(draft.masks, axis=0)[..., None], shown, draft.win)
    if np.array_equal(lose, draft.win):
        raise Unfit("the loser shows what the winner shows")
    captions = tuple(map(describe, drawn.disturbed))
    return replace(draft, lose=lose, disrupted_captions=captions, disruption=disruption(drawn))


MAKERS: dict[str, Callable[[Draft, Drawn], Draft]] = {
    "synthesis": synthesis,
    "segmentation": segmentation,
    "captioning": captioning,
    "disruption": disrupted,
}


@dataclass(frozen=True)
class ToyboxStage:
    """The stage `name` of MAKERS."""

    name: str
    settings: Dip

    def open(self) -> Maker:
        def make(draft: Draft) -> Draft:
            return MAKERS[self.name](draft, draw(self.settings, draft.split, draft.provenance["index"]))

        return one_by_one(self.name, make)
