"""Where a row wins: Student's test and Benjamini–Hochberg against SciPy, and counts of false discoveries."""

from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from scipy import stats
from test_evaluation_layouts import MUG, write_benchmark

from focusdpo_lib import plots
from focusdpo_lib.evaluation import wins
from focusdpo_lib.evaluation.benchmark import Benchmark, Case
from focusdpo_lib.evaluation.scores import COLUMNS


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_benchmark(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def single(folder) -> Benchmark:
    """Its live prompts are not those of objects, so that it has kinds of subjects too."""
    benchmark = Benchmark.load(folder, "single")
    return replace(benchmark, prompts=benchmark.prompts | {"live": benchmark.prompts["live"][:2]})


def scored(benchmark: Benchmark, values, metric="dino") -> pd.DataFrame:
    rows = [
        (case.id, 0, case.unit, case.prompt, metric, name, value, 1.0)
        for case, value in zip(benchmark.cases, values, strict=True)
        for name in case.subjects
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def test_a_subject_s_line_is_scipy_s_paired_test_over_its_images(single):
    base, row = np.random.default_rng(0).normal(0.5, 0.1, (2, 6))
    found = wins.compare([scored(single, row)], [scored(single, base)], single, ["dino"])
    for name, at in ((MUG, slice(0, 3)), ("dog", slice(3, 6))):
        line = found[(found["by"] == "subject") & (found["name"] == name)].iloc[0]
        theirs = stats.ttest_rel(row[at], base[at])
        low, high = theirs.confidence_interval()
        assert line[["value", "low", "high", "p"]].tolist() == pytest.approx(
            [(row[at] - base[at]).mean(), low, high, theirs.pvalue]
        )


def test_a_kind_s_line_is_over_subjects_and_seeds_are_averaged_first(single):
    """Cases 0–2 and 3–5 are places, places and a property; means by hand."""
    base = scored(single, [0.0] * 6)
    row = [scored(single, [0.2, 0.4, 0.9, 0.6, 1.0, 0.3]), scored(single, [0.0, 0.2, 0.7, 0.4, 0.8, 0.1])]
    found = wins.compare(row, [base], single, ["dino"]).set_index(["by", "name"])
    assert found.loc[("prompt", "recontextualised"), "value"] == pytest.approx((0.2 + 0.7) / 2)
    assert found.loc[("prompt", "property change"), "value"] == pytest.approx((0.8 + 0.2) / 2)
    assert found.loc[("subjects", "live"), "value"] == pytest.approx((0.5 + 0.9 + 0.2) / 3)
    assert found.loc[("prompt", "recontextualised"), "count"] == 2
    assert np.isnan(found.loc[("subjects", "live"), "p"])  # one live subject: nothing is known of others
    theirs = stats.ttest_1samp([0.2, 0.7], 0)
    assert found.loc[("prompt", "recontextualised"), "p"] == pytest.approx(theirs.pvalue)


def test_pairs_that_share_subjects_have_wider_intervals_than_independent_ones(single):
    names = [f"s{n}" for n in range(8)]
    pairs = [(a, b) for n, a in enumerate(names) for b in names[n + 1 :]]
    subjects = {name: replace(single.subjects["dog"], name=name) for name in names}
    prompts = ["a dog and a dog in the jungle", "a red dog and a red dog"]
    cases = [
        Case(f"{n:04d}", prompt, pair, ()) for n, (pair, prompt) in enumerate((p, q) for p in pairs for q in prompts)
    ]
    multi = replace(single, kind="multi", subjects=subjects, cases=tuple(cases))
    of = dict(zip(names, np.random.default_rng(1).normal(0, 1, 8), strict=True))
    values = [of[a] + of[b] for a, b in pairs for _ in prompts]
    found = wins.compare([scored(multi, values)], [scored(multi, [0.0] * len(values))], multi, ["dino"])
    line = found[found["by"] == "prompt"].iloc[0]
    plain = stats.ttest_1samp(values[::2], 0).confidence_interval()
    assert line["high"] - line["low"] > 1.5 * (plain.high - plain.low)


def test_the_correction_is_scipy_s_and_passes_over_what_is_unknown():
    p = np.random.default_rng(0).uniform(0, 1, 40) ** 3
    p[[3, 17]] = np.nan
    known = ~np.isnan(p)
    ours = wins.benjamini_hochberg(p)
    assert ours[known] == pytest.approx(stats.false_discovery_control(p[known])) and np.isnan(ours[~known]).all()
    assert wins.benjamini_hochberg(np.array([0.01, 0.04, 0.03])) == pytest.approx([0.03, 0.04, 0.04])  # by hand


def test_rows_of_other_images_are_not_compared(single):
    one = scored(single, range(6))
    with pytest.raises(ValueError, match="scored on different images"):
        wins.compare([one], [one[one["case"] != "0003"]], single, ["dino"])
    same = wins.compare([one], [one], single, ["dino"])
    assert (same["value"] == 0).all() and (same["p"].dropna() == 1).all()


def test_the_forest_fills_what_is_distinguishable_after_the_correction(single):
    lines = [
        {"metric": m, "by": "subject", "name": name, "value": v, "low": v - 0.1, "high": v + 0.1, "adjusted": q}
        for m in ("dino", "clip_t")
        for name, v, q in (("a$b", 0.3, 0.01), ("c+d", -0.4, 0.04), ("e", 0.2, 0.06))
    ]
    lines += [
        {"metric": m, "by": "prompt", "name": "accessory", "value": 0, "low": -1, "high": 1, "adjusted": np.nan}
        for m in ("dino", "clip_t")
    ]
    figure = plots.forest(pd.DataFrame(lines), "UNO+FocusDPO", "UNO")
    left = figure.axes[0]
    assert [text.get_text() for text in left.get_yticklabels()] == ["accessory", r"a\$b", "e", "c + d"]
    marks = {}
    for container in left.containers:
        line = container.lines[0]
        marks[round(line.get_xdata()[0], 2)] = (line.get_marker(), to_hex(line.get_markerfacecolor()).upper())
    assert marks == {0.3: (">", "#0072B2"), -0.4: ("<", "#D55E00"), 0.2: ("o", "#FFFFFF"), 0: ("o", "#FFFFFF")}
    assert figure._suptitle.get_text().startswith("4 of 8 differences are filled")
    figure.draw_without_rendering()
    assert not plt.get_fignums()
