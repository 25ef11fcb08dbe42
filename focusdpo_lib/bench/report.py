"""From the entries of a benchmark to its files: `results.json`, and `README.md` with goals, ratios and steps."""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from focusdpo_lib import provenance
from focusdpo_lib.runs import write_json, write_text

RESULTS, PAGE = "results.json", "README.md"
UNITS = {"": 1, "GB": 1e9}
STATUSES = ("measured", "counted")


class Goal(NamedTuple):
    """A bound on a number of every case that `of` picks; the worst of them counts."""

    text: str
    of: Callable[[dict], bool]
    number: Callable[[dict], float | None]
    limit: float
    at_least: bool
    unit: str = ""

    def verdict(self, entries: Iterable[dict]) -> tuple[str, str]:
        """What was found, and "met", "missed" or "unmeasured"; what was counted serves where nothing was measured."""
        found = {status: self._numbers(e for e in entries if e["status"] == status) for status in STATUSES}
        status = next((status for status, numbers in found.items() if numbers), None)
        if status is None:
            return "–", "unmeasured"
        numbers = found[status]
        worst = min(numbers) if self.at_least else max(numbers)
        met = worst >= self.limit if self.at_least else worst <= self.limit
        cases = "1 case" if len(numbers) == 1 else f"the worst of {len(numbers)} cases"
        return f"{worst:.4g} {self.unit}".strip() + f" ({cases}, {status})", "met" if met else "missed"

    def _numbers(self, entries: Iterable[dict]) -> list[float]:
        numbers = [self.number(entry) for entry in entries if self.of(entry["case"])]
        return [number / UNITS[self.unit] for number in numbers if number is not None]


def toybox(case: dict) -> bool:
    return case["model"] == "toybox"


def full(*models: str, weights: str | None = None) -> Callable[[dict], bool]:
    return lambda case: (
        case["size"] == "full" and case["model"] in models and (weights is None or case["weights"] == weights)
    )


def ratio(name: str) -> Callable[[dict], float | None]:
    return lambda entry: entry["ratios"].get(name)


def matrix_rate_fraction(entry: dict) -> float | None:
    return entry["steps"]["focusdpo"].get("fraction of matrix rate")


def memory(optimizer: str) -> Callable[[dict], float]:
    """FocusDPO's step and the optimizer's state."""
    return lambda entry: entry["steps"]["focusdpo"]["peak_bytes"] + entry["optimizer_bytes"][optimizer]


def two_references(case: dict) -> bool:
    return full("flux")(case) and case["references"] == 2


BOTH = ("flux", "sdxl")
GOALS = [
    Goal("FocusDPO's step / DPO's, toybox", toybox, ratio("focusdpo / dpo"), 1.10, False),
    Goal("the masks' share of a step, toybox", toybox, ratio("share of the masks"), 0.05, False),
    Goal("FocusDPO's step / DPO's, full size", full(*BOTH), ratio("focusdpo / dpo"), 1.03, False),
    Goal("the plain reading's step / FocusDPO's, full size, bfloat16", full(*BOTH, weights="bfloat16"),
         ratio("plain / focusdpo"), 1.3, True),
    Goal("memory less than the plain reading, full FLUX, bfloat16", full("flux", weights="bfloat16"),
         ratio("bytes saved"), 20, True, "GB"),
    Goal("FocusDPO's step and AdamW, full FLUX, two references, bfloat16",
         lambda case: two_references(case) and case["weights"] == "bfloat16", memory("adamw"), 80, False, "GB"),
    Goal("FocusDPO's step and AdamW in 8 bits, full FLUX, two references, nf4, checkpointing",
         lambda case: two_references(case) and case["weights"] == "nf4" and case["checkpointing"],
         memory("adamw_8bit"), 24, False, "GB"),
    Goal("FocusDPO's fraction of the matrix rate, full FLUX, bfloat16", full("flux", weights="bfloat16"),
         matrix_rate_fraction, 0.45, True),
    Goal("FocusDPO's fraction of the matrix rate, full SDXL, bfloat16", full("sdxl", weights="bfloat16"),
         matrix_rate_fraction, 0.45, True),
]  # fmt: skip
NOTES = """\
Steps are forward and backward, without the optimizer. They take turns in one process on the same batch, so ratios hold
where seconds drift. The plain reading computes FocusDPO's loss with a second copy of the weights as reference model,
four separate forwards and one more for the masks. The floor of a preference step is six forwards of its winners through
the base: two without gradient, two with, and two backwards through activations; SFT's is two. Operations are those of
matrix products, convolutions and attention, and their fraction is of this device's rate in a square matrix product.
Peak memory is torch's own account on a GPU; on a CPU it is the weights' bytes and the peak of what a step allocates.
Small sizes have the parts of the full ones and show that everything runs; their numbers tell nothing about a GPU.
"""
UNMEASURED = """\
**Nothing of full size, and nothing quantized, has been measured here**: both need a GPU; `make bench` measures them
there.
"""
COUNTED = """\
Not measured: the same steps run on tensors without contents, of which the bytes that are alive and the operations are
counted (`python -m focusdpo_lib.bench --size full` where there is no GPU). Norms and attention take a GPU's dtypes and
keep what its kernels keep; quantized layers hold what bitsandbytes holds, but for the outlier columns of int8's inputs,
which depend on the data: its memory is at least this. UNO's LoRA and gradients of earlier micro-batches are there; not
the kernels' workspaces, what the allocator loses, and CUDA's own context: allow a few GB. Seconds, and with them every
goal in seconds, stay unmeasured; at equal speed an operation, the ratio of seconds would be that of operations.
"""


