"""Means and intervals against SciPy and plain loops; tables whose cells are worked out by hand."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import bootstrap, norm, t

from focusdpo_lib import params
from focusdpo_lib.evaluation import published, rows, statistics, tables, uno_cases
from focusdpo_lib.evaluation.scores import COLUMNS

SETTINGS = params.section("evaluation", {"bootstrap": 400})


GENERATION = {"steps": 20, "guidance": 1.0}


def frame(rows, kind="single", generation=GENERATION, **evaluation) -> pd.DataFrame:
    """Scores from (unit, case, metric, subject, value[, weight]) with a protocol."""
    full = [
        (case, 0, unit, "", metric, subject, value, *(weight or [1.0]))
        for unit, case, metric, subject, value, *weight in rows
    ]
    table = pd.DataFrame(full, columns=list(COLUMNS))
    settings = {"references": "all", "clip_text_weight": 1.0} | evaluation
    table.attrs["protocol"] = {
        "benchmark": f"{kind} 0123",
        "encoders": {"dino": "d", "clip": "c", "reader": None},
        "evaluation": settings,
        "generation": generation,
    }
    return table


def single(values, metric="dino", **options) -> pd.DataFrame:
    """One case a unit, its value given."""
    return frame([(f"s{i:02d}", f"{i:04d}", metric, "s", v) for i, v in enumerate(values)], **options)


def draw(count=30, seed=0):
    return np.random.default_rng(seed).normal(0.7, 0.1, count)


# --- reducing scores to units ---


def test_per_subject_every_subject_weighs_alike_and_per_image_every_image():
    scores = frame([("a", "0", "dino", "a", 1.0), ("b", "1", "dino", "b", 0.0), ("b", "2", "dino", "b", 0.5)])
    means = {how: statistics.units([scores], "dino", how) for how in ("subject", "image")}
    drawn = np.arange(2)[None]
    assert statistics.estimate(means["subject"], drawn).value == 0.625  # (1 + 0.25) / 2
    assert statistics.estimate(means["image"], drawn).value == 0.5  # (1 + 0 + 0.5) / 3


def test_two_subjects_count_as_their_mean_or_as_the_minimum_of_every_image():
    scores = frame(
        [
            ("a+b", "0", "dino", "a", 0.2),
            ("a+b", "0", "dino", "b", 0.6),
            ("a+b", "1", "dino", "a", 0.8),
            ("a+b", "1", "dino", "b", 0.4),
        ]
    )
    assert statistics.units([scores], "dino", subjects="mean")["numerator"].item() == pytest.approx(0.5)
    assert statistics.units([scores], "dino", subjects="min")["numerator"].item() == pytest.approx(0.3)


def test_leakage_is_a_ratio_of_sums_and_not_a_mean_of_rates():
    scores = frame(
        [
            ("a+b", "0", "leakage", "a", 1.0, 1.0),
            ("a+b", "0", "leakage", "b", 0.25, 4.0),
            ("c+d", "1", "leakage", "c", 0.0, 5.0),
        ]
    )
    units = statistics.units([scores], "leakage")
    assert units.loc["a+b"].tolist() == [2, 5] and units.loc["c+d"].tolist() == [0, 5]
    assert statistics.estimate(units, np.array([[0, 1]])).value == 0.2  # 2 of 10; the mean of rates would be 0.417


def test_training_seeds_are_averaged_inside_each_unit():
    units = statistics.units([single([0.2, 0.4]), single([0.4, 1.0])], "dino")
    assert units["numerator"].tolist() == pytest.approx([0.3, 0.7])
    with pytest.raises(ValueError, match="scored on different subjects"):
        statistics.units([single([0.2, 0.4]), single([0.2])], "dino")


# --- intervals ---


# Of 30 units: the share of draws in an interval that is to be as wide as Student's (Hesterberg 2015).
EXPANDED = 1 - 2 * norm.cdf(-t.ppf(0.975, 29) * (30 / 29) ** 0.5)


def test_the_interval_is_scipy_s_percentile_bootstrap():
    values = draw()
    drawn = statistics.resamples(30, 20000, 0)
    ours = statistics.estimate(statistics.units([single(values)], "dino"), drawn)
    theirs = bootstrap((values,), np.mean, n_resamples=20000, method="percentile", rng=1, confidence_level=EXPANDED)
    theirs = theirs.confidence_interval
    width = theirs.high - theirs.low
    assert ours.value == pytest.approx(values.mean())
    assert abs(ours.low - theirs.low) < 0.02 * width and abs(ours.high - theirs.high) < 0.02 * width


def test_a_copy_s_cosine_that_rounds_to_more_than_one_lies_in_its_interval():
    units = statistics.units([single([1 + 1e-7] * 3)], "dino")
    found = statistics.estimate(units, statistics.resamples(3, 100, 0), statistics.RANGES["dino"])
    assert found.low <= found.value <= found.high == 1


def test_the_interval_of_a_rate_is_scipy_s_for_a_ratio_of_sums():
    random = np.random.default_rng(2)
    possible = random.integers(2, 9, 30)
    leaked = random.binomial(possible, 0.3)
    rows = [
        (f"p{i:02d}", f"{i}", "leakage", "s", n / m, float(m))
        for i, (n, m) in enumerate(zip(leaked, possible, strict=True))
    ]
    ours = statistics.estimate(statistics.units([frame(rows)], "leakage"), statistics.resamples(30, 20000, 0))

    def ratio(n, m, axis):
        return n.sum(axis) / m.sum(axis)

    options = {"n_resamples": 20000, "method": "percentile", "paired": True, "vectorized": True, "rng": 1}
    options["confidence_level"] = EXPANDED
    theirs = bootstrap((leaked, possible), ratio, **options).confidence_interval
    assert ours.value == pytest.approx(leaked.sum() / possible.sum())
    assert abs(ours.low - theirs.low) < 0.02 * (theirs.high - theirs.low)
    assert abs(ours.high - theirs.high) < 0.02 * (theirs.high - theirs.low)


def test_the_paired_difference_is_a_plain_loop_over_the_same_draws():
    base, gain = draw(12), np.random.default_rng(5).normal(0.02, 0.01, 12)
    drawn = statistics.resamples(12, 500, 7)
    tables_ = [statistics.units([single(v)], "dino") for v in (base + gain, base)]
    ours = statistics.difference(*tables_, drawn)
    samples = sorted(sum(gain[i] for i in row) / 12 for row in drawn)
    assert ours.value == pytest.approx(gain.mean())
    tail = norm.cdf(-t.ppf(0.975, 11) * (12 / 11) ** 0.5) * 499  # of 12 units, as a place among the samples
    assert samples[int(tail)] <= ours.low <= samples[int(tail) + 1]
    assert samples[498 - int(tail)] <= ours.high <= samples[499 - int(tail)]
    # Pairing removes the spread between subjects: the interval is far narrower than that of either row.
    alone = statistics.estimate(tables_[0], drawn)
    assert (ours.high - ours.low) < 0.3 * (alone.high - alone.low)


def test_a_difference_needs_the_same_subjects():
    with pytest.raises(ValueError, match=r"in one only: \['s02'\]"):
        statistics.difference(*(statistics.units([single(v)], "dino") for v in ([1, 2, 3], [1, 2])), np.array([[0]]))


def coverage(draw, interval, rounds: int = 2000) -> float:
    """In which share of simulated tables of a true mean of 0 the interval holds it."""
    random = np.random.default_rng(11)
    found = [interval(draw(random)) for _ in range(rounds)]
    return np.mean([estimate.low <= 0 <= estimate.high for estimate in found])


def table_of(values) -> pd.DataFrame:
    return pd.DataFrame({"numerator": values, "denominator": 1.0})


def test_of_thirty_subjects_the_interval_covers_what_it_says():
    """1.6 standard errors of 2000 rounds are 0.8 %; the plain percentile interval covers 93.7 %."""
    drawn = statistics.resamples(30, 1000, 0)
    covered = coverage(lambda random: random.normal(size=30), lambda v: statistics.estimate(table_of(v), drawn))
    assert 0.942 < covered < 0.958


# --- pairs that share subjects ---


def test_the_dyadic_standard_error_is_a_double_loop_over_pairs_that_share_a_subject():
    pairs = [("a", "b"), ("b", "c"), ("d", "e"), ("c", "f"), ("g", "h"), ("h", "a")]
    values = np.array([0.3, 0.5, 0.9, 0.2, 0.6, 0.35])
    by = statistics.Dyads.of(pairs)
    error = values - values.mean()
    variance = 0.0
    for i, one in enumerate(pairs):
        for j, other in enumerate(pairs):
            if set(one) & set(other):
                variance += error[i] * error[j] / 36
    ours = statistics.estimate(table_of(values), by)
    expected = t.ppf(0.975, by.freedom) * (variance * by.inflation) ** 0.5
    assert variance * by.inflation > (error**2).sum() / 30  # what independent pairs would give
    assert (ours.low, ours.high) == pytest.approx((values.mean() - expected, values.mean() + expected))
    base = values - [0.1, 0.05, 0.02, 0.08, 0.01, 0.07]
    gain = values - base
    paired = statistics.difference(table_of(values), table_of(base), by)
    alone = statistics.estimate(table_of(gain), by)
    assert tuple(paired) == pytest.approx(tuple(alone))


def test_pairs_that_share_nothing_have_student_s_interval():
    values = draw(12)
    ours = statistics.estimate(table_of(values), statistics.Dyads.of([(f"a{i}", f"b{i}") for i in range(12)]))
    half = t.ppf(0.975, 11) * values.std(ddof=1) / 12**0.5
    assert (ours.low, ours.high) == pytest.approx((values.mean() - half, values.mean() + half))


def test_a_rate_s_dyadic_interval_is_that_of_its_linear_part():
    """Of Σn / Σd, each unit's error is (n − rate · d) / Σd, as a jackknife shows to first order."""
    pairs = [(f"a{i}", f"b{i}") for i in range(8)]
    random = np.random.default_rng(3)
    denominator = random.integers(3, 9, 8).astype(float)
    units = pd.DataFrame({"numerator": random.binomial(denominator.astype(int), 0.4), "denominator": denominator})
    ours = statistics.estimate(units, statistics.Dyads.of(pairs))
    rates = [units.drop(i)["numerator"].sum() / units.drop(i)["denominator"].sum() for i in range(8)]
    jackknife = (7 / 8 * ((np.array(rates) - np.mean(rates)) ** 2).sum()) ** 0.5
    assert (ours.high - ours.low) / 2 == pytest.approx(t.ppf(0.975, 7) * jackknife, rel=0.1)


