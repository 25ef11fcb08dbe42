"""One look for every figure, and what figures share: colours, sizes, axes, pictures."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, which readers with any colour vision tell apart.
OBJECTIVE_COLOURS = {
    **{"base": "#666666", "sft": "#56B4E9", "dpo": "#E69F00"},
    **{"patchdpo": "#CC79A7", "focusdpo": "#0072B2"},
}
SUBJECT_COLOURS = ("#E69F00", "#56B4E9", "#CC79A7", "#009E73")
BRANCH_COLOURS = {"structure": "#0072B2", "fused": "#E69F00"}
SCORE_MAP, WEIGHT_MAP = "cividis", "viridis"  # of S, and of everything between 0 and 1
WIDTH = 10.0  # inches: a notebook's column


def use_style() -> None:
    """One look for every figure and table; call it once, at the top of a notebook."""
    pd.set_option("display.html.use_mathjax", False)  # a prompt may speak of dollars
    sns.set_theme(context="notebook", style="ticks", palette="colorblind", font_scale=0.8)
    plt.rcParams.update(
        {
            "figure.dpi": 100,
            **{"savefig.dpi": 150, "savefig.bbox": "tight"},
            **{"axes.spines.top": False, "axes.spines.right": False},
            "axes.titlesize": "medium",
            "image.interpolation": "nearest",
        }
    )


def subplots(rows: int, columns: int, size: tuple[float, float], **options) -> tuple[Figure, np.ndarray]:
    """`plt.subplots` in the kit's layout: axes always (rows, columns), the figure let go of by pyplot."""
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)
    plt.close(figure)
    return figure, axes


def pictures(pixels) -> list[np.ndarray]:
    """Pixels, a torch tensor (B, 3, H, W) in [-1, 1], as uint8 images (H, W, 3)."""
    return list(((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())


def bare(axis: Axes, title: str = "") -> Axes:
    """An axis for a picture: no ticks, no frame."""
    axis.set(xticks=[], yticks=[], title=title)
    sns.despine(ax=axis, left=True, bottom=True)
    return axis


def literal(text: str) -> str:
    """A text of the user's own for a figure, letter by letter: between two dollars matplotlib reads mathematics."""
    return text.replace("$", r"\$")
