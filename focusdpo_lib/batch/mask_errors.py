"""What errors of segmentation do to a training: the same one on pairs whose masks are wrong by stated amounts.

    python -m focusdpo_lib.batch.mask_errors --profile toybox

Reads params/<profile>/mask_errors.yaml: trainings, by the file of notebook 03 that holds their settings, and the errors
that befall the masks of their train pairs (`dip.mask_errors`), on each seed; exact masks belong to every training. A
trial is a chain of runs under results/<profile>/mask_errors, so what is complete is not done again. Measured are the
masks, where they make the loss look, the errors on validation pairs, whose masks are exact, and images of the *test*
identities. The table, a row a trial, goes beside the YAML.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd

from focusdpo_lib import backbones, grade, params, runs, stages
from focusdpo_lib.backbones import best_device
from focusdpo_lib.batch import search
from focusdpo_lib.batch.engines.said import time_left
from focusdpo_lib.dip import dataset, mask_errors
from focusdpo_lib.evaluation.benchmark import KINDS, Benchmark
from focusdpo_lib.evaluation.encoders import Encoders
from focusdpo_lib.params import MaskError, ParameterError
from focusdpo_lib.training import LOG, prepare

YAML = "mask_errors.yaml"
SHARED = ("benchmark", "generation", "evaluation")  # sections of the YAML; a training's own are in its file
REPORTED = ("dino", "clip_i", "clip_t", "attribute_accuracy", "leakage")
LOOKED_AT, TIMES = 96, (0.1, 0.5, 0.9)  # train pairs of each number of references, and the times they are noised to
KEY = ["training", "kind", "amount", "seed"]


@dataclass(frozen=True)
class Trial:
    """One training on pairs with one error; `sections` are those of its file of notebook 03."""

    training: str
    error: MaskError
    seed: int
    sections: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.training}-{self.error.name}-seed{self.seed}"


@dataclass(frozen=True)
class Settings:
    """mask_errors.yaml, typed; trials in the order in which they run."""

    sections: Mapping[str, Any]
    trials: tuple[Trial, ...]


def read(path: Path) -> Settings:
    """Reads and checks mask_errors.yaml and the files it names; ParameterError says what is wrong where."""
    values = params.read_yaml(path)
    trainings, seeds = values.pop("trainings", None), values.pop("seeds", None)
    background = values.pop("background", "redrawn")
    if not isinstance(trainings, dict) or not trainings or not all(isinstance(v, dict) for v in trainings.values()):
        raise ParameterError(
            f"{path} needs 'trainings': for each file of notebook 03 lists of amounts by kind of error"
        )
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ParameterError(f"seeds = {seeds!r} in {path} is not accepted: list whole numbers from 0 on")
    if unknown := sorted(values.keys() - set(SHARED)):
        raise ParameterError(f"{', '.join(unknown)} in {path} is nothing it may hold: use {', '.join(SHARED)}")
    errors = {file: list(_errors(kinds, background, path)) for file, kinds in trainings.items()}
    files = _trainings({file: path.with_name(f"{file}.yaml") for file in trainings})
    ranked = []
    for seed in seeds:
        for file, use in files.items():
            seeded = use | {"training": use["training"].model_copy(update={"seed": seed})}
            ranked += [(rank, Trial(file.partition("_")[2], error, seed, seeded)) for rank, error in errors[file]]
    exact = [trial for rank, trial in ranked if rank is None]  # first: how much seeds differ is the measure of the rest
    rest = sorted(((rank, trial) for rank, trial in ranked if rank is not None), key=lambda of: (of[1].seed, of[0]))
    trials = [*exact, *(trial for _, trial in rest)]
    return Settings({name: params.section(name, values.get(name), str(path)) for name in SHARED}, tuple(trials))


def _errors(kinds: Mapping[str, Any], background: Any, path: Path) -> Iterator[tuple[int | None, MaskError]]:
    """Exact masks, and every error with the place of its amount among those of its kind: all first ones come first."""
    yield None, MaskError()
    for kind, amounts in kinds.items():
        if not isinstance(amounts, list):
            raise ParameterError(f"{kind} = {amounts!r} in {path} is not accepted: list the amounts of the error")
        for rank, amount in enumerate(amounts):
            given = {"kind": kind, "amount": amount, "background": background}
            yield rank, params.section("mask_error", given, str(path))


def _trainings(files: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """The sections of files of notebook 03 that make a training; masks, which DPO's does not read, are those of all."""
    read = {name: params.read_yaml(path) for name, path in files.items()}
    masks = next((values["masks"] for values in read.values() if "masks" in values), None)
    wanted = ("backbone", "dip", "masks", "objective", "training")
    return {
        name: {n: params.section(n, ({"masks": masks} | values).get(n), str(files[name])) for n in wanted}
        for name, values in read.items()
    }


