"""`make reproduce` and the search, on tiny untrained models: real notebooks, real runs, both tables at the end."""

import json
import shutil
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
import yaml
from tiny_models import write_tiny_models, write_tiny_profile

from focusdpo_lib import comparison, params, runs
from focusdpo_lib.batch import notebooks, reproduce, resolved, search
from focusdpo_lib.evaluation.benchmark import Benchmark
from focusdpo_lib.evaluation.encoders import Encoders, to_pixels
from focusdpo_lib.params import ParameterError
from focusdpo_lib.toybox.attributes import ToyboxReader, attribute_accuracy
from focusdpo_lib.toybox.reader import Reader
from focusdpo_lib.toybox.world import Identity

ROOT = Path(__file__).parents[1]
BOOKS = ROOT / "notebooks"
SMOKE, TOYBOX = ROOT / "params" / "smoke", ROOT / "params" / "toybox"
# Of eight trainings three, of both families; notebooks 00 to 02 have tests of their own. Each kernel takes seconds.
TRAINED = ("03_uno_sft", "03_uno_focusdpo", "03_ipap_focusdpo")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, models):
    """The smoke profile on tiny models, with three of its eight trainings, in the notebooks' own processes.

    A training in child processes is started by a notebook in test_paper_profile.
    """
    folder = tmp_path_factory.mktemp("params") / "smoke"
    write_tiny_profile(SMOKE, folder, models, (*TRAINED, "04_table1", "05_table2", "reproduce"))
    file = folder / "03_uno_focusdpo.yaml"
    values = yaml.safe_load(file.read_text())
    del values["training"]["processes"]
    file.write_text(yaml.safe_dump(values))
    return folder


def run(profile, results, **options):
    jobs = reproduce.plan(profile, results, options.pop("books", BOOKS), **options)
    return reproduce.reproduce(jobs, results, reproduce.costs(profile))


@pytest.fixture(scope="module")
def ran(tmp_path_factory, smoke):
    """One run of everything: the results' folder, the exit code and what was printed."""
    results, said = tmp_path_factory.mktemp("results") / "smoke", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **_: said.append(" ".join(map(str, words))))
        code = run(smoke, results)
    return results, code, "\n".join(said)


def printed(results, name):
    cells = nbformat.read(results / "notebooks" / name / f"{name}.ipynb", 4).cells
    outputs = [o for cell in cells if cell.cell_type == "code" for o in cell.outputs]
    return "".join(o.get("text", "") for o in outputs if o.get("name") != "stderr")


def test_everything_runs_and_both_tables_are_printed_with_their_figures(ran):
    results, code, said = ran
    assert code == 0, said
    assert said.startswith("5 notebook runs: about ") and "GB of memory" in said.splitlines()[0]
    assert "Table 1: single subject" in said and "Table 2: two subjects" in said
    for figure in ("table1/samples.png", "table2/leakage.png"):
        path = results / "tables" / figure
        assert str(path) in said and path.stat().st_size > 5000
    trained = {"03_uno_sft-seed0", "03_uno_focusdpo-seed0", "03_ipap_focusdpo-seed0"}
    assert {"04_table1", "05_table2"} | trained == {
        path.name for path in (results / "notebooks").iterdir() if (path / f"{path.name}.html").exists()
    }


ANCHORS = ["real photos", "oracle (real renders)", "copy of the reference"]


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("table1", ["UNO", "UNO+SFT", "UNO+FocusDPO", "IPAP", "IPAP+FocusDPO"]),
        ("table2", ["UNO", "UNO+SFT", "UNO+FocusDPO"]),  # the paper's has no IPAP
    ],
)
def test_the_tables_hold_anchors_bases_and_every_trained_objective(ran, name, rows):
    found = pd.read_csv(ran[0] / "tables" / name / "table.csv")
    assert found["row"].drop_duplicates().tolist() == ANCHORS + rows
    # Anchors are no methods, and a base is what the others are compared with.
    compared = found[found["difference"].notna()]["row"].drop_duplicates().tolist()
    assert compared == [row for row in rows if "+" in row]


