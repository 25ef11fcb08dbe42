"""What the chain of Figure 4 costs on the toybox: rows a second by stage, and whether memory grows with the rows.

    python -m focusdpo_lib.bench.dip             # 250 and 1000 pairs, about four minutes on one core

Each number of pairs goes through every stage, curation and dataset in a process of its own, whose peak is measured.
"""

import argparse
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from focusdpo_lib import params, provenance
from focusdpo_lib.bench.report import default_folder, table
from focusdpo_lib.dip import drafts, toybox_stages
from focusdpo_lib.dip.curation import curated, score_table
from focusdpo_lib.dip.pairs import write_pairs
from focusdpo_lib.dip.run import run_chain
from focusdpo_lib.dip.run_sheet import run_sheet
from focusdpo_lib.dip.scoring import Scoring
from focusdpo_lib.runs import write_json, write_text

RESULTS, PAGE = "dip.json", "DIP.md"
SIZES = (250, 1000)  # pairs


def work(pairs: int, folder: Path) -> dict:
    """One process: so many pairs through it all. Seconds by stage, rows, bytes a row, and the process's peak memory."""
    held_out = pairs // 10
    dip = params.Dip(train_pairs=pairs - 2 * held_out, validation_pairs=held_out)
    made_by = [*map(partial(toybox_stages.ToyboxStage, settings=dip), toybox_stages.MAKERS), Scoring(params.Scoring())]
    run_chain(folder, partial(toybox_stages.plan, dip), made_by, params.Chain().part_size, toybox_stages.DRAFT_BYTES)
    names = [stage.name for stage in made_by]
    sheet = run_sheet(folder, names)
    found = {name: {"seconds": sheet["seconds"][name], "opening": sheet["opening"][name]} for name in names}
    for name in names:
        found[name]["bytes"] = sum(path.stat().st_size for path in drafts.parts(folder, name)) / pairs
    begun = time.perf_counter()
    decisions = curated(score_table(folder), params.Curation())
    found["curation"] = {"seconds": (curating := time.perf_counter()) - begun}
    write_pairs(folder / "pairs", folder, decisions)
    size = sum(path.stat().st_size for path in (folder / "pairs").glob("*.parquet")) / pairs
    found["dataset"] = {"seconds": time.perf_counter() - curating, "bytes": size}
    kept = int((decisions["out"] == "").sum())
    return {"pairs": pairs, "kept": kept, "stages": found, "peak_bytes": provenance.peak_memory()}


def measured(pairs: int) -> dict:
    """`work` in a process of its own."""
    with TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "focusdpo_lib.bench.dip", "--worker", str(pairs), folder]
        said = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    return json.loads(said.splitlines()[-1])


def page(found: dict) -> str:
    """What was found, as Markdown."""
    machine, runs = found["machine"], found["runs"]
    commit = machine["git"]["commit"][:12] if machine["git"] else "unknown"
    most = runs[-1]
    rows = [
        [
            name,
            f"{most['pairs'] / of['seconds']:.0f}",
            f"{1000 * of['seconds'] / most['pairs']:.1f}",
            f"{of['opening']:.1f}" if "opening" in of else "–",
            f"{of['bytes'] / 1000:.1f}" if "bytes" in of else "–",
        ]
        for name, of in most["stages"].items()
    ]
    memory = [[str(run["pairs"]), str(run["kept"]), f"{run['peak_bytes'] / 1e6:.0f}"] for run in runs]
    parts = [
        f"# What the chain of Figure 4 costs on the toybox: {machine['device']}",
        f"Commit {commit}; written by `python -m focusdpo_lib.bench.dip`. One process, parts of "
        f"{params.Chain().part_size} drafts, {most['pairs']} pairs.",
        table(["stage", "rows a second", "ms a row", "s to open", "kB a row on disk"], rows),
        "Memory does not grow with the rows:",
        table(["pairs", "kept", "peak MB"], memory),
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> None:
    top = argparse.ArgumentParser(prog="python -m focusdpo_lib.bench.dip", description=__doc__.split("\n\n")[0])
    top.add_argument("--pairs", type=int, nargs="+", default=SIZES, help="numbers of pairs, the largest last")
    top.add_argument("--out", type=Path, help="folder of the results (default: results/bench/<device>)")
    top.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    chosen = top.parse_args(arguments)
    if chosen.worker:
        print(json.dumps(work(int(chosen.worker[0]), Path(chosen.worker[1]))))
        return
    out = chosen.out or default_folder()
    found = {"runs": [measured(pairs) for pairs in chosen.pairs], "machine": provenance.facts()}
    write_json(out / RESULTS, found)
    write_text(out / PAGE, page(found))
    print(pd.DataFrame(found["runs"][-1]["stages"]).T.to_string())
    print(out / PAGE)


if __name__ == "__main__":
    main()
