"""The figures of wrong masks (notebook 06): a pair with each error, and the curves of what the errors did."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from focusdpo_lib.plots.masks import outline, show
from focusdpo_lib.plots.style import WEIGHT_MAP, WIDTH, subplots

KIND_COLOURS = {"eroded": "#0072B2", "dilated": "#D55E00", "shifted": "#009E73", "wrong": "#CC79A7"}  # Okabe and Ito's
KIND_MARKERS = {"eroded": "v", "dilated": "^", "shifted": "s", "wrong": "X"}
EXACT = "#000000"
SMALLEST_SPAN = 0.04  # of a measure's axis


class ErrorRow(NamedTuple):
    """A pair with one error: its mean IoU in the label, the pictures (H, W, 3), masks (S, H, W) and M (h, w)."""

    label: str
    win: np.ndarray
    lose: np.ndarray
    masks: np.ndarray
    focus: np.ndarray


def error_gallery(columns: Sequence[Sequence[ErrorRow]], t: float) -> Figure:
    """Errors as rows; of every pair winner with the masks, loser, and the weight M at t with the exact masks' outlines.

    The first error of each pair is none: its masks are the exact ones.
    """
    count, pairs = len(columns[0]), len(columns)
    step = WIDTH / (3 * pairs + 1.2)
    figure, axes = subplots(count, 3 * pairs, (WIDTH, count * (step + 0.05) + 0.7))
    for n, rows in enumerate(columns):
        block = axes[:, 3 * n : 3 * n + 3]
        for row, line in zip(rows, block, strict=True):
            first, size = row is rows[0], row.win.shape[:2]
            show(line[0], row.win, size, "winner, masks" if first else "")
            show(line[1], row.lose, size, "loser" if first else "")
            heat = show(line[2], row.focus, size, f"$M$, t = {t:g}" if first else "", cmap=WEIGHT_MAP, vmin=0, vmax=1)
            outline(line[0], row.masks, 1.2)
            outline(line[2], rows[0].masks, 0.8)
            if n == 0:
                line[0].set_ylabel(row.label, rotation=0, ha="right", va="center")
    figure.colorbar(heat, ax=axes[:, -1], label="weight $M$", shrink=0.5, aspect=30)
    return figure


def error_curves(
    table: pd.DataFrame, measures: Mapping[str, str], base: Mapping[str, float], trainings: Mapping[str, str]
) -> Figure:
    """Measures against the masks' mean IoU, exact on the left: a line a kind of error through the mean of its seeds.

    table: a row a trial, with training, kind, amount, seed, iou and the columns that `measures` names, with labels.
    base: the level of measures before any training, where there is one. trainings: their names by the column's value;
    the first is drawn in full lines, the second dashed with hollow marks. Small dots are single seeds, the band is the
    range of those with exact masks.
    """
    across = 2 if len(measures) == 4 else min(3, len(measures))
    down = -(-len(measures) // across)
    figure, axes = subplots(down, across, (WIDTH, 2.75 * down + 0.7), sharex=True)
    for axis, (column, label) in zip(axes.flat, measures.items(), strict=False):
        if column in base:
            axis.axhline(base[column], color="#666666", ls=":", lw=1, zorder=0)
        for training, dash in zip(trainings, ("-", "--"), strict=False):
            _curves(axis, table[(table["training"] == training) & table[column].notna()], column, dash)
        low, high = axis.get_ylim()
        room = max(0, SMALLEST_SPAN - (high - low)) / 2  # what moves less than images do by chance shall look so
        axis.set(ylabel=label, xlim=(1.03, -0.03), ylim=(low - room, high + room))
    for axis in axes.flat[len(measures) :]:
        axis.set_axis_off()
    for axis in axes[-1]:
        axis.set_xlabel("mean IoU with the exact masks")
    drawn = [kind for kind in KIND_COLOURS if kind in set(table["kind"])]
    figure.legend(handles=_legend(drawn, trainings, bool(base)), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _curves(axis: Axes, rows: pd.DataFrame, column: str, dash: str) -> None:
    """One training's lines: each kind's begin at exact masks."""
    if rows.empty:
        return
    exact = rows[rows["kind"] == "exact"][column]
    full = dash == "-"
    if full and len(exact) > 1:
        axis.axhspan(exact.min(), exact.max(), color=EXACT, alpha=0.1, lw=0, zorder=0)
    for kind, group in rows[rows["kind"] != "exact"].groupby("kind"):
        means = group.groupby("iou")[column].mean().sort_index(ascending=False)
        colour = KIND_COLOURS[kind]
        face = {} if full else {"markerfacecolor": "white"}
        style = {"color": colour, "ls": dash, "marker": KIND_MARKERS[kind], "ms": 6, "lw": 1.5}
        axis.plot([1, *means.index], [exact.mean(), *means], markevery=slice(1, None), **style, **face)
        axis.plot(group["iou"], group[column], ls="", marker=".", ms=4, color=colour, alpha=0.6)
    axis.plot([1] * len(exact), exact, ls="", marker=".", ms=4, color=EXACT, alpha=0.6)
    axis.plot(1, exact.mean(), ls="", marker="o", ms=6, color=EXACT, markerfacecolor=EXACT if full else "white")


def _legend(kinds: Sequence[str], trainings: Mapping[str, str], base: bool) -> list[Line2D]:
    found = [Line2D([], [], ls="", marker="o", color=EXACT, label="exact (band: its seeds)")]
    found += [Line2D([], [], color=KIND_COLOURS[k], marker=KIND_MARKERS[k], label=k) for k in kinds]
    for (_, name), dash, face in zip(trainings.items(), ("-", "--"), (None, "white"), strict=False):
        more = {} if face is None else {"marker": "o", "markerfacecolor": face}
        found.append(Line2D([], [], color=EXACT, ls=dash, label=name, **more))
    return found + ([Line2D([], [], color="#666666", ls=":", lw=1, label="base")] if base else [])