def test_the_table_says_how_each_family_was_sampled_and_the_paper_stands_apart(ran):
    text = (ran[0] / "tables" / "table1" / "table.md").read_text()
    ours, paper = text.split("Published by the paper on the real DreamBench (not measured here)")
    assert "UNO was sampled with guidance = 2.0. IPAP was sampled with guidance = 3.0." in ours
    assert "UNO and IPAP were sampled with references = listed, size = 64" in ours
    assert "| UNO+FocusDPO | 0.802 |" in paper and "0.802" not in ours


def test_a_family_is_sampled_from_its_own_base(ran):
    images = [path / "images" for path in (ran[0] / "generation" / "single").iterdir() if path.name in ("uno", "ipap")]
    first, second = (sorted(path.iterdir()) for path in images)
    assert [p.name for p in first] == [p.name for p in second]
    assert all(a.read_bytes() != b.read_bytes() for a, b in zip(first, second, strict=True))


def test_a_reference_holds_tables_figures_pages_and_what_they_cost(ran, smoke, tmp_path):
    jobs = reproduce.plan(smoke, ran[0], BOOKS)
    (tmp_path / "reference" / "table1").mkdir(parents=True)
    for old in ("README.md", "table1/old.png", "movement_old.png"):
        (tmp_path / "reference" / old).write_text("by hand")
    kept = reproduce.keep_reference(ran[0], tmp_path / "reference", jobs)
    assert (kept / "README.md").read_text() == "by hand"
    assert not (kept / "table1" / "old.png").exists() and not (kept / "movement_old.png").exists()
    assert (kept / "table1" / "table.md").read_text() == (ran[0] / "tables" / "table1" / "table.md").read_text()
    assert (kept / "table2" / "leakage.png").exists() and (kept / "notebooks" / "05_table2.html").exists()
    trainings = {page.name for page in (kept / "notebooks").glob("03_*")}
    # A family's last row, whose curves show all of its objectives.
    assert trainings == {"03_uno_focusdpo-seed0.html", "03_ipap_focusdpo-seed0.html"}
    text = (kept / "run.md").read_text()
    assert "5 notebook runs" in text and "GB of memory" in text and "| 05_table2 | " in text
    assert str(tmp_path) not in text and str(ran[0]) not in text


def test_a_second_run_skips_everything(ran, smoke, capsys):
    assert run(smoke, ran[0]) == 0
    said = capsys.readouterr().out
    assert "5 of them complete already" in said and said.count("complete already, skipped") == 5
    assert "Table 1" in said


def test_the_executed_notebooks_show_curves_of_the_objectives_beside_them_on_the_same_backbone(ran):
    shown = {name: printed(ran[0], f"{name}-seed0") for name in TRAINED}
    assert "shown: sft\n" in shown["03_uno_sft"] and "shown: sft, focusdpo\n" in shown["03_uno_focusdpo"]
    assert "shown: focusdpo\n" in shown["03_ipap_focusdpo"]
    assert "the package agrees with the hand-sized example" in shown["03_uno_sft"]


def families(models, **adapters):
    """The groups of a table's families from their adapters, on the tiny models that they were trained on."""
    backbones = {
        "uno": {"backbone": {"model": str(models / "flux_uno")}},
        "ipap": {"backbone": {"family": "sdxl_ip", "model": str(models / "sdxl_ip")}},
    }
    rows = {name: backbones[name] | {"adapters": of} for name, of in adapters.items()}
    return params.section("families", rows).given


def test_a_missing_adapter_is_left_out_with_a_sentence_that_says_how_to_make_it(ran, models):
    wanted = families(
        models,
        uno={"sft": ["uno_sft-seed0", "uno_sft-seed1"], "dpo": ["uno_dpo-seed0"]},
        ipap={"sft": ["ipap_sft-seed0"]},
    )
    found, missing = comparison.adapters(ran[0], wanted)
    assert {row: [f.name for f in folders] for row, folders in found.items()} == {"uno_sft": ["uno_sft-seed0"]}
    assert [sentence.split()[0] for sentence in missing] == ["UNO+SFT", "UNO+DPO", "IPAP+SFT"]
    assert "without uno_sft-seed1" in missing[0] and "Run notebook 03 with 03_ipap_sft.yaml" in missing[2]


