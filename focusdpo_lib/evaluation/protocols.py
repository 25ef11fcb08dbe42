"""The protocols by name: whose evaluation each is, and what it says beyond the switches that `params.PROTOCOLS` sets.

A score is comparable with a published one where the protocol and the encoders are the published ones. The names follow
the evaluation code that its authors released, read on single precision: their scripts on CUDA encode, normalise and
average CLIP's vectors in float16, which moves CLIP-I in its third decimal, and which no protocol here repeats.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from focusdpo_lib.params import CUSTOM, Evaluation, Generation

# As a setting names them: DINO v1 ViT-S/16, and OpenAI's CLIP ViT-B/32 with the activation that it was trained with.
PUBLISHED_ENCODERS = {"dino": "facebook/dino-vits16", "clip": "ViT-B-32-quickgelu/openai"}


class ProtocolError(ValueError):
    """Runs that were measured differently were asked into one table; the message says which setting differs."""


@dataclass(frozen=True)
class Named:
    """What a protocol says beyond its switches."""

    of: str  # in words, for a caption
    kinds: tuple[str, ...]  # of benchmark that it is for
    images_per_prompt: int | None  # that it takes; none: any number
    published: tuple[str, ...] = ()  # kinds of benchmark whose table in the paper is measured by it


NAMED = {
    "uno": Named("UNO's: all photos, mean per subject", ("single", "multi"), 1, ("single", "multi")),
    "patchdpo": Named("PatchDPO's: all photos, CLIP-T not clamped", ("single",), 1, ("single",)),
    "mip_adapter": Named("MIP-Adapter's: all photos, CLIP-T times 2.5", ("multi",), 1),
    "strict": Named("against the photos alone that the model has not seen", ("single", "multi"), None),
    CUSTOM: Named("every switch by itself", ("single", "multi"), None),
}


def problems(settings: Evaluation, kind: str, generation: Generation | None) -> list[str]:
    """What of a benchmark's kind and of how its images are sampled (none: an anchor) its protocol does not allow."""
    named, found = NAMED[settings.protocol], []
    if kind not in named.kinds:
        found.append(f"it is for the benchmark '{named.kinds[0]}' and this one is '{kind}'")
    count = generation.images_per_prompt if generation else None
    if count is not None and named.images_per_prompt not in (None, count):
        found.append(f"it takes {named.images_per_prompt} image a prompt, and generation.images_per_prompt is {count}")
    return found


def said(name: str) -> str:
    """The beginning of a caption: "Protocol uno (UNO's: …)."."""
    return f"Protocol {name} ({NAMED[name].of})."


def is_published(protocol: Mapping[str, object], calibrated: bool | None = None) -> bool:
    """Whether a table's flat protocol ("evaluation.protocol", "encoders.dino", …) is one that the paper's numbers have,
    encoders and all, so that a difference from a published number means something.

    `calibrated` (see `calibration`): encoders that failed are none of them, and those that passed are whatever they are
    called.
    """
    kind = str(protocol["benchmark"]).split()[0]
    theirs = has_published_encoders(protocol) if calibrated is None else calibrated
    return theirs and kind in NAMED[str(protocol.get("evaluation.protocol", CUSTOM))].published


def has_published_encoders(protocol: Mapping[str, object]) -> bool:
    """By their ids, which begin with what a setting calls them."""
    ids = {name: str(protocol.get(f"encoders.{name}")) for name in PUBLISHED_ENCODERS}
    return all(re.match(rf"{re.escape(model)}(?=$|[ @])", ids[name]) for name, model in PUBLISHED_ENCODERS.items())
