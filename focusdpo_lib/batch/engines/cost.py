"""What the engine `ray` costs against `local`: seconds a job, and a whole short reproduction with two workers.

    python -m focusdpo_lib.batch.engines.cost        # a quarter of an hour; needs the extra [ray] and a quiet machine

What `batch.plan` foretells of the reproduction, from a probe of this machine, stands beside what it took. Times are of
whole processes, and ratios of one run.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat

from focusdpo_lib import provenance
from focusdpo_lib.batch import plan, reproduce
from focusdpo_lib.batch.schedule import Node, makespan
from focusdpo_lib.bench.report import default_folder, table
from focusdpo_lib.runs import write_json, write_text

RESULTS, PAGE = "engines.json", "ENGINES.md"
ENGINES, WORKERS = ("local", "ray"), (1, 2)
FEW, EMPTY = 4, 8  # notebooks that do nothing, each after the one before: so many, and so many more
A_JOB, FORETOLD = "a job", "the reproduction of the toybox as a plan foretells it"
SHORT = ("--profile", "toybox", "--families", "uno", "--set", "training.steps=40", "--set", "generation.prompts=2")
ALL_EMPTY = """import sys
from pathlib import Path
from focusdpo_lib.batch import Job, run_all
book, out, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
jobs = [Job(book, out / str(i), after=[str(i - 1)] if i else []) for i in range(count)]
sys.exit(run_all(jobs, sys.argv[4]))"""


def seconds(words: list[str]) -> float:
    """Of a process, one thread a worker."""
    begun = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *words], check=True, env=environment, stdout=subprocess.DEVNULL)
    return time.monotonic() - begun


def a_job(engine: str, scratch: Path) -> float:
    """Seconds that one more empty notebook takes in a chain, in which kernels start warm with either engine."""
    book = scratch / "empty.ipynb"
    cell = nbformat.v4.new_code_cell("nothing = 0", metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), book)
    took = [
        seconds(["-c", ALL_EMPTY, str(book), str(scratch / f"{engine}-{n}"), str(n), engine])
        for n in (FEW, FEW + EMPTY)
    ]
    return (took[1] - took[0]) / EMPTY


def a_reproduction(engine: str, scratch: Path, words: Sequence[str]) -> float:
    results = ["--results", str(scratch / engine), "--engine", engine]
    return seconds(["-m", "focusdpo_lib.batch.reproduce", *results, *words])


def foretold(scratch: Path, words: Sequence[str]) -> dict[str, float]:
    """Seconds of a reproduction with either engine, by a plan."""
    given = plan.parser().parse_args(["--results", str(scratch / "plan"), *words])
    jobs, _ = reproduce.estimated(plan.jobs_of(given), reproduce.costs(given.params / given.profile))
    return {e: 60 * makespan(plan.timed(jobs), [Node(0, count)]) for e, count in zip(ENGINES, WORKERS, strict=True)}


def page(found: Mapping[str, Any]) -> str:
    """What was found, as Markdown."""
    machine, rows = found["machine"], found["seconds"]
    commit = machine["git"]["commit"][:12] if machine["git"] else "unknown"
    lines = [[name, *(f"{of[e]:.1f}" for e in ENGINES), _said(name, of)] for name, of in rows.items()]
    foreseen = [f"{rows[FORETOLD][e] / rows[_named(SHORT)][e] - 1:+.0%}" for e in ENGINES]
    return (
        f"# What the engine ray costs: {machine['device']}\n\nCommit {commit}; written by `python -m "
        f"focusdpo_lib.batch.engines.cost`. Seconds; ray had two workers on this machine, local one.\n\n"
        + table(["what", *ENGINES, "ray against local"], [*lines, [f"{FORETOLD}, against what it took", *foreseen, ""]])
        + "\n"
    )


def _said(name: str, of: Mapping[str, float]) -> str:
    if name == A_JOB:
        return f"{of['ray'] - of['local']:+.1f} s"
    return f"{of['local'] / of['ray']:.2f} times as fast"


def _named(words: Sequence[str]) -> str:
    return f"reproduce {' '.join(words)}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m focusdpo_lib.batch.engines.cost", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--out", type=Path, help="folder of the results (default: results/bench/<device>)")
    out = parser.parse_args(arguments).out or default_folder()
    with TemporaryDirectory() as folder:
        found = {A_JOB: {engine: a_job(engine, Path(folder)) for engine in ENGINES}}
        found[FORETOLD] = foretold(Path(folder), SHORT)
        found[_named(SHORT)] = {engine: a_reproduction(engine, Path(folder), SHORT) for engine in ENGINES}
    facts = {"seconds": found, "machine": provenance.facts()}
    write_json(out / RESULTS, facts)
    write_text(out / PAGE, page(facts))
    print(page(facts))


if __name__ == "__main__":
    main()