def test_on_uno_s_pairs_the_interval_covers_where_scores_are_what_subjects_are_like():
    names = sorted({name for pair in uno_cases.PAIRS for name in pair})
    shows = np.array([[name in pair for name in names] for pair in uno_cases.PAIRS], float)
    by = statistics.Dyads.of(uno_cases.PAIRS)
    independent = statistics.Dyads.of([(str(i),) for i in range(30)])
    for own, least, most in ((0.0, 0.94, 0.97), (1.0, 0.93, 0.97)):  # noise of a pair's own beside its subjects'

        def scores(random, own=own):
            return shows @ random.normal(size=30) + own * random.normal(size=30)

        assert least < coverage(scores, lambda v: statistics.estimate(table_of(v), by)) < most
    assert coverage(scores, lambda v: statistics.estimate(table_of(v), independent)) < 0.88  # as if none were shared


def test_where_every_pair_shares_with_every_other_one_degree_of_freedom_is_left():
    by = statistics.Dyads.of([("a", "b"), ("a", "c"), ("a", "d")])
    ours = statistics.estimate(table_of([0.1, 0.2, 0.4]), by)
    assert (ours.high - ours.low) / 2 == pytest.approx(t.ppf(0.975, 1) * np.std([0.1, 0.2, 0.4], ddof=1) / 3**0.5)


