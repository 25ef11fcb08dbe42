"""Engines run jobs, each after those that it needs, and say how far they are. Completion markers are the truth: any
engine goes on where another stopped."""

from collections.abc import Sequence
from importlib import import_module

from focusdpo_lib.batch.engines.said import say
from focusdpo_lib.batch.jobs import Job, checked

ENGINES = ("local", "ray", "slurm")


def run_all(jobs: Sequence[Job], engine: str = "local", **options) -> int:
    """Runs the jobs; a failed one holds up only those after it. Nothing runs if one is not in order. The exit code.

    `options` are the engine's own.
    """
    if problems := checked(jobs):
        for problem in problems:
            say(f"nothing was run: {problem}")
        return 1
    return import_module(f"focusdpo_lib.batch.engines.on_{engine}").run_all(jobs, **options)
