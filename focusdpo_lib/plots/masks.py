"""The figures up to the masks (notebooks 00 to 02)."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from focusdpo_lib.plots.style import (
    BRANCH_COLOURS,
    SCORE_MAP,
    SUBJECT_COLOURS,
    WEIGHT_MAP,
    WIDTH,
    bare,
    literal,
    subplots,
)


def outline(axis: Axes, masks: np.ndarray, width: float = 1.5) -> None:
    """The edge of every subject's mask (S, H, W), over a picture whose extent is W × H."""
    for mask, colour in zip(masks, SUBJECT_COLOURS, strict=False):
        h, w = mask.shape
        padded = np.pad(mask.astype(float), 1)  # so that an edge at the border of the image is closed
        x, y = np.arange(-0.5, w + 1), np.arange(-0.5, h + 1)
        for line, stroke in (("black", width + 1.2), (colour, width)):
            axis.contour(x, y, padded, levels=[0.5], colors=[line], linewidths=stroke)
        axis.set(xlim=(0, w), ylim=(h, 0))


def show(axis: Axes, values: np.ndarray, size: Sequence[int], title: str = "", **options):
    """A picture or a map of any resolution, stretched over H × W = `size`, so that outlines fit on it."""
    bare(axis, title)
    return axis.imshow(values, extent=(0, size[1], size[0], 0), **options)


