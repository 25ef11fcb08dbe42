"""Where a row wins, as a forest plot (notebooks 04 and 05): the table of `evaluation.wins` in, a Figure out."""

import re

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from focusdpo_lib.evaluation.tables import METRICS
from focusdpo_lib.evaluation.wins import LEVEL, SUBJECT
from focusdpo_lib.plots.style import WIDTH, subplots

MORE, LESS, NEITHER = "#0072B2", "#D55E00", "#666666"  # Okabe and Ito's
GAP = 0.8  # between two groups, in lines


def forest(table: pd.DataFrame, row: str, base: str) -> Figure:
    """A panel a score, a line a kind or subject, from the largest difference of the first score down.

    Filled marks are differences after the correction for the number of lines in all panels; a triangle points to the
    row that has more.
    """
    metrics = list(dict.fromkeys(table["metric"]))
    places = _places(table[table["metric"] == metrics[0]])
    height = max(places.values()) + 1
    figure, axes = subplots(1, len(metrics), (WIDTH, 1.3 + 0.2 * height), sharey=True)
    for axis, metric in zip(axes[0], metrics, strict=True):
        for entry in table[table["metric"] == metric].to_dict("records"):
            _mark(axis, places[entry["by"], entry["name"]], entry)
        axis.axvline(0, color=NEITHER, ls=":", lw=1, zorder=0)
        axis.set(title=METRICS[metric], xlabel=f"{row} − {base}")
        axis.locator_params(axis="x", nbins=4)
    names = [_plain(name) for _, name in places]
    axes[0, 0].set(yticks=list(places.values()), yticklabels=names, ylim=(height - 0.3, -0.7))
    counts = [(table["adjusted"] <= LEVEL).sum(), len(table)]
    figure.suptitle(
        f"{counts[0]} of {counts[1]} differences are filled: distinguishable at a false discovery rate of {LEVEL:.0%} "
        "(Benjamini and Hochberg); bars are 95 % intervals of each alone",
        size="small",
    )
    return figure


def _places(table: pd.DataFrame) -> dict[tuple[str, str], float]:
    """Where each line stands: kinds first, then subjects, each group from the largest difference to the smallest."""
    groups = sorted(dict.fromkeys(table["by"]), key=lambda by: by == SUBJECT)
    places, at = {}, 0.0
    for by in groups:
        for name in table[table["by"] == by].sort_values("value", ascending=False)["name"]:
            places[by, name] = at
            at += 1
        at += GAP
    return places


def _mark(axis: Axes, place: float, entry: dict) -> None:
    found = entry["adjusted"] <= LEVEL
    colour = (MORE if entry["value"] > 0 else LESS) if found else NEITHER
    style = {"color": colour, "fmt": (">" if entry["value"] > 0 else "<") if found else "o", "ms": 5, "capsize": 2}
    error = [[entry["value"] - entry["low"]], [entry["high"] - entry["value"]]]
    axis.errorbar(entry["value"], place, xerr=error, mfc=colour if found else "white", lw=1, **style)


def _plain(name: str) -> str:
    return re.sub(r"\s*\+\s*", " + ", name).replace("$", r"\$")
