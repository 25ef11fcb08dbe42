"""`make reproduce` and the search, on tiny untrained models: real notebooks, real runs, both tables at the end."""

import json
import shutil
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
import yaml
from tiny_models import write_tiny_models

from focusdpo_lib import comparison, notebooks, params, reproduce, runs, search
from focusdpo_lib.evaluation.attributes import attribute_accuracy
from focusdpo_lib.evaluation.benchmark import Benchmark
from focusdpo_lib.evaluation.encoders import Encoders, to_pixels
from focusdpo_lib.params import ParameterError
from focusdpo_lib.toybox.reader import Reader
from focusdpo_lib.toybox.world import Identity

ROOT = Path(__file__).parents[1]
BOOKS = ROOT / "notebooks"
TRAINED = ("03_focusdpo", "03_sft")  # notebooks 00 to 02 have tests of their own; each kernel takes seconds to start


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def overrides(models):
    encoders = {f"evaluation.{kind}": str(models / kind) for kind in ("dino", "clip", "reader")}
    patches = str(models / "dino")
    return {"backbone.model": str(models / "flux_uno"), "objective.patch_encoder": patches, **encoders}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The smoke profile with two of its four objectives."""
    folder = tmp_path_factory.mktemp("params") / "smoke"
    folder.mkdir()
    for name in (*TRAINED, "04_table1", "05_table2", "reproduce", "search"):
        shutil.copy(ROOT / "params" / "smoke" / f"{name}.yaml", folder)
    return folder


@pytest.fixture(scope="module")
def ran(tmp_path_factory, smoke, overrides):
    """One run of everything: the results' folder, the exit code and what was printed."""
    results, said = tmp_path_factory.mktemp("results") / "smoke", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **_: said.append(" ".join(map(str, words))))
        code = reproduce.reproduce(smoke, results, BOOKS, 1, overrides)
    return results, code, "\n".join(said)


def printed(results, name):
    cells = nbformat.read(results / "notebooks" / name / f"{name}.ipynb", 4).cells
    outputs = [o for cell in cells if cell.cell_type == "code" for o in cell.outputs]
    return "".join(o.get("text", "") for o in outputs if o.get("name") != "stderr")


def test_everything_runs_and_both_tables_are_printed_with_their_figures(ran):
    results, code, said = ran
    assert code == 0, said
    assert said.startswith("4 notebook runs: about ") and "GB of memory" in said.splitlines()[0]
    assert "Table 1: single subject" in said and "Table 2: two subjects" in said
    for figure in ("table1/samples.png", "table2/leakage.png"):
        path = results / "tables" / figure
        assert str(path) in said and path.stat().st_size > 5000
    assert {"03_focusdpo-seed0", "03_sft-seed0", "04_table1", "05_table2"} == {
        path.name for path in (results / "notebooks").iterdir() if (path / f"{path.name}.html").exists()
    }


def test_the_tables_hold_anchors_base_and_every_trained_objective(ran):
    for name in ("table1", "table2"):
        rows = pd.read_csv(ran[0] / "tables" / name / "table.csv")
        expected = ["real photos", "oracle (real renders)", "copy of the reference", "base", "+SFT", "+FocusDPO"]
        assert rows["row"].drop_duplicates().tolist() == expected
        compared = rows[rows["difference"].notna()]["row"].unique().tolist()
        assert compared == ["+SFT", "+FocusDPO"]  # anchors are no methods: nothing to pair with the base


def test_the_table_says_what_was_measured_on_and_the_paper_stands_apart(ran):
    text = (ran[0] / "tables" / "table1" / "table.md").read_text()
    ours, paper = text.split("Published by the paper on the real DreamBench (not measured here)")
    assert "+FocusDPO" in ours and "UNO+FocusDPO" in paper and "0.802" not in ours


def test_a_reference_holds_tables_figures_pages_and_what_they_cost(ran, tmp_path):
    kept = reproduce.keep_reference(ran[0], tmp_path / "reference")
    assert (kept / "table1" / "table.md").read_text() == (ran[0] / "tables" / "table1" / "table.md").read_text()
    assert (kept / "table2" / "leakage.png").exists() and (kept / "notebooks" / "05_table2.html").exists()
    trainings = [page.name for page in (kept / "notebooks").glob("03_*")]
    assert trainings == ["03_focusdpo-seed0.html"]  # the last row, whose curves show all objectives
    text = (kept / "README.md").read_text()
    assert "4 notebook runs" in text and "GB of memory" in text and "| 05_table2 | " in text
    assert str(tmp_path) not in text and str(ran[0]) not in text


