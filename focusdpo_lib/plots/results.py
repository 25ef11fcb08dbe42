"""The figures of training and results (notebooks 03, 04 and 05). Tables in, matplotlib Figures out."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from focusdpo_lib.evaluation.benchmark import Benchmark, Case, open_image
from focusdpo_lib.evaluation.rows import FAMILIES, OBJECTIVES, ROWS, family
from focusdpo_lib.generation import IMAGES, image_name
from focusdpo_lib.plots.style import BRANCH_COLOURS, OBJECTIVE_COLOURS, SUBJECT_COLOURS, WIDTH, bare, literal, subplots

DASHES = {"sft": ":", "dpo": "--", "patchdpo": "-.", "focusdpo": "-"}  # a second mark beside the colour
MARKERS = {"base": "o", "sft": "v", "dpo": "s", "patchdpo": "^", "focusdpo": "D"}
ANCHOR = "#000000"
BASE_LINE = {"color": OBJECTIVE_COLOURS["base"], "ls": ":", "lw": 1, "zorder": 0}
SMALLEST_SPAN = 0.01  # of a score's axis
GAP = 0.6  # between two families, in rows of a chart or widths of a sample
ERRORS = {  # columns of a log: label, colour, dash
    "policy_win": ("winner, policy", OBJECTIVE_COLOURS["focusdpo"], "-"),
    "reference_win": ("winner, reference model", OBJECTIVE_COLOURS["focusdpo"], ":"),
    "policy_lose": ("loser, policy", OBJECTIVE_COLOURS["dpo"], "-"),
    "reference_lose": ("loser, reference model", OBJECTIVE_COLOURS["dpo"], ":"),
    "reference_image": ("winner, patches the loser lacks", OBJECTIVE_COLOURS["focusdpo"], "-"),
    "generated": ("loser, patches the winner has", OBJECTIVE_COLOURS["dpo"], "--"),
}


# --- Training (notebook 03): logs are `steps.csv`, a row a pair and step ---


def per_step(log: pd.DataFrame, columns: Sequence[str], window: int = 25) -> pd.DataFrame:
    """The mean over the pairs of every step, then over a running window of steps (fewer at the beginning)."""
    return log.groupby("step")[list(columns)].mean().rolling(window, min_periods=1).mean()


def training_curves(logs: Mapping[str, pd.DataFrame], window: int = 25) -> Figure:
    """Loss, margin, implicit accuracy and how far the policy moved from the reference model; {objective: log}.

    Each is a running mean over `window` steps. A loss is divided by its own first window: units differ.
    """
    figure, axes = subplots(2, 2, (WIDTH, 6), sharex=True)
    for name, log in logs.items():
        curve = per_step(log, [c for c in log if log[c].dtype.kind == "f"], window)
        style = {"color": OBJECTIVE_COLOURS[name], "label": OBJECTIVES[name], "lw": 1.8}
        start = curve["loss"].iloc[min(window, len(curve)) - 1]
        axes[0, 0].plot(curve["loss"] / start, ls=DASHES[name], **style)
        if "margin" in curve:
            axes[0, 1].plot(curve["margin"], ls=DASHES[name], **style)
            axes[1, 0].plot(curve["accuracy"], ls=DASHES[name], **style)
            for image, dash, which in (("win", "-", "winner"), ("lose", ":", "loser")):
                change = 100 * (curve[f"policy_{image}"] / curve[f"reference_{image}"] - 1)
                axes[1, 1].plot(change, ls=dash, **(style | {"label": f"{OBJECTIVES[name]}, {which}"}))
    titles = (
        ("loss, relative to its first steps", "loss / loss at the start"),
        ("margin (argument of log σ)", "margin"),
        ("implicit accuracy", "share of pairs ranked right"),
        ("error of the policy against the reference model", "change of the squared error (%)"),
    )
    for axis, (title, label) in zip(axes.flat, titles, strict=True):
        axis.set(title=title, ylabel=label)
        if axis.lines:
            axis.legend(fontsize="small", frameon=False)
    axes[1, 0].set_ylim(0, 1.02)
    for axis, level in ((axes[0, 1], 0), (axes[1, 0], 0.5), (axes[1, 1], 0)):
        _level(axis, level)
    for axis in axes[1]:
        axis.set_xlabel("step")
    return figure


def timestep_bins(log: pd.DataFrame, bins: int = 10) -> pd.DataFrame:
    """The log with `bin`, the middle of each pair's timestep bin on [0, 1]."""
    place = (log["t"] * bins).astype(int).clip(0, bins - 1)
    return log.assign(bin=(place + 0.5) / bins)


