"""Disruption: the loser, which is the winner with its subjects repainted as others of their class.

Every subject is repainted inside its own mask, from an edited caption and with noise of its own (as Figure 4 draws
it; a share of pairs may keep all subjects but one). How strongly is graded: strength k exchanges k details of the
caption and goes `denoising[k - 1]` of the way back to noise. Of several subjects, two may instead exchange captions,
each keeping its class word. Silhouettes stay.

What is repainted is faded in from the edge of the mask over `feather` pixels *within* it, and everything outside is the
winner's: winner and loser are equal to the pixel there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from focusdpo_lib import params
from focusdpo_lib.dip.captioning import DETAILS
from focusdpo_lib.dip.chain import Draft, Maker
from focusdpo_lib.dip.models import batches, seed_of
from focusdpo_lib.dip.painters import Painter
from focusdpo_lib.dip.questions import Detail, edited
from focusdpo_lib.evaluation.wording import exchanged

NAME = "disruption"


@dataclass(frozen=True)
class Disruption:
    """The stage. Raises StageError, when opened, for a model that cannot be loaded."""

    settings: params.Disruption
    name: str = NAME

    def open(self) -> Maker:
        return partial(make, self.settings, Painter(self.settings))


def make(settings: params.Disruption, painter: Painter, drafts: Sequence[Draft]) -> list[Draft]:
    """The drafts with their losers, or dropped; subjects are repainted one after the other, drafts together."""
    planned = [plan(settings, draft) for draft in drafts]
    losers = [draft.win for draft in planned]
    for subject in range(max((len(draft.subjects) for draft in planned), default=0)):
        todo = [i for i, draft in enumerate(planned) if subject in draft.disruption["repainted"]]
        strengths = [_denoising(settings, planned[i]) for i in todo]
        keys = [(losers[i].shape, strength) for i, strength in zip(todo, strengths, strict=True)]
        for group in batches(keys, settings.batch_size):
            some = [todo[at] for at in group]
            painted = painter.paint(
                [losers[i] for i in some],
                [planned[i].masks[subject] for i in some],
                [planned[i].disrupted_captions[subject] for i in some],
                [seed_of(settings.seed, planned[i].id, NAME, subject) for i in some],
                strengths[group[0]],
            )
            for i, image in zip(some, painted, strict=True):
                losers[i] = pasted(losers[i], image, planned[i].masks[subject], settings.feather)
    return [_finished(draft, lose, painter.model) for draft, lose in zip(planned, losers, strict=True)]


def plan(settings: params.Disruption, draft: Draft) -> Draft:
    """The draft with its disrupted captions and what its `disruption` is: drawn from the seed and its id alone."""
    rng = np.random.default_rng(seed_of(settings.seed, draft.id, NAME))
    strength = settings.strengths[rng.integers(len(settings.strengths))]
    swap, single = rng.uniform(size=2) < (settings.swap_share, settings.single_share)
    several = len(draft.subjects) > 1
    captions = _swapped(rng, draft) if swap and several else None
    if captions is not None:
        kind = "swap"
        changes = [{"caption": [a, b]} if a != b else {} for a, b in zip(draft.captions, captions, strict=True)]
    else:
        kind = "change"
        hit = [int(rng.integers(len(draft.subjects)))] if single and several else range(len(draft.subjects))
        known = draft.disruption[DETAILS]
        details = [_drawn(rng, its, strength if i in hit else 0) for i, its in enumerate(known)]
        captions = tuple(map(edited, draft.captions, details))
        changes = [{detail.attribute: [detail.words, detail.instead] for detail in its} for its in details]
    facts = {"kind": kind, "strength": strength, "changes": changes}
    facts["repainted"] = [i for i, its in enumerate(changes) if its]
    return replace(draft, disrupted_captions=captions, disruption=facts)


def _drawn(rng: np.random.Generator, details: Sequence[dict], count: int) -> list[Detail]:
    """As many of a subject's details as there are, at most `count`, in the order of its answer."""
    chosen = sorted(rng.permutation(len(details))[:count])
    return [Detail(**details[at]) for at in chosen]


def _swapped(rng: np.random.Generator, draft: Draft) -> tuple[str, ...] | None:
    """The captions with two of them exchanged, each with its own class word; none where that says nothing new."""
    first, second = rng.permutation(len(draft.subjects))[:2]
    captions = list(draft.captions)
    for one, other in ((first, second), (second, first)):
        words = exchanged(draft.captions[other], draft.subjects[other], draft.subjects[one])
        if words is None or words == draft.captions[one]:
            return None
        captions[one] = words
    return tuple(captions)


def _denoising(settings: params.Disruption, draft: Draft) -> float:
    return settings.denoising[min(draft.disruption["strength"], len(settings.denoising)) - 1]


def faded(mask: np.ndarray, feather: int) -> np.ndarray:
    """How much of the repainted image counts (H, W) in [0, 1]: 0 outside the mask, 1 deeper in it than `feather`.

    In between it grows with the distance to the mask's edge; in a mask that is nowhere so deep it reaches 1 at the
    deepest. The edge of the picture is none of the mask.
    """
    from scipy.ndimage import distance_transform_edt

    if mask.all():
        return np.ones(mask.shape)
    depth = distance_transform_edt(mask)
    return np.clip(depth / min(feather + 1, depth.max()), 0, 1)


def pasted(image: np.ndarray, painted: np.ndarray, mask: np.ndarray, feather: int) -> np.ndarray:
    """The image (H, W, 3) with what was painted in its mask faded in; every pixel outside the mask as it was."""
    weight = faded(mask, feather)[..., None]
    mixed = np.rint(weight * painted + (1 - weight) * image).astype(np.uint8)
    return np.where(mask[..., None], mixed, image)


def _finished(draft: Draft, lose: np.ndarray, model: dict) -> Draft:
    draft = replace(draft, provenance=draft.provenance | {NAME: model})
    if np.array_equal(lose, draft.win):
        return draft.drop(NAME, "the loser shows what the winner shows")
    return replace(draft, lose=lose)
