"""What a reproduction costs before anything is rented: GPU-hours by stage, memory, disk, and when it would be done.

    python -m focusdpo_lib.batch.plan --profile paper --gpu h200              # on 1, 8, 64 and 512 GPUs
    python -m focusdpo_lib.batch.plan --profile toybox --workers 1 2          # of this machine, after a probe

At the paper's scale hours are counted operations (params/<profile>/operations.yaml, see `bench.units`) at a share of
the card's matrix rate, which is an assumption and stands with the others in what is printed. When each run would start
is list scheduling (`schedule`), as an engine does it.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from focusdpo_lib import params, runs
from focusdpo_lib.batch import notebooks, reproduce
from focusdpo_lib.batch.cli import add_overrides, chosen_overrides
from focusdpo_lib.batch.engines.said import span
from focusdpo_lib.batch.estimate import SHARE
from focusdpo_lib.batch.jobs import Job, resolved, resources
from focusdpo_lib.batch.schedule import Node, Task, critical_path, makespan
from focusdpo_lib.evaluation.rows import FAMILIES
from focusdpo_lib.params import ParameterError, Resources

OPERATIONS = "operations.yaml"
CARDS = {  # 10¹² dense bfloat16 operations a second, and GB, of the makers' data sheets
    "a100": (312, 80),
    "h100": (989, 80),
    "h200": (989, 141),
    "b200": (2250, 180),
    "rtx4090": (165, 24),
}
STAGES = ("prepare", "train", "sample", "score", "grade")
NUMBERS = ("one", "two")  # references
FAMILY = dict(zip(FAMILIES, ("flux_uno", "sdxl_ip"), strict=True))
PNG = 1.5  # bytes a pixel of a PNG: photos compress no better


@dataclass(frozen=True)
class Assumed:
    """What nobody measured, each with an option of its own."""

    pairs: int = 10_000  # train pairs, as in the paper, half of them with two subjects
    validation: int = 500  # pairs of which errors by region are measured
    cases: int = 750  # of a table: UNO's lists
    share: float = 0.4  # of the card's matrix rate
    start: float = 3.0  # minutes of a run in which nothing is computed: imports, loading the models


@dataclass(frozen=True)
class Cost:
    """Of a run: operations by stage, how many GPUs can share them, and bytes that it leaves on disk."""

    operations: Mapping[str, float]
    width: int
    bytes: float = 0.0


def cost(job: Job, units: Mapping[str, Any], assumed: Assumed) -> Cost:
    """What a run of notebooks 02 to 05 costs, without preparing the pairs, which the trainings of a family share.

    `units`: operations.yaml, as of `bench.units`.
    """
    values = notebooks.parameters(job.notebook) | resolved(job)
    width = resources(job).gpus or _processes(values)  # none of its own: one for each process, from the cluster
    if "training" in values:
        return _training(values, units, assumed, width)
    if "families" in values:
        return _table(values, units, assumed, width, NUMBERS[job.name.endswith("table2")])
    if "timesteps" in values:
        looks = values["examples"] * len(values["timesteps"])
        return Cost({"grade": looks * sum(_mean(units[name]["evaluation"]) for name in FAMILY.values())}, width)
    return Cost({}, width)


def _processes(values: Mapping[str, Any]) -> int:
    """How many a run's heaviest stage has."""
    training, shards = (params.section(name, values.get(name)).processes for name in ("training", "workers"))
    return (training or 1) if "training" in values else shards


def _training(values: Mapping[str, Any], units: Mapping[str, Any], assumed: Assumed, width: int) -> Cost:
    training, backbone = params.section("training", values["training"]), params.section("backbone", values["backbone"])
    generation, objective = params.section("generation", values.get("generation")), values["objective"]["name"]
    of, processes = units[backbone.family], training.processes or 1
    pairs = training.steps * training.batch_size * training.gradient_accumulation * processes
    step = _mean({n: by.get(objective, SHARE[objective] * by["dpo"]) for n, by in of["step"].items()})
    looks = 2 * 3 * 2  # winner and loser, at three times, by two models
    errors = assumed.validation * (looks * _mean(of["evaluation"]) + _mean(of["prepare"]))
    drawn = 2 * values["samples"] * sum(_image(of, generation, backbone, number) for number in NUMBERS)
    return Cost({"train": pairs * step, "grade": errors, "sample": drawn}, min(width, processes))


def _table(values: Mapping[str, Any], units: Mapping[str, Any], assumed: Assumed, width: int, references: str) -> Cost:
    sampled, images, size = 0.0, 0, 0.0
    for rows in params.section("families", values["families"]).given.values():
        made = assumed.cases * rows.generation.images_per_prompt * (1 + sum(len(names) for _, names in rows.adapters))
        sampled += made * _image(units[rows.backbone.family], rows.generation, rows.backbone, references)
        images, size = images + made, size + made * rows.generation.size**2 * PNG
    return Cost({"sample": sampled, "score": images * units["score"]}, width, size)