def test_table_2_takes_its_pairs_as_pairs():
    def pair(a, b, value):
        return [(f"{a}+{b}", f"{a}{b}", "dino", s, value) for s in (a, b)]

    rows = [*pair("a", "b", 0.3), *pair("b", "c", 0.5), *pair("d", "e", 0.6), *pair("f", "g", 0.4)]
    result = tables.table({"uno": frame(rows, kind="multi")}, SETTINGS).iloc[0]
    by = statistics.Dyads.of([("a", "b"), ("b", "c"), ("d", "e"), ("f", "g")])
    assert (result["low"], result["high"]) == pytest.approx(statistics.estimate(table_of([0.3, 0.5, 0.6, 0.4]), by)[1:])


@pytest.mark.parametrize(
    ("metric", "near", "low", "high"),
    [("leakage", 0.0, 0.0, None), ("attribute_accuracy", 1.0, None, 1.0), ("dino", -1.0, -1.0, None),
     ("clip_i", 1.0, None, 1.0), ("leaning", 0.0, None, None), ("clip_t", 0.0, None, None)],
)  # fmt: skip
def test_an_interval_ends_where_a_rate_or_a_cosine_must(metric, near, low, high):
    """Nine pairs lie at an end and one a tenth away from it: mean ± t · s/√10 reaches past that end, by hand."""
    inwards = -0.1 if near > 0 else 0.1
    lines = [
        (f"a{i}+b{i}", f"{i}", metric, "" if metric == "clip_t" else f"{x}{i}", near + inwards * (i == 0))
        for i in range(10)
        for x in ("a" if metric == "clip_t" else "ab")
    ]
    named = [(f"a{i}+b{i}", f"{i}", "other", f"{x}{i}", 0.0) for i in range(10) for x in "ab"]
    result = tables.table({"uno": frame([*lines, *named], kind="multi")}, SETTINGS).iloc[0]
    half = t.ppf(0.975, 9) * 0.1 / 10**0.5 / 10**0.5  # s² = 0.1² · (1/10) · (9/10) · (10/9)
    assert result["value"] == pytest.approx(near + inwards / 10) and half > 0.02
    assert result["low"] == pytest.approx(result["value"] - half if low is None else low)
    assert result["high"] == pytest.approx(result["value"] + half if high is None else high)


