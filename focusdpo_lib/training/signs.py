"""Signs that a training does not do what it is for, read from its log: a loss that falls says nothing of them."""

import pandas as pd

from focusdpo_lib.masks import to_grid
from focusdpo_lib.training.pairs import PreparedPairs

ABOVE_CHANCE = 0.1  # of the way from chance to 1 that a hit rate should have come, at least
RISE = 1.02  # of the winner's error over the frozen model's
DRIFT = 1.1  # the same outside M, which the loss does not see
FLAT = 0.02  # standard deviation of M_d inside the subjects


def flat_detail(data: dict[int, PreparedPairs]) -> str | None:
    """Says so where M_d hardly varies inside the subjects of most pairs: detail then weighs every place alike."""
    spreads = []
    for pairs in data.values():
        inside = to_grid(pairs.prior_tokens.amax(1), pairs.token_grid, pairs.detail.shape[-2:])
        mean = (pairs.detail * inside).sum((1, 2)) / inside.sum((1, 2))
        variance = ((pairs.detail - mean[:, None, None]) ** 2 * inside).sum((1, 2)) / inside.sum((1, 2))
        spreads += variance.sqrt().tolist()
    flat = pd.Series(spreads) < FLAT
    if flat.mean() <= 0.5:
        return None
    return f"M_d is flat inside the subjects of {flat.mean():.0%} of the pairs: set a smaller masks.entropy_window"


def _ratio(log: pd.DataFrame, errors: str, of: str) -> float:
    return log[errors].sum() / max(log[of].sum(), 1e-12)


def failure_signs(log: pd.DataFrame) -> list[str]:
    """One sentence a sign, from the rows of a preference training's log (one a pair and step), none from another's."""
    found = []
    if "hit" in log:
        hit, chance = log["hit"].mean(), log["chance"].mean()
        if hit < chance + ABOVE_CHANCE * (1 - chance):
            found.append(
                f"correspondence tells nothing: M' hits {hit:.2f} of the subjects' tokens, chance {chance:.2f}, so the "
                "focus is a static mask: let notebook 02 grade other masks.layers and features"
            )
        if (log["branch"] == "fused").all():
            found.append(
                "coverage was never above τ, so M_s alone was never the focus: structure is ignored, lower masks.tau"
            )
    steps = log["step"].rank(pct=True)
    first, last = log[steps <= 0.2], log[steps > 0.8]
    if "outside_policy" in log and (drift := _ratio(last, "outside_policy", "outside_reference")) > DRIFT:
        found.append(
            f"what lies outside M drifts: there the winner's error is {drift:.2f} times the frozen model's, train "
            "fewer steps or raise objective.beta"
        )
    if "policy_lose" in log:
        rise = _ratio(last, "policy_win", "reference_win")
        if last["margin"].mean() > max(first["margin"].mean(), 0.0) and rise > RISE:
            found.append(
                f"margins grow, but the winner's error is {rise:.2f} times the frozen model's: the loser is only "
                "pushed away, lower training.learning_rate or raise objective.beta"
            )
    return found