def test_an_adapter_of_another_base_is_no_row(ran):
    toybox = params.section("families", {"uno": {"adapters": {"sft": ["uno_sft-seed0"]}}}).given
    with pytest.raises(
        ParameterError, match=r"^UNO\+SFT cannot stand here: .* was trained on another base: its model is"
    ):
        comparison.adapters(ran[0], toybox)


def test_an_adapter_of_another_family_is_no_row(ran, models):
    with pytest.raises(ParameterError, match=r"was trained on flux_uno and cannot be a row of sdxl_ip \(IPAP\+SFT\)"):
        comparison.adapters(ran[0], families(models, ipap={"sft": ["uno_sft-seed0"]}))


def test_attribute_shares_average_to_attribute_accuracy(ran):
    """The table's attribute accuracy is the mean over the five attributes: two ways to one number."""
    results, settings = ran[0], params.Evaluation()
    torch.manual_seed(0)
    reader = Reader(width=16).eval()  # untrained: what it reads is sometimes right
    benchmark = Benchmark.load(results / "benchmark" / "test-0", "multi").first_prompts(1)
    images = results / "generation" / "multi" / "oracle"
    few = params.section("families", {"uno": {"generation": {"prompts": 1}}}).given
    encoders = Encoders(None, None, ToyboxReader(reader, "untrained"))
    shares = comparison.attribute_table(benchmark, {"oracle": [images]}, encoders, settings, few)
    found = reader.read(to_pixels([images / "images" / f"{case.id}_0.png" for case in benchmark.cases]))
    expected = [[benchmark.subjects[name].attributes for name in case.subjects] for case in benchmark.cases]
    accuracy = [value for f, e in zip(found, expected, strict=True) for value in attribute_accuracy(f, e)]
    assert shares["value"].mean() == pytest.approx(sum(accuracy) / len(accuracy))


# --- the plan, before anything runs ---


def test_the_toybox_plan_is_every_notebook_in_order_and_the_tables_come_after_every_training():
    jobs = reproduce.plan(TOYBOX, Path("results/toybox"), BOOKS, seeds=2)
    names = [job.name for job in jobs]
    assert [name[:2] for name in names] == ["00", "01", "02", *["03"] * 16, "04", "05", "06"]
    rows = [f"03_{family}_{o}" for family in ("uno", "ipap") for o in ("sft", "dpo", "patchdpo", "focusdpo")]
    assert names[3:19] == [f"{row}-seed{n}" for row in rows for n in (0, 1)]
    one, two, ablations = jobs[-3:]
    assert not ablations.after  # it draws trials that are kept
    assert set(one.after) == set(names[3:19])
    assert set(two.after) == {name for name in names if name.startswith("03_uno")}  # Table 2 is UNO's
    groups = resolved(one)["families"]
    assert groups["ipap"]["adapters"]["focusdpo"] == ["ipap_focusdpo-seed0", "ipap_focusdpo-seed1"]
    assert groups["ipap"]["generation"] == groups["uno"]["generation"]
    assert list(resolved(two)["families"]) == ["uno"]
    seeds = {job.name: job.overrides["training.seed"] for job in jobs if job.name.startswith("03_uno_dpo")}
    assert seeds == {"03_uno_dpo-seed0": 0, "03_uno_dpo-seed1": 1}


@pytest.mark.parametrize(("family", "tables"), [("uno", ["04_table1", "05_table2"]), ("ipap", ["04_table1"])])
def test_one_family_alone_leaves_out_the_other_s_trainings_rows_and_models(family, tables):
    jobs = reproduce.plan(TOYBOX, Path("results/toybox"), BOOKS, families=[family])
    names = [job.name for job in jobs]
    objectives = ("sft", "dpo", "patchdpo", "focusdpo")
    assert [n for n in names if n.startswith("03")] == [f"03_{family}_{o}-seed0" for o in objectives]
    assert [n for n in names if n > "04"] == [*tables, "06_ablations"]
    assert list(resolved(jobs[names.index("04_table1")])["families"]) == [family]
    models = {name for job in jobs for name in job.inputs if name.startswith("model of")}
    assert models == {f"model of {family}"}