def training_by_timestep(log: pd.DataFrame, bins: int = 10) -> Figure:
    """The errors in the loss, implicit accuracy (DPO, FocusDPO) and coverage and branch of Eq. 9 (FocusDPO), by t."""
    by = timestep_bins(log, bins).groupby("bin")
    ranked, focus = "accuracy" in log, "coverage" in log
    figure, axes = subplots(1, 1 + ranked + 2 * focus, (WIDTH if ranked else WIDTH / 2, 3.4))
    for column, (label, colour, dash) in ERRORS.items():
        if column in log:
            axes[0, 0].plot(by[column].mean(), ls=dash, color=colour, label=label)
    axes[0, 0].set(title="error, as in the loss", ylabel="weighted squared error")
    _legend_below(axes[0, 0])
    if ranked:
        accuracy = by["accuracy"].mean()
        axes[0, 1].bar(accuracy.index, accuracy, 0.8 / bins, color=OBJECTIVE_COLOURS["focusdpo"])
        axes[0, 1].set(title="implicit accuracy", ylabel="share of pairs ranked right", ylim=(0, 1.02))
        _level(axes[0, 1], 0.5)
    if focus:
        _focus_by_timestep(axes[0, 2], axes[0, 3], by, bins)
    for axis in axes[0]:
        axis.set(xlabel="timestep $t$", xlim=(0, 1))
    return figure


def _focus_by_timestep(left: Axes, right: Axes, by, bins: int) -> None:
    """Coverage (mean, middle half) on the left, shares of Eq. 9's branches on the right."""
    coverage = by["coverage"]
    left.plot(coverage.mean(), marker="o", ms=4, color=BRANCH_COLOURS["structure"])
    low, high = coverage.quantile(0.25), coverage.quantile(0.75)
    left.fill_between(low.index, low, high, color=BRANCH_COLOURS["structure"], alpha=0.2, lw=0)
    left.set(title="coverage", ylabel="$A_{focus}$, middle half shaded", ylim=(0, 1.02))
    structure = by["branch"].agg(lambda taken: (taken == "structure").mean())
    width = 0.8 / bins
    right.bar(structure.index, structure, width, color=BRANCH_COLOURS["structure"], label="$M = M_s$")
    fused = {"color": BRANCH_COLOURS["fused"], "hatch": "//", "label": "fused"}
    right.bar(structure.index, 1 - structure, width, structure, **fused)
    right.set(title="branch of Eq. 9", ylabel="share of pairs", ylim=(0, 1.02))
    _legend_below(right)


