"""DIP pairs of the toybox world: the chain of Figure 4 where every step is known exactly.

The winner is a scene; its references are studio photos of the same identities; the loser is the same scene with some
subjects disturbed. Silhouettes stay, so winner and loser are equal to the pixel outside the masks. A disturbance is

- a *change*: `strength` attributes of one subject, or of both of two subjects, take other values. Of two subjects, one
  (either) or both are disturbed, half of the time each: a loser in which one subject is right is the common failure.
- a *swap* (two subjects): `strength` attributes on which the two differ are exchanged; a pattern takes its angle along.

The class never changes. No winner or reference shows an identity of another split, and no loser one of a later split
(train < validation < test): training never sees a held-out identity, not even as something to move away from.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from focusdpo_lib.dip.dataset import SPLITS, Pair, write_dataset
from focusdpo_lib.params import Dip
from focusdpo_lib.toybox.world import (
    ANGLES,
    COLOURS,
    PATTERNS,
    Identity,
    Scene,
    halve,
    halve_mask,
    photo_and_mask,
    render,
    sample_scene,
    sample_subjects,
    with_identities,
)

VALUES = {
    "base": tuple(COLOURS),
    "accent": tuple(COLOURS),
    "pattern": PATTERNS,
    "angle": ANGLES,
    "trim": tuple(COLOURS),
}
SWAPPED = ("base", "accent", "pattern", "trim")


def build(settings: Dip, folder: str | Path) -> None:
    """Writes train_pairs, validation_pairs and as many test pairs as validation pairs to `folder`, reproducibly.

    A pair depends on (settings other than the counts, split, index) alone: a bigger dataset starts with the same pairs.
    """
    counts = (settings.train_pairs, settings.validation_pairs, settings.validation_pairs)
    write_dataset(folder, {split: _pairs(settings, split, n) for split, n in zip(SPLITS, counts, strict=True)})


def _pairs(settings: Dip, split: str, count: int) -> Iterator[Pair]:
    for index in range(count):
        yield make_pair(settings, split, index)


@dataclass(frozen=True)
class Drawn:
    """What chance decides of a pair."""

    kind: str  # change or swap
    strength: int
    disturbed: tuple[Identity, ...]  # of the loser, in place of the scene's own
    scene: Scene
    seeds: list[int]  # of the references' photos


def draw(settings: Dip, split: str, index: int) -> Drawn:
    """Of the pair number `index` of a split."""
    rng = np.random.default_rng([settings.seed, SPLITS.index(split), index])
    count = 1 + int(rng.uniform() < settings.two_subject_share)
    kind = "swap" if count == 2 and rng.uniform() < settings.swap_share else "change"
    strength = settings.strengths[rng.integers(len(settings.strengths))]
    identities, disturbed = _sample_disturbance(rng, kind, count, strength, split)
    scene = sample_scene(rng, identities)
    return Drawn(kind, strength, disturbed, scene, [int(seed) for seed in rng.integers(2**31, size=count)])


def make_pair(settings: Dip, split: str, index: int) -> Pair:
    """The pair number `index` of a split."""
    drawn = draw(settings, split, index)
    scene, identities = drawn.scene, drawn.scene.identities
    win, masks = render(scene)
    lose, _ = render(with_identities(scene, drawn.disturbed))
    photos, photo_masks = zip(*map(photo_and_mask, identities, drawn.seeds), strict=True)
    return Pair(
        id=identifier(split, index),
        prompt=scene.caption,
        win=win,
        lose=lose,
        references=tuple(map(halve, photos)),
        masks=tuple(masks),
        reference_masks=tuple(map(halve_mask, photo_masks)),
        subjects=tuple(identity.class_name for identity in identities),
        captions=tuple(map(describe, identities)),
        disrupted_captions=tuple(map(describe, drawn.disturbed)),
        disruption=disruption(drawn),
        provenance=provenance(settings, index, drawn),
        split=split,
    )


def identifier(split: str, index: int) -> str:
    return f"{split}-{index:05d}"


def disruption(drawn: Drawn) -> dict[str, Any]:
    """What a row says of how its loser differs."""
    pairs = zip(drawn.scene.identities, drawn.disturbed, strict=True)
    return {"kind": drawn.kind, "strength": drawn.strength, "changes": [changes(a, b) for a, b in pairs]}


def provenance(settings: Dip, index: int, drawn: Drawn) -> dict[str, Any]:
    """What it takes to make a row again."""
    return {
        "generator": __name__,
        "seed": settings.seed,
        "index": index,
        "scene": asdict(drawn.scene),
        "lose_identities": [asdict(identity) for identity in drawn.disturbed],
        "reference_seeds": drawn.seeds,
    }


def describe(identity: Identity) -> str:
    """The detailed caption of a subject: 'a red mug with blue dots and a green trim'."""
    direction = _direction(identity.pattern, identity.angle)
    words = f"{direction} {identity.accent} {identity.pattern}".strip()
    if identity.pattern in ("spot", "plaid"):
        words = _article(words)
    return f"{_article(f'{identity.base} {identity.class_name}')} with {words} and {_article(identity.trim)} trim"


def changes(before: Identity, after: Identity) -> dict[str, list]:
    """{attribute: [before, after]} of the attributes that differ; the angle counts only of the same pattern."""
    compared = [name for name in VALUES if name != "angle" or before.pattern == after.pattern]
    pairs = {name: [getattr(before, name), getattr(after, name)] for name in compared}
    return {name: values for name, values in pairs.items() if values[0] != values[1]}


def change(rng: np.random.Generator, identity: Identity, strength: int, split: str = "train") -> Identity:
    """The identity with exactly `strength` attributes changed, each of them visibly."""
    names = [name for name in VALUES if name != "angle" or identity.pattern != "spot"]
    while True:
        chosen = rng.choice(names, strength, replace=False)
        after = replace(identity, **{str(name): VALUES[name][rng.integers(len(VALUES[name]))] for name in chosen})
        if len(changes(identity, after)) == strength and _may_show(after, split):
            return after


def swap(
    rng: np.random.Generator, identities: tuple[Identity, Identity], strength: int, split: str = "train"
) -> tuple[Identity, Identity] | None:
    """Both identities with `strength` attributes exchanged, or None where they do not differ enough for that."""
    first, second = identities
    options = []
    for names in combinations(SWAPPED, strength):
        carried = (*names, "angle") if "pattern" in names else names
        swapped = (
            replace(first, **{name: getattr(second, name) for name in carried}),
            replace(second, **{name: getattr(first, name) for name in carried}),
        )
        differ = all(getattr(first, name) != getattr(second, name) for name in names)
        if differ and all(_may_show(identity, split) for identity in swapped):
            options.append(swapped)
    return options[rng.integers(len(options))] if options else None


def _sample_disturbance(rng, kind: str, count: int, strength: int, split: str):
    """Identities for the winner and for the loser."""
    while True:
        identities = sample_subjects(rng, count, split)
        if kind == "swap":
            disturbed = swap(rng, identities, strength, split)
            if disturbed is None:
                continue
            return identities, disturbed
        hit = range(count) if rng.uniform() < 0.5 else [rng.integers(count)]
        return identities, tuple(change(rng, x, strength, split) if i in hit else x for i, x in enumerate(identities))


def _may_show(identity: Identity, split: str) -> bool:
    """Whether a loser of this split may show the identity: three different colours, and not of a later split."""
    colours = {identity.base, identity.accent, identity.trim}
    return len(colours) == 3 and SPLITS.index(identity.split) <= SPLITS.index(split)


def _direction(pattern: str, angle: int) -> str:
    """The word for a pattern's angle; a spot's angles look nearly the same and have none."""
    if pattern == "stripes":
        return {0: "vertical", 45: "rising", 90: "horizontal", 135: "falling"}[angle]
    return "diagonal" if pattern in ("dots", "plaid") and angle % 90 else ""


def _article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"
