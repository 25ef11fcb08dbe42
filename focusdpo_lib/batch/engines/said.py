"""What an engine says: a line a job and state, with the time left."""

import traceback
from collections.abc import Sequence


def say(text: str) -> None:
    """At once, also into a pipe."""
    print(text, flush=True)


def told(error: Exception) -> str:
    """What ended a job: the kit's own errors are sentences; of any other one, its kind, and where it was to stderr."""
    if isinstance(error, ValueError | RuntimeError | OSError):
        return str(error)
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error} (a fault of the kit; where, is said above)"


def time_left(minutes: float, pace: Sequence[tuple[float, float]]) -> str:
    """The expected `minutes` still to go, corrected by how long the jobs so far took against what was expected."""
    return span(minutes * sum(taken for _, taken in pace) / sum(expected for expected, _ in pace))


def span(minutes: float) -> str:
    """A duration to read: '12 min', '1 min 5 s' or '20 s'."""
    whole, seconds = divmod(round(60 * minutes), 60)
    return f"{whole} min" if whole >= 10 else f"{whole} min {seconds} s" if whole else f"{seconds} s"
