"""Where a row wins: its paired differences from another row, subject by subject and kind of prompt by kind.

A subject's difference is the mean over its images, with Student's interval of their spread; a kind's that over subjects
(over pairs that share some: the dyadic-robust one, as in the tables). So many comparisons find some difference by
chance. Their p values are adjusted by Benjamini and Hochberg (1995), over all of a table: of the differences that are
called one, 5 % are expected to be none. That is what a list of where to look needs. Holm's correction, by which with
95 % none is, would with ten prompts a subject hardly name a subject; who claims one subject should draw more prompts.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from focusdpo_lib.evaluation import kinds, statistics
from focusdpo_lib.evaluation.benchmark import Benchmark

METRICS = ("dino", "clip_i", "clip_t")
LEVEL = 0.05  # of the differences called one, the share that is expected to be none
SUBJECT = "subject"


def compare(
    row: Sequence[pd.DataFrame], base: Sequence[pd.DataFrame], benchmark: Benchmark, metrics: Sequence[str] = METRICS
) -> pd.DataFrame:
    """Scores of two rows, a table a training seed each, of the benchmark's cases →

    a line a metric and group: metric, by ("subject", or what `kinds.of_cases` has), name, value, low, high (95 %, of
    this line alone), p, adjusted, count (of images, or of subjects for a kind). `value` is row − base.
    """
    lines = []
    for metric in metrics:
        apart = _apart(row, base, metric)
        lines += [
            {"metric": metric, "by": SUBJECT, "name": unit, **_student(of.to_numpy())}
            for unit, of in apart.groupby("subjects", sort=False)["difference"]
        ]
        lines += _by_kind(apart, benchmark, metric)
    found = pd.DataFrame(lines)
    return found.assign(adjusted=benjamini_hochberg(found["p"].to_numpy()))


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """p values → the smallest rates of false discoveries at which each would be one; NaN stays, and is not counted."""
    adjusted, known = np.full(len(p), np.nan), np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known])]
    scaled = p[order] * len(order) / np.arange(1, len(order) + 1)
    adjusted[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1)
    return adjusted


def _apart(row: Sequence[pd.DataFrame], base: Sequence[pd.DataFrame], metric: str) -> pd.DataFrame:
    """subjects, case, difference: of every image, each row's mean over its training seeds."""
    key = ["subjects", "case", "index"]
    means = [
        pd.concat([statistics.per_image(scores, metric).set_index(key)["numerator"] for scores in seeds])
        .groupby(level=key, sort=False)
        .mean()
        for seeds in (row, base)
    ]
    if set(means[0].index) != set(means[1].index):
        raise ValueError(f"the rows were scored on different images ({metric}): score them alike")
    return (means[0] - means[1].reindex(means[0].index)).rename("difference").reset_index()


def _by_kind(apart: pd.DataFrame, benchmark: Benchmark, metric: str) -> list[dict]:
    """A line a kind: the mean over the subjects (or pairs) of their means over its cases."""
    of_cases, lines = kinds.of_cases(benchmark), []
    for by in of_cases:
        for name, of in apart.groupby(apart["case"].map(of_cases[by]), sort=False):
            means = of.groupby("subjects", sort=False)["difference"].mean()
            found = _dyadic(means, benchmark.subjects_of)
            lines.append({"metric": metric, "by": by, "name": name, **found})
    return lines


def _student(values: np.ndarray) -> dict:
    """Mean, interval and p of independent values; of one alone neither is known."""
    count = len(values)
    error = values.std(ddof=1) / np.sqrt(count) if count > 1 else np.nan
    return _line(values.mean(), error, count - 1, count)


def _dyadic(means: pd.Series, subjects: Mapping[str, Sequence[str]]) -> dict:
    """The same of units that may share subjects."""
    units = [subjects[unit] for unit in means.index]
    if all(len(names) == 1 for names in units) or len(units) < 2:
        return _student(means.to_numpy())
    dyads = statistics.Dyads.of(units)
    margin = dyads.margin((means - means.mean()).to_numpy() / len(means))
    error = margin / stats.t.ppf((1 + statistics.LEVEL) / 2, dyads.freedom)
    return _line(means.mean(), error, dyads.freedom, len(means))


def _line(value: float, error: float, freedom: float, count: int) -> dict:
    if np.isnan(error):
        return {"value": value, "low": np.nan, "high": np.nan, "p": np.nan, "count": count}
    margin = stats.t.ppf((1 + statistics.LEVEL) / 2, freedom) * error
    p = 2 * stats.t.sf(abs(value) / error, freedom) if error > 0 else float(value == 0)
    return {"value": value, "low": value - margin, "high": value + margin, "p": p, "count": count}
