"""`make reproduce`: every notebook of a profile through papermill, in order, and both tables at the end.

    python -m focusdpo_lib.batch.reproduce --profile toybox --seeds 1
    python -m focusdpo_lib.batch.reproduce --families uno     # one family's trainings and rows alone

Every params/<profile>/NN_*.yaml is one run of notebooks/NN_*.ipynb; those of notebook 03 (03_<family>_<objective>) are
run once a training seed, and the tables (a parameter `families`) come after them, each with the rows of the families
that its YAML names. What is complete is skipped; what was interrupted goes on.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from focusdpo_lib import params, runs
from focusdpo_lib.batch import estimate, notebooks
from focusdpo_lib.batch.cli import add_engine, add_overrides, chosen_overrides, engine_options
from focusdpo_lib.batch.engines import run_all
from focusdpo_lib.batch.engines.said import span
from focusdpo_lib.batch.jobs import RESOURCES, Job, is_complete, resolved
from focusdpo_lib.evaluation.rows import FAMILIES, ROWS, family
from focusdpo_lib.params import ParameterError

COSTS = "reproduce.yaml"  # beside the profile's params: what a run costs, as measured
TRAINING = "03"
TABLES = ("table1", "table2")
MOVEMENT = "movement*.png"  # figures of notebook 02 that the README shows
TOOK = "run.md"  # machine, time and memory of a kept run


def plan(
    profile: Path,
    results: Path,
    books: Path,
    seeds: int = 1,
    overrides: Mapping[str, Any] | None = None,
    families: Sequence[str] = tuple(FAMILIES),
) -> list[Job]:
    """The jobs of a profile (a folder of YAML files); `results` is the profile's own folder.

    `overrides` ("backbone.precision": …) go over every YAML whose notebook has that parameter, and into each family of
    a table. Trainings and rows of other than `families` are left out, and so is a table that has no row left. What the
    profile's reproduce.yaml calls `beforehand` is no part of it: people look at what it makes before the rest begins.
    """
    files = sorted(profile.glob("[0-9][0-9]_*.yaml"), key=_place)
    if not files:
        raise ParameterError(f"{profile} holds no NN_*.yaml: correct --profile, or run from the kit's own folder")
    cost = costs(profile)
    minutes = cost.get("minutes") or {}
    files = [file for file in files if file.stem not in (cost.get("beforehand") or ())]
    shared = {"results": Path(os.path.relpath(results, books)).as_posix(), **(overrides or {})}
    jobs: list[Job] = []
    for file in files:
        book = _notebook(books, file)
        known = notebooks.parameters(book)
        mine = {key: value for key, value in shared.items() if key.partition(".")[0] in (*known, RESOURCES)}
        expected = float(minutes.get(file.stem, 1))
        if file.name.startswith(TRAINING):
            if family(_row(file)) in families:
                jobs += _trainings(book, file, results, mine, seeds, expected)
        elif "families" in known:
            jobs += _table(book, file, results, shared, expected, jobs, families)
        else:
            jobs.append(_job(book, file, results, mine, expected))
    return jobs


def _row(file: Path) -> str:
    """The row of the tables that a training's YAML stands for: "uno_sft" of 03_uno_sft.yaml."""
    return file.stem.partition("_")[2]


def _place(file: Path) -> tuple[str, int, str]:
    """By number; trainings in the order of the tables' rows, so that a family's last one shows the curves of all."""
    rows = list(ROWS)
    return file.name[:2], rows.index(_row(file)) if _row(file) in rows else len(rows), file.stem


def _notebook(books: Path, file: Path) -> Path:
    found = list(books.glob(f"{file.name[:2]}_*.ipynb"))
    if len(found) != 1:
        raise ParameterError(f"{file} needs one notebook {books}/{file.name[:2]}_*.ipynb, there are {len(found)}")
    return found[0]


def _trainings(book: Path, file: Path, results: Path, mine: dict, seeds: int, minutes: float) -> Iterator[Job]:
    """One job a training seed, named <family>_<objective>-seed<n> as the training run is."""
    for seed in range(seeds):
        name = f"{_row(file)}-seed{seed}"
        over = mine | {"run": name, "training.seed": seed}
        folder = results / "notebooks" / f"{TRAINING}_{name}"
        yield Job(book, folder, file, over, _inputs(book, file, over), [results / "training" / name], minutes=minutes)


