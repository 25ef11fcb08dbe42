"""Jobs as tasks of Ray's own test cluster: machines with pretend GPUs, on this one."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from focusdpo_lib import runs
from focusdpo_lib.batch import Job, reproduce, run_all
from focusdpo_lib.batch.engines import on_ray, worker

pytest.importorskip("ray")

ROOT = Path(__file__).parents[1]
BOOKS, SMOKE = ROOT / "notebooks", ROOT / "params" / "smoke"
PARAMETERS = "name = 'x'\nseconds = 0.0"
# A record of the run: which GPUs it was given, and when it had them.
BODY = """import json, os, pathlib, time
begun = time.time()
time.sleep(seconds)
record = {"gpus": os.environ.get("CUDA_VISIBLE_DEVICES", ""), "begun": begun, "ended": time.time(), "pid": os.getpid()}
pathlib.Path(f"{name}.json").write_text(json.dumps(record))"""
FAILS = "raise ValueError('of itself')"
# Four shards, more than the run's own GPUs, of which it has none.
SHARDS = """import os
from pathlib import Path
from tiny_work import OnGpu
from focusdpo_lib import workers
assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
Path(name).mkdir()
workers.run(OnGpu(Path(name).absolute(), kills=seconds > 0), Path(name), 4, "items", "item")"""
# A training of two processes; `name` is the folder of its results, beside that of the model.
TRAINING = """import os
from pathlib import Path
import torch
from tiny_training import TRAINING
from focusdpo_lib import params, stages
results = Path(name)
torch.set_num_threads(1)
settings = TRAINING | {"steps": 12, "checkpoint_every": 2, "processes": 2}
folder = stages.train_adapter(
    results, "run", stages.build_pairs(results, "main", params.Dip(train_pairs=16, validation_pairs=1)),
    params.Backbone(model=str(results.parent / "model"), precision="float32"), params.Objective(), params.Masks(),
    params.section("training", settings),
)"""


@pytest.fixture(scope="module")
def cluster():
    """Two machines of one processor and two GPUs each, beside a head that runs nothing."""
    on_ray.imported()
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # of the modules of these tests
        made = on_ray.patiently(lambda: Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0}))
        for _ in range(2):
            on_ray.patiently(lambda: made.add_node(num_cpus=1, num_gpus=2, memory=4_000_000_000))
        patch.setenv("RAY_ADDRESS", made.address)
        yield made
        made.shutdown()


def book(folder, body=BODY):
    path = folder / f"{'good' if body == BODY else 'bad'}.ipynb"
    cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(body)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def job(folder, name, gpus=0, seconds=0.0, body=BODY, **more):
    over = {"name": name, "seconds": seconds, "resources.gpus": gpus}
    return Job(book(folder, body), folder / "out" / name, overrides=over, **more)


def records(folder):
    """What each run wrote, with the node that its log names."""
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    for name, record in found.items():
        line = (folder / "out" / "logs" / f"{name}.log").read_text().splitlines()[0]
        record["node"] = re.search(r"\(node (\w+), GPUs", line)[1]
    return found


def assert_disjoint(found):
    """No GPU of a machine is had by two runs at a time, and none that it has not."""
    for name, one in found.items():
        gpus = [gpu for gpu in one["gpus"].split(",") if gpu]
        assert set(gpus) <= {"0", "1"}
        for other, two in found.items():
            together = one["begun"] < two["ended"] and two["begun"] < one["ended"]
            if name != other and one["node"] == two["node"] and together:
                assert set(gpus).isdisjoint(two["gpus"].split(",")), (name, other)


def test_jobs_run_side_by_side_on_gpus_of_their_own_each_after_what_it_needs(cluster, tmp_path, capsys):
    jobs = [
        job(tmp_path, "a", gpus=1, seconds=3),
        job(tmp_path, "b", gpus=2, seconds=3),
        job(tmp_path, "bad", body=FAILS),
        job(tmp_path, "after a and b", gpus=2, after=["a", "b"]),
        job(tmp_path, "after bad", after=["bad"]),
        job(tmp_path, "after that", after=["after bad"]),
    ]
    assert run_all(jobs, "ray") == 1
    said = capsys.readouterr().out
    found = records(tmp_path)
    assert "nothing was run" not in said
    assert sorted(found) == ["a", "after a and b", "b"]
    assert found["a"]["begun"] < found["b"]["ended"] and found["b"]["begun"] < found["a"]["ended"]
    assert found["after a and b"]["begun"] > max(found["a"]["ended"], found["b"]["ended"])
    assert [len(found[name]["gpus"].split(",")) for name in ("a", "b", "after a and b")] == [1, 2, 2]
    assert_disjoint(found)
    assert re.search(r"\[1/6\] a: started on \S+ \(node \w+, GPUs [01]\), about .* left\n", said)
    assert re.search(r"\[3/6\] bad: FAILED\. cell \[3\] of .*bad\.ipynb .*ValueError: of itself .* \(its log: ", said)
    assert "[5/6] after bad: not run, for it needs bad" in said
    assert "[6/6] after that: not run, for it needs after bad" in said
    assert all(runs.is_complete(tmp_path / "out" / name) for name in found)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "a").iterdir()}
    assert run_all(jobs[:2], "ray") == 0  # another time nothing runs
    assert capsys.readouterr().out.count("complete already, skipped") == 2
    assert run_all(jobs[:2], "local") == 0  # and with another engine
    assert made == {path: path.stat().st_mtime_ns for path in made}


@pytest.mark.parametrize("lost", ["worker", "node"])
def test_a_job_whose_worker_or_node_is_lost_is_run_again(cluster, tmp_path, lost):
    node = on_ray.patiently(lambda: cluster.add_node(num_cpus=1, num_gpus=4))  # the only one that can hold it
    code = "from test_engine_ray import *; sys.exit(run_all([job(Path(sys.argv[1]), 'a', 3, 4)], 'ray'))"
    driver, log = started(code, tmp_path), tmp_path / "out/logs/a.log"
    wait(lambda: log.exists() and log.read_text().startswith(worker.STARTED), driver)
    time.sleep(1)
    if lost == "worker":
        os.kill(worker_of("ray::a"), signal.SIGKILL)
    else:
        cluster.remove_node(node, allow_graceful=False)
        node = on_ray.patiently(lambda: cluster.add_node(num_cpus=1, num_gpus=4))
    assert driver.wait(180) == 0
    assert runs.is_complete(tmp_path / "out/a")
    assert log.read_text().count(worker.STARTED) == 2
    cluster.remove_node(node)


def test_a_killed_driver_takes_its_jobs_with_it_and_the_same_command_goes_on(cluster, tmp_path):
    code = "from test_engine_ray import *; at = Path(sys.argv[1]); "
    code += "sys.exit(run_all([job(at, 'a'), job(at, 'b', seconds=60, after=['a'])], 'ray'))"
    driver = started(code, tmp_path)
    log = tmp_path / "out/logs/b.log"
    wait(lambda: log.exists() and log.read_text().startswith(worker.STARTED), driver)
    driver.kill()
    driver.wait()
    wait(lambda: worker_of("ray::b") is None)
    assert runs.is_complete(tmp_path / "out/a") and not (tmp_path / "out/b").exists()
    jobs = [job(tmp_path, "a"), job(tmp_path, "b", after=["a"])]
    assert run_all(jobs, "ray") == 0
    assert not list((tmp_path / "out").glob("*.failed.ipynb"))


def started(code, folder):
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    words = [sys.executable, "-c", code, str(folder)]
    return subprocess.Popen(words, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.DEVNULL)


def wait(what, process=None, seconds=120):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline and (process is None or process.poll() is None)
        time.sleep(0.1)


def worker_of(title):
    """The process that runs a task of that name, as it calls itself."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_text().startswith(title):
                return int(path.parent.name)
        except OSError:
            continue
    return None


