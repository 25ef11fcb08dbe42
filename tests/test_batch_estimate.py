"""How long a reproduction takes: sums by hand, the probe on the shipped models, what is said before anything runs."""

import time
from pathlib import Path

import pytest

from focusdpo_lib import provenance
from focusdpo_lib.batch import estimate, reproduce
from focusdpo_lib.batch.estimate import Pace

ROOT = Path(__file__).parents[1]
BOOKS, TOYBOX = ROOT / "notebooks", ROOT / "params" / "toybox"
PACE = Pace(20.0, {"flux_uno": 0.1, "sdxl_ip": 0.2}, {"flux_uno": 0.01, "sdxl_ip": 0.03}, "a machine")
REST = {"start": 10.0, "image": 0.5, "train": 7.0, "table": 3.0, "other": 4.0}


@pytest.mark.parametrize(("objective", "share"), [("sft", 1 / 3), ("patchdpo", 2 / 3), ("dpo", 1), ("focusdpo", 1)])
def test_a_training_takes_its_pairs_its_samples_and_the_rest(objective, share):
    values = {
        "training": {"steps": 50, "batch_size": 6, "gradient_accumulation": 2},
        "objective": {"name": objective},
        "backbone": {"family": "sdxl_ip"},
        "generation": {"steps": 5, "guidance": 3.0},
        "samples": 2,
    }
    expected = 50 * 6 * 2 * share * 0.2 + 4 * 2 * (5 * 2) * 0.03 + 7.0 * 2
    assert estimate.seconds(values, PACE, REST, "train") == pytest.approx(expected)
    assert estimate.families(values) == {"sdxl_ip": "auto"}


def test_a_table_takes_the_images_of_bases_and_adapters_and_their_scores():
    adapters = {"sft": ["a"], "dpo": ["b", "c"]}
    values = {
        "families": {
            "uno": {
                "backbone": {"precision": "float32"},
                "generation": {"steps": 20, "prompts": 2},
                "adapters": adapters,
            },
            "ipap": {"backbone": {"family": "sdxl_ip"}, "generation": {"steps": 10, "guidance": 3.0, "prompts": 2}},
        }
    }
    uno, ipap = 30 * 2 * 4, 30 * 2
    expected = uno * 20 * 0.01 + ipap * 10 * 2 * 0.03 + (3.0 + (uno + ipap) * 0.5) * 2
    assert estimate.seconds(values, PACE, REST, "table") == pytest.approx(expected)
    assert estimate.families(values) == {"flux_uno": "float32", "sdxl_ip": "auto"}


def test_what_neither_trains_nor_samples_is_as_much_slower_as_importing():
    assert estimate.seconds({"run": "main"}, PACE, REST, "other") == pytest.approx(4.0 * 20 / 10)
    assert estimate.families({"run": "main"}) == {}


def test_the_probe_begins_a_process_as_kernels_do_and_says_what_that_took():
    pace = estimate.probe({})
    assert pace.start > 0 and pace.device == provenance.device()["device"]
    assert pace.pair == pace.evaluation == {}


def test_what_the_probe_measures_is_a_step_and_an_evaluation(monkeypatch):
    monkeypatch.setattr(estimate, "PAIRS", 2)
    monkeypatch.setattr(estimate, "IMAGES", 2)
    pace = estimate._measure({"flux_uno": "float32"}, time.time())
    assert pace.pair.keys() == pace.evaluation.keys() == {"flux_uno"}
    assert 0 < pace.evaluation["flux_uno"] < pace.pair["flux_uno"], (
        "a step has six forwards and more, an evaluation one"
    )


def test_a_plan_is_estimated_for_this_machine_and_says_so(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(estimate, "probe", lambda families: asked.append(dict(families)) or PACE)
    jobs = reproduce.plan(TOYBOX, tmp_path, BOOKS, families=["uno"])
    cost = reproduce.costs(TOYBOX)
    found, machine = reproduce.estimated(jobs, cost)
    assert (
        asked == [{"flux_uno": "auto"}]
        and machine == "this machine (a machine: 20 s of imports once, a step up to 2.40 s)"
    )
    minutes = {job.name: job.minutes for job in found}
    steps = {"uno_dpo": 200 * 12 * 0.1, "uno_sft": 100 * 12 * 0.1 / 3}
    slower = 20 / cost["rest"]["start"]
    for name, seconds in steps.items():
        other = 16 * 20 * 0.01 + cost["rest"][f"03_{name}"] * slower
        assert minutes[f"03_{name}-seed0"] == pytest.approx((seconds + other) / 60)
    first = 20 + slower * cost["rest"]["00_start_here"]
    assert minutes["00_start_here"] == pytest.approx(first / 60), "the first run imports for all"
    said = reproduce.announcement(found, cost, machine)
    assert said.startswith(f"10 notebook runs: about {reproduce.span(sum(minutes.values()))} and ")
    assert "by ray on its machines" not in said
    assert "one after the other: by ray on its machines" in reproduce.announcement(found, cost, machine, "ray")
    monkeypatch.setattr(reproduce, "is_complete", lambda job: job.name != "03_uno_sft-seed0")
    found, _ = reproduce.estimated([*jobs, *reproduce.plan(TOYBOX, tmp_path, BOOKS, families=["ipap"])], cost)
    assert asked[1:] == [{"flux_uno": "auto"}], "of what is complete nothing is looked at"
    assert [(job.name, job.minutes) for job in found if job.minutes] == [
        ("03_uno_sft-seed0", minutes["03_uno_sft-seed0"] + 20 / 60)
    ]
    assert reproduce.estimated(jobs, {"machine": "another"}) == (jobs, "another"), "minutes as they are written"
    assert reproduce.estimated([], cost) == ([], cost["machine"]), "nothing left to run, nothing to look at"