def test_a_second_run_skips_everything(ran, smoke, overrides, capsys):
    assert reproduce.reproduce(smoke, ran[0], BOOKS, 1, overrides) == 0
    said = capsys.readouterr().out
    assert "4 of them complete already" in said and said.count("complete already, skipped") == 4
    assert "Table 1" in said


def test_the_executed_notebooks_show_curves_of_the_objectives_beside_them(ran):
    first, second = printed(ran[0], "03_sft-seed0"), printed(ran[0], "03_focusdpo-seed0")
    assert "shown: sft\n" in first and "shown: sft, focusdpo\n" in second
    assert "the package agrees with the hand-sized example" in first


def test_a_missing_adapter_is_left_out_with_a_sentence_that_says_how_to_make_it(ran):
    found, missing = comparison.adapters(ran[0], {"sft": ["sft-seed0", "sft-seed1"], "dpo": ["dpo-seed0"]})
    assert {row: [f.name for f in folders] for row, folders in found.items()} == {"sft": ["sft-seed0"]}
    assert "sft-seed1" in missing[0] and "+DPO" in missing[1]
    assert all("Run notebook 03 with 03_" in sentence for sentence in missing)


def test_attribute_shares_average_to_attribute_accuracy(ran):
    """The table's attribute accuracy is the mean over the five attributes: two ways to one number."""
    results, settings = ran[0], params.Evaluation()
    torch.manual_seed(0)
    reader = Reader(width=16).eval()  # untrained: what it reads is sometimes right
    benchmark = Benchmark.load(results / "benchmark" / "test-0", "multi").first_prompts(1)
    images = results / "generation" / "multi" / "oracle"
    few = params.section("generation", {"prompts": 1})
    encoders = Encoders(None, None, reader.read)
    shares = comparison.attribute_table(benchmark, {"oracle": [images]}, encoders, settings, few)
    found = reader.read(to_pixels([images / "images" / f"{case.id}_0.png" for case in benchmark.cases]))
    expected = [[benchmark.subjects[name].attributes for name in case.subjects] for case in benchmark.cases]
    accuracy = [value for f, e in zip(found, expected, strict=True) for value in attribute_accuracy(f, e)]
    assert shares["value"].mean() == pytest.approx(sum(accuracy) / len(accuracy))


# --- the plan, before anything runs ---


def test_the_toybox_plan_is_every_notebook_in_order_and_the_tables_come_after_every_training():
    jobs = reproduce.plan(ROOT / "params" / "toybox", Path("results/toybox"), BOOKS, seeds=2)
    names = [job.name for job in jobs]
    assert [name[:2] for name in names] == ["00", "01", "02", *["03"] * 8, "04", "05"]
    trainings = {name for name in names if name.startswith("03")}
    assert set(jobs[-1].after) == set(jobs[-2].after) == trainings
    assert jobs[-1].overrides["adapters"]["focusdpo"] == ["focusdpo-seed0", "focusdpo-seed1"]
    seeds = {job.name: job.overrides["training.seed"] for job in jobs if job.name.startswith("03_dpo")}
    assert seeds == {"03_dpo-seed0": 0, "03_dpo-seed1": 1}


def test_training_values_stand_in_the_yaml_as_in_the_parameters_cell():
    """Opened in JupyterLab the notebook trains what `make reproduce` trains."""
    for yaml_name, book in {
        "03_focusdpo": "03_training",
        "04_table1": "04_table1_single_subject",
        "05_table2": "05_table2_multi_subject",
    }.items():
        cell = notebooks.parameters(BOOKS / f"{book}.ipynb")
        file = params.read_yaml(ROOT / "params" / "toybox" / f"{yaml_name}.yaml")
        assert cell.keys() == file.keys()
        for name in cell:
            same = [params.section(name, v[name]) if name in params.SECTIONS else v[name] for v in (cell, file)]
            assert same[0] == same[1], f"{name} of {yaml_name}.yaml"


def test_missing_weights_are_one_sentence_before_anything_runs(smoke, tmp_path, capsys):
    gone = {"backbone.model": str(tmp_path / "flux_uno")}
    assert reproduce.reproduce(smoke, tmp_path / "results", BOOKS, 1, gone) == 1
    said = capsys.readouterr().out
    assert said.startswith("nothing was run: ") and str(tmp_path / "flux_uno") in said and "make toybox-weights" in said
    assert not (tmp_path / "results").exists()


def test_an_unknown_profile_is_one_sentence_and_exit_code_1(tmp_path, capsys):
    assert reproduce.main(["--profile", "nonsense", "--params", str(tmp_path)]) == 1
    assert "nonsense holds no NN_*.yaml" in capsys.readouterr().out


