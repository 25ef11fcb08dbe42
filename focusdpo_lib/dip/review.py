"""The manual pass over the pairs: verdicts that outlive any crash, and how far reviewers agree.

Every reviewer has a file of their own, <folder>/<reviewer>.jsonl, to which each click adds a line: the pairs that it
meant, accepted or rejected and why, or that it takes the last line back. Nothing in it is ever changed, so that a
crash costs at most the click that it interrupted. `review_grid` is the face of this in JupyterLab.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from focusdpo_lib.params import run_name
from focusdpo_lib.runs import RunError, full_disk_is_said

ACCEPT, REJECT, UNDO = "accept", "reject", "undo"
WHY = ("identity", "too alike", "mask", "background", "quality", "other")  # of a rejection
Verdict = tuple[bool, str]  # whether a pair is accepted, and why not


def reviewers(folder: Path) -> list[str]:
    """Who has a file there."""
    return sorted(path.stem for path in Path(folder).glob("*.jsonl"))


def verdicts(folder: Path, reviewer: str) -> dict[str, Verdict]:
    """A reviewer's verdicts by pair, without those that were taken back."""
    standing: list[dict] = []
    for line in _lines(Path(folder) / f"{reviewer}.jsonl"):
        if line["verdict"] != UNDO:
            standing.append(line)
        elif standing:
            standing.pop()
    return {name: (line["verdict"] == ACCEPT, line["why"]) for line in standing for name in line["pairs"]}


def _lines(path: Path) -> Iterator[dict]:
    """The whole lines of a file; a last one that a crash cut off is none. RunError where another is damaged."""
    if not path.exists():
        return
    *whole, _ = path.read_bytes().split(b"\n")
    for number, text in enumerate(whole, 1):
        try:
            line = json.loads(text)
            known = line["verdict"] in (ACCEPT, REJECT, UNDO) and isinstance(line["pairs"], list)
        except (ValueError, KeyError, TypeError):
            known = False
        if not known:
            raise RunError(f"line {number} of {path} is no verdict: correct or delete that line")
        yield line