def _job(book: Path, file: Path, results: Path, over: dict, minutes: float, trained: Sequence[Job] = ()) -> Job:
    """A job of its own, after the trainings whose runs it reads."""
    inputs = _inputs(book, file, over) | {job.products[0].name: job.products[0] for job in trained}
    after = [job.name for job in trained]
    return Job(book, results / "notebooks" / file.stem, file, over, inputs, after=after, minutes=minutes)


def _table(
    book: Path,
    file: Path,
    results: Path,
    shared: Mapping[str, Any],
    minutes: float,
    before: Sequence[Job],
    families: Sequence[str],
) -> Iterator[Job]:
    """The job of a table, with the rows of those of its families that are wanted; none where no family is left."""
    known = notebooks.parameters(book)
    every = params.read_yaml(file).get("families") or known["families"]
    trained = {name: [job for job in before if _trains(job, name)] for name in every if name in families}
    if trained:
        rows = {name: dict(every[name] or {}) | _adapters(jobs) for name, jobs in trained.items()}
        over = {"families": rows} | _into_families(shared, known, list(rows))
        jobs = [job for mine in trained.values() for job in mine]
        yield _job(book, file, results, over, minutes * len(rows) / len(every), jobs)


def _trains(job: Job, name: str) -> bool:
    """Whether the job trains an adapter of the family."""
    return job.name.startswith(TRAINING) and family(_row(job.params)) == name