def write_notebook(path, *cells):
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    made.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(made, path)


def test_a_failed_job_gives_exit_code_1_and_holds_up_the_tables(tmp_path, capsys):
    profile = tmp_path / "params"
    profile.mkdir()
    for name in ("03_dpo", "04_table1"):
        (profile / f"{name}.yaml").touch()
    shutil.copy(ROOT / "params" / "smoke" / "reproduce.yaml", profile)
    write_notebook(tmp_path / "03_training.ipynb", "run = 'x'\ntraining = {}", "raise ValueError('out of luck')")
    write_notebook(tmp_path / "04_table.ipynb", "adapters = {}", "print(adapters)")
    assert reproduce.reproduce(profile, tmp_path / "results", tmp_path) == 1
    said = capsys.readouterr().out
    assert "03_dpo-seed0: FAILED" in said and "out of luck" in said
    assert "04_table1: not run, for it needs 03_dpo-seed0" in said and "Table 1" not in said


# --- the search ---


@pytest.fixture(scope="module")
def searched(tmp_path_factory, models):
    folder = tmp_path_factory.mktemp("search")
    values = params.read_yaml(ROOT / "params" / "smoke" / "search.yaml")
    values["backbone"]["model"] = str(models / "flux_uno")
    values["evaluation"] |= {kind: str(models / kind) for kind in ("dino", "clip", "reader")}
    (folder / "search.yaml").write_text(yaml.safe_dump(values))
    return folder, search.search(folder / "search.yaml", folder / "results")


def test_the_search_tries_every_trial_and_scores_the_base_too(searched):
    folder, table = searched
    assert table["objective"].tolist() == ["base", "dpo", "sft"]
    parts = [f"{metric}_{kind}" for metric in ("dino", "attribute_accuracy") for kind in ("single", "multi")]
    assert table["score"].tolist() == pytest.approx(table[parts].mean(axis=1).tolist(), abs=1e-4)
    assert search.best(table)["objective"].tolist() == ["base", "dpo", "sft"]
    assert (folder / "search_results.csv").exists()


def test_the_search_never_sees_a_test_identity(searched):
    written = list((searched[0] / "results" / "benchmark").iterdir())
    assert [path.name for path in written] == ["validation-0"]
    identities = json.loads((written[0] / "attributes.json").read_text()).values()
    assert {Identity(**attributes).split for attributes in identities} == {"validation"}


def test_a_search_goes_on_with_what_is_complete(searched):
    folder, table = searched
    markers = {path: path.stat().st_mtime_ns for path in (folder / "results").rglob(runs.MARKER)}
    assert (
        len(markers) == 1 + 2 + 3 * 2 * 2
    )  # pairs; trainings; images and scores of base and trials, one and two subjects
    assert search.search(folder / "search.yaml", folder / "results", ["sft"]).equals(
        table.iloc[[0, 2, 1]].reset_index(drop=True)
    )
    assert markers == {path: path.stat().st_mtime_ns for path in (folder / "results").rglob(runs.MARKER)}


@pytest.mark.parametrize(
    ("objectives", "says"),
    [
        ({"sft": {"learning_rate": [1e-4], "steps": [2]}, "patchdpo": {"learning_rate": [1e-4], "steps": [4]}},
         "differ in their budget"),
        ({"sft": {"learning_rate": [1e-4], "beta": [1.0], "steps": [2]}}, "objectives.sft .* needs a list each"),
        ({"sft": {"learning_rate": ["1e-4"], "steps": [2]}}, "training.learning_rate = '1e-4'"),
        ({"simpo": {"learning_rate": [1e-4], "steps": [2]}}, "objective.name = 'simpo'"),
        (None, "needs 'objectives'"),
    ],
)  # fmt: skip
def test_a_search_that_is_not_fair_or_not_typed_is_refused(objectives, says, tmp_path):
    (tmp_path / "search.yaml").write_text(yaml.safe_dump({"objectives": objectives}))
    with pytest.raises(ParameterError, match=says):
        search.read(tmp_path / "search.yaml")


def test_the_toybox_search_gives_every_objective_the_same_number_of_steps():
    trials = search.read(ROOT / "params" / "toybox" / "search.yaml").trials
    budgets = pd.DataFrame([vars(t) for t in trials]).groupby("objective")["steps"].agg(["size", "sum"])
    assert set(budgets.index) == {"sft", "dpo", "patchdpo", "focusdpo"}
    assert budgets.drop_duplicates().shape[0] == 1
