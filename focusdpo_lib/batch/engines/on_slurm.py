"""The engine `slurm`: every job is an sbatch that asks for what its YAML states, after those that it needs (submitit).

Partition, account, constraint and time come from slurm.yaml beside the jobs' params. All machines see the same files.
Whoever started it may leave: the jobs go on, and the same command finds what is complete.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from focusdpo_lib import params
from focusdpo_lib.batch.engines.said import say, span
from focusdpo_lib.batch.engines.worker import EngineError, log_of, orders, started, work
from focusdpo_lib.batch.jobs import Job, is_complete, resources

SETTINGS = "slurm.yaml"
FOLDER = "slurm"  # of submitit's own files, beside the executed notebooks


def run_all(jobs: Sequence[Job], cluster: str = "slurm", dry_run: bool = False) -> int:
    """As `engines.run_all`. `dry_run`: prints what would be submitted. `cluster`: "local" runs the graph here, by
    submitit's own executor of that name."""
    try:
        submitit = imported()
        driver = _Driver(submitit, jobs, cluster)
        if dry_run:
            for job in jobs:
                say(f"{script(submitit, job, [f'<id of {name}>' for name in job.after])}\n")
            return 0
        return driver.run()
    except EngineError as error:
        say(f"nothing was run: {error}")
        return 1


def imported() -> Any:
    """The library. EngineError where it is not installed."""
    try:
        import submitit
    except ImportError:
        raise EngineError(
            "the engine slurm needs the extra of that name: python -m pip install -e '.[slurm]' (with uv: uv pip "
            "install)"
        ) from None
    return submitit


def asked(job: Job, after: Sequence[str] = ()) -> dict[str, Any]:
    """A job's parameters of submitit's Slurm executor, after the Slurm jobs of the ids given."""
    needs, where = resources(job), _settings(job)
    more = {"requeue": True}  # a lost node: it goes on from its checkpoint
    if after:
        more |= {"dependency": "afterok:" + ":".join(after), "kill-on-invalid-dep": "yes"}
    found = {
        "job_name": job.name,
        "nodes": 1,
        "ntasks_per_node": 1,
        "cpus_per_task": needs.cpus,
        "gpus_per_node": needs.gpus or None,
        "mem": None if needs.memory is None else f"{needs.memory:g}GB",
        "time": where.minutes,
        "partition": where.partition,
        "account": where.account,
        "constraint": where.constraint,
        "setup": where.setup or None,
        "additional_parameters": more,
    }
    return {name: value for name, value in found.items() if value is not None}


def script(submitit: Any, job: Job, after: Sequence[str] = ()) -> str:
    """The text of a job's sbatch file."""
    from submitit.slurm.slurm import _make_sbatch_string

    command = "python -u -m submitit.core._submit " + str(_folder(job))
    return _make_sbatch_string(command=command, folder=_folder(job), **asked(job, after))


def _settings(job: Job) -> params.Slurm:
    file = job.params.parent / SETTINGS if job.params else None
    values = params.read_yaml(file) if file is not None and file.exists() else {}
    return params.section("slurm", values.get("slurm"), str(file))


def _folder(job: Job) -> Path:
    return job.folder.parent / FOLDER


class _Driver:
    """Submits every job, says what becomes of them, and cancels what is left when it is interrupted."""

    def __init__(self, submitit: Any, jobs: Sequence[Job], cluster: str) -> None:
        self.submitit, self.jobs, self.cluster = submitit, list(jobs), cluster
        self.submitted: dict[str, Any] = {}
        self.begun: dict[str, float] = {}
        self.ended: set[str] = set()
        self.failed: set[str] = set()

    def run(self) -> int:
        try:
            while len(self.ended) < len(self.jobs):
                for job in self.jobs:
                    if job.name not in self.ended:
                        self._look_at(job)
                time.sleep(0.5 if self.cluster == "local" else 10)
        except KeyboardInterrupt:
            for name, job in self.submitted.items():
                if name not in self.ended:
                    job.cancel()
            say("interrupted, what was submitted is cancelled: run the same command again to go on")
            return 130
        return 1 if self.failed else 0

    def _look_at(self, job: Job) -> None:
        if job.name in self.submitted:
            if job.name not in self.begun and (line := started(job)):
                self.begun[job.name] = time.monotonic()
                self._say(job, line)
            if self.submitted[job.name].done():
                self._end(job)
        elif missing := self.failed.intersection(job.after):
            self._fail(job, f"not run, for it needs {', '.join(sorted(missing))}")
        elif self.ended.issuperset(job.after) and is_complete(job):
            self.ended.add(job.name)
            self._say(job, "complete already, skipped")
        elif self._may_be_submitted(job):
            self._submit(job)

    def _may_be_submitted(self, job: Job) -> bool:
        """Slurm itself holds a job back until those are done that it needs; the local executor knows no such thing."""
        return self.ended.union(() if self.cluster == "local" else self.submitted).issuperset(job.after)

    def _submit(self, job: Job) -> None:
        executor_of = {"slurm": self.submitit.SlurmExecutor, "local": self.submitit.LocalExecutor}[self.cluster]
        try:
            executor = executor_of(folder=_folder(job))
        except RuntimeError as error:
            raise EngineError(f"this machine cannot submit ({error}): run it where sbatch and srun are") from None
        if self.cluster == "slurm":
            waits_for = [self.submitted[name].job_id for name in job.after if name not in self.ended]
            executor.update_parameters(**asked(job, waits_for))
        else:
            executor.update_parameters(timeout_min=_settings(job).minutes)
        self.submitted[job.name] = executor.submit(_task, orders(job))
        self._say(job, f"submitted as {self.submitted[job.name].job_id}")

    def _end(self, job: Job) -> None:
        error = self.submitted[job.name].exception()
        if error is not None:
            self._fail(job, f"FAILED. {' '.join(_last_line(error).split())} (its log: {log_of(job)})")
            return
        taken = span((time.monotonic() - self.begun.get(job.name, time.monotonic())) / 60)
        self.ended.add(job.name)
        self._say(job, f"done in {taken}")

    def _fail(self, job: Job, text: str) -> None:
        self.failed.add(job.name)
        self.ended.add(job.name)
        self._say(job, text)

    def _say(self, job: Job, text: str) -> None:
        say(f"[{self.jobs.index(job) + 1}/{len(self.jobs)}] {job.name}: {text}")


def _task(words: dict[str, Any]) -> bool:
    """In a Slurm job."""
    return work(**words, place=f"job {os.environ.get('SLURM_JOB_ID', os.getpid())}")


def _last_line(error: Exception) -> str:
    """What the job's own exception said: the end of the traceback that submitit hands on."""
    lines = [
        line for line in str(error).splitlines() if line and not line.startswith((" ", "-", "Traceback", "You can"))
    ]
    return lines[-1].partition(": ")[2] or lines[-1]
