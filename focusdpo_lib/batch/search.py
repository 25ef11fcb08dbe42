"""The equal-budget search: rate, β, reduction and steps of every objective, chosen on the validation identities.

    python -m focusdpo_lib.batch.search --profile toybox                            # UNO
    python -m focusdpo_lib.batch.search --profile toybox --file search_ipap.yaml    # IPAP

Reads params/<profile>/search.yaml, trains every trial on the train pairs, samples the *validation* benchmark (cases of
`kinds`: one and two subjects, unless it says otherwise) and scores DINO and attribute accuracy; their mean over the
kinds is a trial's score. Every trial is a chain of runs under results/<profile>/search (the file's name), so the search
goes on where it stopped. Test identities are never touched. The table, a row a trial, goes beside the YAML.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from focusdpo_lib import params, runs, stages
from focusdpo_lib.batch.engines.said import time_left
from focusdpo_lib.evaluation import statistics
from focusdpo_lib.evaluation.benchmark import KINDS, Benchmark
from focusdpo_lib.evaluation.encoders import Encoders
from focusdpo_lib.params import ParameterError

YAML = "search.yaml"
SHARED = ("backbone", "dip", "masks", "training", "benchmark", "generation", "evaluation")  # what all trials share
CHOSEN_BY = ("dino", "attribute_accuracy")
REPORTED = (*CHOSEN_BY, "clip_t", "leakage")


@dataclass(frozen=True)
class Trial:
    """One setting of one objective; `beta` and `reduction` are None for objectives that have none."""

    objective: str
    learning_rate: float
    steps: int
    beta: float | None = None
    reduction: str | None = None

    @property
    def name(self) -> str:
        beta = "" if self.beta is None else f"-beta{self.beta:g}"
        reduction = "" if self.reduction in (None, "mean") else f"-{self.reduction}"
        return f"{self.objective}-lr{self.learning_rate:g}{beta}{reduction}-steps{self.steps}"

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the section `objective`."""
        chosen = {"beta": self.beta, "reduction": self.reduction}
        return {"name": self.objective} | {name: value for name, value in chosen.items() if value is not None}


@dataclass(frozen=True)
class Settings:
    """search.yaml, typed: the sections that trials share, the trials, and the kinds of cases they are scored on."""

    sections: Mapping[str, Any]
    trials: tuple[Trial, ...]
    kinds: tuple[str, ...] = tuple(KINDS)


def read(path: str | Path) -> Settings:
    """Reads and checks search.yaml; ParameterError for unknown keys, wrong types or budgets that differ."""
    values = params.read_yaml(path)
    grids = values.pop("objectives", None)
    if not isinstance(grids, dict) or not grids:
        raise ParameterError(f"{path} needs 'objectives': for each a grid of learning_rate, steps and, for DPO, beta")
    kinds = values.pop("kinds", list(KINDS))
    if not isinstance(kinds, list) or not kinds or any(kind not in KINDS for kind in kinds):
        raise ParameterError(f"kinds = {kinds!r} in {path} is not accepted: list one or both of {', '.join(KINDS)}")
    if unknown := sorted(values.keys() - set(SHARED)):
        raise ParameterError(f"{', '.join(unknown)} in {path} is no section of a search: use {', '.join(SHARED)}")
    trials = tuple(trial for name, grid in grids.items() for trial in _grid(name, grid, path))
    budget = {name: sum(t.steps for t in trials if t.objective == name) for name in grids}
    if len(set(budget.values())) > 1:
        raise ParameterError(
            f"the objectives of {path} differ in their budget of training steps ({budget}): give each grid the same"
        )
    sections = {name: params.section(name, values.get(name), str(path)) for name in SHARED}
    return Settings(sections, trials, tuple(kinds))


def _grid(objective: str, grid: Any, path: str | Path) -> Iterator[Trial]:
    """The product of a grid's lists, or of each of several grids; each trial checked as the sections check it."""
    if isinstance(grid, list) and grid:
        for part in grid:
            yield from _grid(objective, part, path)
        return
    pairwise = objective in ("dpo", "focusdpo")
    keys = ("learning_rate", "beta", "steps") if pairwise else ("learning_rate", "steps")
    if pairwise and isinstance(grid, dict) and "reduction" in grid:
        keys = (*keys, "reduction")
    if not isinstance(grid, dict) or set(grid) != set(keys) or not all(isinstance(v, list) for v in grid.values()):
        raise ParameterError(f"objectives.{objective} in {path} needs a list each for {', '.join(keys)}: correct it")
    for values in itertools.product(*(grid[key] for key in keys)):
        chosen = dict(zip(keys, values, strict=True))
        params.section("training", {k: chosen[k] for k in ("learning_rate", "steps")}, str(path))
        trial = Trial(objective, **chosen)
        params.section("objective", trial.settings, str(path))
        yield trial


def measure(
    settings: Settings, results: Path, benchmarks: Mapping[str, Benchmark], encoders: Encoders, trial: Trial | None
) -> dict[str, float]:
    """Trains (None: the base, nothing to train), samples and scores one trial; its metrics on each kind of case."""
    adapter = None if trial is None else _train(settings.sections, results, trial)
    name = "base" if trial is None else trial.name
    found = scored(settings.sections, results, name, benchmarks, encoders, adapter, REPORTED)
    chosen = [found[f"{metric}_{kind}"] for metric in CHOSEN_BY for kind in benchmarks if f"{metric}_{kind}" in found]
    return {"score": round(sum(chosen) / len(chosen), 4), **found}


