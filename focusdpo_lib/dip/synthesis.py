"""Synthesis: references and winners drawn from lists of subjects and scenes (Figure 4, left).

One subject: FLUX.1-dev, without UNO, draws a diptych of its studio photo on white and of the subject in its scene,
which is cut into the reference and the winner. Two subjects: it draws the scene with both; each is found by its word,
and UNO draws it once more, on white, from what its box shows. A reference that is not on white drops the draft.

Prompts of pairs name classes and scene alone, so that identity can come from the references; what else is known of a
subject (its description) only draws it, and is its identity: no description is in two splits.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image

from focusdpo_lib import backbones, params
from focusdpo_lib.backbones.interface import Backbone
from focusdpo_lib.dip.chain import Draft, Maker, Unfit
from focusdpo_lib.dip.detectors import load_detector
from focusdpo_lib.dip.lists import KINDS, read_lists
from focusdpo_lib.dip.mask_rules import choose, edge_colour, edge_share
from focusdpo_lib.dip.models import StageError, facts, images, seed_of
from focusdpo_lib.dip.pairs import split_of, splits_by_identity

NAME = "synthesis"
STUDIO = "a studio photo of {}, whole, alone, from the front, on a plain white background"


# --- what is drawn ---------------------------------------------------------------------------------------------------


def plan(settings: params.Synthesis) -> list[Draft]:
    """`single` drafts with one subject, then `double` with two; each is drawn from the seed and its number alone."""
    lists = read_lists(settings.lists)
    drafts = [_drawn(settings, lists, 1, number) for number in range(settings.single)]
    drafts += [_drawn(settings, lists, 2, number) for number in range(settings.double)]
    splits = splits_by_identity([draft.identities for draft in drafts], settings.splits.model_dump(), settings.seed)
    return [replace(draft, split=split) for draft, split in zip(drafts, splits, strict=True)]


def _drawn(settings: params.Synthesis, lists: Mapping[str, Any], count: int, number: int) -> Draft:
    name = f"{('single', 'double')[count - 1]}-{number:05d}"
    rng = np.random.default_rng(seed_of(settings.seed, NAME, name))
    home = partial(split_of, shares=settings.splits.model_dump(), seed=settings.seed)
    chosen = list(islice(_subjects(rng, lists, home), count))
    words, described = [word for _, word, _ in chosen], [look for *_, look in chosen]
    kind = max((kind for kind, *_ in chosen), key=KINDS.index)  # with a human, a scene for humans
    scene = _pick(rng, lists["scenes"][kind])
    return Draft(
        id=name,
        prompt=f"{' and '.join(map(_with_article, words))} {scene}",
        split="",
        subjects=tuple(words),
        identities=tuple(described),
        provenance={NAME: {"scene": scene, "described": described}},
    )


def _subjects(
    rng: np.random.Generator, lists: Mapping[str, Any], home: Callable[[str], str]
) -> Iterator[tuple[str, str, str]]:
    """(kind, class word, description) of one subject after the other; no class twice.

    All are of the first one's `home`, a split: joined across splits, thousands of pairs would hang together and end in
    one. Where lists are so short that a hundred draws find none, any will do.
    """
    seen: set[str] = set()
    kinds, at_home, tried = [kind for kind in KINDS if kind in lists["subjects"]], "", 0
    while True:
        tried += 1
        kind = _pick(rng, kinds)
        subject = _pick(rng, lists["subjects"][kind])
        filled = {name: _pick(rng, words) for name, words in lists["slots"].items()}
        look = _pick(rng, subject["looks"]).format(**filled)
        if subject["word"] not in seen and (not at_home or home(look) == at_home or tried > 100):
            seen.add(subject["word"])
            at_home, tried = at_home or home(look), 0
            yield kind, subject["word"], look


def _pick(rng: np.random.Generator, options: Sequence) -> Any:
    return options[int(rng.integers(len(options)))]


def _with_article(words: str) -> str:
    return f"an {words}" if words[0].lower() in "aeiou" else f"a {words}"


# --- the stage -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Synthesis:
    """The stage. `backbone` is FLUX.1-dev with UNO; `segmentation` says what finds the subjects of two.

    Raises BackboneError and StageError, when opened or at the first pair of two, for a model that cannot be loaded.
    """

    settings: params.Synthesis
    backbone: params.Backbone
    segmentation: params.Segmentation
    name: str = NAME

    def open(self) -> Maker:
        if self.backbone.family != "flux_uno":
            raise StageError(f"synthesis draws with flux_uno, not with {self.backbone.family}: correct backbone.family")
        backbone = backbones.load(self.backbone, backbones.best_device())
        detectors: list = []  # the one detector, once a pair needs it

        def detect(*words) -> list:
            if not detectors:
                detectors.append(load_detector(self.segmentation, self.segmentation.masks))
            return detectors[0].segment(*words)

        drawn_by = facts(self.backbone.model, self.backbone.revision)
        if self.backbone.subject_lora:
            drawn_by["redrawn"] = facts(self.backbone.subject_lora, self.backbone.subject_revision)
        return partial(make, self.settings, backbone, partial(_boxes, self.segmentation, detect), drawn_by)


Boxes = Callable[[Sequence[np.ndarray], Sequence[Sequence[str]]], list]


def make(
    settings: params.Synthesis, backbone: Backbone, boxes: Boxes, drawn_by: dict, drafts: Sequence[Draft]
) -> list[Draft]:
    """The drafts with references and winners, or dropped."""
    singles = [draft for draft in drafts if len(draft.subjects) == 1]
    doubles = [draft for draft in drafts if len(draft.subjects) > 1]
    made = {d.id: d for d in (*_diptychs(settings, backbone, singles), *_groups(settings, backbone, boxes, doubles))}
    found = []
    for draft in (made[draft.id] for draft in drafts):
        draft = replace(draft, provenance=draft.provenance | {NAME: draft.provenance[NAME] | drawn_by})
        on_white = all(_on_white(settings, photo) for photo in draft.references)
        found.append(draft if draft.dropped or on_white else draft.drop(NAME, "a reference is not on white"))
    return found


def _on_white(settings: params.Synthesis, photo: np.ndarray) -> bool:
    light = (edge_colour(photo) >= 255 - settings.tolerance).all()
    return bool(light) and edge_share(photo, settings.tolerance) >= settings.plain


def _diptychs(settings: params.Synthesis, backbone: Backbone, drafts: Sequence[Draft]) -> list[Draft]:
    """One picture of both panels; between them `gutter` pixels on either side of the middle are cut away."""
    side = settings.size
    prompts = [_diptych(draft) for draft in drafts]
    with _without_subject_lora(backbone):
        pictures = _draw(settings, backbone, drafts, prompts, (side, 2 * (side + settings.gutter)))
    return [
        replace(draft, references=(picture[:, :side],), win=picture[:, -side:])
        for draft, picture in zip(drafts, pictures, strict=True)
    ]


def _diptych(draft: Draft) -> str:
    described, (word,) = _with_article(draft.identities[0]), draft.subjects
    return (
        f"A diptych of two photos side by side of the very same {word}. On the left {STUDIO.format(described)}. On the "
        f"right a photo of the same {word}, {described}, {draft.provenance[NAME]['scene']}."
    )


def _groups(settings: params.Synthesis, backbone: Backbone, boxes: Boxes, drafts: Sequence[Draft]) -> list[Draft]:
    """The scene of several, and of each a reference that UNO draws from its crop."""
    prompts = [_scene_of_several(draft) for draft in drafts]
    with _without_subject_lora(backbone):
        winners = _draw(settings, backbone, drafts, prompts, (settings.size, settings.size))
    found = boxes(winners, [draft.subjects for draft in drafts])
    drafts = [
        replace(draft, win=win) if not isinstance(its, Unfit) else draft.drop(NAME, f"{its} (winner)")
        for draft, win, its in zip(drafts, winners, found, strict=True)
    ]
    asked = [
        (draft, i, cropped(draft.win, box, settings.margin))
        for draft, its in zip(drafts, found, strict=True)
        if not draft.dropped
        for i, box in enumerate(its)
    ]
    photos = iter(_redrawn(settings, backbone, asked))
    return [d if d.dropped else replace(d, references=tuple(next(photos) for _ in d.subjects)) for d in drafts]


def _scene_of_several(draft: Draft) -> str:
    subjects = " and ".join(map(_with_article, draft.identities))
    return f"A photo of {subjects}, apart from each other, {draft.provenance[NAME]['scene']}."


def _redrawn(settings: params.Synthesis, backbone: Backbone, asked: Sequence[tuple]) -> list[np.ndarray]:
    """A studio photo of each (draft, subject's number, crop)."""
    photos = []
    for start in range(0, len(asked), settings.batch_size):
        some = asked[start : start + settings.batch_size]
        crops = [backbone.reference(Image.fromarray(crop), settings.size, "lanczos") for *_, crop in some]
        prompts = [STUDIO.format(_with_article(draft.identities[i])) for draft, i, _ in some]
        seeds = [seed_of(settings.seed, NAME, draft.id, i) for draft, i, _ in some]
        conditioning = backbone.condition(prompts, [torch.stack(crops)])
        drawn = backbone.sample(
            conditioning, seeds, (settings.size, settings.size), settings.redraw_steps, settings.redraw_guidance
        )
        photos += images(drawn)
    return photos


def _draw(settings: params.Synthesis, backbone: Backbone, drafts, prompts: list[str], size) -> list[np.ndarray]:
    """A picture (H, W, 3) of `size` a prompt, without references."""
    pictures = []
    for start in range(0, len(prompts), settings.batch_size):
        some = slice(start, start + settings.batch_size)
        seeds = [seed_of(settings.seed, NAME, draft.id) for draft in drafts[some]]
        conditioning = backbone.condition(prompts[some], [])
        drawn = backbone.sample(conditioning, seeds, size, settings.steps, settings.guidance)
        pictures += images(drawn)
    return pictures


@contextmanager
def _without_subject_lora(backbone: Backbone) -> Iterator[None]:
    """Within this context the model is plain FLUX: UNO's LoRA off, and times shifted as the library shifts them."""
    network, shift = backbone.network, backbone.sampling_shift
    held = bool(getattr(network, "peft_config", None))
    if held:
        network.disable_adapters()
    backbone.sampling_shift = "library"
    try:
        yield
    finally:
        backbone.sampling_shift = shift
        if held:
            network.enable_adapters()


def _boxes(settings: params.Segmentation, detect: Callable, winners, phrases) -> list[list[tuple] | Unfit]:
    """The box (x0, y0, x1, y1) of every phrase in every image, about its mask; or why there are none."""
    if not winners:
        return []
    rule = partial(choose, threshold=settings.threshold, same=settings.same, rival=settings.rival)
    found = detect(winners, phrases, rule)
    return [masks if isinstance(masks, Unfit) else _around(masks) for masks in found]


def _around(masks: np.ndarray) -> list[tuple] | Unfit:
    if not all(mask.any() for mask in masks):
        return Unfit("a mask is empty")
    rows, columns = ([np.flatnonzero(mask.any(axis)) for mask in masks] for axis in (1, 0))
    return [(c[0], r[0], c[-1] + 1, r[-1] + 1) for r, c in zip(rows, columns, strict=True)]


def cropped(image: np.ndarray, box: Sequence[int], margin: float) -> np.ndarray:
    """The square about a box, `margin` of its longer side wider on each side, as far as the image (H, W, 3) goes."""
    left, top, right, bottom = map(int, box)
    height, width = image.shape[:2]
    side = min(round(max(right - left, bottom - top) * (1 + 2 * margin)), height, width)
    x = min(max((left + right - side) // 2, 0), width - side)
    y = min(max((top + bottom - side) // 2, 0), height - side)
    return image[y : y + side, x : x + side]
