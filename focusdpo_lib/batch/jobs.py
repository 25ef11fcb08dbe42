"""Notebooks run through papermill: checked before, whole or absent after, skipped when complete.

    python -m focusdpo_lib.batch notebooks/03_training.ipynb params/toybox/03_*.yaml --into results/toybox/notebooks

Each job's folder gets <name>.ipynb, <name>.html, params.yaml, provenance.json and the completion marker.
"""

import argparse
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from focusdpo_lib import params, runs, strict_yaml
from focusdpo_lib.batch import notebooks
from focusdpo_lib.batch.notebooks import NotebookError
from focusdpo_lib.params import ParameterError

TRUSTED = 2.0  # minutes: a first short job that takes longer than expected says little of the others


@dataclass(frozen=True)
class Job:
    """One run of one notebook. Paths are the caller's; the notebook itself runs in its own folder, as in JupyterLab."""

    notebook: Path
    folder: Path  # of the executed notebook; its last part is the job's name
    params: Path | None = None  # YAML
    overrides: Mapping[str, Any] = field(default_factory=dict)  # over the YAML; "training.lora.rank" reaches into it
    inputs: Mapping[str, Path | str] = field(default_factory=dict)  # as of runs.Run
    products: Sequence[Path] = ()  # run folders the notebook makes: complete before this job is skipped
    after: Sequence[str] = ()  # names of the jobs it depends on
    minutes: float = 1.0  # expected, relative to the other jobs: for the time left

    @property
    def name(self) -> str:
        return self.folder.name


def resolved(job: Job) -> dict[str, Any]:
    """What the notebook is given: the YAML under the overrides, checked against the notebook's parameters cell."""
    values = params.read_yaml(job.params) if job.params else {}
    for key, value in job.overrides.items():
        name, *inner = key.split(".")
        section = values.get(name) or notebooks.parameters(job.notebook).get(name)
        values[name] = replaced(section, inner, value)
    notebooks.check(job.notebook, values, str(job.params or "the overrides"))
    return values


def replaced(section: Any, keys: Sequence[str], value: Any) -> Any:
    """A copy of nested groups with the value that `keys` lead to; groups on the way are made where missing."""
    if not keys:
        return value
    group = section if isinstance(section, Mapping) else {}
    return {**group, keys[0]: replaced(group.get(keys[0]), keys[1:], value)}


def execute(job: Job, warm: bool = False) -> bool:
    """Runs the job unless it is complete; says whether it ran. NotebookError, ParameterError or RunError on failure.

    `warm`: as of `notebooks.execute`.
    """
    values, name = resolved(job), job.name
    inputs = {**job.inputs, "notebook": notebooks.source_hash(job.notebook)}
    if runs.Run(job.folder, values, inputs).complete and all(map(runs.is_complete, job.products)):
        return False
    for left_over in job.folder.parent.glob(f"{runs.PARTIAL}*/{name}"):  # by a killed process
        shutil.rmtree(left_over.parent, ignore_errors=True)
    failed = job.folder.with_name(f"{name}.failed.ipynb")
    with runs.atomic(job.folder) as partial, runs.Run(partial, values, inputs):
        notebooks.execute(job.notebook, partial / f"{name}.ipynb", values, failed, warm)
        unfinished = [str(p) for p in job.products if not runs.is_complete(p)]
        if unfinished:
            raise NotebookError(f"{name}: {job.notebook} ran to its end but left {', '.join(unfinished)} unfinished")
    failed.unlink(missing_ok=True)
    return True