def scored(
    use: Mapping[str, Any],
    results: Path,
    name: str,
    benchmarks: Mapping[str, Benchmark],
    encoders: Encoders,
    adapter: Path | None,
    metrics: Sequence[str],
) -> dict[str, float]:
    """Samples and scores what an adapter (None: the base) draws: {"<metric>_<kind of case>": mean}.

    `use`: the sections backbone, generation and evaluation. A metric that is not known of a kind is left out.
    """
    found = {}
    for kind, benchmark in benchmarks.items():
        images = stages.generate_images(results, name, benchmark, use["backbone"], use["generation"], adapter)
        scores = stages.score(results, name, benchmark, images, encoders, use["evaluation"], use["generation"])
        for metric in metrics:
            if (scores["metric"] == metric).any():
                sums = statistics.units([scores], metric, use["evaluation"].average).sum()
                found[f"{metric}_{kind}"] = round(float(sums["numerator"] / sums["denominator"]), 4)
    return found


def _train(use: Mapping[str, Any], results: Path, trial: Trial) -> Path:
    pairs = stages.build_pairs(results, "main", use["dip"])
    training = use["training"].model_copy(update={"learning_rate": trial.learning_rate, "steps": trial.steps})
    typed = params.section("objective", trial.settings)
    backbone, masks, tolerance = use["backbone"], use["masks"], use["dip"].tolerance
    return stages.train_adapter(results, trial.name, pairs, backbone, typed, masks, training, tolerance=tolerance)


def search(path: Path, results: Path, objectives: Sequence[str] | None = None) -> pd.DataFrame:
    """Runs the trials of search.yaml (of the named objectives only, if given) that are not complete; returns the table.

    The table is written anew after every trial. Sorted as in the YAML, the base first.
    """
    settings = read(path)
    source = settings.sections["benchmark"]
    benchmarks = {kind: stages.load_benchmark(results, source, kind, split="validation") for kind in settings.kinds}
    encoders = stages.load_encoders(settings.sections["evaluation"], results)
    wanted = [t for t in settings.trials if objectives is None or t.objective in objectives]
    rows, pace = [], []
    for number, trial in enumerate([None, *wanted]):
        start = time.monotonic()
        name = "base" if trial is None else trial.name
        measured = measure(settings, results, benchmarks, encoders, trial)
        about = {"objective": "base"} if trial is None else asdict(trial)
        rows.append({**about, **measured})
        taken = (time.monotonic() - start) / 60
        pace += [(trial.steps, taken)] if trial and taken > 0.1 else []  # what was complete says nothing of the pace
        rest = sum(t.steps for t in wanted[number:])
        left = f", about {time_left(rest, pace)} left" if pace and rest else ""
        print(f"[{number}/{len(wanted)}] {name}: score {measured['score']:.4f}{left}", flush=True)
        _write(pd.DataFrame(rows), table_path(path), keep=objectives is not None)
    return pd.read_csv(table_path(path))


def table_path(path: Path) -> Path:
    """Where the table of a search goes: search_results.csv beside search.yaml."""
    return path.with_name(f"{path.stem}_results.csv")


def _write(rows: pd.DataFrame, path: Path, keep: bool) -> None:
    """Writes the table; `keep`: rows of other trials that are there already stay."""
    key = ["objective", "learning_rate", "steps", "beta", "reduction"]
    rows = rows.reindex(columns=[*key, *rows.columns.drop(key, errors="ignore")])  # the base alone has none of them
    if keep and path.exists():
        rows = pd.concat([rows, pd.read_csv(path)]).drop_duplicates(key)
    with runs.atomic(path) as partial:
        rows.to_csv(partial, index=False)


def best(table: pd.DataFrame) -> pd.DataFrame:
    """The trial with the highest score of every objective."""
    return table.loc[table.groupby("objective", sort=False)["score"].idxmax()].reset_index(drop=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code is 1, with one sentence, when the search cannot go on."""
    parser = argparse.ArgumentParser(prog="python -m focusdpo_lib.batch.search", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="toybox", help="folder of params/ that holds the file")
    parser.add_argument("--file", default=YAML, help="the YAML of the search; another family has its own")
    parser.add_argument("--params", type=Path, default=Path("params"))
    parser.add_argument("--results", type=runs.home, default=Path("results"))
    parser.add_argument("--objectives", nargs="+", help="only these (for searching several at a time)")
    given = parser.parse_args(arguments)
    path = given.params / given.profile / given.file
    try:
        table = search(path, given.results / given.profile / path.stem, given.objectives)
    except (ValueError, RuntimeError, OSError) as error:  # the kit's own errors are one sentence each
        print(f"search stopped: {error}", file=sys.stderr)
        return 1
    print(f"\nEvery trial: {table_path(path)}\nChosen on the validation identities, best of each objective:")
    print(best(table).to_string(index=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
