"""Means and intervals against SciPy and plain loops; tables whose cells are worked out by hand."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import bootstrap

from focusdpo_lib import params
from focusdpo_lib.evaluation import published, rows, statistics, tables
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


def test_the_interval_is_scipy_s_percentile_bootstrap():
    values = draw()
    drawn = statistics.resamples(30, 20000, 0)
    ours = statistics.estimate(statistics.units([single(values)], "dino"), drawn)
    theirs = bootstrap((values,), np.mean, n_resamples=20000, method="percentile", rng=1).confidence_interval
    width = theirs.high - theirs.low
    assert ours.value == pytest.approx(values.mean())
    assert abs(ours.low - theirs.low) < 0.02 * width and abs(ours.high - theirs.high) < 0.02 * width


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
    assert samples[11] <= ours.low <= samples[13] and samples[486] <= ours.high <= samples[488]  # 2.5 % and 97.5 %
    # Pairing removes the spread between subjects: the interval is far narrower than that of either row.
    alone = statistics.estimate(tables_[0], drawn)
    assert (ours.high - ours.low) < 0.3 * (alone.high - alone.low)


def test_a_difference_needs_the_same_subjects():
    with pytest.raises(ValueError, match=r"in one only: \['s02'\]"):
        statistics.difference(*(statistics.units([single(v)], "dino") for v in ([1, 2, 3], [1, 2])), np.array([[0]]))


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


def two_subjects(shift: float) -> pd.DataFrame:
    rows = []
    for i, unit in enumerate(("a+b", "c+d")):
        for metric in ("dino", "clip_i", "attribute_accuracy"):
            rows += [(unit, str(i), metric, s, v + shift) for s, v in zip(unit.split("+"), (0.4, 0.6), strict=True)]
        rows += [(unit, str(i), "clip_t", "", 0.3), (unit, str(i), "leakage", "a", 0.5, 2.0)]
    return frame(rows, kind="multi")


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
