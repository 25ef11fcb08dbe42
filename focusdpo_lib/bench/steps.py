"""One case measured: every objective's step and the plain reading's, on one batch and in turns."""

import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from focusdpo_lib import backbones, params
from focusdpo_lib.backbones import Backbone
from focusdpo_lib.bench import models
from focusdpo_lib.bench.cases import Case
from focusdpo_lib.bench.measure import Task, held_bytes, interleaved, matrix_rate, operations, peak_bytes, release
from focusdpo_lib.bench.plain import plain_objective, reference_copy
from focusdpo_lib.training import Draw, draws, focus_masks, new_tap, noised_views, step_objective
from focusdpo_lib.training.pairs import PreparedPairs

OBJECTIVES = ("sft", "dpo", "focusdpo")
MASKS = params.Masks(layers="all")  # the most that they can cost
# The floor, in forwards of the winners through the base. A preference step needs winner and loser through the reference
# model, both through the policy, and a backward through the activations of both, which multiplies by every matrix once,
# as a forward does; SFT needs the winner's two. Above it: LoRA, attention's backward (at least twice its forward), and
# what gradient checkpointing computes again. Below it: matrices that no gradient passes, before the first LoRA and for
# the keys and values of a U-Net's text.
FLOOR = {"sft": 2, "dpo": 6, "focusdpo": 6, "plain": 6}


def stepping(backbone: Backbone, loss: Callable[[], torch.Tensor]) -> Task:
    """A step, forward and backward; the optimizer's update of LoRA's few weights is left out."""

    def step() -> None:
        loss().backward()
        for parameter in backbone.adapter_parameters():  # each step begins without gradients, as training's do
            parameter.grad = None

    return step


def our_step(backbone: Backbone, pairs: PreparedPairs, draw: Draw, name: str) -> Task:
    objective = params.Objective(name=name)
    return stepping(backbone, lambda: step_objective(backbone, pairs, draw, objective, MASKS)[0].loss)


def toybox_step(backbone: Backbone, count: int) -> Task:
    """A FocusDPO step of `count` of the toybox's pairs with one reference, a fresh adapter being put on."""
    pairs = models.load_pairs(Case("toybox", "shipped", 1, False, "float32"), backbone, count)
    backbone.add_adapter(params.Lora().rank)
    return our_step(backbone, pairs, draws({1: pairs}, params.Training(batch_size=count))(0), "focusdpo")


def plain_step(backbone: Backbone, twin: Backbone, pairs: PreparedPairs, draw: Draw) -> Task:
    objective = params.Objective()
    return stepping(backbone, lambda: plain_objective(backbone, twin, pairs, draw, objective, MASKS).loss)


def winners_forward(backbone: Backbone, pairs: PreparedPairs, draw: Draw, masked: bool) -> Task:
    """The winners through the reference model, with or without the masks on the way."""
    t, condition = draw.t.to(backbone.device), pairs.conditioning[draw.rows].to(backbone.device)
    noised = backbone.noised(pairs.win[draw.rows].to(backbone.device), draw.noise.to(backbone.device), t)

    @torch.no_grad()
    def forward() -> None:
        tap = new_tap(backbone, MASKS, pairs, draw.rows) if masked else None
        with backbone.reference_model():
            backbone.predict(noised, t, noised_views(backbone, condition, draw.view_noise, t), taps=tap)
        if masked:
            focus_masks(backbone, tap, pairs, draw.rows, MASKS)

    return forward