def test_an_override_reaches_every_family_of_a_table():
    jobs = reproduce.plan(TOYBOX, Path("results/toybox"), BOOKS, overrides={"generation.steps": 7, "masks.tau": 0.2})
    last = {job.name: resolved(job) for job in jobs[-4:]}
    assert {rows["generation"]["steps"] for rows in last["04_table1"]["families"].values()} == {7}
    training = last["03_ipap_focusdpo-seed0"]
    assert training["generation"]["steps"] == 7 and training["masks"]["tau"] == 0.2


def test_a_benchmark_that_is_not_there_is_told_before_anything_runs(tmp_path):
    with pytest.raises(ParameterError, match=r"benchmark\.folder = '\.\./nowhere' in .*03_uno_sft\.yaml"):
        reproduce.plan(TOYBOX, tmp_path, BOOKS, overrides={"benchmark.folder": "../nowhere"})


def test_training_values_stand_in_the_yaml_as_in_the_parameters_cell():
    """Opened in JupyterLab the notebook trains what `make reproduce` trains."""
    for yaml_name, book in {
        "03_uno_focusdpo": "03_training",
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
    assert run(smoke, tmp_path / "results", overrides=gone) == 1
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
    for name in ("03_uno_dpo", "04_table1"):
        (profile / f"{name}.yaml").touch()
    shutil.copy(ROOT / "params" / "smoke" / "reproduce.yaml", profile)
    write_notebook(tmp_path / "03_training.ipynb", "run = 'x'\ntraining = {}", "raise ValueError('out of luck')")
    write_notebook(tmp_path / "04_table.ipynb", "families = {'uno': {}}", "print(families)")
    assert run(profile, tmp_path / "results", books=tmp_path) == 1
    said = capsys.readouterr().out
    assert "03_uno_dpo-seed0: FAILED" in said and "out of luck" in said
    assert "04_table1: not run, for it needs 03_uno_dpo-seed0" in said and "Table 1" not in said


# --- the search ---


@pytest.fixture(scope="module")
def searches(tmp_path_factory, models):
    """Both families' smoke searches, run: {name: table}, and the folder of their files and results."""
    folder = tmp_path_factory.mktemp("search")
    write_tiny_profile(SMOKE, folder / "smoke", models, ("search", "search_ipap"))
    found = {}
    for name in ("search", "search_ipap"):
        path = folder / "smoke" / f"{name}.yaml"
        assert search.main(["--profile", "smoke", "--params", str(folder), "--results", str(folder / "results"),
                            "--file", path.name]) == 0  # fmt: skip
        found[name] = pd.read_csv(search.table_path(path))
    return folder, found


@pytest.fixture(scope="module")
def searched(searches):
    """UNO's search: its YAML, its results, its table."""
    folder, found = searches
    return folder / "smoke" / "search.yaml", folder / "results" / "smoke" / "search", found["search"]


def test_the_search_tries_every_trial_and_scores_the_base_too(searched):
    path, _, table = searched
    assert table["objective"].tolist() == ["base", "dpo", "sft"]
    parts = [f"{metric}_{kind}" for metric in ("dino", "attribute_accuracy") for kind in ("single", "multi")]
    assert table["score"].tolist() == pytest.approx(table[parts].mean(axis=1).tolist(), abs=1e-4)
    assert search.best(table)["objective"].tolist() == ["base", "dpo", "sft"]
    assert (path.parent / "search_results.csv").exists()


def test_the_second_family_is_searched_on_one_subject_alone_and_apart_from_the_first(searches):
    folder, found = searches
    table = found["search_ipap"]
    assert table["objective"].tolist() == ["base", "dpo", "sft"]
    assert not [column for column in table if column.endswith("_multi")]
    parts = table[["dino_single", "attribute_accuracy_single"]]
    assert table["score"].tolist() == pytest.approx(parts.mean(axis=1).tolist(), abs=1e-4)
    assert (folder / "smoke" / "search_ipap_results.csv").exists()
    assert not (folder / "results" / "smoke" / "search_ipap" / "generation" / "multi").exists()
    assert not table.equals(found["search"][table.columns])


def test_the_search_never_sees_a_test_identity(searched):
    written = list((searched[1] / "benchmark").iterdir())
    assert [path.name for path in written] == ["validation-0"]
    identities = json.loads((written[0] / "attributes.json").read_text()).values()
    assert {Identity(**attributes).split for attributes in identities} == {"validation"}


def test_a_search_goes_on_with_what_is_complete(searched):
    path, results, table = searched
    markers = {path: path.stat().st_mtime_ns for path in results.rglob(runs.MARKER)}
    # Pairs; what is prepared of them, once; trainings; images and scores of base and trials, one and two subjects.
    assert len(markers) == 1 + 1 + 2 + 3 * 2 * 2
    assert search.search(path, results, ["sft"]).equals(table.iloc[[0, 2, 1]].reset_index(drop=True))
    assert markers == {path: path.stat().st_mtime_ns for path in results.rglob(runs.MARKER)}


@pytest.mark.parametrize(
    ("objectives", "says"),
    [
        ({"sft": {"learning_rate": [1e-4], "steps": [2]}, "patchdpo": {"learning_rate": [1e-4], "steps": [4]}},
         "differ in their budget"),
        ({"sft": {"learning_rate": [1e-4], "beta": [1.0], "steps": [2]}}, "objectives.sft .* needs a list each"),
        ({"sft": {"learning_rate": ["1e-4"], "steps": [2]}}, "training.learning_rate = '1e-4'"),
        ({"dpo": {"learning_rate": [1e-4], "beta": [1.0], "steps": [2], "reduction": ["median"]}},
         "objective.reduction = 'median'"),
        ({"sft": {"learning_rate": [1e-4], "steps": [2], "reduction": ["mean"]}}, "objectives.sft .* needs a list"),
        ({"simpo": {"learning_rate": [1e-4], "steps": [2]}}, "objective.name = 'simpo'"),
        (None, "needs 'objectives'"),
    ],
)  # fmt: skip
def test_a_search_that_is_not_fair_or_not_typed_is_refused(objectives, says, tmp_path):
    (tmp_path / "search.yaml").write_text(yaml.safe_dump({"objectives": objectives}))
    with pytest.raises(ParameterError, match=says):
        search.read(tmp_path / "search.yaml")


def test_a_trial_of_another_reduction_is_another_run(tmp_path):
    grid = {"learning_rate": [1e-4], "beta": [30.0], "steps": [2], "reduction": ["mean", "masked_mean"]}
    (tmp_path / "search.yaml").write_text(yaml.safe_dump({"objectives": {"focusdpo": grid}}))
    first, second = search.read(tmp_path / "search.yaml").trials
    assert (first.name, second.name) == (
        "focusdpo-lr0.0001-beta30-steps2",
        "focusdpo-lr0.0001-beta30-masked_mean-steps2",
    )
    assert second.settings == {"name": "focusdpo", "beta": 30.0, "reduction": "masked_mean"}


@pytest.mark.parametrize("kinds", ["single", [], ["single", "triple"]])
def test_a_search_on_no_kind_of_case_or_an_unknown_one_is_refused(kinds, tmp_path):
    grid = {"sft": {"learning_rate": [1e-4], "steps": [2]}}
    (tmp_path / "search.yaml").write_text(yaml.safe_dump({"objectives": grid, "kinds": kinds}))
    with pytest.raises(ParameterError, match=r"kinds = .* list one or both of single, multi"):
        search.read(tmp_path / "search.yaml")


@pytest.mark.parametrize("name", ["search", "search_ipap"])
def test_the_toybox_searches_give_every_objective_the_same_number_of_steps(name):
    trials = search.read(TOYBOX / f"{name}.yaml").trials
    budgets = pd.DataFrame([vars(t) for t in trials]).groupby("objective")["steps"].agg(["size", "sum"])
    assert set(budgets.index) == {"sft", "dpo", "patchdpo", "focusdpo"}
    assert budgets.drop_duplicates().shape[0] == 1
