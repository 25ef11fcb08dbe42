"""What a reproduction would cost: operations by hand, and when a small graph ends, drawn by hand."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from focusdpo_lib import params
from focusdpo_lib.batch import plan
from focusdpo_lib.batch.reproduce import plan as jobs_of
from focusdpo_lib.bench import count, units
from focusdpo_lib.bench.cases import Case

ROOT = Path(__file__).parents[1]
# Round numbers of operations; a GPU does 3600 of them an hour.
OF_ONE = {
    "step": {"one": {"sft": 1.0, "dpo": 3.0, "focusdpo": 4.0}, "two": {"sft": 1.0, "dpo": 5.0, "focusdpo": 6.0}},
    "evaluation": {"one": 2.0, "two": 4.0},
    "prepare": {"one": 10.0, "two": 20.0},
    "decode": 7.0,
    "peak_bytes": 66_000_000_000,
    "prepared_bytes": 5_000_000,
}
UNITS = {"flux_uno": OF_ONE, "sdxl_ip": OF_ONE, "score": 0.5}
ASSUMED = plan.Assumed(pairs=1000, validation=100, cases=10, start=0.0)


@pytest.fixture(scope="module")
def jobs():
    """The paper's profile as it is shipped, but for the benchmark's photos."""
    return jobs_of(
        ROOT / "params/paper", Path("results/paper"), ROOT / "notebooks", overrides={"benchmark.folder": "toybox"}
    )


def named(jobs, name):
    return next(job for job in jobs if job.name == name)


def test_a_training_costs_its_steps_what_it_draws_and_the_errors_by_region(jobs):
    """2000 steps of 8 pairs, half with two subjects; 8 images each with one and with two; 100 pairs, 12 times."""
    found = plan.cost(named(jobs, "03_uno_dpo-seed0"), UNITS, ASSUMED)
    assert found.width == 8
    assert found.operations["train"] == 2000 * 8 * (3 + 5) / 2
    assert found.operations["sample"] == 8 * (25 * 2 + 7) + 8 * (25 * 4 + 7)  # FLUX's guidance is an input: one pass
    assert found.operations["grade"] == 100 * (12 * 3 + 15)
    patch = plan.cost(named(jobs, "03_ipap_patchdpo-seed0"), UNITS, ASSUMED)
    assert patch.operations["train"] == pytest.approx(2000 * 8 * 4 * 2 / 3)  # four forwards of a preference step's six


def test_a_run_without_gpus_of_its_own_gets_one_for_each_process(jobs):
    def wide(name, **over):
        return plan.cost(replace(named(jobs, name), overrides={"resources.gpus": 0, **over}), UNITS, ASSUMED).width

    assert wide("03_uno_dpo-seed0", **{"training.processes": 16}) == 16
    assert wide("04_table1", **{"workers.processes": 24}) == 24
    assert plan.cost(named(jobs, "02_masks"), UNITS, ASSUMED).width == 1


def test_a_table_costs_every_row_s_images(jobs):
    """Table 1: the base and three trainings of UNO, the base and four of IPAP, whose guidance takes two passes."""
    found = plan.cost(named(jobs, "04_table1"), UNITS, ASSUMED)
    assert found.operations["sample"] == 10 * 4 * (25 * 2 + 7) + 10 * 5 * (30 * 2 * 2 + 7)
    assert found.operations["score"] == 10 * 9 * 0.5
    assert found.bytes == 10 * (4 * 512**2 + 5 * 1024**2) * 1.5
    two = plan.cost(named(jobs, "05_table2"), UNITS, ASSUMED)
    assert two.operations["sample"] == 10 * 4 * (25 * 4 + 7)


def test_the_ends_are_those_of_a_schedule_drawn_by_hand(jobs):
    """UNO's trainings and Table 2 alone, at a rate that makes every run a round number of hours."""
    few = [job for job in jobs if "uno" in job.name or job.name == "05_table2"]
    work = {name: plan.cost(named(few, name), UNITS, ASSUMED) for name in [job.name for job in few]}
    hours = {name: sum(found.operations.values()) / 3600 for name, found in work.items()}
    prepare = 1000 * 15 / 3600
    table = hours.pop("05_table2")

    def end(gpus, most=8):
        found = plan.tasks(few, UNITS, ASSUMED, rate=1.0, most=min(most, gpus))
        return plan.makespan(found, plan.machines(gpus, most)) / 60

    assert end(1) == pytest.approx(prepare + sum(hours.values()) + table)  # one after the other
    assert end(8) == pytest.approx(end(1) / 8)  # each on all eight
    first, last = hours["03_uno_sft-seed0"], hours["03_uno_focusdpo-seed0"]  # on the machine that SFT leaves
    assert end(16) == pytest.approx((prepare + first + last + table) / 8)
    assert end(24) == end(512) == pytest.approx((prepare + max(hours.values()) + table) / 8)  # no more helps