def measure(case: Case, device: torch.device, rounds: int, batch: int, scratch: Path) -> dict:
    """Everything the report says of a case, as plain values; a step out of memory is one that "does not fit".

    Memory is taken before the plain reading's second copy of the weights is there, seconds with everything there.
    """
    backbone = models.load(case, device, scratch)
    pairs = models.load_pairs(case, backbone, batch)
    training = params.Training(batch_size=batch)
    backbone.add_adapter(training.lora.rank)
    if case.checkpointing:
        backbone.network.enable_gradient_checkpointing()
    draw = draws({case.references: pairs}, training)(0)
    forwards = {
        name: winners_forward(backbone, pairs, draw, masked)
        for name, masked in {"forward": False, "forward with masks": True}.items()
    }
    ours = {name: our_step(backbone, pairs, draw, name) for name in OBJECTIVES}
    floor = operations(forwards["forward"], backbone.network)
    costs = {name: cost(step, backbone, floor * FLOOR[name]) for name, step in ours.items()}
    plain, costs["plain"] = plain_cost(backbone, pairs, draw, floor * FLOOR["plain"])
    rate = matrix_rate(device, backbone.precision)
    seconds = interleaved(forwards | ours | plain, rounds)
    return summary(costs, {name: statistics.median(values) for name, values in seconds.items()}, rate, batch) | {
        "weights_bytes": held_bytes(backbone.network),
        "optimizer_bytes": optimizer_bytes(backbone),
        "forward_operations": floor,
        "matrix_rate": {"dtype": str(backbone.precision).removeprefix("torch."), "operations_per_second": rate},
    }


def optimizer_bytes(backbone: Backbone) -> dict[str, int]:
    """AdamW's state by the name of the optimizer: two numbers for every weight of the adapter, of 4 bytes or of 1."""
    weights = sum(parameter.numel() for parameter in backbone.adapter_parameters())
    return {"adamw": 8 * weights, "adamw_8bit": 2 * weights}


def cost(step: Task, backbone: Backbone, floor: int, *others: torch.nn.Module) -> dict:
    """Bytes and operations of a step; `others` are networks held beside the backbone's."""
    peak = peak_bytes(step, backbone.network, *others)
    counted = operations(step, backbone.network, *others)
    return {"peak_bytes": peak, "operations": counted, "operations / floor": counted / floor}


def plain_cost(backbone: Backbone, pairs: PreparedPairs, draw: Draw, floor: int) -> tuple[dict[str, Task], dict]:
    """The plain reading's step, if it fits, and what it costs."""
    try:
        twin = reference_copy(backbone)
        step = plain_step(backbone, twin, pairs, draw)
        return {"plain": step}, cost(step, backbone, floor, twin.network)
    except torch.OutOfMemoryError:
        pass  # what the exception's traceback holds is free only when it is gone
    twin = step = None
    release()
    return {}, {"status": "does not fit"}


def summary(costs: dict[str, dict], seconds: dict[str, float], rate: float, batch: int) -> dict:
    """Steps with their seconds, and the ratios for which there are goals."""
    steps = {}
    for name, step in costs.items():
        steps[name] = step | ({} if name not in seconds else {
            "seconds": seconds[name],
            "pairs_per_second": batch / seconds[name],
            "fraction of matrix rate": step["operations"] / seconds[name] / rate,
        })  # fmt: skip
    ratios = {
        "focusdpo / dpo": seconds["focusdpo"] / seconds["dpo"],
        "share of the masks": (seconds["forward with masks"] - seconds["forward"]) / seconds["focusdpo"],
    }
    if "plain" in seconds:
        ratios["plain / focusdpo"] = seconds["plain"] / seconds["focusdpo"]
        ratios["bytes saved"] = steps["plain"]["peak_bytes"] - steps["focusdpo"]["peak_bytes"]
    return {"steps": steps, "ratios": ratios}


def attempted(case: Case, device: torch.device, rounds: int, batch: int, scratch: Path) -> dict:
    """`measure`, or why there is nothing to measure: a case that does not fit must not end those after it."""
    try:
        return {"status": "measured", **measure(case, device, rounds, batch, scratch)}
    except torch.OutOfMemoryError:
        return {"status": "does not fit"}
    except (ImportError, backbones.BackboneError, params.ParameterError) as error:
        return {"status": f"cannot be loaded: {error}"}
    finally:
        release()
