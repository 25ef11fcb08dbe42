"""What the engine `ray` costs against `local`: seconds a job, and a whole small reproduction with two workers.

    python -m focusdpo_lib.bench.engines             # ten minutes; needs the extra [ray] and a quiet machine

The reproduction is that of the profile smoke, thirteen notebooks of a few seconds each, which is hard on an engine;
`--profile toybox --set training.steps=40 --set generation.prompts=2 --families uno` is one in which more is computed.
Times are of whole processes, and ratios of one run.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
import pandas as pd

from focusdpo_lib import provenance
from focusdpo_lib.bench.report import default_folder, table
from focusdpo_lib.runs import write_json, write_text

RESULTS, PAGE = "engines.json", "ENGINES.md"
ENGINES = ("local", "ray")
EMPTY = 8  # notebooks that do nothing, each after the one before
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
    """Seconds that one more empty notebook takes in a chain."""
    book = scratch / "empty.ipynb"
    cell = nbformat.v4.new_code_cell("nothing = 0", metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), book)
    took = [
        seconds(["-c", ALL_EMPTY, str(book), str(scratch / f"{engine}-{n}"), str(n), engine]) for n in (2, 2 + EMPTY)
    ]
    return (took[1] - took[0]) / EMPTY


def a_reproduction(engine: str, scratch: Path, words: list[str]) -> float:
    results = ["--results", str(scratch / engine), "--engine", engine]
    return seconds(["-m", "focusdpo_lib.batch.reproduce", *results, *words])


def page(found: dict) -> str:
    """What was found, as Markdown."""
    machine = found["machine"]
    commit = machine["git"]["commit"][:12] if machine["git"] else "unknown"
    rows = pd.DataFrame(found["seconds"]).T
    lines = [[name, *(f"{rows.loc[name, e]:.1f}" for e in ENGINES), _said(name, rows.loc[name])] for name in rows.index]
    return (
        f"# What the engine ray costs: {machine['device']}\n\nCommit {commit}; written by `python -m "
        f"focusdpo_lib.bench.engines`. Seconds; ray had two workers on this machine, local one.\n\n"
        + table(["what", *ENGINES, "ray against local"], lines)
        + "\n"
    )


def _said(name: str, of: pd.Series) -> str:
    if name == "a job":
        return f"{of['ray'] - of['local']:+.1f} s"
    return f"{of['local'] / of['ray']:.2f} times as fast"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m focusdpo_lib.bench.engines", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="folder of the results (default: results/bench/<device>)")
    parser.add_argument("--profile", default="smoke", help="of the reproduction; what follows goes to it as it stands")
    given, words = parser.parse_known_args(arguments)
    words = ["--profile", given.profile, *words]
    out, found = given.out or default_folder(), {"a job": {}, f"reproduce {' '.join(words)}": {}}
    with TemporaryDirectory() as folder:
        for engine in ENGINES:
            one, all_of_it = found
            found[one][engine] = a_job(engine, Path(folder))
            found[all_of_it][engine] = a_reproduction(engine, Path(folder), words)
    facts = {"seconds": found, "machine": provenance.facts()}
    write_json(out / RESULTS, facts)
    write_text(out / PAGE, page(facts))
    print(page(facts))


if __name__ == "__main__":
    main()