def _image(of: Mapping[str, Any], generation: params.Generation, backbone: params.Backbone, references: str) -> float:
    passes = 1 if generation.guidance == 1.0 or backbone.family == "flux_uno" else 2  # classifier-free guidance
    return generation.steps * passes * of["evaluation"][references] + of["decode"]


def _mean(of: Mapping[str, float]) -> float:
    """Over pairs with one and with two subjects, as many of each."""
    return sum(of.values()) / len(of)


def tasks(jobs: Sequence[Job], units: Mapping[str, Any], assumed: Assumed, rate: float, most: int) -> list[Task]:
    """The runs, and before each family's trainings what prepares their pairs; minutes on at most `most` GPUs a run.

    `rate`: operations a second of a GPU.
    """
    found: list[Task] = []
    prepared: dict[str, str] = {}

    def add(name: str, operations: float, width: int, after: Sequence[str] = ()) -> None:
        minutes = assumed.start + operations / rate / width / 60
        found.append(Task(name, minutes, Resources(gpus=width, cpus=1), tuple(after)))

    for job in jobs:
        of, before = cost(job, units, assumed), list(job.after)
        width = min(of.width, most)
        if "train" in of.operations:
            if (family := _family(job)) not in prepared:
                prepared[family] = f"prepare {family}"
                add(prepared[family], assumed.pairs * _mean(units[FAMILY[family]]["prepare"]), width)
            before.append(prepared[family])
        add(job.name, sum(of.operations.values()), width, before)
    return found


def _family(job: Job) -> str:
    return job.params.stem.split("_")[1]


def machines(gpus: int, each: int) -> list[Node]:
    """So many GPUs in machines of `each`, of whose processors there are enough."""
    return [Node(min(each, gpus - at), float("inf")) for at in range(0, gpus, each)]


def hours(jobs: Sequence[Job], units: Mapping[str, Any], assumed: Assumed, rate: float) -> pd.DataFrame:
    """GPU-hours of every run by stage, and of all."""
    rows = {job.name: cost(job, units, assumed).operations for job in jobs}
    for family in dict.fromkeys(_family(job) for job in jobs if "train" in rows[job.name]):
        rows[f"prepare {family}"] = {"prepare": assumed.pairs * _mean(units[FAMILY[family]]["prepare"])}
    table = pd.DataFrame(rows).T.reindex(columns=STAGES).fillna(0.0) / rate / 3600
    table.loc["all"] = table.sum()
    return table.assign(all=table.sum(axis=1))


def room(jobs: Sequence[Job], units: Mapping[str, Any], assumed: Assumed, gigabytes: int) -> list[str]:
    """Memory and disk, a sentence each."""
    said, disk = [], sum(cost(job, units, assumed).bytes for job in jobs)
    for name in dict.fromkeys(FAMILY[_family(job)] for job in jobs if "train" in cost(job, units, assumed).operations):
        peak = units[name]["peak_bytes"] / 1e9
        fits = "fits" if peak < 0.95 * gigabytes else "does not fit: put a preset of params/paper/memory over it"
        said.append(f"A preference step of {name} in bf16 takes {peak:.0f} GB of the card's {gigabytes}: {fits}.")
        disk += assumed.pairs * units[name]["prepared_bytes"]
    return [*said, f"Disk for prepared pairs and images, beside models and pairs: {disk / 1e9:.0f} GB."]


def ends(
    jobs: Sequence[Job], units: Mapping[str, Any], assumed: Assumed, rate: float, counts: Sequence[int], each: int
) -> list[str]:
    """When all would be done on so many GPUs, and where more of them stop to help."""
    said = []
    for count in counts:
        found = tasks(jobs, units, assumed, rate, min(each, count))
        said.append(f"{count:5} GPUs: {makespan(found, machines(count, each)) / 60:8.1f} h")
    found = tasks(jobs, units, assumed, rate, each)
    minutes, path = critical_path(found)
    longest = max((task for task in found if task.name in path), key=lambda task: task.minutes)
    return [
        *said,
        f"More GPUs do not end before {minutes / 60:.1f} h: {' → '.join(path)}, each of which needs the one before. "
        f"The longest is {longest.name}, which shares {longest.needs.gpus} GPUs: a training as many as a step has "
        "pairs (the paper's 8 × 1), a table those of one machine.",
    ]


