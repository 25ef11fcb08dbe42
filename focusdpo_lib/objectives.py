"""What is minimised: Eq. 1 (Diffusion-DPO) and Eq. 10 (FocusDPO), and the tables' other rows, SFT and PatchDPO.

Predictions and targets are (B, C, h, w) on the latent grid, ε or velocity, whatever the backbone predicts. All of it is
computed in fp32, whatever the inputs' dtype: the margin is a small difference of large errors.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

REDUCTIONS = ("mean", "sum", "masked_mean")


class Objective(NamedTuple):
    """What every objective returns; only `loss` carries a graph, the rest is for logs.

    loss      scalar
    parts     name -> (B,) squared errors of every sample, weighted and reduced as they enter the loss;
              a log may add more
    margin    (B,) the argument of log σ, −½ β Δ: positive where the policy ranks the pair right; None without a pair
    accuracy  (B,) 1 where margin > 0, ½ where it is exactly 0 (as in Diffusion-DPO's code), else 0; None without a pair
    """

    loss: Tensor
    parts: dict[str, Tensor]
    margin: Tensor | None = None
    accuracy: Tensor | None = None


def flow_weight(t: Tensor, kind: str) -> Tensor:
    """R14: the factor on a velocity's squared error, t (B,) in [0, 1] -> (B,).

    "velocity" leaves it alone. "epsilon" gives the error in ε: x_t = (1−t) x_0 + t ε and v = ε − x_0 make
    ε = x_t + (1−t) v, so ‖Δε‖² = (1−t)² ‖Δv‖².
    """
    if kind not in ("velocity", "epsilon"):
        raise ValueError(f"kind must be velocity or epsilon; got {kind!r}")
    if ((t < 0) | (t > 1)).any():
        raise ValueError(f"flow times lie in [0, 1]; got {t.min().item():g} to {t.max().item():g}")
    return torch.ones_like(t, dtype=torch.float32) if kind == "velocity" else (1 - t.float()).square()


def _squared_error(prediction, target):
    """(ε − ε_θ)², (B, C, h, w), fp32."""
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
    return (prediction.float() - target.float()).square()


def _element_weights(focus, like):
    """`focus` (B, h, w), or broadcastable to predictions, as fp32 weights of the shape of `like` (B, C, h, w)."""
    if focus is None:
        return torch.ones_like(like, dtype=torch.float32)
    focus = focus.detach().float()
    focus = focus.unsqueeze(1) if focus.ndim == 3 else focus
    try:
        return focus.expand(like.shape)
    except RuntimeError:
        raise ValueError(
            f"a weight map of {tuple(focus.shape)} does not fit predictions of {tuple(like.shape)}"
        ) from None


def _reduced(squared_error, element_weights, reduction, weight):
    """Weighted squared errors (B, C, h, w) to one number a sample, (B,), times the sample's own `weight` (B,)."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    total = (squared_error * element_weights).flatten(1).sum(1)
    if reduction == "mean":
        total = total / squared_error[0].numel()
    elif reduction == "masked_mean":
        # An all-zero mask has a zero numerator too: any positive divisor makes the term 0, as a mask of zeros should.
        mass = element_weights.flatten(1).sum(1)
        total = total / torch.where(mass > 0, mass, 1.0)
    if weight is None:
        return total
    if weight.shape != total.shape:
        raise ValueError(f"weight must be one number a sample, {tuple(total.shape)}; got {tuple(weight.shape)}")
    return total * weight.float()


def preference_loss(
    policy_win: Tensor,
    policy_lose: Tensor,
    reference_win: Tensor,
    reference_lose: Tensor,
    target_win: Tensor,
    target_lose: Tensor,
    focus: Tensor | None = None,
    *,
    beta: float,
    mask_power: int = 2,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Objective:
    """Eq. 10, FocusDPO; without `focus` (M ≡ 1) it is Eq. 1, Diffusion-DPO.

    policy_*, reference_*, target_*: (B, C, h, w), the policy's ε_θ, the frozen reference model's ε_ref, and ε.
    focus M: (B, h, w), or broadcastable to (B, C, h, w); the winner's, used for both images (R12).
    mask_power: 2 as printed, M inside the squared norm; 1 weights the squared error by M itself (R11).
    reduction: of ‖·‖² over a sample's elements (R13): `mean`, `sum` as printed, or `masked_mean`, which divides by the
    weights' sum Σ M^mask_power, so that a small subject counts as much as a large one.
    beta: β T ω(λ_t) in one constant, with Diffusion-DPO's ½. weight: (B,) factor on squared errors, see `flow_weight`.
    """
    if mask_power not in (1, 2):
        raise ValueError(f"mask_power must be 2 (printed) or 1; got {mask_power!r}")
    element_weights = _element_weights(focus, policy_win) ** mask_power

    def error(prediction, target):
        return _reduced(_squared_error(prediction, target), element_weights, reduction, weight)

    win, lose = error(policy_win, target_win), error(policy_lose, target_lose)
    # The reference model is frozen, whatever graph its predictions may have come with.
    frozen_win, frozen_lose = error(reference_win.detach(), target_win), error(reference_lose.detach(), target_lose)
    # Δ = ‖(ε^w − ε_θ) ⊙ M‖² − ‖(ε^w − ε_ref) ⊙ M‖² − (‖(ε^l − ε_θ) ⊙ M‖² − ‖(ε^l − ε_ref) ⊙ M‖²)
    delta = (win - frozen_win) - (lose - frozen_lose)
    margin = -0.5 * beta * delta
    parts = {"policy_win": win, "policy_lose": lose, "reference_win": frozen_win, "reference_lose": frozen_lose}
    accuracy = (margin.detach().sign() + 1) / 2
    return Objective(-F.logsigmoid(margin).mean(), _detached(parts), margin.detach(), accuracy)


def errors_outside(policy: Tensor, reference: Tensor, target: Tensor, focus: Tensor) -> dict[str, Tensor]:
    """Mean squared error of both models where the focus M is 0, name -> (B,): what the loss does not see drift.

    Predictions and target (B, C, h, w), focus (B, h, w); 0 where M is 0 nowhere.
    """
    outside = _element_weights(focus == 0, target)
    errors = {"outside_policy": policy, "outside_reference": reference}
    return {
        name: _reduced(_squared_error(prediction.detach(), target), outside, "masked_mean", None)
        for name, prediction in errors.items()
    }


def sft_loss(policy_win: Tensor, target_win: Tensor, *, weight: Tensor | None = None) -> Objective:
    """SFT: the backbone's own denoising loss on the winner alone, the mean of (ε^w − ε_θ)².

    policy_win, target_win (B, C, h, w); weight (B,) factor on squared errors, see `flow_weight`.
    """
    error = _reduced(_squared_error(policy_win, target_win), torch.ones_like(policy_win).float(), "mean", weight)
    return Objective(error.mean(), _detached({"policy_win": error}))


def patchdpo_loss(
    policy_reference_image: Tensor,
    policy_generated: Tensor,
    target_reference_image: Tensor,
    target_generated: Tensor,
    target_map: Tensor,
    quality_map: Tensor,
    *,
    weight: Tensor | None = None,
) -> Objective:
    """PatchDPO (Huang et al. 2025): mean((ε − ε_θ)² · w) over the batch [reference image; generated image].

    Predictions and targets (B, C, h, w); maps (B, h, w) in [0, 1]: w = 1 − target_map on the reference image, so it
    teaches where generation failed, and w = quality_map on the generated image, so its good patches are kept.
    weight (B,) as in `sft_loss`, the same for both images.

    Source: `train_patchdpo.py` and `data/subject_dataset.py` of github.com/hqhQAQ/PatchDPO (read in the mirror
    rfan-debug/PatchDPO). No log σ, no reference model, no negative sign anywhere; the mean runs over all elements and
    not over the weights' sum; t and ε are the same for both images. It reads both maps, already at latent resolution,
    from a file whose making is not released (its issue 5): `patch_quality` stands in for it.
    """
    real = _squared_error(policy_reference_image, target_reference_image)
    generated = _squared_error(policy_generated, target_generated)
    errors = {
        "reference_image": _reduced(real, _element_weights(1 - target_map, real), "mean", weight),
        "generated": _reduced(generated, _element_weights(quality_map, generated), "mean", weight),
    }
    return Objective(torch.cat(list(errors.values())).mean(), _detached(errors))


@torch.no_grad()
def patch_quality(generated_features: Tensor, reference_features: Tensor) -> Tensor:
    """PatchDPO's patch quality: the cosine of each generated patch with the reference patch that fits it best.

    generated_features (B, P_g, d), reference_features (B, P_r, d): patch tokens of a pre-trained vision encoder,
    without its class token; returns (B, P_g) in [0, 1], fp32, for `masks.to_grid`. Several references: concatenate
    their patches. Called the other way round, patch_quality(reference, generated), it says which of the reference's
    patches were reproduced: our reading of target_map. Simplified: PatchDPO first fine-tunes the encoder by a
    self-supervised task, and how it scales qualities is not public; negative cosines become 0 here, because a negative
    weight would leave the loss without a lower bound.
    """
    generated, reference = (F.normalize(x.float(), dim=-1) for x in (generated_features, reference_features))
    with torch.autocast(generated.device.type, enabled=False):
        return (generated @ reference.mT).amax(-1).clamp(0, 1)


def _detached(parts):
    return {name: value.detach() for name, value in parts.items()}
