"""The run sheet: what came in to each stage and went out, why drafts fell out, how long it took and what it cost."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from focusdpo_lib.dip import drafts
from focusdpo_lib.dip.run import PLAN, times

USED = ("tokens", "dollars")  # what a stage may note of a draft in its provenance, under the stage's name


def run_sheet(folder: Path, stages: Sequence[str], decisions: pd.DataFrame | None = None) -> pd.DataFrame:
    """A row a stage of a chain's folder, and one of the curation whose `decisions` are given.

    Columns: came, out, dropped, why (the reasons, most frequent first), seconds (of all processes together, without
    what opening took), opening, rows a second, and the sums of USED where a stage noted them.
    """
    rows = [_row(folder, stage) for stage in (PLAN, *stages)]
    if decisions is not None:
        why = Counter(decisions["out"][decisions["out"] != ""])
        rows.append({"stage": "curation", **_counted(len(decisions), why)})
    sheet = pd.DataFrame(rows).set_index("stage")
    return sheet.dropna(axis=1, how="all")


def reasons(folder: Path, stages: Sequence[str], decisions: pd.DataFrame | None = None) -> pd.DataFrame:
    """Why drafts fell out: a row a stage and reason, with how many, the most frequent of a stage first."""
    found = [(stage, why, n) for stage in (PLAN, *stages) for why, n in _dropped(folder, stage).most_common()]
    if decisions is not None:
        out = decisions["out"][decisions["out"] != ""].value_counts()
        found += [("curation", why, n) for why, n in out.items()]
    return pd.DataFrame(found, columns=["stage", "why", "drafts"])


def _row(folder: Path, stage: str) -> dict:
    parts = drafts.parts(folder, stage)
    came = sum(drafts.length(path) for path in parts)
    row = {"stage": stage, **_counted(came, _dropped(folder, stage))}
    noted = [pd.read_csv(times(path)) for path in parts if times(path).exists()]
    if noted:
        spent = pd.concat(noted)[["came", "seconds", "opening"]].sum()
        row |= {"seconds": spent["seconds"], "opening": spent["opening"]}
        row["rows a second"] = spent["came"] / spent["seconds"] if spent["seconds"] else float("nan")
    return row | _used(folder, stage)


def _counted(came: int, why: Counter) -> dict:
    words = "; ".join(f"{reason} ({n})" for reason, n in why.most_common())
    return {"came": came, "out": came - why.total(), "dropped": why.total(), "why": words}


def _dropped(folder: Path, stage: str) -> Counter:
    return Counter(row["dropped"] for row in drafts.rows(folder, stage, ["dropped"]) if row["dropped"])


def _used(folder: Path, stage: str) -> dict[str, float]:
    """Sums of what the stage noted; a part at a time, since provenance may be long."""
    found: Counter[str] = Counter()
    for path in drafts.parts(folder, stage):
        for text in drafts.column(path, "provenance"):
            found.update(_numbers(drafts.notes(text).get(stage)))
    return dict(found)


def _numbers(noted: object) -> Iterable:
    return {name: noted[name] for name in USED if name in noted} if isinstance(noted, dict) else {}
