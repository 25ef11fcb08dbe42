"""From settings to a chain: who plans, who makes each stage, and all that the drafts will depend on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from focusdpo_lib import backbones, params
from focusdpo_lib.dip import (
    captioning,
    detectors,
    disruption,
    painters,
    scoring,
    segmentation,
    sources,
    synthesis,
    toybox_stages,
)
from focusdpo_lib.dip.chain import PICTURES, STAGES, Stage
from focusdpo_lib.dip.run import Plan
from focusdpo_lib.evaluation.encoders import clip_repository
from focusdpo_lib.runs import home

PIXEL_BYTES = 2  # of a PNG: photos compress no better
MODELS = (
    "detector",
    "segmenter",
    "model",
    "subject_lora",
)  # settings that may name a folder, whose content then counts


@dataclass(frozen=True)
class Assembly:
    """A chain that is ready to run. `settings` and `inputs` are what its drafts depend on; `draft_bytes` on disk."""

    plan: Plan
    stages: list[Stage]
    settings: dict[str, params.Section]
    draft_bytes: int
    inputs: dict[str, Path | str] = field(default_factory=dict)


def assembled(chain: params.Chain, sections: Mapping[str, params.Section], results: Path) -> Assembly:
    """The chain that `chain` names, each stage by its own section of `sections`; one that is not given has defaults.

    Models of a hub are of the commits that `results` is pinned to, where what captioners said is kept too.
    """

    def given(name: str) -> Any:
        return _pinned(name, sections.get(name) or params.section(name), results)

    dip, by = given("dip"), given(scoring.NAME)
    of_models = {
        "segmentation": lambda: segmentation.Segmentation(given("segmentation")),
        "captioning": lambda: captioning.Captioning(given("captioning"), str(home(results) / "captions")),
        "disruption": lambda: disruption.Disruption(given("disruption")),
    }
    plan, first, names, size = _begin(chain, given)
    used = {name: given(name) for name in names} | {scoring.NAME: by}
    made_by: list[Stage] = [first]
    for stage in STAGES[1:-1]:
        drawn = getattr(chain, stage) == "toybox"
        made_by.append(toybox_stages.ToyboxStage(stage, dip) if drawn else of_models[stage]())
        used |= {} if drawn else {stage: given(stage)}
    if captioning.NAME in used:  # a budget that is used up may be raised, and the run goes on
        used[captioning.NAME] = used[captioning.NAME].deciding
    return Assembly(plan, [*made_by, scoring.Scoring(by)], used, size, _inputs(used))


def _begin(chain: params.Chain, given) -> tuple[Plan, Stage, tuple[str, ...], int]:
    """The plan, the first stage, the sections that both go by, and bytes of a draft."""
    if chain.synthesis == "toybox":
        dip = given("dip")
        stage = toybox_stages.ToyboxStage("synthesis", dip)
        return partial(toybox_stages.plan, dip), stage, ("dip",), toybox_stages.DRAFT_BYTES
    if chain.synthesis == "source":
        source = given("source")
        return partial(sources.plan, source), sources.Source(source), ("source",), _bytes(source.size)
    drawn = given("synthesis")
    stage = synthesis.Synthesis(drawn, given("backbone"), given("segmentation"))
    return partial(synthesis.plan, drawn), stage, ("synthesis", "backbone"), _bytes(drawn.size)


def _pinned(name: str, settings: Any, results: Path) -> Any:
    """A section with the commits of its models of a hub."""
    sources: dict[str, str | None] = {}
    if name == "backbone":
        return backbones.pinned(settings, results)
    if name == "segmentation":
        used = {settings.masks, settings.reference_masks} & detectors.DEFAULTS.keys()
        segmenters = {settings.segmenter or detectors.DEFAULTS[source] for source in used} - {"toybox"}
        sources["detector_revision"] = settings.detector if "sam2" in used else None
        sources["segmenter_revision"] = segmenters.pop() if len(segmenters) == 1 else None
    if name == "captioning":
        sources["revision"] = settings.model if settings.by == "local" else None
    if name == "disruption":
        sources["revision"] = settings.model or painters.DEFAULTS[settings.painter]
    if name == scoring.NAME:
        sources |= {"dino_revision": settings.dino, "clip_revision": clip_repository(settings.clip)}
    return backbones.with_commits(settings, sources, results)


def _bytes(side: int) -> int:
    return PICTURES * PIXEL_BYTES * side**2


def _inputs(used: Mapping[str, params.Section]) -> dict[str, Path | str]:
    """What lies in folders: encoders, models and own photos, by their content."""
    found: dict[str, Path | str] = {}
    for name, settings in used.items():
        for key in MODELS:
            if (model := getattr(settings, key, None)) is not None and Path(model).is_dir():
                found[f"{name}.{key}"] = Path(model)
    if (of := used.get(segmentation.NAME)) and "toybox" in (of.masks, of.reference_masks):
        found["segmentation.segmenter"] = _content(params.shipped("segmenter", of.segmenter or "toybox"))
    by = used[scoring.NAME]
    found |= {name: _content(params.shipped(name, getattr(by, name))) for name in ("dino", "clip")}
    if "synthesis" in used:
        found["lists"] = Path(used["synthesis"].lists)
    if "source" in used and used["source"].kind == "photos":  # of others the published list is what counts
        found["source"] = _content(used["source"].folder)
    return found


def _content(model: str) -> Path | str:
    """A folder by what is in it, a hub id by itself."""
    return Path(model) if Path(model).is_dir() else model