def run_all(jobs: Sequence[Job]) -> int:
    """The local engine: one job after the other, a failed one holds up only those after it; returns the exit code."""
    if not _checked(jobs):
        return 1
    failed: set[str] = set()
    pace = [(TRUSTED, TRUSTED)]  # minutes expected and taken
    for number, job in enumerate(jobs, 1):
        label = f"[{number}/{len(jobs)}] {job.name}:"
        missing = failed.intersection(job.after)
        if missing:
            failed.add(job.name)
            _say(f"{label} not run, for it needs {', '.join(sorted(missing))}")
            continue
        left = sum(other.minutes for other in jobs[number - 1 :] if not failed.intersection(other.after))
        _say(f"{label} started, about {time_left(left, pace)} left")
        start = time.monotonic()
        try:
            ran = execute(job, warm=len(jobs) > 1)
        except KeyboardInterrupt:
            _say(f"{label} interrupted: run the same command again to go on; what is complete is kept")
            return 130
        except Exception as error:  # one sentence each; the other jobs go on
            failed.add(job.name)
            _say(f"{label} FAILED. {error}")
            continue
        taken = (time.monotonic() - start) / 60
        pace += [(job.minutes, taken)] if ran else []
        _say(f"{label} done in {span(taken)}" if ran else f"{label} complete already, skipped")
    return 1 if failed else 0


def time_left(minutes: float, pace: Sequence[tuple[float, float]]) -> str:
    """The expected `minutes` still to go, corrected by how long the jobs so far took against what was expected."""
    return span(minutes * sum(taken for _, taken in pace) / sum(expected for expected, _ in pace))


def span(minutes: float) -> str:
    """A duration to read: '12 min', '1 min 5 s' or '20 s'."""
    whole, seconds = divmod(round(60 * minutes), 60)
    return f"{whole} min" if whole >= 10 else f"{whole} min {seconds} s" if whole else f"{seconds} s"


def _checked(jobs: Sequence[Job]) -> bool:
    """Checks every job before any runs, and says all that is wrong."""
    problems, names = [], set()
    for job in jobs:
        if job.name in names:
            problems.append(f"{job.name}: two jobs have this name: give each its own")
        problems += [f"{job.name}: runs after {n}, which is not a job before it" for n in job.after if n not in names]
        names.add(job.name)
        try:
            resolved(job)
        except (ParameterError, OSError) as error:
            problems.append(f"{job.name}: {error}")
    for problem in problems:
        _say(f"nothing was run: {problem}")
    return not problems


def _say(text: str) -> None:
    print(text, flush=True)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """The options --over and --set, which `chosen_overrides` reads."""
    parser.add_argument(
        "--over", action="append", default=[], type=Path, metavar="FILE", help="a YAML of settings over every YAML"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="over every YAML that has it")


def chosen_overrides(given: argparse.Namespace) -> dict[str, Any]:
    """What --over and --set put over every YAML, --set last. ParameterError for a file that is not settings."""
    overrides: dict[str, Any] = {}
    for path in given.over:
        overrides |= params.read_overrides(path)
    for text in given.set:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise ParameterError(f"--set {text} is not accepted: write it as --set KEY=VALUE")
        overrides[key] = _value(key, value)
    return overrides


def _value(key: str, text: str) -> Any:
    try:
        return strict_yaml.load(text)
    except strict_yaml.StrictYamlError as error:
        raise ParameterError(f"--set {key}={text} is not accepted: {error}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: one notebook under several YAML files, one run each."""
    parser = argparse.ArgumentParser(prog="python -m focusdpo_lib.batch", description=__doc__.splitlines()[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("params", type=Path, nargs="+", help="YAML files; the name of each is the name of its run")
    parser.add_argument("--into", type=runs.home, required=True, help="folder of the executed notebooks")
    add_overrides(parser)
    given = parser.parse_args(arguments)
    try:
        overrides = chosen_overrides(given)
    except ParameterError as error:
        print(f"nothing was run: {error}")
        return 1
    suffix = "".join(f"_{path.stem}" for path in given.over)
    suffix += "".join(f"_{key.split('.')[-1]}-{value}" for key, _, value in (t.partition("=") for t in given.set))
    suffix = re.sub(r"[^\w.+-]+", "-", suffix)  # a value may hold slashes, quotes or brackets: a name may not
    return run_all([Job(given.notebook, given.into / (p.stem + suffix), p, overrides) for p in given.params])
