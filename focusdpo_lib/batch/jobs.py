"""One run of one notebook through papermill: checked before, whole or absent after, skipped when complete.

A job's folder gets <name>.ipynb, <name>.html, params.yaml, provenance.json and the completion marker. Engines run
many (see `engines`).
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from focusdpo_lib import params, runs
from focusdpo_lib.batch import notebooks
from focusdpo_lib.batch.notebooks import NotebookError
from focusdpo_lib.params import ParameterError

RESOURCES = "resources"  # a YAML's group that says what its run asks an engine for; the notebook is not given it


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
    values.pop(RESOURCES, None)
    notebooks.check(job.notebook, values, str(job.params))
    known = notebooks.parameters(job.notebook) if job.overrides else {}
    for key, value in job.overrides.items():
        name, *inner = key.split(".")
        if name != RESOURCES:
            values[name] = replaced(values.get(name) or known.get(name), inner, value)
    notebooks.check(job.notebook, values, _where(job))
    return values


def _where(job: Job) -> str:
    """What to name where overrides and YAML together are wrong, and the YAML alone is not."""
    if not job.overrides:
        return str(job.params)
    return f"the overrides {', '.join(job.overrides)}" + (f" over {job.params}" if job.params else "")


def resources(job: Job) -> params.Resources:
    """What the job asks an engine for: the YAML's `resources` under the overrides."""
    asked = (params.read_yaml(job.params) if job.params else {}).get(RESOURCES) or {}
    over = {key.partition(".")[2]: v for key, v in job.overrides.items() if key.startswith(f"{RESOURCES}.")}
    return params.section(RESOURCES, {**asked, **over}, _where(job))


def is_complete(job: Job) -> bool:
    """Whether this very job, and all that it makes, is complete already."""
    inputs = {**job.inputs, "notebook": notebooks.source_hash(job.notebook)}
    if any(isinstance(what, Path) and not what.exists() for what in inputs.values()):
        return False
    return runs.Run(job.folder, resolved(job), inputs).complete and all(map(runs.is_complete, job.products))


def replaced(section: Any, keys: Sequence[str], value: Any) -> Any:
    """A copy of nested groups with the value that `keys` lead to; groups on the way are made where missing."""
    if not keys:
        return value
    group = section if isinstance(section, Mapping) else {}
    return {**group, keys[0]: replaced(group.get(keys[0]), keys[1:], value)}


def execute(job: Job, warm: bool = False) -> bool:
    """Runs the job unless it is complete; says whether it ran. NotebookError, ParameterError or RunError on failure.

    Waits while another process runs the same job. `warm`: as of `notebooks.execute`.
    """
    values, name = resolved(job), job.name
    with runs.locked(job.folder.with_name(f".{name}.lock"), f"another process runs {name}: waiting for it"):
        if is_complete(job):
            return False
        for left_over in job.folder.parent.glob(f"{runs.PARTIAL}*/{name}"):  # by a killed process
            shutil.rmtree(left_over.parent, ignore_errors=True)
        failed = job.folder.with_name(f"{name}.failed.ipynb")
        inputs = {**job.inputs, "notebook": notebooks.source_hash(job.notebook)}
        with runs.atomic(job.folder) as partial, runs.Run(partial, values, inputs):
            notebooks.execute(job.notebook, partial / f"{name}.ipynb", values, failed, warm)
            unfinished = [str(p) for p in job.products if not runs.is_complete(p)]
            if unfinished:
                raise NotebookError(
                    f"{name}: {job.notebook} ran to its end but left {', '.join(unfinished)} unfinished"
                )
        failed.unlink(missing_ok=True)
        return True


def checked(jobs: Sequence[Job]) -> list[str]:
    """All that is wrong with jobs, a sentence each, before any of them runs."""
    problems, names = [], set()
    for job in jobs:
        if job.name in names:
            problems.append(f"{job.name}: two jobs have this name: give each its own")
        problems += [f"{job.name}: runs after {n}, which is not a job before it" for n in job.after if n not in names]
        names.add(job.name)
        try:
            params.run_name(job.name)
            resolved(job)
            resources(job)
        except (ParameterError, OSError) as error:
            problems.append(f"{job.name}: {error}")
    return problems
