"""Figures of the chain of Figure 4 (notebook 01): what drafts score, and pages as reviewers see them."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from focusdpo_lib.plots.masks import show
from focusdpo_lib.plots.style import OBJECTIVE_COLOURS, WIDTH, bare, literal, subplots

LIMIT = "#D55E00"


def score_distributions(scores: pd.DataFrame, limits: Mapping[str, float | None]) -> Figure:
    """A histogram for each column of `scores`, with its limit, where there is one, as a line."""
    columns = 3
    rows = -(-scores.shape[1] // columns)
    figure, axes = subplots(rows, columns, (WIDTH, 2.1 * rows))
    for axis, name in zip(axes.flat, [*scores, *[None] * (axes.size - scores.shape[1])], strict=True):
        if name is None:
            axis.set_visible(False)
            continue
        axis.hist(scores[name], bins=30, color=OBJECTIVE_COLOURS["focusdpo"])
        axis.set(xlabel=name, ylabel="drafts")
        if (limit := limits.get(name)) is not None:
            axis.axvline(limit, color=LIMIT, lw=1.5)
            axis.set_title(f"limit {limit:g}", color=LIMIT)
    return figure


def review_page(strips: Sequence[np.ndarray], titles: Sequence[str], columns: int = 3) -> Figure:
    """Pictures (h, w, 3) of a page's pairs (references, winner, loser), each under its title."""
    rows = -(-len(strips) // columns)
    figure, axes = subplots(rows, columns, (WIDTH, 1.15 * rows))
    for i, axis in enumerate(axes.flat):
        bare(axis)
        if i < len(strips):
            show(axis, strips[i], strips[i].shape, literal(titles[i]))
    return figure
