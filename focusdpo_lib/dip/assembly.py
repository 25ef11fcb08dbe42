"""From settings to a chain: who plans, who makes each stage, and all that the drafts will depend on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from focusdpo_lib import params
from focusdpo_lib.dip import scoring, toybox_stages
from focusdpo_lib.dip.chain import Stage
from focusdpo_lib.dip.run import Plan

STAGES = (*toybox_stages.MAKERS, scoring.NAME)  # in order


@dataclass(frozen=True)
class Assembly:
    """A chain that is ready to run. `settings` and `inputs` are what its drafts depend on; `draft_bytes` on disk."""

    plan: Plan
    stages: list[Stage]
    settings: dict[str, params.Section]
    draft_bytes: int
    inputs: dict[str, Path | str] = field(default_factory=dict)


def assembled(chain: params.Chain, sections: Mapping[str, params.Section]) -> Assembly:
    """The chain that `chain` names, each stage by its own section of `sections`; one that is not there has defaults."""

    def settings_of(name: str) -> params.Section:
        return sections.get(name) or params.section(name)

    dip, by = settings_of("dip"), settings_of(scoring.NAME)
    inputs = {name: _content(params.shipped(name, getattr(by, name))) for name in ("dino", "clip")}
    stages = [*map(partial(toybox_stages.ToyboxStage, settings=dip), toybox_stages.MAKERS), scoring.Scoring(by)]
    used = {"dip": dip, scoring.NAME: by}
    return Assembly(partial(toybox_stages.plan, dip), stages, used, toybox_stages.DRAFT_BYTES, inputs)


def _content(model: str) -> Path | str:
    """A model as an input of a run: a folder by what is in it, a hub id by itself."""
    return Path(model) if Path(model).is_dir() else model