def at_paper_scale(jobs: Sequence[Job], units: Mapping[str, Any], assumed: Assumed, given: argparse.Namespace) -> str:
    """The plan of a profile whose operations are counted."""
    tera, gigabytes = CARDS[given.gpu]
    rate = tera * 1e12 * assumed.share
    table = hours(jobs, units, assumed, rate).map(lambda value: f"{value:.1f}" if value else "")
    facts = (
        f"Assumed, not measured: {assumed.share:.0%} of the {tera} · 10¹² operations a second of one {given.gpu}; "
        f"{assumed.pairs} train and {assumed.validation} validation pairs, half of them with two subjects; "
        f"{assumed.cases} cases a table; {assumed.start:g} minutes of every run to load models; no gradient "
        "checkpointing, which computes a third more in a training."
    )
    return "\n".join(
        [
            *("GPU-hours by counted operations", table.to_string(), "", *room(jobs, units, assumed, gigabytes), ""),
            *ends(jobs, units, assumed, rate, given.gpus, given.each),
            *("", facts),
        ]
    )


def timed(jobs: Sequence[Job]) -> list[Task]:
    """The runs of a profile whose minutes are of this machine, one processor each."""
    return [Task(job.name, job.minutes, Resources(), tuple(job.after)) for job in jobs]


def here(jobs: Sequence[Job], machine: str, workers: Sequence[int]) -> str:
    """The plan of a profile whose runs were timed by a probe of this machine."""
    found = timed(jobs)
    minutes, path = critical_path(found)
    return "\n".join(
        [
            f"On {machine}:",
            *(f"{count:5} workers: {span(makespan(found, [Node(0, count)]))}" for count in workers),
            f"More workers do not end before {span(minutes)}: {' → '.join(path)}.",
        ]
    )


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    top = argparse.ArgumentParser(prog="python -m focusdpo_lib.batch.plan", description=__doc__.splitlines()[0])
    top.add_argument("--profile", default="paper", help="a folder of params/")
    top.add_argument("--seeds", type=_count, default=1, help="training seeds of every objective")
    of = {"nargs": "+", "choices": FAMILIES, "default": list(FAMILIES)}
    top.add_argument("--families", **of, help="train and show these alone")
    top.add_argument("--gpu", default="h200", choices=CARDS)
    top.add_argument("--gpus", type=_count, nargs="+", default=[1, 8, 64, 512], help="how many")
    top.add_argument("--each", type=_count, default=8, help="GPUs of a machine")
    top.add_argument("--workers", type=_count, nargs="+", default=[1, 2], help="without counted operations: processes")
    for name, value in vars(Assumed()).items():
        kind = {"share": _share, "start": _minutes}.get(name, _count)
        top.add_argument(f"--{name}", type=kind, default=value, help=f"assumed: {value}")
    top.add_argument("--params", type=Path, default=Path("params"))
    top.add_argument("--results", type=runs.home, default=Path("results"))
    top.add_argument("--notebooks", type=Path, default=Path("notebooks"))
    add_overrides(top)
    return top


def jobs_of(given: argparse.Namespace) -> list[Job]:
    """The runs that a command line asks for. Raises ParameterError or RunError."""
    over = {"benchmark.folder": "toybox", **chosen_overrides(given)}  # a plan needs no photos
    where = given.params / given.profile, given.results / given.profile, given.notebooks
    return reproduce.plan(*where, given.seeds, over, given.families)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    given = parser().parse_args(arguments)
    profile = given.params / given.profile
    try:
        jobs = jobs_of(given)
        if (profile / OPERATIONS).exists():
            assumed = Assumed(**{name: getattr(given, name) for name in vars(Assumed())})
            print(at_paper_scale(jobs, _units(profile / OPERATIONS), assumed, given))
        else:
            print(here(*reproduce.estimated(jobs, reproduce.costs(profile)), given.workers))
    except (ParameterError, runs.RunError) as error:
        print(f"no plan: {error}", file=sys.stderr)
        return 1
    return 0


def _units(path: Path) -> dict[str, Any]:
    """The counted operations. ParameterError for a file that is not of that form."""
    units = params.read_yaml(path)
    try:
        for of in (units[name] for name in FAMILY.values()):
            numbers = [of["decode"], of["peak_bytes"], of["prepared_bytes"], units["score"]]
            numbers += [of[what][number] for what in ("evaluation", "prepare") for number in NUMBERS]
            numbers += [of["step"][number][name] for number in NUMBERS for name in ("sft", "dpo", "focusdpo")]
            sum(numbers)
    except (KeyError, TypeError) as error:
        raise ParameterError(
            f"{path} lacks counts ({error}): write it again with python -m focusdpo_lib.bench.units {path}"
        ) from None
    return units


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no count: give a whole number, at least 1")
    return int(text)


def _share(text: str) -> float:
    if not 0 < (value := _number(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share: give a number above 0, at most 1")
    return value


def _minutes(text: str) -> float:
    if not 0 <= (value := _number(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} are no minutes: give 0 or more")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


if __name__ == "__main__":
    sys.exit(main())
