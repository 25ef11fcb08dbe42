"""Kinds of prompts and subjects: counts are those of DreamBooth's paper and dataset."""

from collections import Counter
from pathlib import Path

import pytest

from focusdpo_lib.evaluation import kinds
from focusdpo_lib.evaluation.benchmark import Benchmark
from focusdpo_lib.toybox.benchmark import write_benchmark

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the DreamBench photos are not beside the repository")


@pytest.mark.parametrize(
    ("template", "kind"),
    [
        ("a {0} {1} in the jungle", "recontextualised"),
        ("a {0} {1} with a blue house in the background", "recontextualised"),
        ("a {0} {1} in a chef outfit", "accessory"),
        ("a {0} {1} wearing a red hat", "accessory"),
        ("a cube shaped {0} {1}", "property change"),
        ("a red {0} {1}", "property change"),
    ],
)
def test_a_prompt_asks_for_a_place_a_property_or_an_accessory(template, kind):
    assert kinds.of_template(template) == kind


@needs_data
def test_dreambench_has_20_and_5_prompts_for_objects_and_10_10_and_5_for_live_subjects():
    benchmark = Benchmark.load(DATA / "dreambench", "single", "uno")
    found = kinds.of_cases(benchmark)
    counted = Counter(zip(found["subjects"], found["prompt"], strict=True))
    assert counted == {
        **{("object", "recontextualised"): 21 * 20, ("object", "property change"): 21 * 5},
        **{("live", "recontextualised"): 9 * 10, ("live", "accessory"): 9 * 10, ("live", "property change"): 9 * 5},
    }


@needs_data
def test_uno_s_pairs_are_ten_of_objects_ten_of_live_subjects_and_ten_of_both():
    benchmark = Benchmark.load(DATA / "dreambench", "multi", DATA / "uno" / "dreambench_multiip.json")
    found = kinds.of_cases(benchmark)
    assert Counter(found["subjects"]) == {"object + object": 250, "live + live": 250, "live + object": 250}
    asked = Counter(zip(found["subjects"], found["prompt"], strict=True))
    assert asked["live + live", "accessory"] == 100 and asked["object + object", "property change"] == 50
    assert "another wording" not in set(found["prompt"])


def test_the_toybox_has_no_kinds(tmp_path):
    for kind in ("single", "multi"):
        folder = tmp_path / "toybox"
        benchmark = Benchmark.load(folder if folder.exists() else write_benchmark(folder), kind)
        assert kinds.of_cases(benchmark).shape == (300, 0)
