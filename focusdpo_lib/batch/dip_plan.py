"""What the chain of Figure 4 costs at the paper's scale, before anything is rented: by stage, and in all.

    python -m focusdpo_lib.batch.dip_plan --gpu h200 --gpus 8

GPU-hours are counted operations of FLUX (params/paper/operations.yaml, see `bench.units`) at an assumed share of the
card's matrix rate; calls, tokens and dollars are those of the captioning's own settings. What is assumed is printed.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from focusdpo_lib import params
from focusdpo_lib.batch.plan import CARDS, OPERATIONS, PNG, Assumed
from focusdpo_lib.dip.chain import PICTURES, STAGES

TEXT = 512  # tokens of T5
TOKENS = {"one": TEXT + 32**2 + 32**2, "two": TEXT + 32**2 + 2 * 20**2}  # of the units' evaluations: text, an image of
# 512², and one reference of 512² or two of 320²
PERCEPTION = 5e12  # operations of Grounding DINO and SAM 2 for a picture: a guess, a hundredth of what drawing it takes
QUESTION, ANSWER = 250, 150  # tokens of a question's text and of an answer, about


@dataclass(frozen=True)
class Chained:
    """How many drafts of each kind go in, and which share of them each stage but scoring lets through."""

    single: int = 5000
    double: int = 5000
    kept: float = 0.8

    def entering(self, stage: str) -> tuple[float, float]:
        passed = self.kept ** min(STAGES.index(stage), 3)
        return self.single * passed, self.double * passed


def evaluation(of: Mapping[str, Any]) -> tuple[float, float]:
    """(a, b): an evaluation of FLUX with n tokens takes a·n + b·n² operations, by the two that were counted."""
    (m, one), (n, two) = ((TOKENS[name], of["evaluation"][name] / TOKENS[name]) for name in TOKENS)
    b = (one - two) / (m - n)
    return one - b * m, b


def costs(settings: Mapping[str, Any], units: Mapping[str, Any], chained: Chained) -> pd.DataFrame:
    """A row a stage: drafts, operations, calls, tokens, dollars, and bytes that it leaves on disk."""
    flux, (a, b) = units["flux_uno"], evaluation(units["flux_uno"])
    drawn, repaint, captions = settings["synthesis"], settings["disruption"], settings["captioning"]
    decode = flux["decode"] * (drawn.size / 512) ** 2
    side = (drawn.size // 16) ** 2

    def passes(steps: int, tokens: int) -> float:
        return steps * (a * (TEXT + tokens) + b * (TEXT + tokens) ** 2)

    diptych, scene = passes(drawn.steps, 2 * side) + 2 * decode, passes(drawn.steps, side) + decode
    redrawn, painted = passes(drawn.redraw_steps, 2 * side) + decode, passes(repaint.steps, side) + 2 * decode
    rows = []
    for stage in STAGES:
        single, double = chained.entering(stage)
        subjects = single + 2 * double
        row = {"stage": stage, "drafts": single + double, "operations": 0.0}
        row |= dict.fromkeys(("calls", "tokens", "dollars"), 0.0)
        if stage == "synthesis":
            row["operations"] = single * diptych + double * (scene + 2 * redrawn + PERCEPTION)
        elif stage == "segmentation":
            row["operations"] = (single + double) * PERCEPTION
        elif stage == "captioning":
            read, written = subjects * (QUESTION + captions.image_tokens), subjects * ANSWER
            dollars = (read * captions.price_read + written * captions.price_written) / 1e6
            row |= {"calls": subjects, "tokens": read + written, "dollars": dollars}
        elif stage == "disruption":
            row["operations"] = subjects * painted
        else:
            row["operations"] = (single + double) * (3 + 3 + 2 + 1) * units["score"]
        row["bytes"] = row["drafts"] * drawn.size**2 * PNG * (PICTURES if STAGES.index(stage) > 2 else PICTURES - 1)
        rows.append(row)
    return pd.DataFrame(rows).set_index("stage")


def report(table: pd.DataFrame, gpu: str, gpus: int, share: float, chained: Chained) -> str:
    """The table with GPU-hours, its sums, and every assumption."""
    rate = CARDS[gpu][0] * 1e12 * share
    shown = table.assign(**{"GPU-hours": table.pop("operations") / rate / 3600, "GB": table.pop("bytes") / 1e9})
    shown.loc["in all"] = shown.sum()
    shown.loc["in all", "drafts"] = chained.single + chained.double
    hours = shown.loc["in all", "GPU-hours"]
    return (
        f"{shown.round(1).to_string()}\n\n"
        f"{hours:.1f} GPU-hours on {gpu}: {hours / gpus:.1f} h on {gpus}, beside what the server takes to answer.\n"
        f"Assumed: {share:.0%} of the card's dense bfloat16 rate; a stage up to disruption lets {chained.kept:.0%} "
        f"of its drafts through; {QUESTION} tokens of text a question and {ANSWER} an answer, beside the picture's; "
        f"{PNG} bytes a pixel of PNG; {PERCEPTION / 1e12:g}·10¹² operations to detect and segment in a picture (not "
        "counted, as FLUX's are). Loading models and writing files come on top. Nothing here was run on a GPU."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    top = argparse.ArgumentParser(prog="python -m focusdpo_lib.batch.dip_plan", description=__doc__.split("\n\n")[0])
    top.add_argument("--params", type=Path, default=Path("params/paper/01_dip.yaml"), help="of the run of notebook 01")
    top.add_argument("--gpu", choices=CARDS, default="h200")
    top.add_argument("--gpus", type=int, default=8)
    top.add_argument("--share", type=float, default=Assumed.share, help="of the card's matrix rate")
    top.add_argument("--kept", type=float, default=Chained.kept, help="share of drafts that a stage lets through")
    chosen = top.parse_args(arguments)
    values = params.read_yaml(chosen.params)
    units = params.read_yaml(chosen.params.parent / OPERATIONS)
    settings = {name: params.section(name, values.get(name)) for name in ("synthesis", "captioning", "disruption")}
    chained = Chained(settings["synthesis"].single, settings["synthesis"].double, chosen.kept)
    print(report(costs(settings, units, chained), chosen.gpu, chosen.gpus, chosen.share, chained))


if __name__ == "__main__":
    main()
