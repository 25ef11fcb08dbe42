"""Of which kind a case is, in DreamBench's terms: what its prompt asks for, and what its subjects are.

DreamBooth's 25 prompts for objects are 20 that put the subject elsewhere and 5 that change a property of it; those for
live subjects are 10, 5, and 10 that dress it. A benchmark whose prompts are all of one kind has none to tell apart.
"""

import re

import pandas as pd

from focusdpo_lib.evaluation import uno_cases
from focusdpo_lib.evaluation.benchmark import Benchmark

RECONTEXTUALISED, PROPERTY, ACCESSORY = "recontextualised", "property change", "accessory"
UNKNOWN = "another wording"  # a prompt that is none of the dataset's
ASKED, SHOWN = "prompt", "subjects"  # the two ways to sort cases


def of_template(template: str) -> str:
    """What a prompt such as "a red {0} {1}" asks for."""
    before, _, after = template.replace("{0} {1}", "{}").partition("{}")
    if before.strip().lower() not in ("", "a", "an", "the"):
        return PROPERTY
    return ACCESSORY if re.match(r"\s+(wearing\b|in an? [\w\s]*\boutfit\b)", after) else RECONTEXTUALISED


def of_cases(benchmark: Benchmark) -> pd.DataFrame:
    """A row a case (index: its id): `prompt` and `subjects` ("object", "live + object"), where these differ at all."""
    rows = {case.id: (_asked(benchmark, case), _shown(benchmark, case.subjects)) for case in benchmark.cases}
    found = pd.DataFrame.from_dict(rows, orient="index", columns=[ASKED, SHOWN])
    if benchmark.prompts["object"] == benchmark.prompts["live"]:  # the benchmark makes no difference between them
        found = found.drop(columns=SHOWN)
    return found[[name for name in found if found[name].nunique() > 1]]


def _asked(benchmark: Benchmark, case) -> str:
    words = [benchmark.subjects[name].class_name for name in case.subjects]
    for template in dict.fromkeys([*benchmark.prompts["object"], *benchmark.prompts["live"]]):
        if case.prompt == uno_cases.prompt(template, words, benchmark.prompts):
            return of_template(template)
    return UNKNOWN


def _shown(benchmark: Benchmark, names: tuple[str, ...]) -> str:
    words = [benchmark.subjects[name].class_name for name in names]
    return " + ".join("live" if word in uno_cases.LIVE else "object" for word in words)
