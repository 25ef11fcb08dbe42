"""The paper's profile: its files fit the notebooks, its presets go over them, and its path runs on tiny models."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny_models import write_tiny_sdxl_ip
from tiny_training import assert_same_weights, tiny_pairs

from focusdpo_lib import params, runs, stages
from focusdpo_lib.batch import Job, execute, notebooks, resolved
from focusdpo_lib.batch.cli import main as batch
from focusdpo_lib.batch.reproduce import costs, plan
from focusdpo_lib.dip import toybox
from focusdpo_lib.dip.dataset import write_dataset
from focusdpo_lib.params import ParameterError
from focusdpo_lib.toybox.benchmark import write_benchmark
from focusdpo_lib.training.memory import PRESETS

ROOT = Path(__file__).parents[1]
PAPER, BOOKS = ROOT / "params" / "paper", ROOT / "notebooks"
FILES = sorted(PAPER.glob("[0-9]*.yaml"))
MEMORY = sorted((ROOT / PRESETS).glob("*.yaml"))


def book(file):
    return next(BOOKS.glob(f"{file.name[:2]}_*.ipynb"))


@pytest.mark.parametrize("over", [None, PAPER / "as_printed.yaml", *MEMORY], ids=lambda p: p.stem if p else "alone")
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_file_fits_its_notebook_and_every_preset_every_training(file, over, tmp_path):
    if over and file.name[:2] != "03":
        pytest.skip("a training's preset")
    values = resolved(Job(book(file), tmp_path, file, params.read_overrides(over) if over else {}))
    typed = {name: params.section(name, value) for name, value in values.items() if name in params.SECTIONS}
    if over is None and file.name[:2] == "03":
        training = typed["training"]  # the paper's: 8 processes of one pair, 2000 steps, a LoRA of rank 32
        assert (training.processes, training.batch_size, training.steps, training.lora.rank) == (8, 1, 2000, 32)
        assert typed["backbone"].weights == "bfloat16" and typed["launch"].machines == 1
    if over and over in MEMORY:
        training = typed["training"]
        assert training.processes * training.batch_size * training.gradient_accumulation == 8, "the paper's batch"


def test_models_are_pinned_where_the_commit_is_known():
    uno = params.section("backbone", yaml.safe_load((PAPER / "03_uno_dpo.yaml").read_text())["backbone"])
    ipap = params.section("backbone", yaml.safe_load((PAPER / "03_ipap_dpo.yaml").read_text())["backbone"])
    assert len(uno.revision) == len(ipap.ip_revision) == 40


def test_an_override_file_is_settings_of_sections_alone(tmp_path, capsys):
    assert params.read_overrides(PAPER / "as_printed.yaml") == {"training.learning_rate": 1e-8}
    (tmp_path / "bad.yaml").write_text("training: {steps: 1}\nrun: other\n")
    with pytest.raises(ParameterError, match=r"^run in .*bad.yaml is no section of settings: remove it, or use --set$"):
        params.read_overrides(tmp_path / "bad.yaml")
    (tmp_path / "typo.yaml").write_text("training: {stepz: 1}\n")
    words = [str(BOOKS / "03_training.ipynb"), str(FILES[0]), "--into", str(tmp_path), "--over"]
    assert batch([*words, str(tmp_path / "typo.yaml")]) == 1
    assert "training.stepz" in capsys.readouterr().out


def test_its_costs_name_every_run():
    said = costs(PAPER)
    assert {*said["minutes"], *said["beforehand"]} == {file.stem for file in FILES}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """What a user brings: a model, preference pairs and a benchmark, in folders of their own."""
    home = tmp_path_factory.mktemp("home")
    write_tiny_sdxl_ip(home / "model")
    pairs = tiny_pairs(6)
    write_dataset(home / "pairs", {"train": pairs, "validation": tiny_validation()})
    write_benchmark(home / "benchmark", 0, "test")
    (home / "benchmark" / "attributes.json").unlink()  # as the real one: nobody knows its subjects' attributes
    return home


def tiny_validation():

    return [
        toybox.make_pair(params.Dip(two_subject_share=share), "validation", i) for i, share in enumerate((0.0, 1.0))
    ]


@pytest.fixture(scope="module")
def trained(home, tmp_path_factory):
    """The run of notebook 03 from params/paper, with what a laptop has in place of models, pairs and benchmark."""
    into = tmp_path_factory.mktemp("trained")
    over = {
        "results": str(into / "results"),
        "samples": 1,
        "dip.folder": str(home / "pairs"),
        "benchmark": {"folder": str(home / "benchmark")},
        "training.processes": 2,
        "workers.processes": 2,
        "training.steps": 2,
        "training.lora": {"rank": 2},
        "generation": {"size": 64, "steps": 1, "guidance": 2.0},
        **{f"backbone.{name}": None for name in ("revision", "ip_adapter", "ip_revision")},
        "backbone.model": str(home / "model"),
    }
    file = PAPER / "03_ipap_focusdpo.yaml"
    folder = into / "results" / "training" / "ipap_focusdpo-seed0"
    execute(Job(book(file), into / "notebooks" / file.stem, file, over, products=[folder]), warm=True)
    return folder


def test_the_paper_s_training_runs_with_a_tiny_model_in_child_processes(trained):
    assert runs.is_complete(trained)
    kept = yaml.safe_load((trained / "params.yaml").read_text())
    assert kept["backbone"]["weights"] == "bfloat16" and kept["training"]["processes"] == 2
    assert "base_model" not in (trained / "adapter" / "README.md").read_text()
    log = np.genfromtxt(trained / "steps.csv", delimiter=",", names=True, dtype=None, encoding=None)
    assert len(log) == 4 and set(log["step"]) == {0, 1}
    assert len(json.loads((trained / "provenance.json").read_text())["processes"]) == 2


def test_two_processes_of_a_machine_give_the_weights_of_one_that_accumulates(trained, home):
    results, kept = trained.parents[1], yaml.safe_load((trained / "params.yaml").read_text())
    kept["training"] |= {"processes": None, "gradient_accumulation": 2}
    use = [params.section(name, kept[name]) for name in ("backbone", "objective", "masks", "training")]
    pairs = stages.build_pairs(results, "pairs", params.Dip(folder=str(home / "pairs")))
    one = stages.train_adapter(results, "one", pairs, *use)
    assert_same_weights(trained, one, exactly=False)
    assert (trained / "steps.csv").read_bytes() == (one / "steps.csv").read_bytes()
    assert len(list((results / "prepared").iterdir())) == 1, "both trainings share what was prepared"


def test_a_folder_without_pairs_is_named(tmp_path):
    with pytest.raises(runs.RunError, match=r"dip.folder = .* is not accepted: .*train.parquet does not exist"):
        stages.build_pairs(tmp_path, "pairs", params.Dip(folder=str(tmp_path)))


def test_a_missing_benchmark_is_said_before_anything_runs(tmp_path):
    if (ROOT / "data" / "dreambench").exists():
        pytest.skip("the benchmark is there")
    with pytest.raises(ParameterError, match=r"benchmark.folder = '../data/dreambench' in .* is not there"):
        plan(PAPER, tmp_path, BOOKS)
    assert notebooks.parameters(BOOKS / "03_training.ipynb")["launch"] == {"machines": 1}
