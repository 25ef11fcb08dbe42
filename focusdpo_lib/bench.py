"""`make bench`: what a preference step costs, as ratios taken in one process on the same batch.

Steps of the objectives take turns, so that a machine that slows down slows them all; the medians are compared.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from focusdpo_lib import backbones, params, provenance
from focusdpo_lib.dip.toybox import make_pair
from focusdpo_lib.pairs import PreparedPairs, prepare
from focusdpo_lib.runs import write_json
from focusdpo_lib.training import draws, focus_masks, new_tap, step_objective

OBJECTIVES = ("sft", "dpo", "focusdpo")


def interleaved(tasks: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every task in every round, after two rounds of warm-up; the order turns from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    names = list(tasks)
    for k in range(rounds + 2):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            begun = time.perf_counter()
            tasks[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if k >= 2:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def step_seconds(
    backbone, data: dict[int, PreparedPairs], count: int, training: params.Training, rounds: int
) -> dict[str, list[float]]:
    """Seconds of one step (forward, backward) of each objective, and of the masks alone, with `count` references."""
    pairs = data[count]
    draw = draws({count: pairs}, training)(0)
    masks = params.Masks()
    noised = backbone.noised(pairs.win[draw.rows], draw.noise, draw.t).to(backbone.device)
    condition = pairs.conditioning[draw.rows].to(backbone.device)

    def step(name):
        def run():
            loss, _ = step_objective(backbone, pairs, draw, params.Objective(name=name), masks)
            loss.loss.backward()

        return run

    @torch.no_grad()
    def forward(watched):
        tap = new_tap(backbone, masks, len(draw.rows), pairs.token_grid) if watched else None
        with backbone.reference_model():
            backbone.predict(noised, draw.t.to(backbone.device), condition, taps=tap)
        if watched:
            focus_masks(backbone, tap, pairs, draw.rows, masks)

    tasks = {name: step(name) for name in OBJECTIVES}
    tasks |= {"forward": lambda: forward(False), "forward with masks": lambda: forward(True)}
    return interleaved(tasks, rounds)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m focusdpo_lib.bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="toybox", help="pipeline folder or hub id (default: the shipped toybox)")
    parser.add_argument("--batch-size", type=int, default=params.Training().batch_size)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("results/bench/step.json"))
    chosen = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = backbones.load(params.Backbone(model=chosen.model), device)
    training = params.Training(batch_size=chosen.batch_size)
    dip = params.Dip(train_pairs=4 * chosen.batch_size)
    data = prepare(backbone, [make_pair(dip, "train", i) for i in range(dip.train_pairs)], params.Masks())
    backbone.add_adapter(training.lora.rank)
    report = {"machine": provenance.facts(), "batch_size": chosen.batch_size, "references": {}}
    for count in data:
        seconds = step_seconds(backbone, data, count, training, chosen.rounds)
        median = {name: statistics.median(values) for name, values in seconds.items()}
        share = (median["forward with masks"] - median["forward"]) / median["focusdpo"]
        numbers = {
            "seconds": {name: round(value, 4) for name, value in median.items()},
            "focusdpo / dpo": round(median["focusdpo"] / median["dpo"], 3),
            "share of the masks": round(share, 4),
        }
        report["references"][str(count)] = numbers
        print(count, "reference(s):", json.dumps(numbers))
    write_json(chosen.out, report)
    print(chosen.out)


if __name__ == "__main__":
    main()
