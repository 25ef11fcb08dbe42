"""A job in a worker of an engine, away from whoever started it: what it is told, its log, and where it runs.

The log of each lies at <folder of the notebooks>/logs/<job>.log.
"""

import os
import platform
import time
from pathlib import Path
from typing import Any

from focusdpo_lib import runs
from focusdpo_lib.batch.jobs import Job, execute, resolved
from focusdpo_lib.cluster import redirected

STARTED = "started on "  # how a log's line begins that says where a job runs


class EngineError(RuntimeError):
    """Jobs that cannot be run there; the message says why and what to do."""


def orders(job: Job, warm: bool = False) -> dict[str, Any]:
    """What `work` is told; the log of an earlier try is removed. `warm`: as of `jobs.execute`."""
    log = log_of(job)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    return {"job": job, "settings": _settings(job), "cwd": os.getcwd(), "log": log.absolute(), "warm": warm}


def log_of(job: Job) -> Path:
    """The file that holds what a job printed."""
    return job.folder.parent / "logs" / f"{job.name}.log"


def started(job: Job) -> str | None:
    """The line of its log that says where a job runs, once it does."""
    log = log_of(job)
    line = log.open(encoding="utf-8", errors="replace").readline() if log.exists() else ""
    return line.strip() if line.startswith(STARTED) and line.endswith("\n") else None


def work(job: Job, settings: str, cwd: str, log: Path, warm: bool, place: str) -> bool:
    """Runs a job, its output into its log; says whether it ran. EngineError where the settings are not those of whoever
    started it: this machine sees other files."""
    os.chdir(cwd)
    with redirected(log):
        print(f"{STARTED}{platform.node()} ({place})", flush=True)
        if _settings(job) != settings:
            what = job.params or "its settings"
            raise EngineError(
                f"{what} says something else on {platform.node()} than where this was started: let all machines see "
                "the same files"
            )
        start = time.monotonic()
        ran = execute(job, warm)
        print(f"ended after {time.monotonic() - start:.1f} s", flush=True)
        return ran


def _settings(job: Job) -> str:
    return runs.digest(runs.plain(resolved(job)))