def test_what_no_machine_can_hold_is_refused_with_what_they_have(cluster, tmp_path, capsys):
    assert run_all([job(tmp_path, "a", gpus=3)], "ray") == 1
    assert re.search(
        r"^nothing was run: a asks for 3 GPU\(s\), 1 CPU\(s\) on one machine, and the cluster's machines have "
        r"0 GPU.*2 GPU\(s\), 1 CPU\(s\), 4 GB.*: lower resources in its settings, or --set resources\.gpus=2$",
        capsys.readouterr().out.strip(),
    )
    assert not (tmp_path / "out").exists()


def test_results_that_workers_cannot_see_are_refused(cluster, tmp_path, capsys, monkeypatch):
    class Elsewhere:
        name = "/nowhere/token"

        def __init__(self, **words):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(on_ray, "NamedTemporaryFile", Elsewhere)
    assert run_all([job(tmp_path, "a")], "ray") == 1
    assert "does not see /nowhere: put the results on a file system that all machines share" in capsys.readouterr().out


def test_another_package_on_a_machine_is_refused(cluster, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(on_ray, "_package", lambda: "mine")
    assert run_all([job(tmp_path, "a")], "ray") == 1
    assert "has another focusdpo_lib or another Python than this one" in capsys.readouterr().out


def test_settings_that_differ_at_the_worker_are_refused(cluster, tmp_path, capsys, monkeypatch):
    """The YAML is changed between the start and the run: as if the machines saw different files."""
    monkeypatch.setattr(worker, "_settings", lambda job: "another")
    assert run_all([job(tmp_path, "a")], "ray") == 1
    assert "its settings says something else on" in capsys.readouterr().out


def test_a_cluster_that_is_not_there_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    code = "from test_engine_ray import *; sys.exit(run_all([job(Path(sys.argv[1]), 'a')], 'ray'))"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    words = [sys.executable, "-c", code, str(tmp_path)]
    found = subprocess.run(words, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert found.returncode == 1
    assert found.stdout.startswith("nothing was run: the cluster at RAY_ADDRESS=127.0.0.1:1 cannot be joined (")


def test_without_the_extra_one_sentence_says_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run_all([job(tmp_path, "a")], "ray") == 1
    assert "nothing was run: the engine ray needs the extra of that name: " in capsys.readouterr().out


def test_a_start_that_was_too_slow_is_tried_again_and_another_failure_is_not(tmp_path):
    slow, said = Exception("The current node timed out during startup. …"), iter([1, 2, 3, 4, 5, 6])

    def start(fails, error=slow):
        if next(said) <= fails:
            raise error
        return "up"

    assert on_ray.patiently(lambda: start(2)) == "up"
    with pytest.raises(on_ray.EngineError, match=r"^Ray does not start here \(The current .*\): end other work"):
        on_ray.patiently(lambda: start(9))
    with pytest.raises(ValueError, match="wrong"):
        on_ray.patiently(lambda: (_ for _ in ()).throw(ValueError("wrong")))


def test_a_ray_of_its_own_listens_on_this_machine_alone_and_runs_the_jobs(tmp_path):
    """In a process without RAY_ADDRESS; the sockets of all its processes, as the system lists them."""
    code = """import subprocess, sys
from pathlib import Path
from focusdpo_lib.batch import Job, reproduce, run_all
from focusdpo_lib.batch.engines import on_ray
def listening():
    found = subprocess.run(["cat", "/proc/net/tcp", "/proc/net/tcp6"], capture_output=True, text=True).stdout
    rows = [line.split() for line in found.splitlines() if ":" in line and line.split()[3] == "0A"]
    return {row[9]: row[1] for row in rows}
before = listening()
original = on_ray._require_room
on_ray._require_room = lambda *words: (print("new", set(listening().items()) - set(before.items())), original(*words))
sys.exit(run_all([Job(Path(sys.argv[1]), Path(sys.argv[2]) / "out/a", overrides={"name": "a"})], "ray"))"""
    path = os.pathsep.join(sys.path)
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", on_ray.CLUSTERS)}
    words = [sys.executable, "-c", code, str(book(tmp_path)), str(tmp_path)]  # Ray looks at import whether to listen
    found = subprocess.run(words, env={**environment, "PYTHONPATH": path}, capture_output=True, text=True)
    assert found.returncode == 0 and "[1/1] a: done in" in found.stdout, found.stdout + found.stderr
    addresses = re.findall(r"'([0-9A-F]+):[0-9A-F]{4}'", found.stdout)
    assert len(addresses) >= 4
    assert set(addresses) <= {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


@pytest.mark.parametrize("dies", [False, True])
def test_more_shards_than_a_run_has_gpus_run_all_over_the_cluster(cluster, tmp_path, dies):
    """Four shards of a run without a GPU: on the two GPUs of each of two machines, one on each at a time."""
    made = Job(book(tmp_path, SHARDS), tmp_path / "out/a", overrides={"name": "a", "seconds": float(dies)})
    assert run_all([made], "ray") == 0, worker.log_of(made).read_text()
    found = [json.loads((tmp_path / f"a/{k}.json").read_text()) for k in range(4)]
    assert [record["of"] for record in found] == [4] * 4
    assert {record["gpus"] for record in found} == {"0", "1"}
    assert len({record["node"] for record in found}) == 2
    for record in found:
        others = [o for o in found if o is not record and (o["node"], o["gpus"]) == (record["node"], record["gpus"])]
        assert all(other["begun"] > record["ended"] or other["ended"] < record["begun"] for other in others)


def test_a_training_over_the_cluster_is_that_of_one_machine_to_the_bit(cluster, tiny_flux, tmp_path, monkeypatch):
    """By Ray Train, on GPUs of which the run has none of its own, against accelerate's launcher."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.copytree(tiny_flux, tmp_path / "model")
    over = {"name": str(tmp_path / "ray"), "seconds": 0.0}
    made = Job(book(tmp_path, TRAINING), tmp_path / "out/a", overrides=over)
    assert run_all([made], "ray") == 0, worker.log_of(made).read_text()
    page = (tmp_path / "out/a/a.html").read_text()
    assert "12/12" in page, "the first process's bar is shown"
    exec(TRAINING, {"name": str(tmp_path / "local")})
    ours, theirs = tmp_path / "ray/training/run", tmp_path / "local/training/run"
    for file in ("steps.csv", "adapter/pytorch_lora_weights.safetensors"):
        assert (ours / file).read_bytes() == (theirs / file).read_bytes()
    left = {path.name for path in theirs.iterdir()} ^ {path.name for path in ours.iterdir()}
    assert left == {"accelerate.yaml"}, "accelerate's own settings; Ray Train leaves nothing"


def test_what_a_training_over_the_cluster_raises_is_its_sentence(cluster, tiny_flux, tmp_path, capsys):
    shutil.copytree(tiny_flux, tmp_path / "model")
    body = TRAINING.replace('"steps": 12', '"steps": 12, "learning_rate": 1e30')
    over = {"name": str(tmp_path / "ray"), "seconds": 0.0}
    made = Job(book(tmp_path, body), tmp_path / "out/a", overrides=over)
    assert run_all([made], "ray") == 1
    assert "TrainingError: " in capsys.readouterr().out


def test_a_training_that_the_cluster_cannot_hold_is_refused(cluster, tmp_path, capsys):
    body = "pass"
    cells = [
        nbformat.v4.new_code_cell("training = {}", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(body),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "b.ipynb")
    for gpus, processes, says in (
        (0, 5, "trains in 5 processes, and the cluster has 4 GPU(s): lower training.processes"),
        (1, 2, "asks for 1 GPU(s) and trains in 2 processes: set resources.gpus to 2 for one machine, or to 0, and"),
    ):
        over = {"training.processes": processes, "resources.gpus": gpus}
        assert run_all([Job(tmp_path / "b.ipynb", tmp_path / "out/a", overrides=over)], "ray") == 1
        assert says in capsys.readouterr().out


def test_the_smoke_profile_on_the_cluster_ends_with_the_tables_of_one_machine(cluster, tmp_path, monkeypatch):
    """Of its trainings one is in two processes, which get GPUs of the cluster."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for engine in ("ray", "local"):
        jobs = reproduce.plan(SMOKE, tmp_path / engine, BOOKS, families=["uno"])
        assert reproduce.reproduce(jobs, tmp_path / engine, reproduce.costs(SMOKE), engine=engine) == 0
    logs = [(tmp_path / "ray/notebooks/logs" / f"{job.name}.log").read_text() for job in jobs]
    assert all(re.match(r"started on .* GPUs none\)", log) for log in logs) and len(logs) == 9
    facts = json.loads((tmp_path / "ray/training/uno_focusdpo-seed0/provenance.json").read_text())
    assert len(facts["processes"]) == 2
    for table in ("table1", "table2"):
        ours, theirs = (tmp_path / engine / "tables" / table / "table.csv" for engine in ("ray", "local"))
        assert ours.read_bytes() == theirs.read_bytes()