def _into_families(shared: Mapping[str, Any], known: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Overrides for a table's notebook: those of a section that its families hold go into each of them."""
    over = {}
    for key, value in shared.items():
        section = key.partition(".")[0]
        if section in params.FamilyRows.model_fields:
            over |= {f"families.{name}.{key}": value for name in names}
        elif section in (*known, RESOURCES):
            over[key] = value
    return over


def _adapters(trained: Sequence[Job]) -> dict[str, dict[str, list[str]]]:
    """A family's training runs by objective, one a seed, as its group `adapters`; nothing where none is trained."""
    found: dict[str, list[str]] = {}
    for job in trained:
        found.setdefault(_row(job.params).partition("_")[2], []).append(job.products[0].name)
    return {"adapters": found} if found else {}


def _inputs(book: Path, file: Path, over: Mapping[str, Any]) -> dict[str, Path | str]:
    """The models and the benchmark that a run reads, by name: folders as paths from here, hub models by their id.

    ParameterError for a benchmark that is not there: said before anything runs.
    """
    values = notebooks.parameters(book) | resolved(Job(book, file.parent, file, over))
    typed = {name: params.section(name, values[name], str(file)) for name in params.SECTIONS.keys() & values.keys()}
    named: dict[str, Path | str] = {}
    if "backbone" in typed:
        named["model"] = params.shipped(typed["backbone"].family, typed["backbone"].model)
    if "families" in typed:
        named |= {
            f"model of {name}": params.shipped(rows.backbone.family, rows.backbone.model)
            for name, rows in typed["families"].given.items()
        }
    if evaluation := typed.get("evaluation"):
        kinds = {"dino": evaluation.dino, "clip": evaluation.clip, "reader": evaluation.reader}
        named |= {kind: params.shipped(kind, model) for kind, model in kinds.items() if model}
    found = {n: book.parent / model if str(model).startswith((".", "/")) else model for n, model in named.items()}
    for name, rows in typed["families"].given.items() if "families" in typed else []:
        if rows.photos.masks is not None:
            found[f"masks of {name}"] = book.parent / rows.photos.masks
    for given in typed["external"].rows if "external" in typed else []:
        if (images := book.parent / given.folder).is_dir():  # a kept row outlives its folder
            found[f"images of {given.row}"] = images
    if "benchmark" in typed and (folder := typed["benchmark"].folder) != "toybox":
        found["benchmark"] = book.parent / folder
        if not found["benchmark"].is_dir():
            raise ParameterError(
                f"benchmark.folder = '{folder}' in {file} is not there: correct it (from {book.parent}), or, if it is "
                f"DreamBench, run `make data` or set {params.DREAMBENCH_DIR} to a copy"
            )
    return found


def missing_models(jobs: Sequence[Job]) -> list[Path]:
    """Folders of models that the jobs read and that are not there."""
    models = ("model", "dino", "clip", "reader")
    paths = [path for job in jobs for name, path in job.inputs.items() if name.startswith(models)]
    return [path for path in dict.fromkeys(paths) if isinstance(path, Path) and not path.is_dir()]


def costs(profile: Path) -> dict[str, Any]:
    """What reproduce.yaml says: minutes by YAML or the rest of them beside what a probe tells (see `estimate`),
    gigabytes, the machine, and how to get models that are missing."""
    return params.read_yaml(profile / COSTS)


def estimated(jobs: Sequence[Job], cost: Mapping[str, Any]) -> tuple[list[Job], str]:
    """The jobs with the minutes that each takes, and which machine they are of: this one, where it can be probed."""
    rest, todo = cost.get("rest"), _to_run(jobs)
    if rest is None or not todo:
        return list(jobs), cost["machine"]
    values = {job.name: notebooks.parameters(job.notebook) | resolved(job) for job in todo}
    print("looking at how fast this machine is …", flush=True)
    used = {name: precision for job in todo for name, precision in estimate.families(values[job.name]).items()}
    pace = estimate.probe(used)
    minutes = {job.name: estimate.seconds(values[job.name], pace, rest, job.params.stem) / 60 for job in todo}
    minutes[todo[0].name] += pace.start / 60  # which imports for all
    step = estimate.PAIRS * max(pace.pair.values(), default=0)
    where = f"this machine ({pace.device}: {pace.start:.0f} s of imports once, a step up to {step:.2f} s)"
    return [replace(job, minutes=minutes.get(job.name, 0.0)) for job in jobs], where  # of what is complete: none


def _to_run(jobs: Sequence[Job]) -> list[Job]:
    return [job for job in jobs if not is_complete(job)]


def announcement(jobs: Sequence[Job], cost: Mapping[str, Any], machine: str, engine: str = "local") -> str:
    """How long it takes and how much memory, said before anything runs; of another engine, what that leaves open."""
    todo = _to_run(jobs)
    done = f", {len(jobs) - len(todo)} of them complete already" if len(todo) < len(jobs) else ""
    return (
        f"{len(jobs)} notebook runs{done}: about {span(sum(job.minutes for job in todo))} and "
        f"{cost['gigabytes']:g} GB of memory on {machine}"
        + ("" if engine == "local" else f", one after the other: by {engine} on its machines, side by side, unknown")
        + "; the time left follows the pace of the runs"
    )


def tables(results: Path, jobs: Sequence[Job]) -> dict[str, Path]:
    """The tables that the jobs made, by name."""
    made = {name: results / "tables" / name for job in jobs for name in TABLES if job.name.endswith(name)}
    return {name: folder for name, folder in made.items() if runs.is_complete(folder)}


def shown(tables: Mapping[str, Path]) -> str:
    """Tables as text, each with the paths of its figures."""
    parts = []
    for folder in tables.values():
        figures = "\n".join(f"  {path}" for path in sorted(folder.glob("*.png")))
        parts.append(f"{(folder / 'table.txt').read_text('utf-8')}\nFigures:\n{figures}")
    return "\n\n".join(parts)


def keep_reference(results: Path, reference: Path, jobs: Sequence[Job]) -> Path:
    """Copies what complete jobs show to `reference`, in place of what an older run showed.

    Tables and their figures, the movement of the masks, executed notebooks as HTML (of a family's trainings one, whose
    curves show all), and run.md with machine, time and memory. Whatever else lies there stays.
    """
    firsts = [job for job in jobs if job.name.startswith(TRAINING) and job.name.endswith("-seed0")]
    last = {family(_row(job.params)): job.name for job in firsts}  # jobs stand in the order of the tables' rows
    with runs.atomic(reference) as kept:
        others = shutil.ignore_patterns(*TABLES, "notebooks", MOVEMENT, TOOK)
        shutil.copytree(reference, kept, ignore=others) if reference.is_dir() else kept.mkdir()
        for name, folder in tables(results, jobs).items():
            shutil.copytree(folder, kept / name)
        (kept / "notebooks").mkdir()
        for job in jobs:
            if job.name in last.values() or not job.name.startswith(TRAINING):
                shutil.copy(job.folder / f"{job.name}.html", kept / "notebooks")
        for gallery in results.glob(f"masks/*/{MOVEMENT}"):
            shutil.copy(gallery, kept)
        (kept / TOOK).write_text(_what_it_took(jobs), encoding="utf-8")
    return reference


def _what_it_took(jobs: Sequence[Job]) -> str:
    """Machine and minutes of executed notebooks, and the memory of trainings, as Markdown.

    A kernel is no child of whoever runs its notebook (`warm`), so that only a run within it knows what it takes.
    """
    facts = {job.name: _facts(job.folder) for job in jobs}
    peak = max((_facts(folder)["peak_memory_bytes"] for job in jobs for folder in job.products), default=0)
    last = max(facts.values(), key=lambda run: run["started"])
    commit = last["git"]["commit"][:12] if last["git"] else "unknown"
    lines = [
        f"# A run of `make reproduce`: {len(facts)} notebook runs",
        "",
        f"Commit {commit}, torch {last['packages']['torch']}, {last['device']}.",
        f"{sum(f['wall_seconds'] for f in facts.values()) / 60:.0f} minutes in all"
        + (f"; a training took at most {peak / 1e9:.1f} GB of memory." if peak else "."),
        "",
        "| run | minutes |",
        "|---|---|",
        *(f"| {name} | {facts[name]['wall_seconds'] / 60:.1f} |" for name in sorted(facts)),
    ]
    return "\n".join(lines) + "\n"


def _facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / runs.PROVENANCE).read_text(encoding="utf-8"))


