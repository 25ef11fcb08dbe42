"""How sure a mean is, and the paired difference of two runs on the same subjects.

The unit is what a case shows: the subject of a single-subject benchmark, the *pair* of subjects of a two-subject one.
Every score of a run becomes two sums a unit, numerator and denominator, and every estimate is
Σ numerator / Σ denominator over the units: a macro mean (denominators 1), a mean over images, or a rate.

Subjects are drawn anew with replacement (bootstrap). The plain percentile interval of 30 draws of a normal covers the
truth in 93.7 %, not 95: it takes the spread for that of the sample and knows the normal's quantile where Student's is
due. So its tails are made smaller until it is as wide as Student's (Hesterberg 2015, the expanded percentile interval):
measured at 30 units, it covers 95 % of normal scores and 93 % of exponential ones.

Pairs that share a subject are not independent: with UNO's 30 pairs, an interval that takes them so covers 77 % where a
score is the sum of what its subjects are like. Two-subject tables therefore have the dyadic-robust standard error
(Fafchamps and Gubert 2007), corrected for few subjects with Student's quantile at Satterthwaite's degrees of freedom
(Bell and McCaffrey 2002): measured on UNO's pairs, 95 to 98 % of normal scores and 93 to 95 % of exponential ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from focusdpo_lib.params import Evaluation

LEVEL = 0.95
RATES = ("leakage", "leaning")  # of which each score has a weight of its own
COSINE, SHARE, ANYTHING = (-1.0, 1.0), (0.0, 1.0), (-np.inf, np.inf)
RANGES = {"dino": COSINE, "clip_i": COSINE, "attribute_accuracy": SHARE, "leakage": SHARE}  # in which a mean must lie


class Estimate(NamedTuple):
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def contains_zero(self) -> bool:
        return self.low <= 0 <= self.high


def per_image(scores: pd.DataFrame, metric: str, subjects: str = "mean") -> pd.DataFrame:
    """One row an image: subjects (the unit), case, index, numerator, denominator.

    Several subjects count as their mean or their minimum ("mean", "min"); rates always as their ratios of sums.
    """
    rows = scores[scores["metric"] == metric]
    key = ["subjects", "case", "index"]
    if metric in RATES:
        sums = rows.assign(numerator=rows["value"] * rows["weight"], denominator=rows["weight"])
        return sums.groupby(key, sort=False)[["numerator", "denominator"]].sum().reset_index()
    reduced = rows.groupby(key, sort=False)["value"].agg(subjects).reset_index(name="numerator")
    return reduced.assign(denominator=1.0)


def units(seeds: list[pd.DataFrame], metric: str, average: str = "subject", subjects: str = "mean") -> pd.DataFrame:
    """Numerator and denominator a unit (index: subjects, sorted), averaged over the runs of several training seeds.

    `average`: "subject" gives every unit the same weight, "image" every image. ValueError if the runs' units differ.
    """
    tables = []
    for scores in seeds:
        sums = per_image(scores, metric, subjects).groupby("subjects")[["numerator", "denominator"]].sum()
        if average == "subject" and metric not in RATES:
            sums = sums.div(sums["denominator"], axis=0)
        tables.append(sums)
    if any(not table.index.equals(tables[0].index) for table in tables):
        raise ValueError(
            f"the training seeds of one row were scored on different subjects ({metric}): score them alike"
        )
    return sum(tables) / len(tables)


def components(scores: pd.DataFrame, metric: str, subjects: str = "mean") -> dict[str, float] | None:
    """Shares of the variance of a score that lie between subjects, prompts of a subject and images of a prompt.

    By the mean squares of a nested analysis of variance (Searle 1971), a negative part counted as 0. None where no
    prompt has several images, or not all have as many.
    """
    values = per_image(scores, metric, subjects)
    values["value"] = values["numerator"] / values["denominator"]
    prompt = values.groupby(["subjects", "case"], sort=False)["value"].agg(["mean", "count"]).reset_index()
    subject = prompt.groupby("subjects", sort=False)["mean"].agg(["mean", "count"])
    images, prompts = prompt["count"].iloc[0], subject["count"].iloc[0]
    uneven = prompt["count"].nunique() > 1 or subject["count"].nunique() > 1
    if images < 2 or prompts < 2 or len(subject) < 2 or uneven:
        return None
    of_case = values.merge(prompt, on=["subjects", "case"])
    of_subject = prompt.merge(subject, on="subjects", suffixes=("", "_subject"))
    within = ((of_case["value"] - of_case["mean"]) ** 2).sum() / (len(prompt) * (images - 1))
    between = images * ((of_subject["mean"] - of_subject["mean_subject"]) ** 2).sum() / (len(prompt) - len(subject))
    among = images * prompts * subject["mean"].var()
    parts = {
        "subjects": max((among - between) / (images * prompts), 0.0),
        "prompts": max((between - within) / images, 0.0),
        "images": within,
    }
    total = sum(parts.values())
    return {name: float(part / total) for name, part in parts.items()} if total else None


def resamples(count: int, draws: int, seed: int = 0) -> np.ndarray:
    """Indices (draws, count) of units drawn with replacement; the same for every row, which pairs their differences."""
    return np.random.default_rng(seed).integers(0, count, (draws, count))


@dataclass(frozen=True)
class Dyads:
    """Pairs of subjects of which some share one: what their standard error and its degrees of freedom need."""

    shared: np.ndarray  # (units, units) of 0 and 1: whether two units have a subject in common, as each with itself
    inflation: float  # of the variance: the plain one is too small where subjects are few
    freedom: float

    @classmethod
    def of(cls, subjects: Sequence[Sequence[str]]) -> "Dyads":
        """From the subjects of every unit. The correction is exact where a unit's score is the sum of its subjects'.

        Where each unit shares with every other, nothing can be learned of it: they count as independent, with one
        degree of freedom.
        """
        names = sorted({name for unit in subjects for name in unit})
        shows = np.array([[name in unit for name in names] for unit in subjects], float)
        together = shows @ shows.T  # a model of the covariance, up to a factor
        shared = (together > 0).astype(float)
        centred = np.eye(len(shows)) - 1 / len(shows)
        weighed = centred @ shared @ centred @ together
        if (expected := np.trace(weighed)) < 1e-9:
            return cls(np.eye(len(shows)), len(shows) / max(len(shows) - 1, 1), 1.0)
        return cls(shared, together.sum() / expected, expected**2 / np.trace(weighed @ weighed))

    def margin(self, influence: np.ndarray) -> float:
        """Half the interval of Σ influence, the units' parts in an estimate's error; never below that of
        independent units."""
        count = len(influence)
        alone = (influence**2).sum() * count / max(count - 1, 1)
        together = influence @ self.shared @ influence * self.inflation
        return stats.t.ppf((1 + LEVEL) / 2, self.freedom) * np.sqrt(max(alone, together))


def uncertainty(
    units: pd.DataFrame, subjects: Mapping[str, Sequence[str]], settings: Evaluation
) -> "np.ndarray | Dyads":
    """What `estimate` and `difference` take for the units of a table: draws, or the dyads where a unit is a pair."""
    of_units = [subjects.get(name, (name,)) for name in units.index]
    if any(len(names) > 1 for names in of_units):
        return Dyads.of(of_units)
    return resamples(len(units), settings.bootstrap, settings.seed)


def estimate(table: pd.DataFrame, by: "np.ndarray | Dyads", within: tuple[float, float] = ANYTHING) -> Estimate:
    """The estimate of one row with its interval; `by` from `resamples` or `uncertainty`.

    The interval ends where the truth must: `within` cuts off what no mean can be, and so no truth that it covered. The
    mean too: a copy's cosine with itself may be rounded to more than 1.
    """
    return Estimate(*(min(max(each, within[0]), within[1]) for each in _interval([(table, 1)], by)))


def difference(table: pd.DataFrame, base: pd.DataFrame, by: "np.ndarray | Dyads") -> Estimate:
    """This row minus the base row on the same units, with the interval of the paired difference."""
    if not table.index.equals(base.index):
        only = sorted(set(table.index) ^ set(base.index))
        raise ValueError(f"a paired difference needs the same subjects in both rows, these are in one only: {only}")
    return _interval([(table, 1), (base, -1)], by)


def _interval(parts: list[tuple[pd.DataFrame, int]], by: "np.ndarray | Dyads") -> Estimate:
    """Of a sum of rows, each with its sign."""
    value = sum(sign * _ratio(table) for table, sign in parts)
    if isinstance(by, Dyads):
        margin = by.margin(sum(sign * _influence(table) for table, sign in parts))
        return Estimate(float(value), float(value - margin), float(value + margin))
    samples = sum(sign * _ratio(table, by) for table, sign in parts)
    low, high = np.quantile(samples, [tail := _tail(by.shape[1]), 1 - tail])
    return Estimate(float(value), float(low), float(high))


def _ratio(table: pd.DataFrame, drawn: np.ndarray | None = None) -> np.ndarray:
    """Σ numerator / Σ denominator over all units, or over each draw (draws, units) → (draws,)."""
    numerator, denominator = table["numerator"].to_numpy(), table["denominator"].to_numpy()
    if drawn is None:
        return numerator.sum() / denominator.sum()
    return numerator[drawn].sum(1) / denominator[drawn].sum(1)


def _influence(table: pd.DataFrame) -> np.ndarray:
    """(units,) → how far each moves the estimate from what the others say, to first order; they sum to 0."""
    return ((table["numerator"] - _ratio(table) * table["denominator"]) / table["denominator"].sum()).to_numpy()


def _tail(count: int) -> float:
    """The share of draws beyond each end of an interval of so many units (Hesterberg 2015)."""
    if count < 2:
        return 0.0
    student = stats.t.ppf((1 + LEVEL) / 2, count - 1)
    return float(stats.norm.cdf(-student * np.sqrt(count / (count - 1))))
