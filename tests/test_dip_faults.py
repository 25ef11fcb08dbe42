"""Ten kills at random moments of 1,000 toybox pairs in the chain: the files are those of an unbroken run.

`make test-ray` runs it (it takes minutes); FOCUSDPO_PAIRS=200 makes it shorter.
"""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from focusdpo_lib.runs import PARTIAL, is_complete

PAIRS, KILLS = int(os.environ.get("FOCUSDPO_PAIRS", 1000)), 10
COMMAND = """import sys
from pathlib import Path
from focusdpo_lib import params, stages
if __name__ == "__main__":
    results, pairs, processes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    dip = params.Dip(train_pairs=pairs - 2 * (pairs // 10), validation_pairs=pairs // 10)
    chain = stages.make_drafts(results, "toybox", params.Chain(part_size=32), {"dip": dip}, processes)
    stages.curate(results, "pairs", chain, params.Curation(similarity=0.9, drop=0.1))
"""


def start(results, processes):
    script = results.parent / "run.py"
    script.write_text(COMMAND)
    words = [sys.executable, script, str(results), str(PAIRS), str(processes)]
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    hushed = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(words, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, **hushed)


def files(results):
    """What is to be the same: every part, every pair, the decisions and the card; times are not."""
    found = [*results.rglob("*.parquet"), *results.glob("dip/*/curation.csv"), *results.glob("dip/*/README.md")]
    return {path.relative_to(results).as_posix(): path.read_bytes() for path in found}


def made(results):
    return sum(1 for path in results.rglob("*.parquet") if PARTIAL not in str(path))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    results = tmp_path_factory.mktemp("unbroken") / "results"
    results.mkdir()
    begun = time.monotonic()
    assert start(results, 1).wait() == 0
    return files(results), time.monotonic() - begun


def test_ten_kills_lose_and_double_nothing(tmp_path, unbroken):
    """Of the driver or of one of its two shards, each after a while in which at least a part more was made."""
    whole, seconds = unbroken
    draw, results, kills = random.Random(0), tmp_path / "results", 0
    results.mkdir()
    while True:
        run, before = start(results, 2), made(results)
        while run.poll() is None:
            time.sleep(draw.uniform(0.0, 0.12) * seconds / KILLS)
            if kills < KILLS and made(results) > before and run.poll() is None:
                kills, before = kills + 1, made(results)
                shards = children(run.pid)
                kill(draw.choice([run.pid, *shards]))
        if run.returncode == 0:
            break
    assert kills == KILLS
    found = files(results)
    assert sorted(found) == sorted(whole)
    assert [name for name in whole if found[name] != whole[name]] == []
    assert is_complete(results / "dip" / "pairs") and is_complete(results / "chain" / "toybox")
    assert not list(results.rglob(f"{PARTIAL}*"))
    ids = [i for path in sorted(results.glob("chain/toybox/scoring/*.parquet")) for i in ids_of(path)]
    assert len(ids) == len(set(ids)) == PAIRS


def ids_of(path):
    return pq.read_table(path, columns=["id"])["id"].to_pylist()


def children(pid):
    """The shards of a run: what it started but multiprocessing's own tracker, or what was forked for it."""
    found = {child: command(child) for child in started_by(pid)}
    forked = [child for server, words in found.items() if b"forkserver" in words for child in started_by(server)]
    return [*forked, *(child for child, words in found.items() if b"spawn_main" in words)]


def started_by(pid):
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def kill(pid):
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