def reproduce(
    jobs: Sequence[Job], results: Path, cost: Mapping[str, Any], reference: Path | None = None, **how: Any
) -> int:
    """Runs the jobs of a plan, prints their tables and keeps them as `reference`, if given; the exit code.

    `how`: the engine and its options, as of `run_all`.
    """
    if gone := missing_models(jobs):
        print(f"nothing was run: {', '.join(map(str, gone))} is missing: {cost['models']}")
        return 1
    if how.get("dry_run"):
        return run_all(jobs, **how)
    jobs, machine = estimated(jobs, cost)
    print(announcement(jobs, cost, machine, how.get("engine", "local")), flush=True)
    if code := run_all(jobs, **how):
        print("not everything ran (see above): the same command goes on with what is left; what is complete is kept")
        return code
    print(f"\n{shown(tables(results, jobs))}\n\nExecuted notebooks, also as HTML: {results / 'notebooks'}")
    if reference:
        print(f"kept: {keep_reference(results, reference, jobs)}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m focusdpo_lib.batch.reproduce", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="toybox", help="a folder of params/")
    parser.add_argument("--seeds", type=int, default=1, help="training seeds of every objective")
    of = {"nargs": "+", "choices": FAMILIES, "default": list(FAMILIES)}
    parser.add_argument("--families", **of, help="train and show these alone; Table 2 has UNO's rows only")
    parser.add_argument("--params", type=Path, default=Path("params"))
    parser.add_argument("--results", type=runs.home, default=Path("results"))
    parser.add_argument("--notebooks", type=Path, default=Path("notebooks"))
    parser.add_argument("--reference", type=Path, help="when all is complete, keep tables, figures and HTML here")
    add_overrides(parser)
    add_engine(parser)
    given = parser.parse_args(arguments)
    if given.seeds < 1:
        parser.error(f"--seeds {given.seeds}: at least one")
    try:
        profile, results = given.params / given.profile, given.results / given.profile
        jobs = plan(profile, results, given.notebooks, given.seeds, chosen_overrides(given), given.families)
        return reproduce(jobs, results, costs(profile), given.reference, **engine_options(given))
    except (ParameterError, runs.RunError) as error:
        print(f"nothing was run: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
