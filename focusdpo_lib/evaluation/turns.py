"""How far each switch of the protocol moves the scores of one image: what a table's caption is worth reading for."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from focusdpo_lib.evaluation import scores, statistics
from focusdpo_lib.evaluation.benchmark import Benchmark, BenchmarkError, Case
from focusdpo_lib.evaluation.encoders import Encoders
from focusdpo_lib.params import CUSTOM, Evaluation, Generation

TOKEN = "sks"  # DreamBooth's, where the settings name none
SHOWN = {"dino": "DINO", "clip_i": "CLIP-I", "clip_t": "CLIP-T"}
# A switch of Evaluation, each of its values in turn, and what it says.
TURNS: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("references", ("all", "used", "unused"), "photos that the image is scored against"),
    ("subjects", ("mean", "min"), "what counts of two subjects"),
    ("clip_prompt", ("class", "token", "scene"), "what CLIP-T reads: the prompt, with a token, without its subjects"),
    ("clip_precision", ("float32", "bfloat16"), "arithmetic of CLIP"),
    ("clip_text_weight", (1.0, 2.5), "factor of CLIP-T"),
    ("clip_text_clamp", (True, False), "whether CLIP-T is at least 0"),
)


def turned(
    benchmark: Benchmark,
    case: Case,
    images: Path,
    settings: Evaluation,
    generation: Generation,
    load: Callable[[Evaluation], Encoders],
) -> pd.DataFrame:
    """The scores of <images>/<case>_0.png with every switch turned once, the others as `settings` has them.

    A line a switch and value: switch, value, what, DINO, CLIP-I, CLIP-T, and how far each moved from the first line,
    which is `settings` itself. `load` gives the encoders for settings. A turn that the case does not allow is left out,
    and so is `region`, which needs a detector.
    """
    one = generation.model_copy(update={"images_per_prompt": 1})
    alone = replace(
        benchmark, cases=(case,), subjects={name: benchmark.subjects[name] for name in dict.fromkeys(case.subjects)}
    )
    given = settings.model_copy(update={"protocol": CUSTOM, "reader": None, "subjects": _one(settings.subjects)})
    at_hand = load(given)
    lines = [("as set", "", "", _scores(alone, images, at_hand, given, one))]
    for switch, values, what in TURNS:
        for value in (value for value in values if value != getattr(given, switch)):
            if switch == "subjects" and len(case.subjects) < 2:
                continue
            token = {"unique_token": given.unique_token or TOKEN} if value == "token" else {}
            other = given.model_copy(update={switch: value, **token})
            try:
                found = _scores(alone, images, load(other) if switch == "clip_precision" else at_hand, other, one)
            except BenchmarkError:  # a subject of one photo, say, has no other to be scored against
                continue
            lines.append((switch, str(value), what, found))
    first = lines[0][3]
    return pd.DataFrame(
        {"switch": switch, "turned to": value, "what it is": what}
        | {label: found[label] for label in first}
        | {f"{label} moved": found[label] - first[label] for label in first}
        for switch, value, what, found in lines
    )


def _one(subjects: str) -> str:
    return "mean" if subjects == "both" else subjects


def _scores(
    alone: Benchmark, images: Path, encoders: Encoders, settings: Evaluation, generation: Generation
) -> dict[str, float]:
    table = scores.score_images(alone, images, encoders, settings, generation)
    found = {}
    for metric, label in SHOWN.items():
        values = statistics.per_image(table, metric, settings.subjects if metric != "clip_t" else "mean")
        found[label] = float(values["numerator"].iloc[0])
    return found
