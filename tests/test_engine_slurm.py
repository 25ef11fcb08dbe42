"""Jobs for Slurm without Slurm: the text of their sbatch files, and their graph run by submitit's local executor."""

import re
import sys
from types import SimpleNamespace

import pytest
from test_engine_ray import FAILS, job

from focusdpo_lib import runs
from focusdpo_lib.batch import Job, cli
from focusdpo_lib.batch.engines import on_slurm

submitit = pytest.importorskip("submitit")

EXAMPLE = """#!/bin/bash

# Parameters
#SBATCH --account=proj_7
#SBATCH --constraint='a100|h100'
#SBATCH --cpus-per-task=4
#SBATCH --dependency=afterok:101:102
#SBATCH --error={folder}/%j_0_log.err
#SBATCH --gpus-per-node=2
#SBATCH --job-name=c
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mem=48GB
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output={folder}/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=USR2@90
#SBATCH --time=600
#SBATCH --wckey=submitit

# setup
module load cuda

# command
export SUBMITIT_EXECUTOR=slurm
{srun}
"""  # read line by line against sbatch's manual

SRUN = (
    "srun --unbuffered --output {folder}/%j_%t_log.out --error {folder}/%j_%t_log.err "
    "python -u -m submitit.core._submit {folder}"
)

SLURM_YAML = """slurm:
  partition: gpu
  account: proj_7
  constraint: "a100|h100"
  minutes: 600
  setup: [module load cuda]
"""


def graph(folder):
    """Two jobs and one after both, whose YAML says what it needs."""
    (folder / "c.yaml").write_text("name: c\nresources: {gpus: 2, cpus: 4, memory: 48}\n")
    (folder / "slurm.yaml").write_text(SLURM_YAML)
    a, b = job(folder, "a"), job(folder, "b")
    return [a, b, Job(a.notebook, folder / "out" / "c", folder / "c.yaml", after=["a", "b"])]


def test_the_sbatch_text_is_the_reviewed_example(tmp_path):
    found = on_slurm.script(submitit, graph(tmp_path)[2], ["101", "102"])
    assert found == EXAMPLE.replace("{srun}", SRUN).format(folder=tmp_path / "out" / "slurm")


def test_a_dry_run_prints_every_job_and_makes_nothing(tmp_path, capsys):
    assert on_slurm.run_all(graph(tmp_path), dry_run=True) == 0
    said = capsys.readouterr().out
    assert re.findall(r"--job-name=(\w+)", said) == ["a", "b", "c"]
    assert re.findall(r"--dependency=(.*)", said) == ["'afterok:<id of a>:<id of b>'"]
    assert not (tmp_path / "out").exists()


def test_submitting_asks_slurm_for_all_that_and_hands_it_the_dependencies(tmp_path, monkeypatch, capsys):
    """What reaches submitit's executor, of which no Slurm is behind; b is done before c is submitted."""
    asked = {}

    class Executor:
        def __init__(self, folder):
            self.folder = folder

        def update_parameters(self, **words):
            self.words = words

        def submit(self, function, orders):
            name = orders["job"].name
            asked[name] = self.words
            done = lambda: name == "b" or "c" in asked  # noqa: E731
            return SimpleNamespace(job_id=f"10{len(asked)}", done=done, exception=lambda: None)

    monkeypatch.setattr(submitit, "SlurmExecutor", Executor)
    monkeypatch.setattr(on_slurm.time, "sleep", lambda seconds: None)
    assert on_slurm.run_all(graph(tmp_path)) == 0
    assert asked["c"]["additional_parameters"]["dependency"] == "afterok:101:102"
    assert asked["c"]["partition"] == "gpu" and asked["c"]["gpus_per_node"] == 2
    assert "dependency" not in asked["a"]["additional_parameters"]
    assert "[3/3] c: submitted as 103" in capsys.readouterr().out


def test_the_graph_runs_in_order_and_a_failure_holds_up_only_what_needs_it(tmp_path, capsys):
    jobs = [*graph(tmp_path), job(tmp_path, "bad", body=FAILS), job(tmp_path, "after bad", after=["bad"])]
    assert on_slurm.run_all(jobs, "local") == 1
    said = capsys.readouterr().out
    assert [runs.is_complete(one.folder) for one in jobs] == [True, True, True, False, False]
    assert said.index("b: done") < said.index("c: submitted")
    assert re.search(
        r"bad: FAILED\. cell \[3\] of .*bad\.ipynb .*ValueError: of itself .*\(its log: .*bad\.log\)\n", said
    )
    assert "[5/5] after bad: not run, for it needs bad" in said
    assert on_slurm.run_all(jobs[:3], "local") == 0
    assert capsys.readouterr().out.count("complete already, skipped") == 3


def test_a_machine_without_slurm_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert on_slurm.run_all([job(tmp_path, "a")]) == 1
    said = capsys.readouterr().out
    assert re.match(
        r"nothing was run: this machine cannot submit \(.*srun.*\): run it where sbatch and srun are\n", said
    )


def test_without_the_extra_one_sentence_says_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert on_slurm.run_all([job(tmp_path, "a")]) == 1
    assert "nothing was run: the engine slurm needs the extra of that name: " in capsys.readouterr().out


def test_a_dry_run_is_for_slurm(tmp_path, capsys):
    words = ["notebook.ipynb", "a.yaml", "--into", str(tmp_path), "--engine", "ray", "--dry-run"]
    assert cli.main(words) == 1
    assert capsys.readouterr().out == "nothing was run: --dry-run is for --engine slurm\n"
