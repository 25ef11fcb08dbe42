"""The engine `local`: one job after the other, in the order given."""

import time
from collections.abc import Sequence

from focusdpo_lib.batch.engines.said import say, span, time_left, told
from focusdpo_lib.batch.jobs import Job, execute

TRUSTED = 2.0  # minutes: a first short job that takes longer than expected says little of the others


def run_all(jobs: Sequence[Job]) -> int:
    """As `engines.run_all`."""
    failed: set[str] = set()
    pace = [(TRUSTED, TRUSTED)]  # minutes expected and taken
    for number, job in enumerate(jobs, 1):
        label = f"[{number}/{len(jobs)}] {job.name}:"
        missing = failed.intersection(job.after)
        if missing:
            failed.add(job.name)
            say(f"{label} not run, for it needs {', '.join(sorted(missing))}")
            continue
        left = sum(other.minutes for other in jobs[number - 1 :] if not failed.intersection(other.after))
        say(f"{label} started, about {time_left(left, pace)} left")
        start = time.monotonic()
        try:
            ran = execute(job, warm=len(jobs) > 1)
        except KeyboardInterrupt:
            say(f"{label} interrupted: run the same command again to go on; what is complete is kept")
            return 130
        except Exception as error:  # the other jobs go on
            failed.add(job.name)
            say(f"{label} FAILED. {told(error)}")
            continue
        taken = (time.monotonic() - start) / 60
        pace += [(job.minutes, taken)] if ran else []
        say(f"{label} done in {span(taken)}" if ran else f"{label} complete already, skipped")
    return 1 if failed else 0