def image_grid(
    images: Sequence[np.ndarray],
    titles: Sequence[str] = (),
    columns: int = 5,
    row_labels: Sequence[str] = (),
    masks: Sequence[np.ndarray] = (),
    width: float = WIDTH,
) -> Figure:
    """Images (H, W, 3) row by row, the first with titles; `masks`, one (S, H, W) an image, outlines the subjects."""
    rows, lines = -(-len(images) // columns), [title.count("\n") + 1 for title in titles]
    above = sum(0.2 * max(lines[at : at + columns]) for at in range(0, len(titles), columns))
    figure, axes = subplots(rows, columns, (width, rows * width / columns + above))
    for i, axis in enumerate(axes.flat):
        bare(axis)
        if i < len(images):
            show(axis, images[i], images[i].shape, titles[i] if i < len(titles) else "")
        if i < len(masks):
            outline(axis, masks[i])
    for axis, label in zip(axes[:, 0], row_labels, strict=False):
        axis.set_ylabel(label, rotation=0, ha="right", va="center")
    return figure


def pipeline(stages: Sequence[tuple[str, str, str]]) -> Figure:
    """The stages of a reproduction as boxes with arrows between them: (name, what it makes, notebook)."""
    figure, axes = subplots(1, 1, (WIDTH, 1.7))
    axis, step = bare(axes[0, 0]), 1.0
    for i, (name, product, notebook) in enumerate(stages):
        axis.add_patch(FancyBboxPatch((i * step, 0), 0.74, 1, boxstyle="round,pad=0.04", fc="#EAF2F8", ec="#0072B2"))
        axis.text(i * step + 0.37, 0.76, name, ha="center", va="center", weight="bold")
        axis.text(i * step + 0.37, 0.4, product, ha="center", va="center", size="small")
        axis.text(i * step + 0.37, -0.22, notebook, ha="center", va="center", size="small", color="#555555")
        if i:
            ends = (i * step - 0.21, 0.5), (i * step - 0.05, 0.5)
            axis.add_patch(FancyArrowPatch(*ends, arrowstyle="-|>", mutation_scale=14, color="#0072B2"))
    axis.set(xlim=(-0.08, (len(stages) - 1) * step + 0.82), ylim=(-0.35, 1.1))
    return figure


# --- DIP (notebook 01) ---


def pair_gallery(pairs: Sequence) -> Figure:
    """One dip.dataset.Pair a row: its references, winner with M_prior, loser, and where the two differ."""
    count = max(len(pair.references) for pair in pairs)
    step = WIDTH / (count + 3.8)
    ratios = {"width_ratios": [*[0.6] * count, 1, 1, 1]}
    figure, axes = subplots(len(pairs), count + 3, (WIDTH, len(pairs) * (step * 1.1 + 0.3)), gridspec_kw=ratios)
    for row, pair in zip(axes, pairs, strict=True):
        for i, axis in enumerate(row[:count]):
            bare(axis)
            if i < len(pair.references):
                show(axis, pair.references[i], pair.references[i].shape, "reference" if pair is pairs[0] else "")
                axis.set_xlabel(literal(pair.subjects[i]))
        difference = np.abs(pair.win.astype(int) - pair.lose).max(-1)
        titles = ("winner, $M_{prior}$", "loser", "|winner − loser|")
        for axis, picture, title in zip(row[count:], (pair.win, pair.lose, difference), titles, strict=True):
            heat = show(
                axis, picture, pair.win.shape, title if pair is pairs[0] else "", cmap=WEIGHT_MAP, vmin=0, vmax=255
            )
        outline(row[count], pair.prior)
        outline(row[count + 2], pair.prior, 0.8)
        row[count].set_xlabel(literal(textwrap.fill(f"“{pair.prompt}”", 24)))
        row[count + 1].set_xlabel(literal(_disturbance(pair)))
    for axis, title in zip(axes[0, count:], ("winner, $M_{prior}$", "loser", "|winner − loser|"), strict=True):
        axis.set_title(title)
    figure.colorbar(heat, ax=axes[:, -1], shrink=0.6, aspect=30, label="largest difference of a channel (0–255)")
    return figure


def _disturbance(pair) -> str:
    """What made the loser, in words: as the toybox's pairs note it, or what the loser shows instead."""
    kind, strength = pair.disruption.get("kind"), pair.disruption.get("strength")
    if kind and isinstance(strength, int):
        return f"{kind} of {strength} attribute{'s' if strength > 1 else ''}"
    return textwrap.fill(textwrap.shorten(f"“{'; '.join(pair.disrupted_captions)}”", 72, placeholder=" …"), 24)


MOST = 8


def disruption_counts(rows: pd.DataFrame, changed: pd.Series) -> Figure:
    """How losers differ: pairs by kind and by strength (columns of `rows`), and the attributes that changed most.

    A captioner names attributes as it likes, so no more than MOST are shown.
    """
    figure, axes = subplots(1, 3, (WIDTH, 2.8))
    panels = (
        (rows["kind"].value_counts(), "kind of disturbance", "pairs"),
        (rows["strength"].value_counts().sort_index(), "strength (attributes a subject)", "pairs"),
        (changed.value_counts().head(MOST), "attribute that changed", "disturbed subjects"),
    )
    for axis, (counts, x, y) in zip(axes[0], panels, strict=True):
        axis.bar([str(name) for name in counts.index], counts.to_numpy(), color="#0072B2", width=0.6)
        axis.bar_label(axis.containers[0], size="small", padding=2)
        axis.set(xlabel=x, ylabel=y)
        axis.margins(y=0.12)
    return figure


# --- Masks (notebook 02) ---


class MaskRow(NamedTuple):
    """One row of `mask_gallery`, all of one sample with S subjects; maps on any grid."""

    label: str
    picture: np.ndarray  # (H, W, 3), shown first: the noised winner, say
    scores: np.ndarray  # (S, h, w), Eq. 3
    matched: np.ndarray  # (S, h, w), M'
    structure: np.ndarray  # (h, w), M_s
    detail: np.ndarray  # (h, w), M_d
    focus: np.ndarray  # (h, w), M
    coverage: float  # A_focus


def mask_gallery(
    rows: Sequence[MaskRow],
    prior: np.ndarray,
    subjects: Sequence[str],
    picture: str = "$x_t$",
    shared_scores: bool = True,
) -> Figure:
    """S and M' of every subject, M_s, M_d and M, a row each; the outlines are M_prior (S, H, W), given in pixels.

    All masks share one colour scale. So do the scores, unless each row's are of another unit (`shared_scores` off).
    """
    columns = 4 + 2 * len(subjects)
    step = min(WIDTH / (columns + 1), 1.4)
    figure, axes = subplots(len(rows), columns, (step * (columns + 1), len(rows) * (step + 0.25) + 0.7))
    everywhere = (min(row.scores.min() for row in rows), max(row.scores.max() for row in rows))
    scores = None
    for n, (row, line) in enumerate(zip(rows, axes, strict=True)):
        limits = everywhere if shared_scores else (row.scores.min(), row.scores.max())
        for axis, (title, values, outlined) in zip(line, _maps(row, prior, subjects, picture), strict=True):
            score = title.startswith("$S$")
            (low, high), colours = (limits, SCORE_MAP) if score else ((0, 1), WEIGHT_MAP)
            heat = show(axis, values, prior.shape[1:], "" if n else title, cmap=colours, vmin=low, vmax=high)
            scores = heat if score else scores
            outline(axis, outlined, 1.0)
        line[0].set_ylabel(row.label, rotation=0, ha="right", va="center")
        line[-3].set_xlabel(f"coverage {row.coverage:.2f}", labelpad=2)
    bars = {"location": "bottom", "aspect": 40, "pad": 0.02}
    label = "score $S$ (Eq. 3)"
    bar = figure.colorbar(scores, ax=axes[:, : columns // 2], label=label, **bars)
    if not shared_scores:
        bar.set_ticks(list(limits), labels=["lowest of its row", "highest of its row"])
        for text, side in zip(bar.ax.get_xticklabels(), ("left", "right"), strict=True):
            text.set_ha(side)
    figure.colorbar(heat, ax=axes[:, columns // 2 :], label="masks and weights", **bars)
    return figure


def _maps(row: MaskRow, prior: np.ndarray, subjects: Sequence[str], picture: str) -> list[tuple]:
    """The panels of one row, left to right: title, values, and the masks to outline on it."""
    maps = [(picture, row.picture, prior)]
    for i, name in enumerate(map(literal, subjects)):
        # The other subjects' masks are emptied, not left out: outlines keep their colours.
        own = prior * (np.arange(len(prior)) == i)[:, None, None]
        maps += [(f"$S$ {name}", row.scores[i], own), (f"$M'$ {name}", row.matched[i], own)]
    return [*maps, ("$M_s$", row.structure, prior), ("$M_d$", row.detail, prior), ("$M$", row.focus, prior)]


def token_grids(grids: Mapping[str, np.ndarray], digits: int = 2, unit: Sequence[float] | None = None) -> Figure:
    """Small maps {title: (h, w)} with every number written in its cell; `unit`: one colour range for all of them."""
    figure, axes = subplots(1, len(grids), (min(WIDTH, 2.2 * len(grids)), 2.4))
    for axis, (title, values) in zip(axes[0], grids.items(), strict=True):
        limits = dict(zip(("vmin", "vmax"), unit or (values.min(), values.max()), strict=True))
        text = f".{0 if np.array_equal(values, np.round(values)) else digits}f"
        sns.heatmap(
            values, ax=axis, annot=True, fmt=text, cmap=WEIGHT_MAP, cbar=False, square=True, linewidths=1,
            annot_kws={"size": 9}, xticklabels=False, yticklabels=False, **limits,
        )  # fmt: skip
        axis.set_title(title)
    return figure


def entropy_steps(image: np.ndarray, gray: np.ndarray, entropy: np.ndarray, detail: np.ndarray, window: int) -> Figure:
    """Eq. 7–8 on one image (H, W, 3): grey levels, patch entropy with the window drawn in, and M_d on the latent grid.

    The squares are the patches with the least and the most entropy.
    """
    figure, axes = subplots(1, 4, (WIDTH, 2.9))
    panels = (
        ("winner", image, {}),
        ("grey levels", gray, {"cmap": "gray", "vmin": 0, "vmax": 255}),
        (f"$C_p$, {window}×{window} patches", entropy, {"cmap": WEIGHT_MAP, "vmin": 0}),
        (f"$M_d$ on {detail.shape[0]}×{detail.shape[1]} latents", detail, {"cmap": WEIGHT_MAP, "vmin": 0, "vmax": 1}),
    )
    heats = [show(axis, x, image.shape, title, **how) for axis, (title, x, how) in zip(axes[0], panels, strict=True)]
    for heat, axis, label in zip(heats[1:], axes[0, 1:], ("level", "bits", "weight"), strict=True):
        figure.colorbar(heat, ax=axis, location="bottom", label=label, shrink=0.9)
    for colour, (y, x) in zip(SUBJECT_COLOURS, extreme_patches(entropy, window), strict=False):
        for axis in axes[0, :3]:
            corner = (x + 0.5 - window / 2, y + 0.5 - window / 2)
            for line, stroke in (("black", 3), (colour, 1.8)):
                axis.add_patch(plt.Rectangle(corner, window, window, fill=False, ec=line, lw=stroke))
    return figure


def extreme_patches(entropy: np.ndarray, window: int) -> list[tuple[int, int]]:
    """Centres (y, x) of the patches with the least and the most entropy (H, W), among those inside the image."""
    edge = window // 2
    inner = entropy[edge : entropy.shape[0] - edge, edge : entropy.shape[1] - edge]
    places = [np.unravel_index(f(inner), inner.shape) for f in (np.argmin, np.argmax)]
    return [(int(y) + edge, int(x) + edge) for y, x in places]


def coverage_by_timestep(rows: pd.DataFrame, tau: float) -> Figure:
    """A_focus against t and the share of pairs in each branch of Eq. 9, from columns t, subjects, coverage, chance.

    `chance` is the coverage that random scores would have, in the mean.
    """
    figure, axes = subplots(1, 2, (WIDTH, 3.4), width_ratios=[1.3, 1])
    left, right = axes[0]
    for (count, group), colour in zip(rows.groupby("subjects"), SUBJECT_COLOURS, strict=False):
        by = group.groupby("t")["coverage"]
        name = f"{count} subject{'s' if count > 1 else ''}"
        left.plot(by.mean().index, by.mean(), marker="o", color=colour, label=f"{name}: mean, middle half shaded")
        left.fill_between(by.mean().index, by.quantile(0.25), by.quantile(0.75), color=colour, alpha=0.2, lw=0)
        left.axhline(group["chance"].mean(), color=colour, ls=":", label=f"{name}: random scores")
    left.axhline(tau, color="black", ls="--", lw=1, label=f"τ = {tau:g}")
    left.set(xlabel="timestep $t$ (0 clean, 1 noise)", ylabel="focus coverage $A_{focus}$", ylim=(0, 1))
    left.legend(fontsize="small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    structure = rows.assign(share=rows["coverage"] > tau).groupby("t")["share"].mean()
    width = 0.7 * np.diff(structure.index).min() if len(structure) > 1 else 0.1
    right.bar(structure.index, structure, width, color=BRANCH_COLOURS["structure"], label="$M = M_s$")
    fused = "$M = γ M_s + (1−γ)\\, M_d ⊙ M_{prior}$"
    right.bar(structure.index, 1 - structure, width, structure, color=BRANCH_COLOURS["fused"], label=fused, hatch="//")
    right.set(xlabel="timestep $t$", ylabel="share of pairs in each branch", ylim=(0, 1))
    right.legend(fontsize="small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    return figure
