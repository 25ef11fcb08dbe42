"""What an engine says: a line a job and state, with the time left."""

from collections.abc import Sequence


def say(text: str) -> None:
    """At once, also into a pipe."""
    print(text, flush=True)


def time_left(minutes: float, pace: Sequence[tuple[float, float]]) -> str:
    """The expected `minutes` still to go, corrected by how long the jobs so far took against what was expected."""
    return span(minutes * sum(taken for _, taken in pace) / sum(expected for expected, _ in pace))


def span(minutes: float) -> str:
    """A duration to read: '12 min', '1 min 5 s' or '20 s'."""
    whole, seconds = divmod(round(60 * minutes), 60)
    return f"{whole} min" if whole >= 10 else f"{whole} min {seconds} s" if whole else f"{seconds} s"