def branches_over_training(log: pd.DataFrame, window: int = 25) -> Figure:
    """Hit rate, coverage and the share of pairs in the structure branch of Eq. 9, step by step (running means)."""
    figure, axes = subplots(1, 1, (WIDTH, 2.6))
    shares = log.assign(structure=(log["branch"] == "structure").astype(float))
    taken = per_step(shares, ["hit", "chance", "coverage", "structure"], window)
    axis = axes[0, 0]
    axis.plot(taken["hit"], color=SUBJECT_COLOURS[3], label="hit rate of $M'$")
    axis.plot(taken["chance"], color="black", ls=":", label="its chance level")
    axis.plot(taken["coverage"], color=OBJECTIVE_COLOURS["focusdpo"], label="coverage $A_{focus}$")
    axis.plot(taken["structure"], color=OBJECTIVE_COLOURS["dpo"], ls="--", label="share of pairs with $M = M_s$")
    axis.set(xlabel="step", ylabel="share", ylim=(0, 1.02))
    axis.legend(fontsize="small", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


# --- Results (notebooks 04 and 05) ---


def sample_grid(
    benchmark: Benchmark, folders: Mapping[str, Path], cases: Sequence[Case], labels: Mapping[str, str] | None = None
) -> Figure:
    """A case a row: its references, then one image of every row of `folders` (generation runs), all of one seed.

    A gap stands before each family.
    """
    labels = labels or {}
    count = len(cases[0].references)
    numbers = [f"reference {i + 1}" if count > 1 else "reference" for i in range(count)]
    titles = [*numbers, *(labels.get(row, ROWS.get(row, row)) for row in folders)]
    families = [None] * count + [family(row) for row in folders]
    widths = [part for n in range(len(titles)) for part in ([GAP / 3] if _begins(families, n) else []) + [1]]
    step = min(WIDTH / sum(widths), 1.7)
    size = (step * sum(widths), len(cases) * (step + 0.2) + 0.3)
    figure, axes = subplots(len(cases), len(widths), size, gridspec_kw={"width_ratios": widths})
    for n, (case, line) in enumerate(zip(cases, axes, strict=True)):
        for axis in line[[width < 1 for width in widths]]:
            axis.set_visible(False)
        shown = line[[width == 1 for width in widths]]
        pictures = [*case.references, *(Path(f) / IMAGES / image_name(case, 0) for f in folders.values())]
        for axis, picture, title in zip(shown, pictures, titles, strict=True):
            bare(axis).imshow(np.asarray(open_image(picture)))
            axis.set_title("" if n else literal(_broken(title)), size="medium" if step > 1 else "small")
        shown[0].set_xlabel(" ")  # the height of the prompt, which is wider than its column and must not widen it
        prompt = {"transform": shown[0].transAxes, "va": "top", "in_layout": False}
        shown[0].text(0, -0.05, literal(f"“{case.prompt}”"), **prompt)
    return figure


def intervals(result: pd.DataFrame, columns: Sequence[str] | None = None) -> Figure:
    """Every row's mean with its 95 % interval, a panel a column of the table; each family's dotted line is its base."""
    return _estimates(result, columns, ("value", "low", "high"))


def differences(result: pd.DataFrame, columns: Sequence[str] | None = None) -> Figure:
    """Paired difference of every adapter from its base with its 95 % interval; hollow where the interval holds 0."""
    kept = result[result["difference"].notna()]
    return _estimates(kept, columns, ("difference", "difference_low", "difference_high"), from_base=True)


def _estimates(result: pd.DataFrame, columns, names: Sequence[str], from_base: bool = False) -> Figure:
    """A panel a column, a line a row, families apart: a mark, its interval, and a dotted line at the family's base."""
    columns = list(columns or dict.fromkeys(result["column"]))
    places = _places(result[result["column"].isin(columns)])
    across = min(len(columns), 4)
    down = -(-len(columns) // across)
    height = max(places.values()) + 1
    figure, axes = subplots(down, across, (WIDTH, down * (0.9 + 0.32 * height)), sharey=True)
    for axis, column in zip(axes.flat, columns, strict=False):
        of = result[result["column"] == column]
        for entry in of.to_dict("records"):
            value, low, high = (entry[name] for name in names)
            style = _style(_key(entry["row"]), "|") | ({"mfc": "white"} if from_base and low <= 0 <= high else {})
            axis.errorbar(value, places[entry["row"]], xerr=[[value - low], [high - value]], ms=6, capsize=3, **style)
        if from_base:
            axis.axvline(0, **BASE_LINE)
        for base in of[of["row"] == of["family"]].to_dict("records"):
            own = [places[row] for row in of.loc[of["family"] == base["family"], "row"]]
            axis.vlines(base["value"], min(own) - 0.5, max(own) + 0.5, **BASE_LINE)
        axis.set(title=column, yticks=list(places.values()), yticklabels=list(places), ylim=(height - 0.4, -0.6))
        _widen(axis)
    for axis in axes.flat[len(columns) :]:
        axis.set_visible(False)
    return figure


def _widen(axis: Axes) -> None:
    """At least SMALLEST_SPAN, so that differences of rounding errors look as small as they are."""
    left, right = axis.get_xlim()
    if right - left < SMALLEST_SPAN:
        axis.set_xlim((left + right - SMALLEST_SPAN) / 2, (left + right + SMALLEST_SPAN) / 2)
    axis.locator_params(axis="x", nbins=3)


def _places(result: pd.DataFrame) -> dict[str, float]:
    """Where each row stands, from the top: one apart, and a gap before every family."""
    rows = result.drop_duplicates("row")
    gaps = np.cumsum([_begins(list(rows["family"]), n) for n in range(len(rows))])
    return {row: n + GAP * gap for n, (row, gap) in enumerate(zip(rows["row"], gaps, strict=True))}


def attribute_accuracy(table: pd.DataFrame) -> Figure:
    """Share of images with each attribute right, with 95 % intervals: a panel a family, attributes along x, a mark a
    row; rows without a family, the oracle above all, stand in every panel."""
    names, rows = list(dict.fromkeys(table["attribute"])), list(dict.fromkeys(table["row"]))
    families = [name for name in FAMILIES if any(family(row) == name for row in rows)]
    figure, axes = subplots(1, len(families), (WIDTH, 3.4), sharey=True)
    for axis, of in zip(axes[0], families, strict=True):
        mine = [row for row in rows if family(row) in ("", of)]
        for n, row in enumerate(mine):
            line = table[table["row"] == row].set_index("attribute").loc[names]
            at = np.arange(len(names)) + 0.7 * ((n + 0.5) / len(mine) - 0.5)
            error = [line["value"] - line["low"], line["high"] - line["value"]]
            label = ROWS.get(row, row).replace(" (", "\n(")
            axis.errorbar(at, line["value"], yerr=error, capsize=2, ms=7, label=label, **_style(row, "_"))
        axis.set(xticks=range(len(names)), xticklabels=[n.removesuffix("_name") for n in names], ylim=(0, 1.02))
        axis.set_title(FAMILIES[of])
        axis.legend(fontsize="small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
    axes[0, 0].set_ylabel("share of images read right")
    return figure


def _key(label: str) -> str:
    """The row's key behind the label that a table shows."""
    return next((key for key, shown in ROWS.items() if shown == label), label)


def _style(row: str, anchor: str) -> dict[str, str]:
    """Colour and mark of a row by its key: the same for an objective in every family, `anchor` the mark of anchors."""
    name = "base" if row in FAMILIES else row.partition("_")[2] if family(row) else ""
    return {"color": OBJECTIVE_COLOURS.get(name, ANCHOR), "fmt": MARKERS.get(name, anchor)}


def _begins(families: Sequence[str | None], n: int) -> bool:
    """Whether the n-th is the first of a family, with something before it."""
    return n > 0 and bool(families[n]) and families[n] != families[n - 1]


def _broken(title: str) -> str:
    """A title on two lines: "UNO" over "+SFT", "oracle" over "(real renders)"."""
    return title.replace(" (", "\n(").replace("+", "\n+")


def _legend_below(axis: Axes) -> None:
    axis.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.22), frameon=False)


def _level(axis: Axes, value: float) -> None:
    axis.axhline(value, color="#999999", ls=":", lw=1, zorder=0)