def test_a_difference_is_cut_nowhere():
    def of(values):
        return frame([(f"s{i}", f"{i}", "attribute_accuracy", f"s{i}", v) for i, v in enumerate(values)])

    result = tables.table({"uno": of([0.0] * 6), "uno_dpo": of([1.0] * 5 + [0.5])}, SETTINGS)
    line = result[result["row"] == "UNO+DPO"].iloc[0]
    assert line["high"] == 1.0 and line["difference_high"] == pytest.approx(line["difference"] + 1 / 12, abs=0.05)
    assert line["difference_low"] < line["difference"]


def test_pairs_of_one_class_word_are_left_out_once_more():
    rows = {name: two_subjects(shift, alike=["c+d"]) for name, shift in (("uno", 0), ("uno_dpo", 0.1))}
    rows["uno_dpo"].loc[rows["uno_dpo"]["subjects"] == "c+d", "value"] += 0.2  # gains that are not counted
    result = tables.table(rows, SETTINGS)
    dino = result[result["column"] == "DINO (mean)"].set_index("row")
    assert dino.loc["UNO+DPO", "value"] == pytest.approx(0.7) and dino.loc["UNO+DPO", "distinct"] == pytest.approx(0.6)
    assert dino.loc["UNO+DPO", "distinct_difference"] == pytest.approx(0.1) and set(dino["distinct_units"]) == {1}
    page = tables.markdown(result)
    assert "The subjects of 1 of the 2 pairs share a class word" in page
    without = page.split("Without pairs that share a class word (1 of 2)")[1].split(published.HEADING)[0]
    assert "0.600 [0.600, 0.600]" in without and "0.700 [" not in without
    assert "share a class word" not in tables.markdown(tables.table({"uno": two_subjects(0)}, SETTINGS))


# --- tables ---


