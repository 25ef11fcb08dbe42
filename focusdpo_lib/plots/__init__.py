"""Every figure of the kit.

Functions take plain arrays or tables and return a matplotlib Figure that pyplot has let go of: it appears where a
notebook names it as a cell's last line, once, and `figure.savefig` keeps it.
"""

from focusdpo_lib.plots.dip import review_page, score_distributions
from focusdpo_lib.plots.forest import forest
from focusdpo_lib.plots.grade import Moment, grade_curves, grade_heatmap, movement
from focusdpo_lib.plots.mask_errors import ErrorRow, error_curves, error_gallery
from focusdpo_lib.plots.masks import (
    MaskRow,
    coverage_by_timestep,
    disruption_counts,
    entropy_steps,
    extreme_patches,
    image_grid,
    mask_gallery,
    outline,
    pair_gallery,
    pipeline,
    token_grids,
)
from focusdpo_lib.plots.results import (
    attribute_accuracy,
    branches_over_training,
    differences,
    intervals,
    sample_grid,
    training_by_timestep,
    training_curves,
)
from focusdpo_lib.plots.style import (
    BRANCH_COLOURS,
    OBJECTIVE_COLOURS,
    SCORE_MAP,
    SUBJECT_COLOURS,
    WEIGHT_MAP,
    pictures,
    use_style,
)