@dataclass
class Review:
    """A reviewer's pass over pairs, in their order: what is open, what comes next, and every click saved at once."""

    folder: Path
    reviewer: str
    pairs: Sequence[str]  # ids
    page_size: int = 12
    found: dict[str, Verdict] = field(init=False)

    def __post_init__(self) -> None:
        run_name(self.reviewer)
        self.folder = Path(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._close_line()
        self.found = verdicts(self.folder, self.reviewer)

    @property
    def path(self) -> Path:
        return self.folder / f"{self.reviewer}.jsonl"

    @property
    def open(self) -> list[str]:
        """The pairs without a verdict."""
        return [name for name in self.pairs if name not in self.found]

    @property
    def pages(self) -> int:
        return -(-len(self.pairs) // self.page_size)

    def page(self, number: int) -> list[str]:
        return list(self.pairs[number * self.page_size : (number + 1) * self.page_size])

    def next_page(self) -> int | None:
        """The first page with an open pair; None where every pair has its verdict."""
        return next((n for n in range(self.pages) if any(p not in self.found for p in self.page(n))), None)

    def decide(self, pairs: Sequence[str], accept: bool, why: str = "") -> None:
        """One click. RunError where the disk is full: then nothing has changed."""
        if pairs:
            self._write({"pairs": list(pairs), "verdict": ACCEPT if accept else REJECT, "why": why})

    def accept_rest(self, number: int) -> None:
        """Accepts the pairs of a page that have no verdict yet: a page without fault is one key."""
        self.decide([name for name in self.page(number) if name not in self.found], True)

    def undo(self) -> None:
        """Takes the last click back, and then the one before it; what it said of a pair earlier holds again."""
        if self.found:
            self._write({"pairs": [], "verdict": UNDO, "why": ""})

    def _write(self, line: Mapping) -> None:
        text = json.dumps({**line, "time": round(time.time(), 1)}, ensure_ascii=False) + "\n"
        before = self.path.stat().st_size if self.path.exists() else 0
        with full_disk_is_said(self.path):
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                os.truncate(self.path, before)
                raise
        self.found = verdicts(self.folder, self.reviewer)

    def _close_line(self) -> None:
        """Cuts off what a crash left of a line, so that the next one does not continue it."""
        if self.path.exists() and (content := self.path.read_bytes()) and not content.endswith(b"\n"):
            os.truncate(self.path, content.rfind(b"\n") + 1)

    def page_of(self, pair: str) -> int:
        return list(self.pairs).index(pair) // self.page_size

    def pace(self) -> float | None:
        """Pairs an hour: by the median time between clicks, so that a break does not count."""
        lines = [line for line in _lines(self.path) if line["verdict"] != UNDO]
        if len(lines) < 2:
            return None
        between = np.median(np.diff([line["time"] for line in lines]))
        return float(np.mean([len(line["pairs"]) for line in lines]) * 3600 / max(between, 0.1))


KEYS = "1234567890-="  # of a page's pairs
REASONS = dict(zip("itmgqo", WHY, strict=True))
HELP = (
    "**1 2 3 …** reject a pair, or accept it after all · **space** accept the rest and turn the page · **u** undo · "
    "**b**, **n** page back, on · why: " + ", ".join(f"**{key}** {why}" for key, why in REASONS.items())
)


@dataclass
class Desk:
    """A reviewer at work: the page that lies open, the reason that rejections get, and what each key does."""

    review: Review
    page: int = field(init=False)
    why: str = WHY[0]

    def __post_init__(self) -> None:
        if self.review.page_size > len(KEYS):
            raise RunError(
                f"a page of {self.review.page_size} pairs has more than there are keys ({len(KEYS)}): lower it"
            )
        first = self.review.next_page()
        self.page = self.review.pages - 1 if first is None else first

    @property
    def shown(self) -> list[str]:
        return self.review.page(self.page)

    def press(self, key: str) -> None:
        """One key; one without a meaning is passed over."""
        if key in KEYS and KEYS.index(key) < len(self.shown):
            self.toggle(self.shown[KEYS.index(key)])
        elif key in REASONS:
            self.why = REASONS[key]
        elif key == " ":
            self.review.accept_rest(self.page)
            following = self.review.next_page()
            self.page = self.page if following is None else following
        elif key == "u":
            self._undo()
        elif key in ("b", "n"):
            self.page = min(max(self.page + (1 if key == "n" else -1), 0), self.review.pages - 1)

    def toggle(self, pair: str) -> None:
        """Rejects a pair for the reason that is set; accepts one that is rejected."""
        accepted, _ = self.review.found.get(pair, (True, ""))
        self.review.decide([pair], not accepted, "" if not accepted else self.why)

    def _undo(self) -> None:
        """And turns to the page where something changed."""
        before = dict(self.review.found)
        self.review.undo()
        if moved := [pair for pair in self.review.pairs if before.get(pair) != self.review.found.get(pair)]:
            self.page = self.review.page_of(moved[0])


# --- Several reviewers ---


def agreed(folder: Path) -> dict[str, Verdict]:
    """One verdict for each pair that anybody reviewed: accepted by more than half of those who did."""
    found: dict[str, list[Verdict]] = {}
    for name in reviewers(folder):
        for pair, verdict in verdicts(folder, name).items():
            found.setdefault(pair, []).append(verdict)
    return {pair: _majority(given) for pair, given in found.items()}


def _majority(given: Sequence[Verdict]) -> Verdict:
    accepted = 2 * sum(accept for accept, _ in given) > len(given)
    return accepted, "" if accepted else next(why for accept, why in given if not accept)


def agreement(folder: Path) -> pd.DataFrame:
    """How far reviewers agree beyond chance: Cohen's κ of each two, and Fleiss' of all where there are more.

    Over the pairs that all of a row's reviewers have a verdict of: `pairs`, the share `agree`, and `kappa`.
    """
    by = {name: verdicts(folder, name) for name in reviewers(folder)}
    groups = list(combinations(by, 2)) + ([tuple(by)] if len(by) > 2 else [])
    rows = []
    for group in groups:
        shared = sorted(set.intersection(*(set(by[name]) for name in group)))
        votes = np.array([[by[name][pair][0] for name in group] for pair in shared], bool).reshape(len(shared), -1)
        same = (votes.all(1) | ~votes.any(1)).mean() if shared else np.nan
        kappa = cohen_kappa(votes[:, 0], votes[:, 1]) if len(group) == 2 else fleiss_kappa(votes)
        rows.append({"reviewers": ", ".join(group), "pairs": len(shared), "agree": same, "kappa": kappa})
    return pd.DataFrame(rows, columns=["reviewers", "pairs", "agree", "kappa"])


def cohen_kappa(first: np.ndarray, second: np.ndarray) -> float:
    """Agreement of two reviewers (N,) bool beyond what their own shares of acceptance would give (Cohen, 1960).

    NaN where it says nothing: no pair in common, or both always said the same one thing.
    """
    if not len(first):
        return float("nan")
    a, b = first.mean(), second.mean()
    by_chance = a * b + (1 - a) * (1 - b)
    return _beyond_chance((first == second).mean(), by_chance)


def fleiss_kappa(votes: np.ndarray) -> float:
    """Agreement of n reviewers, votes (N, n) of bool, beyond what their common share of acceptance would give.

    Fleiss (1971). NaN as of `cohen_kappa`.
    """
    if not len(votes):
        return float("nan")
    number, accepted = votes.shape[1], votes.sum(1)
    rejected = number - accepted
    agree = (accepted * (accepted - 1) + rejected * (rejected - 1)) / (number * (number - 1))
    share = votes.mean()
    return _beyond_chance(agree.mean(), share**2 + (1 - share) ** 2)


def _beyond_chance(found: float, by_chance: float) -> float:
    return float("nan") if by_chance == 1 else float((found - by_chance) / (1 - by_chance))