def test_the_command_says_hours_memory_disk_ends_and_what_is_assumed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    shutil.copytree("params/paper", tmp_path / "paper", ignore=shutil.ignore_patterns(plan.OPERATIONS))
    of_one = {key: value for key, value in OF_ONE.items()}
    (tmp_path / "paper" / plan.OPERATIONS).write_text(
        yaml.safe_dump({"flux_uno": of_one, "sdxl_ip": of_one, "score": 0.5})
    )
    words = ["--profile", "paper", "--params", str(tmp_path), "--gpu", "a100", "--gpus", "1", "8", "--start", "60"]
    assert plan.main(words) == 0
    said = capsys.readouterr().out
    assert "A preference step of flux_uno in bf16 takes 66 GB of the card's 80: fits." in said
    # 10 runs and two preparations of an hour each on one GPU; on eight no two share it either. Pairs: beforehand.
    assert "\n    1 GPUs:     12.0 h\n    8 GPUs:     12.0 h\n" in said
    assert re.search(r"More GPUs do not end before 3\.0 h: prepare (\w+) → 03_\1_\w+-seed0 → 0\d_table\d, each", said)
    assert "Assumed, not measured: 40% of the 312 · 10¹² operations a second of one a100; 10000 train" in said
    assert plan.main(["--profile", "nothing", "--params", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("no plan: ")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--gpus 0", "argument --gpus: 0 is no count: give a whole number, at least 1"),
        ("--each -2", "argument --each: -2 is no count"),
        ("--share 0", "argument --share: 0 is no share: give a number above 0, at most 1"),
        ("--share nan", "nan is no share"),
        ("--share half", "argument --share: half is no share"),
        ("--start inf", "inf are no minutes: give 0 or more"),
        ("--pairs 1e4", "1e4 is no count"),
    ],
)
def test_what_is_no_assumption_is_said_in_one_line(words, says, capsys):
    with pytest.raises(SystemExit):
        plan.main(words.split())
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("text", ["flux_uno: {step: 3}", "score: 1.0", "flux_uno: 1", "[1]", ""])
def test_counts_that_are_not_all_there_are_named(text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    shutil.copytree("params/paper", tmp_path / "paper")
    (tmp_path / "paper" / plan.OPERATIONS).write_text(text)
    assert plan.main(["--params", str(tmp_path)]) == 1
    assert re.fullmatch(r"no plan: .*operations\.yaml .*\n", capsys.readouterr().err)


def test_a_forward_counted_alone_is_the_bench_s(tmp_path, monkeypatch):
    monkeypatch.setattr(count, "_cost", lambda *_: {"operations": 1, "peak_bytes": 1})  # of steps, which take long
    for model in ("flux", "sdxl"):
        case = Case(model, "small", 1, False, "bfloat16")
        assert units.forward(case, tmp_path) == count.counted(case, 1, tmp_path)["forward_operations"]


def test_the_encoders_count_what_their_parameters_say():
    """A forward multiplies with every weight once a token, and attention adds little where there are few tokens."""
    found = units.encoders()
    t5 = 24 * (4 * 4096**2 + 3 * 4096 * 10240)  # four projections and a gated feed-forward a layer
    clip = 12 * (4 * 768**2 + 2 * 768 * 3072)
    assert found["flux_uno"]["text"] == pytest.approx(2 * (512 * t5 + 77 * clip), rel=0.06)
    vit_h = 32 * (4 * 1280**2 + 2 * 1280 * 5120)
    assert found["image"] == pytest.approx(2 * 257 * vit_h, rel=0.05)
    vit_s, vit_b = 12 * (4 * 384**2 + 2 * 384 * 1536), 12 * (4 * 768**2 + 2 * 768 * 3072)
    assert found["score"] == pytest.approx(2 * (197 * vit_s + 50 * vit_b), rel=0.08)


def test_the_shipped_counts_are_read_by_the_strict_loader():
    of = params.read_yaml(ROOT / "params/paper" / plan.OPERATIONS)
    assert of["flux_uno"]["step"]["one"]["dpo"] == pytest.approx(6 * of["flux_uno"]["evaluation"]["one"], rel=0.1)
