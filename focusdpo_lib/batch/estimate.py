"""How long a run will take on this machine: a probe of a few seconds, and what the run has to do.

    seconds of a run = training steps · a step's + images · an image's + the rest, as measured elsewhere, in proportion

The rest (drawing pairs, scoring, figures) stands in params/<profile>/reproduce.yaml beside the seconds that importing
took on the same machine, and is taken to be longer here by as much as importing is.
"""

import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from focusdpo_lib import params
from focusdpo_lib.batch.warm import context
from focusdpo_lib.runs import RunError

PAIRS, STEPS, IMAGES = 12, 6, 16  # of the probe: pairs a step, denoising steps and images of a sample
# The forwards of a step (a backward through activations counts as one), as a share of a preference step's six.
SHARE = {"sft": 1 / 3, "patchdpo": 2 / 3, "dpo": 1.0, "focusdpo": 1.0}


@dataclass(frozen=True)
class Pace:
    """Seconds on this machine: until a process has imported everything; a preference step of a pair, by backbone
    family; one evaluation of the network for one image, by family. `device` names the machine."""

    start: float
    pair: Mapping[str, float]
    evaluation: Mapping[str, float]
    device: str


def probe(families: Mapping[str, str]) -> Pace:
    """Measures this machine in a process of the kind that kernels are: its imports, and a step and a sample of each
    family in the precision (of arithmetic, as `backbone.precision`) that is given with it.

    Raises RunError if that process is killed.
    """
    try:
        with ProcessPoolExecutor(1, context) as pool:
            return pool.submit(_measure, dict(families), time.time()).result()
    except BrokenProcessPool:
        raise RunError("the probe was killed, most often for want of main memory: close other programs") from None


def _measure(families: Mapping[str, str], asked: float) -> Pace:
    from focusdpo_lib import backbones, provenance

    start = time.time() - asked  # whatever it took to begin: the imports
    pair, evaluation = {}, {}
    for family, precision in families.items():
        backbone = backbones.load(params.Backbone(family=family, precision=precision), backbones.best_device())
        pair[family], evaluation[family] = _step(backbone), _evaluation(backbone)
    return Pace(start, pair, evaluation, provenance.device()["device"])


def _step(backbone) -> float:
    """Seconds that a FocusDPO step takes for each of its pairs: the second step's, for the first one sets up."""
    from focusdpo_lib.bench.measure import timed
    from focusdpo_lib.bench.steps import toybox_step

    step = toybox_step(backbone, PAIRS)
    step()
    return timed(step) / PAIRS


def _evaluation(backbone) -> float:
    """Seconds of one denoising step of one image, the decoder's share included."""
    import torch

    from focusdpo_lib.bench.measure import timed

    side = params.Generation().reference_size
    condition = backbone.condition(["a mug on a beach"] * IMAGES, [torch.zeros(IMAGES, 3, side, side)])
    size = (params.Generation().size,) * 2
    backbone.sample(condition, range(IMAGES), size, 1)  # sets up
    return timed(lambda: backbone.sample(condition, range(IMAGES), size, STEPS)) / IMAGES / STEPS


def seconds(values: Mapping[str, Any], pace: Pace, rest: Mapping[str, float], name: str) -> float:
    """What the run `name` (of a params file) takes whose notebook is given `values`.

    `rest`: seconds elsewhere, of `start` (importing), of each `image` that a table scores, and by name of what else a
    run does.
    """
    from focusdpo_lib.toybox.benchmark import SETTINGS, SUBJECTS

    other, found, prompts = rest[name], 0.0, len(SETTINGS)
    if "training" in values:
        family = params.section("backbone", values.get("backbone")).family
        training, objective = params.section("training", values["training"]), values.get("objective") or {}
        pairs = training.steps * training.batch_size * training.gradient_accumulation
        found += pairs * SHARE[objective.get("name", "focusdpo")] * pace.pair[family]
        drawn = 4 * values.get("samples", 0)  # before and after, of one subject and of two
        found += drawn * _evaluations(values.get("generation"), family) * pace.evaluation[family]
    for rows in (params.section("families", values["families"]).given if "families" in values else {}).values():
        images = SUBJECTS * min(prompts, rows.generation.prompts or prompts) * rows.generation.images_per_prompt
        images *= 1 + sum(len(runs) for _, runs in rows.adapters)
        found += images * _evaluations(rows.generation, rows.backbone.family) * pace.evaluation[rows.backbone.family]
        other += images * rest["image"]
    return found + other * pace.start / rest["start"]


def families(values: Mapping[str, Any]) -> dict[str, str]:
    """The backbone families that a run with these values trains or samples, each with its precision."""
    if "families" in values:
        used = [rows.backbone for rows in params.section("families", values["families"]).given.values()]
    else:
        used = [params.section("backbone", values.get("backbone"))] if "training" in values else []
    return {backbone.family: backbone.precision for backbone in used}


def _evaluations(generation: Any, family: str) -> int:
    """Of the network, for one image: classifier-free guidance takes two a step, guidance that is an input one."""
    if not isinstance(generation, params.Generation):
        generation = params.section("generation", generation)
    return generation.steps * (1 if generation.guidance == 1.0 or family == "flux_uno" else 2)
