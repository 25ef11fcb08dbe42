"""`make reproduce`: every notebook of a profile through papermill, in order, and both tables at the end.

    python -m focusdpo_lib.reproduce --profile toybox --seeds 1

Every params/<profile>/NN_*.yaml is one run of notebooks/NN_*.ipynb; those of notebook 03 are run once a training seed,
and the tables (a parameter `adapters`) come after them. What is complete is skipped; what was interrupted goes on.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from focusdpo_lib import backbones, notebooks, params, runs
from focusdpo_lib.batch import Job, resolved, run_all, span
from focusdpo_lib.evaluation.encoders import toybox_folder
from focusdpo_lib.evaluation.tables import ROWS
from focusdpo_lib.params import ParameterError

COSTS = "reproduce.yaml"  # beside the profile's params: what a run costs, as measured
TRAINING = "03"
TABLES = ("table1", "table2")


def plan(
    profile: Path, results: Path, books: Path, seeds: int = 1, overrides: Mapping[str, Any] | None = None
) -> list[Job]:
    """The jobs of a profile (a folder of YAML files); `results` is the profile's own folder.

    `overrides` ("backbone.model": …) go over every YAML whose notebook has that parameter.
    """
    files = sorted(profile.glob("[0-9][0-9]_*.yaml"), key=_place)
    if not files:
        raise ParameterError(f"{profile} holds no NN_*.yaml: correct --profile, or run from the kit's own folder")
    minutes = costs(profile).get("minutes") or {}
    shared = {"results": Path(os.path.relpath(results, books)).as_posix(), **(overrides or {})}
    jobs: list[Job] = []
    for file in files:
        book = _notebook(books, file)
        known = notebooks.parameters(book)
        mine = {key: value for key, value in shared.items() if key.partition(".")[0] in known}
        expected = float(minutes.get(file.stem, 1))
        if file.name.startswith(TRAINING):
            jobs += _trainings(book, file, results, mine, seeds, expected)
        else:
            jobs.append(_job(book, file, results, mine, expected, jobs if "adapters" in known else []))
    return jobs


def _place(file: Path) -> tuple[str, int, str]:
    """By number; trainings in the order of the tables' rows, so that the last one's curves show all of them."""
    number, _, name = file.stem.partition("_")
    rows = list(ROWS)
    return number, rows.index(name) if name in rows else len(rows), name


def _notebook(books: Path, file: Path) -> Path:
    found = list(books.glob(f"{file.name[:2]}_*.ipynb"))
    if len(found) != 1:
        raise ParameterError(f"{file} needs one notebook {books}/{file.name[:2]}_*.ipynb, there are {len(found)}")
    return found[0]


def _trainings(book: Path, file: Path, results: Path, mine: dict, seeds: int, minutes: float) -> Iterator[Job]:
    """One job a training seed, named <objective>-seed<n> as the training run is."""
    objective = file.stem.partition("_")[2]
    for seed in range(seeds):
        name = f"{objective}-seed{seed}"
        over = mine | {"run": name, "training.seed": seed}
        folder = results / "notebooks" / f"{TRAINING}_{name}"
        yield Job(book, folder, file, over, _models(book, file, over), [results / "training" / name], minutes=minutes)


def _job(book: Path, file: Path, results: Path, mine: dict, minutes: float, before: Sequence[Job]) -> Job:
    """A job of its own; one that compares comes after the trainings `before` it and reads their runs."""
    trained = [job for job in before if job.folder.name.startswith(TRAINING)]
    adapters: dict[str, list[str]] = {}
    for job in trained:
        adapters.setdefault(job.params.stem.partition("_")[2], []).append(job.products[0].name)
    over = mine | ({"adapters": adapters} if trained else {})
    inputs = _models(book, file, over) | {job.products[0].name: job.products[0] for job in trained}
    after = [job.name for job in trained]
    return Job(book, results / "notebooks" / file.stem, file, over, inputs, after=after, minutes=minutes)


def _models(book: Path, file: Path, over: Mapping[str, Any]) -> dict[str, Path | str]:
    """The models that a run reads, by name: folders as paths from here, hub models by their id."""
    values = notebooks.parameters(book) | resolved(Job(book, file.parent, file, over))
    named: dict[str, Path | str] = {}
    if "backbone" in values:
        backbone = params.section("backbone", values["backbone"], str(file))
        named["model"] = backbones.model_path(backbone) if backbone.model == "toybox" else backbone.model
    if "evaluation" in values:
        evaluation = params.section("evaluation", values["evaluation"], str(file))
        kinds = {"dino": evaluation.dino, "clip": evaluation.clip, "reader": evaluation.reader}
        named |= {kind: toybox_folder(kind, model) for kind, model in kinds.items() if model}
    local = {name: book.parent / model for name, model in named.items() if str(model).startswith((".", "/"))}
    return named | local


def missing_models(jobs: Sequence[Job]) -> list[Path]:
    """Folders of models that the jobs read and that are not there."""
    paths = [path for job in jobs for name, path in job.inputs.items() if name in ("model", "dino", "clip", "reader")]
    return [path for path in dict.fromkeys(paths) if isinstance(path, Path) and not path.is_dir()]


def costs(profile: Path) -> dict[str, Any]:
    """What reproduce.yaml says: minutes by YAML, gigabytes, the machine, and how to get models that are missing."""
    return params.read_yaml(profile / COSTS)


def announcement(jobs: Sequence[Job], cost: Mapping[str, Any]) -> str:
    """How long it takes and how much memory, said before anything runs."""
    todo = [job for job in jobs if not all(map(runs.is_complete, [job.folder, *job.products]))]
    done = f", {len(jobs) - len(todo)} of them complete already" if len(todo) < len(jobs) else ""
    return (
        f"{len(jobs)} notebook runs{done}: about {span(sum(job.minutes for job in todo))} and "
        f"{cost['gigabytes']:g} GB of memory on {cost['machine']}; the time left follows your machine's own pace"
    )


def tables(results: Path) -> str:
    """Both tables as text, each with the paths of its figures."""
    parts = []
    for name in TABLES:
        folder = results / "tables" / name
        if runs.is_complete(folder):
            figures = "\n".join(f"  {path}" for path in sorted(folder.glob("*.png")))
            parts.append(f"{(folder / 'table.txt').read_text('utf-8')}\nFigures:\n{figures}")
    return "\n\n".join(parts)


def keep_reference(results: Path, reference: Path) -> Path:
    """Copies what a complete run shows to `reference`, in place of an older one: tables and their figures, the mask
    galleries, executed notebooks as HTML (of the trainings one, whose curves show all), and a README with machine, time
    and memory."""
    done = [f for f in (results / "notebooks").iterdir() if runs.is_complete(f)]
    trainings = [f for f in done if f.name.startswith(TRAINING) and f.name.endswith("-seed0")]
    shown = max(trainings, key=lambda f: list(ROWS).index(f.name[3:].removesuffix("-seed0")))
    with runs.atomic(reference) as kept:
        for name in TABLES:
            shutil.copytree(results / "tables" / name, kept / name)
        (kept / "notebooks").mkdir()
        for folder in done:
            if folder == shown or not folder.name.startswith(TRAINING):
                shutil.copy(folder / f"{folder.name}.html", kept / "notebooks")
        for gallery in results.glob("masks/*/timesteps_*.png"):
            shutil.copy(gallery, kept)
        (kept / "README.md").write_text(_what_it_took(done), encoding="utf-8")
    return reference


def _what_it_took(folders: Sequence[Path]) -> str:
    """Machine, minutes and memory of executed notebooks, as Markdown."""
    facts = {f.name: json.loads((f / runs.PROVENANCE).read_text(encoding="utf-8")) for f in folders}
    last = max(facts.values(), key=lambda run: run["started"])
    commit = last["git"]["commit"][:12] if last["git"] else "unknown"
    lines = [
        f"# A run of `make reproduce`: {len(facts)} notebook runs",
        "",
        f"Commit {commit}, torch {last['packages']['torch']}, {last['device']}.",
        f"{sum(f['wall_seconds'] for f in facts.values()) / 60:.0f} minutes in all, at most "
        f"{max(f['peak_memory_bytes'] for f in facts.values()) / 1e9:.1f} GB of memory.",
        "",
        "| run | minutes |",
        "|---|---|",
        *(f"| {name} | {facts[name]['wall_seconds'] / 60:.1f} |" for name in sorted(facts)),
    ]
    return "\n".join(lines) + "\n"


def reproduce(
    profile: Path, results: Path, books: Path, seeds: int = 1, overrides: Mapping[str, Any] | None = None
) -> int:
    """Runs the plan and prints the tables; the exit code."""
    jobs, cost = plan(profile, results, books, seeds, overrides), costs(profile)
    if gone := missing_models(jobs):
        print(f"nothing was run: {', '.join(map(str, gone))} is missing: {cost['models']}")
        return 1
    print(announcement(jobs, cost), flush=True)
    code = run_all(jobs)
    if code:
        print("not everything ran (see above): the same command goes on with what is left; what is complete is kept")
        return code
    print(f"\n{tables(results)}\n\nExecuted notebooks, also as HTML: {results / 'notebooks'}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m focusdpo_lib.reproduce", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="toybox", help="a folder of params/")
    parser.add_argument("--seeds", type=int, default=1, help="training seeds of every objective")
    parser.add_argument("--params", type=Path, default=Path("params"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--notebooks", type=Path, default=Path("notebooks"))
    parser.add_argument("--reference", type=Path, help="when all is complete, keep tables, figures and HTML here")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="over every YAML that has it")
    given = parser.parse_args(arguments)
    overrides = {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in given.set)}
    if given.seeds < 1:
        parser.error(f"--seeds {given.seeds}: at least one")
    try:
        profile, results = given.params / given.profile, given.results / given.profile
        code = reproduce(profile, results, given.notebooks, given.seeds, overrides)
        if code == 0 and given.reference:
            print(f"kept: {keep_reference(results, given.reference)}")
        return code
    except (ParameterError, runs.RunError) as error:
        print(f"nothing was run: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