def default_folder() -> Path:
    """Where the results of this device go."""
    return Path("results/bench") / re.sub(r"\W+", "-", provenance.device()["device"].lower()).strip("-")


def read_results(folder: Path) -> dict[str, dict]:
    """The entries of earlier runs, by case; none if there were none."""
    path = Path(folder) / RESULTS
    return json.loads(path.read_text(encoding="utf-8"))["cases"] if path.exists() else {}


def write_results(folder: Path, entries: dict[str, dict]) -> None:
    write_json(Path(folder) / RESULTS, {"cases": entries})
    write_text(Path(folder) / PAGE, page(entries))


def page(entries: dict[str, dict]) -> str:
    """All entries as Markdown."""
    measured, counted = ({n: e for n, e in entries.items() if e["status"] == status} for status in STATUSES)
    other = {name: entry["status"] for name, entry in entries.items() if entry["status"] not in STATUSES}
    devices, commits, versions = (", ".join(_each(entries, what)) for what in (_device, _commit, _torch))
    parts = [
        f"# What a step costs: {devices}",
        f"Commit {commits}, torch {versions}; written by `python -m focusdpo_lib.bench`.",
        NOTES,
        "## Goals",
        goals_table(entries),
        "## Ratios",
        ratios_table(measured),
        "## Steps",
        steps_table(measured),
    ]
    if not any(entry["case"]["size"] == "full" for entry in measured.values()):
        parts.insert(3, UNMEASURED)
    if counted:
        parts += ["## Counted: full size", COUNTED, counted_ratios_table(counted), counted_steps_table(counted)]
    if other:
        parts += ["## Not measured", table(["case", "why"], [[name, why] for name, why in other.items()])]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def goals_table(entries: dict[str, dict]) -> str:
    rows = []
    for goal in GOALS:
        limit = f"{'≥' if goal.at_least else '≤'} {goal.limit:g} {goal.unit}".strip()
        rows.append([goal.text, limit, *goal.verdict(entries.values())])
    return table(["goal", "limit", "found", ""], rows)


def ratios_table(entries: dict[str, dict]) -> str:
    rows = []
    for name, entry in entries.items():
        found = entry["ratios"]
        plain = ["the plain reading does not fit"] * 2
        if "plain / focusdpo" in found:
            plain = [f"{found['plain / focusdpo']:.2f}", f"{found['bytes saved'] / 1e9:.3g}"]
        rows.append([name, f"{found['focusdpo / dpo']:.3f}", f"{found['share of the masks']:.1%}", *plain])
    return table(["case", "FocusDPO / DPO", "masks' share", "plain / FocusDPO", "GB less than plain"], rows)


def steps_table(entries: dict[str, dict]) -> str:
    rows = [
        [name, step, f"{1000 * cost['seconds']:.4g}", f"{cost['pairs_per_second']:.3g}",
         f"{cost['peak_bytes'] / 1e9:.3g}", f"{cost['operations'] / 1e12:.3g}", f"{cost['operations / floor']:.3f}",
         f"{cost['fraction of matrix rate']:.1%}"]
        for name, entry in entries.items() for step, cost in entry["steps"].items() if "seconds" in cost
    ]  # fmt: skip
    header = ["case", "step", "ms", "pairs/s", "peak GB", "10¹² operations", "of the floor", "of the matrix rate"]
    return table(header, rows)


def counted_ratios_table(entries: dict[str, dict]) -> str:
    rows = [
        [name, f"{e['ratios']['operations, focusdpo / dpo']:.3f}", f"{e['ratios']['operations, plain / focusdpo']:.3f}",
         f"{e['ratios']['bytes saved'] / 1e9:.3g}", f"{memory('adamw')(e) / 1e9:.3g}",
         f"{memory('adamw_8bit')(e) / 1e9:.3g}"]
        for name, e in entries.items()
    ]  # fmt: skip
    header = ["case", "operations, FocusDPO / DPO", "operations, plain / FocusDPO", "GB less than plain"]
    return table([*header, "GB with AdamW", "GB with AdamW in 8 bits"], rows)


def counted_steps_table(entries: dict[str, dict]) -> str:
    rows = [
        [name, step, f"{cost['peak_bytes'] / 1e9:.3g}", f"{cost['operations'] / 1e12:.4g}",
         f"{cost['operations / floor']:.3f}"]
        for name, entry in entries.items() for step, cost in entry["steps"].items()
    ]  # fmt: skip
    return table(["case", "step", "peak GB", "10¹² operations", "of the floor"], rows)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _each(entries: dict[str, dict], what: Callable[[dict], str]) -> list[str]:
    """Every value once, in order."""
    return list(dict.fromkeys(what(entry["machine"]) for entry in entries.values()))


def _device(machine: dict) -> str:
    return machine["device"]


def _commit(machine: dict) -> str:
    return machine["git"]["commit"][:12] if machine["git"] else "unknown"


def _torch(machine: dict) -> str:
    return machine["packages"]["torch"]
