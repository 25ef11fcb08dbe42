"""Training in child processes: the same weights, errors that come back as one sentence, nothing left running."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import yaml
from tiny_training import TRAINING, assert_same_weights

from focusdpo_lib import params, stages
from focusdpo_lib.runs import RunError, is_complete
from focusdpo_lib.training import TrainingError, launch, ranks
from focusdpo_lib.training.checkpoints import CHECKPOINT, held

DIP = params.Dip(train_pairs=16, validation_pairs=1)
LEFT_BEHIND = {"WORLD_SIZE": "4", "RANK": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29513"}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """As this process computes: with more, sums take another order, and the last bits differ."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


def train(results, model, name, machines=None, **changes):
    return stages.train_adapter(
        results,
        name,
        stages.build_pairs(results, "main", DIP),
        params.Backbone(model=str(model), precision="float32"),
        params.Objective(),
        params.Masks(),
        params.section("training", TRAINING | {"steps": 4, "checkpoint_every": 2} | changes),
        machines,
    )


@pytest.fixture(scope="module")
def one(results, tiny_flux):
    """The run of one process that accumulates the gradients of two micro-batches."""
    return train(results, tiny_flux, "one", gradient_accumulation=2)


def test_two_machines_give_the_weights_of_one_process_that_accumulates(results, tiny_flux, one, capfd):
    """Both machines are this one: they share its files and meet at a port of it.

    Two processes of one machine are launched by a notebook, in test_paper_profile.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = params.Launch(machines=2, main_address="127.0.0.1", main_port=port)
    folder = results / "training" / "two"
    first = threading.Thread(target=train, args=(results, tiny_flux, "two", several), kwargs={"processes": 2})
    first.start()
    deadline = time.monotonic() + 100
    while not (folder / launch.CONFIG).exists() and time.monotonic() < deadline:  # the pairs are prepared before
        time.sleep(0.1)
    (prepared,) = (results / "prepared").iterdir()
    words = f"--processes 2 --machines 2 --machine-rank 1 --main-address 127.0.0.1 --main-port {port}"
    code = launch.main([str(folder), "--pairs", str(prepared), *words.split()])
    assert code == 0, "\n".join(log.read_text() for log in folder.glob("launch-*.log"))
    first.join(100)
    shown, errors = capfd.readouterr()
    assert "4/4" in shown and not errors.strip()
    assert is_complete(folder)
    assert_same_weights(folder, one, exactly=False)
    assert (folder / "steps.csv").read_bytes() == (one / "steps.csv").read_bytes()
    made = launch.runs._read_json(folder / "provenance.json")
    assert len(made["processes"]) == 2 and all(p["peak_memory_bytes"] > 0 for p in made["processes"])
    assert len(list((results / "prepared").iterdir())) == 1, "both trainings share what was prepared"


def test_what_a_process_said_comes_back_as_one_sentence(tmp_path, monkeypatch):
    """Here that another number of processes was started than the run asks for, said before a model is loaded.

    A job script has left variables behind, which would make the one process wait for three others.
    """
    for name, value in LEFT_BEHIND.items():
        monkeypatch.setenv(name, value)
    asked = {name: params.section(name).model_dump() for name in ("backbone", "objective", "masks")}
    asked["training"] = params.section("training", {"processes": 2}).model_dump()
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(asked))
    with pytest.raises(TrainingError, match=r"^1 processes were started for training\.processes = 2: give") as caught:
        launch.run(launch.command(tmp_path, tmp_path / "prepared", 1, params.Launch()), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rank", "sentence"),
    [(0, "not all machines came within 0 minutes: start"), (1, "the first machine cannot be reach")],
)
def test_a_meeting_that_nobody_joins_ends_with_a_sentence(tmp_path, monkeypatch, rank, sentence):
    monkeypatch.setattr(launch, "MEETING", timedelta(seconds=2))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = params.Launch(machines=2, main_address="127.0.0.1", main_port=port)
    with pytest.raises(TrainingError, match=f"^{sentence}"):
        launch.run(launch.command(tmp_path, tmp_path / "prepared", 2, several, rank), tmp_path, rank)


def test_variables_of_another_launcher_are_cleared_and_named(capsys):
    found = {"WORLD_SIZE": "4", "MASTER_ADDR": "node7", "OMPI_COMM_WORLD_RANK": "1", "ACCELERATE_USE_FSDP": "true"}
    found |= {"PET_NNODES": "2", "PET_RDZV_ENDPOINT": "node7:29400"}  # torchrun's own, as Kubernetes sets them
    environment = found | {"PATH": "/bin", "PETSC_DIR": "/opt", "OMP_NUM_THREADS": "2", "SLURM_JOB_ID": "7"}
    ranks.clear(environment)
    assert set(environment) == {"PATH", "PETSC_DIR", "OMP_NUM_THREADS", "SLURM_JOB_ID"}
    assert capsys.readouterr().out.startswith("ACCELERATE_USE_FSDP, MASTER_ADDR, OMPI_COMM_WORLD_RANK, PET_NNODES, ")
    ranks.clear(environment)
    assert not capsys.readouterr().out


def test_a_job_script_s_ranks_do_not_make_a_training_wait(results, tiny_flux, monkeypatch, capsys):
    for name, value in LEFT_BEHIND.items():
        monkeypatch.setenv(name, value)
    assert is_complete(train(results, tiny_flux, "left", steps=1))
    assert "of another launcher are ignored" in capsys.readouterr().out


def test_a_process_that_was_killed_leaves_a_run_that_goes_on(results, tiny_flux, tmp_path, monkeypatch):
    """It trains, too, whatever the user once answered to `accelerate config`, which would be taken of one process: a
    default config for DeepSpeed would start another launcher, which is not even installed."""
    (tmp_path / "accelerate").mkdir()
    answers = launch.NOTHING | {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}}
    (tmp_path / "accelerate" / "default_config.yaml").write_text(yaml.safe_dump(answers))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    folder, said = results / "training" / "killed", []

    def run():
        try:
            train(results, tiny_flux, "killed", processes=1, steps=4000, checkpoint_every=1)
        except TrainingError as error:
            said.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    deadline = time.monotonic() + 200
    while not (folder / CHECKPOINT).exists() and thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert thread.is_alive(), said
    found = subprocess.run(["pgrep", "-f", f"focusdpo_lib.training.launch {folder}"], capture_output=True, text=True)
    os.kill(int(found.stdout.split()[-1]), signal.SIGKILL)  # the youngest: the process that trains
    thread.join(60)
    assert not thread.is_alive()
    assert said and str(folder / launch.LOG.format(0)) in said[0]
    assert (folder / CHECKPOINT).exists() and not is_complete(folder)


SLEEPER = """
import os, sys, time
from pathlib import Path
from focusdpo_lib.workers import end_with_stdin
end_with_stdin()
Path(sys.argv[1], f"{os.environ['RANK']}-{os.environ['WORLD_SIZE']}.pid").write_text(str(os.getpid()))
time.sleep(300)
"""


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
def test_the_processes_of_a_machine_are_of_one_world_and_end_when_the_one_that_launched_them_is_killed(
    tmp_path, monkeypatch
):
    """Through accelerate and torchrun, in a session of their own, which no signal to the parent reaches."""
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    words = launch.command(tmp_path, tmp_path / "prepared", 2, params.Launch())
    words = [*words[: words.index("--module")], "--module", "sleeper", str(tmp_path)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(launch.__file__).parents[2])]))
    parent = multiprocessing.get_context("fork").Process(target=launch.run, args=(words, tmp_path))
    parent.start()
    deadline = time.monotonic() + 100
    while len(pids := [path.read_text() for path in tmp_path.glob("*.pid")]) < 2 or not all(pids):
        assert parent.is_alive() and time.monotonic() < deadline
        time.sleep(0.1)
    assert {path.stem for path in tmp_path.glob("*.pid")} == {"0-2", "1-2"}, "two ranks of one world"
    assert all(alive(int(pid)) for pid in pids)
    parent.kill()
    parent.join()
    deadline = time.monotonic() + 20
    while any(alive(int(pid)) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(int(pid)) for pid in pids)


def test_a_process_that_trains_ends_so_before_anything_else(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(launch, "end_with_stdin", lambda: asked.append("stdin"))
    assert launch.main([str(tmp_path), "--pairs", str(tmp_path), "--worker"]) == 1  # it has no params.yaml
    assert asked == ["stdin"]


def leaves(folder: Path) -> None:
    sys.stdout = open(folder / "shown", "w")  # noqa: SIM115 - nobody closes it, as nobody closes a process's stdout
    try:
        print("done", end="")
        launch.leave(3)
    finally:
        (folder / "torn down").touch()


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_process_that_leaves_tears_nothing_down_but_what_it_printed_is_there(tmp_path):
    child = multiprocessing.get_context("fork").Process(target=leaves, args=(tmp_path,))
    child.start()
    child.join(60)
    assert child.exitcode == 3
    assert [path.name for path in tmp_path.iterdir()] == ["shown"]
    assert (tmp_path / "shown").read_text() == "done"


def test_a_folder_is_trained_by_one_process_at_a_time(tmp_path):
    with held(tmp_path), pytest.raises(RunError, match="another process is training"), held(tmp_path):
        pass
    with held(tmp_path):
        pass


def test_the_command_line_says_processes_machines_and_where_they_meet(tmp_path):
    several = params.Launch(machines=2, main_address="node0", main_port=29500)
    words = launch.command(tmp_path, tmp_path / "prepared", 16, several, machine_rank=1)
    assert words[1:3] == ["-m", "accelerate.commands.launch"]
    expected = {"--num_processes=16", "--num_machines=2", "--machine_rank=1", "--main_process_ip=node0"}
    assert expected | {"--main_process_port=29500", "--multi_gpu"} <= set(words)
    with pytest.raises(TrainingError, match="16 do not divide among 3 machines: correct one of them"):
        launch.command(tmp_path, tmp_path, 16, several.model_copy(update={"machines": 3}))
    with pytest.raises(TrainingError, match=r"needs launch.main_address and launch.main_port, where they meet"):
        launch.command(tmp_path, tmp_path, 16, params.Launch(machines=2))
    alone = launch.command(tmp_path, tmp_path / "prepared", 1, params.Launch())
    assert "--multi_gpu" not in alone and "--main_process_port=0" in alone
    assert not any("None" in word for word in alone)
