"""The signs of a failing training, each from a log that has it and one that has not."""

import pandas as pd
import pytest
import torch
from tiny_training import load_tiny, tiny_pairs

from focusdpo_lib import params
from focusdpo_lib.training import prepare
from focusdpo_lib.training.signs import failure_signs, flat_detail


def log(steps=20, **columns):
    """A sound log of a FocusDPO training, 2 pairs a step; columns given as a value or as (first, last)."""
    sound = {
        "hit": 0.8,
        "chance": 0.2,
        "branch": ["structure", "fused"] * steps,
        "margin": (0.0, 1.0),
        "policy_win": (1.0, 0.99),
        "policy_lose": (1.0, 1.2),
        "reference_win": 1.0,
        "reference_lose": 1.0,
        "outside_policy": (1.0, 1.05),
        "outside_reference": 1.0,
    }
    table = pd.DataFrame({"step": [i // 2 for i in range(2 * steps)]})
    for name, value in (sound | columns).items():
        if isinstance(value, tuple):
            first, last = value
            value = first + (last - first) * table["step"] / (steps - 1)
        table[name] = value
    return table


def test_a_sound_log_has_no_sign():
    assert failure_signs(log()) == []


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"hit": 0.25}, "correspondence tells nothing: M' hits 0.25 of the subjects' tokens, chance 0.20"),
        ({"branch": "fused"}, "coverage was never above τ"),
        ({"outside_policy": (1.0, 1.5)}, "what lies outside M drifts: there the winner's error is 1.4"),
        ({"policy_win": (1.0, 1.4)}, "margins grow, but the winner's error is 1.3"),
    ],
)
def test_each_sign_is_said_in_one_sentence_with_what_to_do(columns, sentence):
    (found,) = failure_signs(log(**columns))
    assert found.startswith(sentence) and "\n" not in found


def test_a_rising_error_without_a_rising_margin_is_not_that_sign():
    assert failure_signs(log(policy_win=(1.0, 1.4), margin=(0.0, -1.0))) == []


def test_logs_of_objectives_without_masks_or_losers_are_read_too():
    assert failure_signs(log().drop(columns=["hit", "chance", "branch", "outside_policy", "outside_reference"])) == []
    assert failure_signs(log()[["step", "policy_win"]]) == []


def test_flat_detail_is_seen_before_the_first_step(tiny_flux):
    data = prepare(load_tiny(tiny_flux), tiny_pairs(2), params.Masks())
    assert flat_detail(data) is None
    flat = {count: pairs.__class__(**vars(pairs) | {"detail": torch.full_like(pairs.detail, 0.5)})
            for count, pairs in data.items()}  # fmt: skip
    assert "M_d is flat inside the subjects of 100% of the pairs" in flat_detail(flat)