def test_table_1_by_hand():
    rows = {
        "uno_focusdpo": [single([0.8, 0.9, 1.0]), single([0.8, 0.9, 0.7])],
        "uno": single([0.6, 0.7, 0.8]),
        "uno_sft": single([0.7, 0.7, 0.7]),
        "copy": single([0.9, 0.9, 0.9], generation=None),
    }
    result = tables.table(rows, SETTINGS)
    assert result["row"].tolist() == ["copy of the reference", "UNO", "UNO+SFT", "UNO+FocusDPO"]
    assert result["value"].tolist() == pytest.approx([0.9, 0.7, 0.7, 0.85])
    assert result["seeds"].tolist() == [1, 1, 1, 2] and set(result["units"]) == {3}
    # FocusDPO's mean over its seeds is 0.8, 0.9, 0.85: gains of 0.2, 0.2, 0.05, so any draw's mean lies in [0.05, 0.2].
    focus = result.iloc[3]
    assert focus["difference"] == pytest.approx(0.15)
    assert 0.0499 <= focus["difference_low"] < 0.15 < focus["difference_high"] <= 0.2001
    assert result["difference"].isna().tolist() == [True, True, False, False]  # neither an anchor nor the base has one
    assert tables.wide(result).loc["copy of the reference", "DINO"] == "0.900 [0.900, 0.900]"
    shown = tables.differences(result)["DINO"]
    assert shown["UNO+SFT"] == "not distinguishable" and shown["UNO+FocusDPO"].startswith("+0.150 [+0.0")


GUIDED = {"steps": 20, "guidance": 2.0}


def two_families(**changes) -> dict:
    """UNO at 0.7 in the mean and IPAP at 0.3, each with an adapter that gains 0.1 on every subject."""
    return {
        "copy": single([0.9, 0.9, 0.9], generation=None),
        "uno": single([0.6, 0.7, 0.8]),
        "uno_dpo": single([0.7, 0.8, 0.9]),
        "ipap": single([0.2, 0.3, 0.4], generation=GUIDED),
        "ipap_dpo": single([0.3, 0.4, 0.5], **{"generation": GUIDED} | changes),
    }


def test_focusdpo_s_difference_from_its_own_family_s_dpo_and_how_rows_were_trained():
    rows = two_families() | {
        "uno_focusdpo": single([0.75, 0.85, 0.95]),  # 0.05 above DPO on every subject
        "ipap_focusdpo": single([0.31, 0.39, 0.5], generation=GUIDED),  # as good as DPO in the mean
    }
    how = {"uno_focusdpo": {"learning rate": "0.0001", "β": "300"}, "uno_dpo": {"learning rate": "0.0003"}}
    result = tables.table(rows, SETTINGS, how)
    found = result.set_index("row")[["from_dpo", "from_dpo_low", "from_dpo_high"]].dropna()
    assert list(found.index) == ["UNO+FocusDPO", "IPAP+FocusDPO"]
    assert found.loc["UNO+FocusDPO"].tolist() == pytest.approx([0.05] * 3)
    assert found.loc["IPAP+FocusDPO", "from_dpo"] == pytest.approx(0)
    for form in (tables.text, tables.markdown, tables.html):
        page = form(result)
        assert "Paired difference of FocusDPO from DPO, same subjects (95 % interval)" in page
        third = page.split("Paired difference of FocusDPO from DPO")[1].split("How the rows were trained")
        assert "+0.050 [+0.050, +0.050]" in third[0] and "not distinguishable" in third[0]
        trained = third[1].split(published.HEADING)[0]
        assert "UNO+FocusDPO" in trained and "300" in trained and "learning rate" in trained
        assert "–" in trained.split("UNO+DPO")[1]  # nothing is said of its β
    without = tables.text(tables.table(two_families(), SETTINGS))
    assert "from DPO" not in without and "were trained" not in without


