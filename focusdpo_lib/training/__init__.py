"""Algorithm 1: from preference pairs to an adapter, in one process or many, resumable at any moment."""

from focusdpo_lib.training.checkpoints import CHECKPOINT, LOG
from focusdpo_lib.training.loop import (
    ADAPTER,
    Draw,
    TrainingError,
    draw_timesteps,
    draw_view_noise,
    draws,
    focus_masks,
    generator,
    log_rows,
    new_optimizer,
    new_tap,
    noised_views,
    step_objective,
    train,
)
from focusdpo_lib.training.pairs import PreparedPairs, prepare, prepare_into
from focusdpo_lib.training.signs import failure_signs