def measure(
    settings: Settings, results: Path, benchmarks: Mapping[str, Benchmark], encoders: Encoders, trial: Trial | None
) -> dict[str, float]:
    """Builds, trains and measures one trial; of the base (None) the images alone."""
    if trial is None:
        use = settings.sections | {"backbone": settings.trials[0].sections["backbone"]}
        return search.scored(use, results, "base", benchmarks, encoders, None, REPORTED)
    use = settings.sections | trial.sections
    backbone, masks = use["backbone"], use["masks"]
    pairs = stages.build_pairs(results, trial.error.name, use["dip"], trial.error)
    exact = stages.build_pairs(results, "exact", use["dip"])
    found = of_masks(pairs) | focus(results, trial.error.name, pairs, exact, backbone, masks)
    adapter = stages.train_adapter(results, trial.name, pairs, backbone, use["objective"], masks, use["training"])
    log = pd.read_csv(adapter / LOG)
    if "hit" in log:  # FocusDPO's, as it sees itself: against the masks that it was given
        found |= {"log_hit": log["hit"].mean(), "log_detail": (log["branch"] == "fused").mean()}
    errors = stages.errors_by_region(results, trial.name, exact, backbone, masks, adapter)["change"]
    found |= {f"{image}_{region}": change for (image, region), change in errors.items()}
    drawn = search.scored(use, results, trial.name, benchmarks, encoders, adapter, REPORTED)
    return {name: round(float(value), 4) for name, value in (found | drawn).items()}


def of_masks(pairs: Path) -> dict[str, float]:
    """What the error did to the pairs in a folder; exact ones have nothing to say of it."""
    file = pairs / mask_errors.FACTS
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    count = len(dataset.read_dataset(pairs, ["train"], check=False)["train"])
    return {"iou": 1.0, "reference_iou": 1.0, "pairs": count, "no_token": 0, "same": 0}


def focus(
    results: Path, run: str, pairs: Path, exact: Path, backbone: params.Backbone, masks: params.Masks
) -> dict[str, float]:
    """Stage focus: where wrong masks make the loss look, by the exact ones (`grade.against_truth`), on train pairs."""
    inputs = {"pairs": pairs, "exact": exact, **backbones.inputs(backbone)}
    job = runs.Run(stages.place(results, "focus", run), {"backbone": backbone, "masks": masks}, inputs)
    with job.alone():
        if not job.complete:
            with job:
                true = {pair.id: pair for pair in dataset.read_dataset(exact, ["train"], check=False)["train"]}
                found: dict[int, list] = {}
                for pair in dataset.read_dataset(pairs, ["train"], check=False)["train"]:
                    some = found.setdefault(len(pair.references), [])
                    some += [pair] if len(some) < LOOKED_AT else []
                model = backbones.load(backbone, best_device())
                rows = []
                for count, prepared in prepare(model, [*chain.from_iterable(found.values())], masks).items():
                    tokens = [mask_errors.tokens(true[name].masks) for name in prepared.ids]
                    rows.append(grade.against_truth(model, prepared, tokens, TIMES, masks) | {"references": count})
                with runs.atomic(job.folder / "focus.csv") as partial:
                    pd.DataFrame(rows).to_csv(partial, index=False)
    table = pd.read_csv(job.folder / "focus.csv").set_index("references")
    return {f"{name}_{KIND[count]}": value for count, row in table.iterrows() for name, value in row.items()}


KIND = dict(enumerate(KINDS, start=1))  # of cases, by their number of references


def run(path: Path, results: Path) -> pd.DataFrame:
    """Runs the trials of mask_errors.yaml that are not complete; the table, written anew after every trial."""
    settings = read(path)
    source = settings.sections["benchmark"]
    benchmarks = {kind: stages.load_benchmark(results, source, kind) for kind in KINDS}
    encoders = stages.load_encoders(settings.sections["evaluation"], results)
    rows, pace, total = [], [], len(settings.trials)
    for number, trial in enumerate([None, *settings.trials]):
        start = time.monotonic()
        measured = measure(settings, results, benchmarks, encoders, trial)
        about = {"training": "base"}
        if trial is not None:
            about = dict(zip(KEY, (trial.training, trial.error.kind, trial.error.amount, trial.seed), strict=True))
        rows.append(about | measured)
        taken = (time.monotonic() - start) / 60
        pace += [(1, taken)] if trial and taken > 0.1 else []  # what was complete says nothing of the pace
        left = f", about {time_left(total - number, pace)} left" if pace and number < total else ""
        print(f"[{number}/{total}] {trial.name if trial else 'base'}{left}", flush=True)
        table = pd.DataFrame(rows)
        with runs.atomic(table_path(path)) as partial:
            table.reindex(columns=[*KEY, *table.columns.drop(KEY, errors="ignore")]).to_csv(partial, index=False)
    return pd.read_csv(table_path(path))


def table_path(path: Path) -> Path:
    """Where the table goes: mask_errors_results.csv beside mask_errors.yaml."""
    return path.with_name(f"{path.stem}_results.csv")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code is 1, with one sentence, when it cannot go on."""
    parser = argparse.ArgumentParser(
        prog="python -m focusdpo_lib.batch.mask_errors", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--profile", default="toybox", help="folder of params/ that holds the file")
    parser.add_argument("--file", default=YAML, help="the YAML of the trials")
    parser.add_argument("--params", type=Path, default=Path("params"))
    parser.add_argument("--results", type=runs.home, default=Path("results"))
    given = parser.parse_args(arguments)
    path = given.params / given.profile / given.file
    try:
        run(path, given.results / given.profile / path.stem)
    except (ValueError, RuntimeError, OSError) as error:  # the kit's own errors are one sentence each
        print(f"mask_errors stopped: {error}", file=sys.stderr)
        return 1
    print(f"\nEvery trial: {table_path(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