def test_a_difference_is_from_the_row_s_own_base():
    result = tables.table(two_families(), SETTINGS).set_index("row")
    assert list(result.index) == ["copy of the reference", "UNO", "UNO+DPO", "IPAP", "IPAP+DPO"]
    assert result["difference"].dropna().to_dict() == pytest.approx({"UNO+DPO": 0.1, "IPAP+DPO": 0.1})
    assert result["family"].tolist() == ["", "UNO", "UNO", "IPAP", "IPAP"]
    without = {name: scores for name, scores in two_families().items() if name != "ipap"}
    alone = tables.table(without, SETTINGS).set_index("row")["difference"]
    assert math.isnan(alone["IPAP+DPO"])  # UNO is no stand-in for a base that is missing
    assert alone["UNO+DPO"] == pytest.approx(0.1)


def test_families_may_be_sampled_differently_and_the_table_says_how():
    result = tables.table(two_families(), SETTINGS)
    said = " ".join(tables.text(result).split())
    assert "UNO and IPAP were sampled with steps = 20. UNO was sampled with guidance = 1.0. IPAP was" in said
    assert "Paired difference from the row's own base, UNO or IPAP, same subjects" in said
    uno = {name: scores for name, scores in two_families().items() if "ipap" not in name}
    said = " ".join(tables.text(tables.table(uno, SETTINGS)).split())
    assert "UNO was sampled with steps = 20, guidance = 1.0." in said and "Paired difference from UNO, same" in said


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"generation": GENERATION}, "'ipap' and 'ipap_dpo' .* generation.guidance is 2.0 in the one and 1.0"),
        ({"generation": {"steps": 25, "guidance": 2.0}}, "'ipap' and 'ipap_dpo' .* generation.steps is 20 .* and 25"),
        ({"references": "unused"}, "'copy' and 'ipap_dpo' .* evaluation.references is 'all' in the one and 'unused'"),
        ({"kind": "multi"}, "'copy' and 'ipap_dpo' .* benchmark is 'single 0123' in the one and 'multi 0123'"),
    ],
)
def test_within_a_family_sampling_must_agree_and_everything_else_between_families_too(changed, message):
    with pytest.raises(tables.ProtocolError, match=message):
        tables.table(two_families(**changed), SETTINGS)


def test_seeds_are_named_together():
    rows = {"uno": single([0.5, 0.6])} | {f"uno_{o}": [single([0.5, 0.6])] * 3 for o in ("sft", "dpo")}
    assert "Mean over 3 training seeds: UNO+SFT, UNO+DPO. Measured" in tables.markdown(tables.table(rows, SETTINGS))


def test_every_row_of_the_paper_that_we_have_bears_its_name():
    ours = set(rows.ROWS.values()) - set(rows.ANCHORS.values())
    theirs = {name for name in published.TABLE_1 if name.startswith(("UNO", "IPAP"))}
    assert ours - theirs == {"UNO+PatchDPO"} and theirs <= ours


def two_subjects(shift: float, alike=()) -> pd.DataFrame:
    rows = []
    for i, unit in enumerate(("a+b", "c+d")):
        for metric in ("dino", "clip_i", "attribute_accuracy"):
            rows += [(unit, str(i), metric, s, v + shift) for s, v in zip(unit.split("+"), (0.4, 0.6), strict=True)]
        rows += [(unit, str(i), "clip_t", "", 0.3), (unit, str(i), "leakage", "a", 0.5, 2.0)]
    found = frame(rows, kind="multi")
    found.attrs["same_class_units"] = list(alike)
    return found


def test_table_2_shows_mean_and_minimum_over_subjects():
    rows = {"uno": two_subjects(0), "uno_dpo": two_subjects(0.1)}
    shown = tables.wide(tables.table(rows, SETTINGS))
    assert list(shown.columns) == [
        *("DINO (mean)", "DINO (min)", "CLIP-I (mean)", "CLIP-I (min)", "CLIP-T"),
        *("attribute accuracy (mean)", "attribute accuracy (min)", "leakage rate"),
    ]
    dpo = shown.loc["UNO+DPO"]
    assert dpo["DINO (mean)"].startswith("0.600") and dpo["DINO (min)"].startswith("0.500")
    assert dpo["leakage rate"].startswith("0.500")
    only = tables.wide(tables.table(rows, SETTINGS.model_copy(update={"subjects": "min"})))
    assert "DINO (mean)" not in only.columns and "DINO (min)" in only.columns


