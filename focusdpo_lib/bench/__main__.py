"""`make bench`: the cost of a step of SFT, DPO, FocusDPO and of a plain reading of the paper, case by case.

Every case is written as soon as it is done; a run that was killed goes on where it was when it is started again.
Without a GPU the full sizes (`--size full`) are counted, not measured: bytes and operations, no seconds. A case takes
two minutes on one core.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import diffusers.utils.logging
import torch

from focusdpo_lib import backbones, provenance
from focusdpo_lib.bench.cases import ROUNDS, Case, cases
from focusdpo_lib.bench.count import counted
from focusdpo_lib.bench.report import PAGE, default_folder, read_results, write_results
from focusdpo_lib.bench.steps import attempted


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m focusdpo_lib.bench", description=__doc__)
    top.add_argument("--size", choices=["small", "full"], help="of random models (default: small, full on a GPU)")
    top.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cases with all these words in their name")
    top.add_argument("--rounds", type=int, help=f"turns that are timed (default: by size, {ROUNDS})")
    top.add_argument("--batch-size", type=int, help="pairs a step (default: by model)")
    top.add_argument("--out", type=Path, help="folder of the results (default: results/bench/<device>)")
    top.add_argument("--again", action="store_true", help="take anew what is there from the same commit and device")
    return top


def main(arguments: list[str] | None = None) -> None:
    top = parser()
    chosen = top.parse_args(arguments)
    diffusers.utils.logging.set_verbosity_error()
    device = torch.device(backbones.best_device())
    torch.zeros(1, device=device)  # from here on, provenance names the GPU
    on_gpu = device.type == "cuda"  # diffusers quantizes there alone
    size = chosen.size or ("full" if on_gpu else "small")
    offered = cases(size, quantized=on_gpu or size == "full")
    wanted = [case for case in offered if all(word in case.name for word in chosen.only)]
    if not wanted:
        top.error(f"no case has all of {chosen.only} in its name: choose from {', '.join(c.name for c in offered)}")
    out = chosen.out or default_folder()
    run(wanted, device, out, rounds=chosen.rounds, batch=chosen.batch_size, again=chosen.again)
    print(out / PAGE)


def run(
    wanted: list[Case],
    device: torch.device,
    out: Path,
    *,
    rounds: int | None = None,
    batch: int | None = None,
    again: bool = False,
) -> None:
    """Takes cases one after the other and writes the results so far after each; cases already there are kept."""
    results = read_results(out)
    with TemporaryDirectory() as scratch:
        for case in wanted:
            settings = {"case": asdict(case), "rounds": rounds or ROUNDS[case.size], "pairs": batch or case.pairs}
            if not again and is_current(results.get(case.name), settings):
                print(f"{case.name}: kept, taken before by this commit on this device")
                continue
            if case.size == "full" and device.type == "cpu":
                found = counted(case, settings["pairs"], Path(scratch))
            else:
                found = attempted(case, device, settings["rounds"], settings["pairs"], Path(scratch))
            results[case.name] = settings | found | {"machine": provenance.facts()}
            write_results(out, results)
            print(f"{case.name}: {found['status']} {found.get('ratios', '')}", flush=True)


def is_current(entry: dict | None, settings: dict) -> bool:
    """Whether an entry says what measuring would: same settings, device, commit and packages."""
    if entry is None or entry["status"].startswith("cannot be loaded"):
        return False
    now, then = provenance.facts(), entry["machine"]
    same_machine = all(now[name] == then[name] for name in ("device", "git", "packages"))
    return same_machine and all(entry[name] == value for name, value in settings.items())


if __name__ == "__main__":
    main()
