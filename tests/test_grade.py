"""Grades of Eq. 3 against known masks. Expected values by hand, and the ROC area from scipy's Mann–Whitney U."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import mannwhitneyu
from tiny_sdxl import load_tiny_sdxl, write_tiny_sdxl
from tiny_training import load_tiny, tiny_pairs

from focusdpo_lib import grade, params
from focusdpo_lib.masks import CorrespondenceTap
from focusdpo_lib.training import draw_view_noise, generator, noised_views, prepare


def test_where_the_misses_go_by_hand():
    # Six tokens: A owns 0 and 1, B owns 2 to 4, token 5 is background. K is 2 and 3.
    prior = torch.tensor([[[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0.0]]])
    scores = torch.tensor([[[9, 1, 8, 0, 0, 2], [9, 0, 8, 1, 0, 7.0]]])  # A takes 0 and 2; B takes 0, 2 and 5
    found = grade.scores_against(scores, prior)
    assert found["hit"].tolist() == [[0.5, pytest.approx(1 / 3)]]
    assert found["chance"].tolist() == [[pytest.approx(2 / 6), 0.5]]
    assert found["other"].tolist() == [[0.5, pytest.approx(1 / 3)]]
    assert found["background"].tolist() == [[0, pytest.approx(1 / 3)]]
    # A: 9 beats all four others, 1 beats two of them.
    assert found["auc"][0, 0].item() == pytest.approx((4 + 2) / 8)


def test_the_area_under_the_roc_curve_is_mann_and_whitney_s_with_ties():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, (3, 2, 40)).astype(np.float32)
    prior = (rng.uniform(size=scores.shape) < 0.3).astype(np.float32)
    areas = grade.scores_against(torch.from_numpy(scores), torch.from_numpy(prior))["auc"]
    for at in np.ndindex(3, 2):
        own, others = scores[at][prior[at] == 1], scores[at][prior[at] == 0]
        expected = mannwhitneyu(own, others).statistic / (len(own) * len(others))
        assert areas[at].item() == pytest.approx(expected, abs=1e-6)


def test_random_scores_hit_by_chance_and_perfect_ones_always():
    draw = torch.Generator().manual_seed(0)
    prior = torch.zeros(500, 2, 36)
    prior[:, 0, :9], prior[:, 1, 20:26] = 1, 1
    random = grade.scores_against(torch.rand(prior.shape, generator=draw), prior)
    perfect = grade.scores_against(prior, prior)
    assert random["hit"].mean(0).tolist() == pytest.approx([9 / 36, 6 / 36], abs=0.02)
    assert random["auc"].mean().item() == pytest.approx(0.5, abs=0.02)
    assert perfect["hit"].min() == 1 and perfect["auc"].min() == 1 and perfect["other"].max() == 0


@pytest.fixture(scope="module")
def backbones(tiny_flux, tmp_path_factory):
    sdxl = write_tiny_sdxl(tmp_path_factory.mktemp("models"))
    return {"flux_uno": load_tiny(tiny_flux), "sdxl_ip": load_tiny_sdxl(sdxl, precision="float32")}


@pytest.mark.parametrize("family", ["flux_uno", "sdxl_ip"])
def test_all_readings_of_one_pass_get_what_each_would_alone(backbones, family):
    backbone = backbones[family]
    data = prepare(backbone, tiny_pairs(3), params.Masks())
    choices = {"features": ["block_output", "query"], "pool": ["subject", "all"]}
    readings = grade.readings(backbone, params.Masks(), **choices)
    table = grade.grade(backbone, data, readings, [0.3, 0.9], batch=2)
    layers = len(backbone.attention_layers("all"))
    sets = layers + (2 if family == "flux_uno" else 1)
    assert len(table) == len(readings) * 2 * 2 == sets * 4 * 2 * 2
    assert set(table.loc[table.references == 2, "subjects"]) == {6}
    reading = "layers == '1' and features == 'query' and pool == 'all' and t == 0.9"
    for count, pairs in data.items():
        row = table.query(f"{reading} and references == {count}")
        source = generator(0, 0)
        noise, t = torch.randn(pairs.win.shape, generator=source), torch.full((len(pairs),), 0.9)
        views = draw_view_noise(pairs.conditioning, len(pairs), source)
        tap = CorrespondenceTap([1], features="query", samples=slice(0, len(pairs)), grid=pairs.token_grid)
        backbone.predict(
            backbone.noised(pairs.win, noise, t), t, noised_views(backbone, pairs.conditioning, views, t), taps=tap
        )
        expected = grade.scores_against(tap.result(), pairs.prior_tokens)
        row = table.query(
            "layers == '1' and features == 'query' and pool == 'all' and t == 0.9 and references == @count"
        )
        for name in grade.GRADES:
            assert row[name].item() == pytest.approx(expected[name].mean().item(), abs=2e-3), name


def test_a_single_layer_is_named_by_its_number_and_impossible_readings_are_left_out(backbones):
    flux = grade.readings(backbones["flux_uno"], params.Masks())
    assert [reading.layers for reading in flux] == ["double", "all", [0], [1], [2], [3]]
    choices = {
        "features": ["query", "query_key"],
        "pool": ["subject", "all"],
        "reference_tokens": ["own", "image_keys"],
    }
    found = grade.readings(backbones["sdxl_ip"], params.Masks(), **choices)
    keys = [(r.features, r.pool) for r in found if r.reference_tokens == "image_keys"]
    assert set(keys) == {("query_key", "all")}


# --- The toybox's choice ---


TOYBOX = Path(__file__).parents[1] / "params" / "toybox"
CHOSEN = {"uno": ("02_masks", "03_uno_focusdpo", "search"), "ipap": ("03_ipap_focusdpo", "search_ipap")}


@pytest.mark.parametrize("family", CHOSEN)
def test_the_toybox_reads_eq_3_as_its_grade_recommends(family):
    best = grade.recommended(pd.read_csv(TOYBOX / f"masks_grade_{family}.csv"))
    used = [params.read_yaml(TOYBOX / f"{name}.yaml")["masks"] for name in CHOSEN[family]]
    if family == "ipap":
        used.append(params.read_yaml(TOYBOX / "02_masks.yaml")["ipap"]["masks"])
    for values in used:
        typed = params.section("masks", values)
        assert {name: getattr(typed, name) for name in grade.READING} == best


def test_a_reading_of_more_layers_goes_before_one_that_is_hardly_better():
    def table(single, every):
        rows = [{"layers": "3", "hit": single}, {"layers": "all", "hit": every}, {"layers": "5", "hit": 0.2}]
        shared = {"features": "query", "reference_tokens": "own", "pool": "subject", "similarity": "cosine", "t": 0.5}
        return pd.DataFrame([row | shared for row in rows])

    assert grade.recommended(table(0.805, 0.8))["layers"] == "all"
    assert grade.recommended(table(0.82, 0.8))["layers"] == [3]