def test_a_metric_that_a_row_lacks_is_a_dash():
    rows = {
        "photos": single([0.9, 0.8], generation=None),
        "uno": pd.concat([single([0.5, 0.5]), single([0.3, 0.3], "clip_t")]),
    }
    rows["uno"].attrs = single([0.5]).attrs
    assert tables.wide(tables.table(rows, SETTINGS)).loc["real photos", "CLIP-T"] == "–"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"references": "unused"}, r"'uno' and 'uno_dpo' .* evaluation.references is 'all' in the one and 'unused'"),
        ({"kind": "multi"}, r"benchmark is 'single 0123' in the one and 'multi 0123'"),
        ({"generation": {"steps": 25, "guidance": 1.0}}, r"generation.steps is 20 in the one and 25"),
    ],
)
def test_runs_measured_differently_do_not_share_a_table(changed, message):
    with pytest.raises(tables.ProtocolError, match=message):
        tables.table({"uno": single([0.5]), "uno_dpo": single([0.5], **changed)}, SETTINGS)


def test_an_anchor_is_free_of_generation_settings_but_not_of_the_rest():
    tables.table({"uno": single([0.5]), "copy": single([0.5], generation=None)}, SETTINGS)
    with pytest.raises(tables.ProtocolError, match="clip_text_weight"):
        tables.table({"uno": single([0.5]), "copy": single([0.5], generation=None, clip_text_weight=2.5)}, SETTINGS)
    bare = single([0.5])
    bare.attrs = {}
    with pytest.raises(tables.ProtocolError, match="'uno' do not say how they were measured"):
        tables.table({"uno": bare}, SETTINGS)


# --- published numbers ---


@pytest.mark.parametrize("render", [tables.text, tables.markdown, tables.html])
def test_published_numbers_stand_under_their_own_heading_with_the_note_on_0802(render):
    shown = render(tables.table({"uno": single([0.5, 0.7]), "uno_dpo": single([0.6, 0.8])}, SETTINGS))
    ours, theirs = shown.split(published.HEADING)
    assert "0.802" not in ours and "0.600" in ours and "UNO+FocusDPO" not in ours
    flat = " ".join(theirs.split())
    assert "0.802" in flat and "lies above the oracle (0.774" in flat and "pasting the reference (0.817)" in flat
    assert "evaluation.references = all" in " ".join(ours.split())  # a table names its protocol
    assert "Paired difference from UNO" in ours


def test_markdown_is_a_pipe_table_of_equal_columns():
    shown = tables.markdown(tables.table({"uno": single([0.5, 0.7]), "uno_dpo": single([0.6, 0.8])}, SETTINGS))
    for block in shown.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1


def test_published_tables_have_the_paper_s_rows_and_the_copy_follows_from_the_oracle():
    one, two = published.published("single"), published.published("multi")
    assert one.shape == (15, 3) and two.shape == (8, 3)
    assert one.loc["UNO+FocusDPO"].tolist() == [0.802, 0.842, 0.316] and two.loc["UNO", "DINO"] == 0.542
    photos = [6] * 10 + [5] * 18 + [4] * 2
    for metric, oracle in published.REAL_PHOTOS.items():
        copy = np.mean([1 / n + (1 - 1 / n) * oracle for n in photos])
        assert math.isclose(copy, published.COPY[metric], abs_tol=6e-4)


def test_a_difference_shows_as_many_digits_as_it_takes_to_see_that_it_is_not_zero():
    assert tables._signed(statistics.Estimate(0.0123, 0.008, 0.0166)) == "+0.012 [+0.008, +0.017]"
    assert tables._signed(statistics.Estimate(-0.0012, -0.0021, -0.0003)) == "-0.0012 [-0.0021, -0.0003]"
    assert tables._signed(statistics.Estimate(0.0001, 0.00004, 0.0002)) == "+0.00010 [+0.00004, +0.00020]"
    assert tables._signed(statistics.Estimate(-3e-6, -8e-6, -1e-6)) == "-3e-06 [-8e-06, -1e-06]"
