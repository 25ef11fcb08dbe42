"""The chain of Figure 4: what its stages take and hand on.

    plan → synthesis → segmentation → captioning → disruption → curation → dataset

A *draft* is a pair in the making. A stage fills in more of every draft, or drops it with a reason; it never adds or
reorders drafts. What a stage makes of a draft depends on its settings, its models and that draft alone (a seed comes
from the settings' seed and the draft's id), so neither the number of processes nor where a run was killed shows in it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from focusdpo_lib.pictures import PictureError

STAGES = ("synthesis", "segmentation", "captioning", "disruption", "scoring")  # in order; after them curation decides
PICTURES = 4  # of a draft, about: winner, loser and two references


class Unfit(ValueError):
    """Raised where one draft is looked at alone: it falls out for this reason, in words that the run sheet counts."""


@dataclass(frozen=True, eq=False)
class Draft:
    """A pair in the making; images are uint8 (H, W, 3), masks bool (H, W), as in `dip.pair.Pair`.

    Tuples have one entry a subject, in the order of the prompt, or none while no stage has filled them in.
    """

    id: str
    prompt: str
    split: str
    subjects: tuple[str, ...]  # class words
    identities: tuple[str, ...]  # who the subjects are: no identity stands in two splits
    references: tuple[np.ndarray, ...] = ()  # from synthesis
    win: np.ndarray | None = None  # from synthesis
    masks: tuple[np.ndarray, ...] = ()  # from segmentation (or the source, where it knows them)
    reference_masks: tuple[np.ndarray, ...] = ()  # the same
    captions: tuple[str, ...] = ()  # from captioning: each subject of the winner in detail
    disrupted_captions: tuple[str, ...] = ()  # from disruption
    lose: np.ndarray | None = None  # from disruption
    disruption: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)  # from scoring
    signature: bytes = b""  # from scoring: what near-duplicates have in common
    provenance: dict[str, Any] = field(default_factory=dict)  # what made it: by stage its models, seeds, tokens used …
    dropped_by: str = ""  # the stage that dropped it; none while it is in
    dropped: str = ""  # and why, in words that the run sheet counts: no number or name in them

    def drop(self, stage: str, why: str) -> "Draft":
        """The draft as it falls out. No later stage touches it."""
        return replace(self, dropped_by=stage, dropped=why)


Maker = Callable[[Sequence[Draft]], Sequence[Draft]]  # of a part's drafts that are still in, in order, as many back


class Stage(Protocol):
    """A stage: settings alone (a frozen dataclass that can be pickled), until a process opens it."""

    name: str  # of its folder and in the run sheet

    def open(self) -> Maker:
        """Loads its models, once a process, and returns what makes drafts of drafts, in batches of its own size."""


def one_by_one(stage: str, make: Callable[[Draft], Draft]) -> Maker:
    """The maker of a stage that looks at one draft at a time: Unfit drops it, and so does a picture without use.

    What else `make` raises ends the run: of a server that is gone or a full disk no draft is guilty.
    """

    def made(draft: Draft) -> Draft:
        try:
            return make(draft)
        except Unfit as why:
            return draft.drop(stage, str(why))
        except PictureError as error:  # its sentence has names and numbers
            noted = replace(draft, provenance=draft.provenance | {stage: {"error": str(error)}})
            return noted.drop(stage, "a picture that cannot be used")

    return lambda drafts: [made(draft) for draft in drafts]
