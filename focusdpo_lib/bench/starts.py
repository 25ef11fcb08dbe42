"""What starting costs: imports as ratios to `import torch`, and from how many steps compiling the blocks pays.

    python -m focusdpo_lib.bench.starts             # imports alone, two minutes
    python -m focusdpo_lib.bench.starts --compile   # ten minutes; needs a C++ compiler where there is no GPU

`training.compile` keeps what it compiled beside the results, for every later run: the first pays "cold", the others
"warm".
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from focusdpo_lib import backbones, params, provenance
from focusdpo_lib.bench.measure import interleaved, timed
from focusdpo_lib.bench.report import default_folder, table
from focusdpo_lib.bench.steps import toybox_step
from focusdpo_lib.runs import write_json, write_text

RESULTS, PAGE = "starts.json", "STARTS.md"
TORCH = "import torch"
STARTS = {
    TORCH: ["-c", "import torch"],
    "import focusdpo_lib.stages": ["-c", "import focusdpo_lib.stages"],
    "… and what loads UNO": ["-c", "from focusdpo_lib import backbones; backbones.family_class('flux_uno')"],
    "python -m focusdpo_lib.batch.reproduce --help": ["-m", "focusdpo_lib.batch.reproduce", "--help"],
    "python -m focusdpo_lib.batch --help": ["-m", "focusdpo_lib.batch", "--help"],
}
STEPS = 12  # that are timed, after two that set up


def imports(rounds: int = 5) -> dict[str, float]:
    """Median seconds of a whole process for each of STARTS, taken in turns."""

    def process(words: list[str]) -> Callable[[], None]:
        return lambda: subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL) and None

    seconds = interleaved({name: process(words) for name, words in STARTS.items()}, rounds, warm_up=1)
    return {name: statistics.median(values) for name, values in seconds.items()}


def compiling(family: str) -> dict[str, float]:
    """Seconds of a FocusDPO step with and without compiled blocks, and of compiling them with and without a cache."""
    with TemporaryDirectory() as cache:
        words = [sys.executable, "-m", "focusdpo_lib.bench.starts", "--worker", family]
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        said = [subprocess.run(words, check=True, env=environment, capture_output=True, text=True) for _ in range(2)]
    cold, warm = (json.loads(process.stdout.splitlines()[-1]) for process in said)
    return {"eager": warm["eager"], "compiled": warm["compiled"], "cold": cold["compiling"], "warm": warm["compiling"]}


def work(family: str) -> dict[str, float]:
    """One process of `compiling`: the step before and after, on a batch of one reference."""
    backbone = backbones.load(params.Backbone(family=family), backbones.best_device())
    step = toybox_step(backbone, params.Training().batch_size)

    def steps() -> list[float]:
        return [timed(step) for _ in range(STEPS + 2)]

    eager = statistics.median(steps()[2:])
    backbone.network.compile_repeated_blocks()
    first, second, *others = steps()
    compiled = statistics.median(others)
    return {"eager": eager, "compiled": compiled, "compiling": first + second - 2 * compiled}


def page(found: dict) -> str:
    """What was found, as Markdown."""
    machine, seconds = found["machine"], found["imports"]
    commit = machine["git"]["commit"][:12] if machine["git"] else "unknown"
    parts = [
        f"# What starting costs: {machine['device']}",
        f"Commit {commit}, torch {machine['packages']['torch']}; written by `python -m focusdpo_lib.bench.starts`. "
        "Whole processes, in turns, medians.",
        table(
            ["process", "seconds", "of `import torch`"],
            [[f"`{name}`", f"{value:.2f}", f"{value / seconds[TORCH]:.2f}"] for name, value in seconds.items()],
        ),
    ]
    if found.get("compiling"):
        rows = []
        for family, of in found["compiling"].items():
            saved = of["eager"] - of["compiled"]
            pays = [f"{of[when] / saved:.0f}" if saved > 0 else "never" for when in ("cold", "warm")]
            ratio = f"{of['eager'] / of['compiled']:.2f}"
            rows.append([family, *(f"{of[name]:.3g}" for name in ("eager", "compiled")), ratio,
                         *(f"{of[name]:.0f}" for name in ("cold", "warm")), *pays])  # fmt: skip
        header = [
            "family",
            "s a step",
            "compiled",
            "faster",
            "compiling, cold",
            "warm",
            "pays from steps, cold",
            "warm",
        ]
        about = (
            "`training.compile`, FocusDPO's step of 12 pairs with one reference (batches of two references, and every "
            "other objective, compile once more). Warm: with what a run before kept."
        )
        parts += ["## Compiled blocks", about, table(header, rows)]
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> None:
    top = argparse.ArgumentParser(prog="python -m focusdpo_lib.bench.starts", description=__doc__.split("\n\n")[0])
    top.add_argument("--compile", action="store_true", help="also compile, and time steps")
    top.add_argument("--rounds", type=int, default=5, help="turns that are timed")
    top.add_argument("--out", type=Path, help="folder of the results (default: results/bench/<device>)")
    top.add_argument("--worker", help=argparse.SUPPRESS)
    chosen = top.parse_args(arguments)
    if chosen.worker:
        print(json.dumps(work(chosen.worker)))
        return
    out = chosen.out or default_folder()
    found = {"imports": imports(chosen.rounds), "machine": provenance.facts()}
    if chosen.compile:
        found["compiling"] = {family: compiling(family) for family in params.FAMILY_SETTINGS}
    write_json(out / RESULTS, found)
    write_text(out / PAGE, page(found))
    print(out / PAGE)


if __name__ == "__main__":
    main()
