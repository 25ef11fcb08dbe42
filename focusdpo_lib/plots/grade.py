"""The figures of the focus that moves: the masks across timesteps, and the grade of Eq. 3 (notebook 02)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from focusdpo_lib.plots.masks import outline, show
from focusdpo_lib.plots.style import SUBJECT_COLOURS, WEIGHT_MAP, WIDTH, subplots

PRIORITY_COLOURS = {"high": "#CC3311", "low": "#0072B2"}  # the authors' red and blue, told apart by any reader


class Moment(NamedTuple):
    """One pair at one timestep; maps on any grid, of S subjects."""

    t: float
    picture: np.ndarray  # (H, W, 3), the noised winner
    matched: np.ndarray  # (S, h, w), M'
    structure: np.ndarray  # (h, w), M_s
    focus: np.ndarray  # (h, w), M
    enabled: bool  # whether M_d is


def movement(strips: dict[str, tuple[np.ndarray, np.ndarray, Sequence[Moment]]]) -> Figure:
    """Figure 3 of the paper, from noise to image: M' (low priority) grows, M_s (high) shrinks, M_d is enabled.

    strips: label → the winner (H, W, 3), M_prior (S, H, W) and its moments, noise first. Each is three rows: x_t; the
    masks over the winner; the weight M, with what became of M_d in words.
    """
    columns = max(len(moments) for *_, moments in strips.values())
    step = WIDTH / (columns + 0.9)
    figure, axes = subplots(3 * len(strips), columns, (WIDTH, len(strips) * (3 * step + 0.75) + 0.3))
    for n, (label, (winner, prior, moments)) in enumerate(strips.items()):
        block = axes[3 * n : 3 * n + 3]
        for column, moment in zip(block.T, moments, strict=True):
            heat = _moment(column, winner, prior, moment)
        for axis, words in zip(block[:, 0], (f"{label}\n\n$x_t$", "$M'$ and $M_s$", "weight $M$"), strict=True):
            axis.set_ylabel(words, rotation=0, ha="right", va="center")
    patches = [
        Patch(fc=PRIORITY_COLOURS["low"], label="$M'$ on its subject: low priority"),
        Patch(fc=_pale("low"), label="$M'$ elsewhere: a miss"),
        Patch(fc=PRIORITY_COLOURS["high"], label="$M_s$: high priority"),
    ]
    figure.legend(handles=patches, loc="outside upper center", ncols=3, frameon=False)
    figure.colorbar(heat, ax=axes[:, -1], label="weight $M$", shrink=0.4, aspect=40)
    return figure


def _pale(priority: str) -> tuple[float, ...]:
    return tuple(0.45 * value + 0.55 for value in to_rgb(PRIORITY_COLOURS[priority]))


def _moment(column: Sequence[Axes], winner: np.ndarray, prior: np.ndarray, moment: Moment):
    """The three panels of one timestep; returns the heat map of M."""
    size = winner.shape[:2]
    show(column[0], moment.picture, size, f"t = {moment.t:g}")
    grey = np.repeat(winner.mean(-1, keepdims=True), 3, -1) / 255 * 0.5 + 0.5
    show(column[1], grey, size)
    for mask, colour in _layers(prior, moment):
        painted = np.zeros((*mask.shape, 4))
        painted[..., :3], painted[..., 3] = colour, 0.85 * mask
        show(column[1], painted, size)
    heat = show(column[2], moment.focus, size, cmap=WEIGHT_MAP, vmin=0, vmax=1)
    for axis in column[1:]:
        outline(axis, prior, 1.0)
    column[2].set_xlabel("$M_d$ enabled" if moment.enabled else "$M_d$ disabled")
    return heat


def _layers(prior: np.ndarray, moment: Moment) -> list[tuple[np.ndarray, tuple]]:
    """Masks and their colours, the last on top: misses of M', its hits, and M_s."""
    h, w = moment.structure.shape
    cells = prior.reshape(len(prior), h, prior.shape[1] // h, w, prior.shape[2] // w).mean((2, 4)) >= 0.5
    hits = (moment.matched.astype(bool) & cells).any(0)
    misses = moment.matched.astype(bool).any(0) & ~hits
    return [
        (misses, _pale("low")),
        (hits, to_rgb(PRIORITY_COLOURS["low"])),
        (moment.structure > 0, to_rgb(PRIORITY_COLOURS["high"])),
    ]


def grade_heatmap(table: pd.DataFrame) -> Figure:
    """Hit rate of each layer, or set of layers, at each t; one panel a number of references, its chance in the title.

    table: the rows of `grade.grade` of one kind of features, reference tokens, pool and similarity.
    """
    counts = sorted(table["references"].unique())
    layers = table["layers"].nunique()
    figure, axes = subplots(1, len(counts), (WIDTH, 1.3 + 0.3 * layers))
    for axis, count in zip(axes[0], counts, strict=True):
        rows = table[table["references"] == count]
        values = rows.pivot_table(index="layers", columns="t", values="hit", sort=False)
        sns.heatmap(
            values, ax=axis, annot=layers <= 24, fmt=".2f", cmap=WEIGHT_MAP, vmin=0, vmax=1, cbar=count == counts[-1],
            annot_kws={"size": 8}, cbar_kws={"label": "hit rate of $M'$"},
        )  # fmt: skip
        title = f"{count} subject{'s' if count > 1 else ''} (chance {rows['chance'].mean():.2f})"
        axis.set(title=title, xlabel="timestep $t$", ylabel="layers" if count == counts[0] else "")
        axis.tick_params(axis="y", rotation=0)
    return figure


def grade_curves(table: pd.DataFrame) -> Figure:
    """Hit rate against t of several readings, with chance; one panel a number of references.

    table: rows of `grade.grade` with a column `reading`, the name of each in the legend.
    """
    counts = sorted(table["references"].unique())
    figure, axes = subplots(1, len(counts), (WIDTH, 3.2), sharey=True)
    for axis, count in zip(axes[0], counts, strict=True):
        rows = table[table["references"] == count]
        styles = zip(rows.groupby("reading", sort=False), ("#0072B2", *SUBJECT_COLOURS), "os^vD", strict=False)
        for (name, group), colour, marker in styles:
            axis.plot(group["t"], group["hit"], color=colour, marker=marker, label=name)
        axis.plot(rows["t"].unique(), rows.groupby("t")["chance"].mean(), color="black", ls=":", label="chance")
        axis.set(title=f"{count} subject{'s' if count > 1 else ''}", xlabel="timestep $t$ (noise on the left)")
        axis.set(ylim=(0, 1), xlim=(1, 0))
    axes[0, 0].set_ylabel("hit rate of $M'$")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure
