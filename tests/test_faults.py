"""Ten faults at random moments of each kind: the same command ends with the files of an unbroken run, and no others."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import nbformat
import pytest
from test_engine_ray import cluster, started
from tiny_work import Steady

from focusdpo_lib import workers
from focusdpo_lib.batch import Job
from focusdpo_lib.batch.engines import on_ray
from focusdpo_lib.runs import PARTIAL, RunError, is_complete

assert cluster  # a fixture
FAULTS = 10
ON_ONE_MACHINE = """import sys
from pathlib import Path
from tiny_work import Steady
from focusdpo_lib import runs, workers
if __name__ == "__main__":
    with runs.Run(Path(sys.argv[1]), {}) as run:
        workers.run(Steady(run.folder, pause=0.15), run.folder, 3, "items", "item")
"""
# A run of its own stage in two shards, on GPUs of the cluster.
BODY = """from pathlib import Path
from tiny_work import Steady
from focusdpo_lib import runs, workers
with runs.Run(Path(name).absolute(), {}) as run:
    workers.run(Steady(run.folder, pause=0.4), run.folder, 2, "items", "item")"""
COMMAND = """from test_faults import *
from focusdpo_lib.batch import run_all
sys.exit(run_all(jobs(Path(sys.argv[1])), "ray"))"""


def files(folder):
    """What a run made, by its content, and whatever it left half made."""
    found = [*Path(folder).rglob("*.txt"), *Path(folder).rglob(f"{PARTIAL}*/*")]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    workers.run(Steady(folder, pause=0), folder, 1, "items", "item")
    return files(folder)


def test_a_shard_killed_at_ten_random_moments(tmp_path, unbroken):
    draw, folder, faults = random.Random(0), tmp_path / "items", 0
    folder.mkdir()
    while faults < FAULTS or files(folder) != unbroken:
        if files(folder) == unbroken:
            folder = tmp_path / f"items{faults}"
            folder.mkdir()
        run = on_one_machine(folder)
        while run.poll() is None:
            time.sleep(draw.uniform(0.0, 0.8))
            if (found := children(run.pid)) and faults < FAULTS:
                kill(draw.choice(found))
                faults += 1
        run.wait()


def test_a_driver_killed_at_ten_random_moments(tmp_path, unbroken):
    """Its shards end with it."""
    draw, folder, faults = random.Random(1), tmp_path / "items", 0
    folder.mkdir()
    while True:
        run = on_one_machine(folder)
        until = time.monotonic() + 60
        while faults < FAULTS and not children(run.pid) and run.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        if faults == FAULTS or run.poll() is not None:
            assert run.wait() == 0
            assert files(folder) == unbroken and is_complete(folder)
            if faults == FAULTS:
                return
            folder = tmp_path / f"items{faults}"
            folder.mkdir()
            continue
        time.sleep(draw.uniform(0.0, 0.6))
        orphans = children(run.pid)
        kill(run.pid)
        run.wait()
        faults += 1
        while any(Path(f"/proc/{process}").exists() for process in orphans):
            time.sleep(0.05)
        if is_complete(folder):  # it came too late: nothing was left to be killed
            assert files(folder) == unbroken
            folder, faults = tmp_path / f"late{faults}-{run.pid}", faults - 1
            folder.mkdir()


def test_a_disk_full_at_ten_random_items_of_one_shard(tmp_path, unbroken):
    draw = random.Random(2)
    for full in draw.sample(range(30), FAULTS):
        folder = tmp_path / str(full)
        folder.mkdir()
        with pytest.raises(
            RunError, match=rf"^no space left to write .*{full}\.txt: free some disk space and run again"
        ):
            workers.run(Steady(folder, pause=0, full=full), folder, 2, "items", "item")
        workers.run(Steady(folder, pause=0, full=full), folder, 2, "items", "item")
        (folder / "was full").unlink()
        assert files(folder) == unbroken


@pytest.mark.parametrize("fault", ["worker", "node", "driver"])
def test_ray_at_ten_random_moments(cluster, tmp_path, unbroken, fault):
    pytest.importorskip("ray")
    draw, faults, runs = random.Random(fault), 0, 0
    node = on_ray.patiently(lambda: cluster.add_node(num_cpus=2, num_gpus=2))
    while faults < FAULTS:
        folder, runs = tmp_path / str(runs), runs + 1
        folder.mkdir()
        while (driver := started(COMMAND, folder)) and driver.poll() is None:
            while driver.poll() is None:
                time.sleep(draw.uniform(0.5, 8.0))
                if faults == FAULTS or driver.poll() is not None:
                    continue
                if fault == "node":
                    cluster.remove_node(node, allow_graceful=False)
                    node = on_ray.patiently(lambda: cluster.add_node(num_cpus=2, num_gpus=2))
                else:
                    kill(driver.pid if fault == "driver" else draw.choice(of_ray() or [0]))
                faults += 1
            if driver.returncode == 0:
                break
        for job in jobs(folder):
            assert files(folder / job.name) == unbroken
        assert sorted(path.name for path in (folder / "out").iterdir() if path.is_dir()) == ["a", "b", "logs"]
        assert not list((folder / "out").glob("*.failed.ipynb"))
    cluster.remove_node(node)


def jobs(folder):
    """Two runs, one after the other."""
    path = folder / "book.ipynb"
    if not path.exists():
        first = nbformat.v4.new_code_cell("name = 'x'", metadata={"tags": ["parameters"]})
        nbformat.write(nbformat.v4.new_notebook(cells=[first, nbformat.v4.new_code_cell(BODY)]), path)
    return [
        Job(path, folder / "out" / name, overrides={"name": name}, after=after)
        for name, after in (("a", []), ("b", ["a"]))
    ]


def on_one_machine(folder):
    script = folder.parent / "run.py"
    script.write_text(ON_ONE_MACHINE)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    hushed = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, script, str(folder)], env={**os.environ, "PYTHONPATH": path}, **hushed)


def children(process):
    """The shards of a run: what it started but multiprocessing's own tracker, or what was forked for it."""
    found = {pid: _command(pid) for pid in _started_by(process)}
    forked = [pid for server, words in found.items() if "forkserver" in words for pid in _started_by(server)]
    return [*forked, *(pid for pid, words in found.items() if "spawn_main" in words)]


def _started_by(process):
    try:
        return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def of_ray():
    """Processes that work for Ray at the moment, this test's own aside."""
    every = (path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline"))
    return [int(pid) for pid in every if _command(pid).startswith("ray::_task")]


def _command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def kill(pid):
    if pid:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
