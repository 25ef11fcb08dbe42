"""Eq. 1, Eq. 10, SFT and PatchDPO against closed forms, NumPy in float64 and each other's limits."""

import math

import numpy as np
import pytest
import torch

from focusdpo_lib import objectives
from focusdpo_lib.objectives import (
    errors_outside,
    flow_weight,
    patch_quality,
    patchdpo_loss,
    preference_loss,
    sft_loss,
)

SHAPE = (3, 4, 6, 5)
NAMES = ("policy_win", "policy_lose", "reference_win", "reference_lose", "target_win", "target_lose")


def pair(seed=0, dtype=torch.float32):
    """The six predictions and targets of a batch of three pairs."""
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(SHAPE, generator=draw).to(dtype) for name in NAMES}


def focus_map(seed=9):
    return torch.rand(SHAPE[0], *SHAPE[2:], generator=torch.Generator().manual_seed(seed))


def swapped(tensors):
    exchange = {"win": "lose", "lose": "win"}
    return {f"{kind}_{exchange[side]}": t for kind, side, t in ((*name.split("_"), t) for name, t in tensors.items())}


def numpy_margin(tensors, element_weights, beta, reduction):
    """−½ β Δ of Eq. 10 in float64; `element_weights` (B, 1, h, w) multiplies squared errors."""
    values = {name: t.double().numpy() for name, t in tensors.items()}
    weights = np.broadcast_to(element_weights, SHAPE)
    divisor = {"sum": 1, "mean": np.prod(SHAPE[1:]), "masked_mean": weights.sum((1, 2, 3))}[reduction]

    def error(model, side):
        squared = (values[f"target_{side}"] - values[f"{model}_{side}"]) ** 2
        return (squared * weights).sum((1, 2, 3)) / divisor

    delta = error("policy", "win") - error("reference", "win") - error("policy", "lose") + error("reference", "lose")
    return -0.5 * beta * delta


# --- Eq. 10 as printed, and its switches ---


@pytest.mark.parametrize("reduction", ["mean", "sum", "masked_mean"])
@pytest.mark.parametrize("mask_power", [1, 2])
def test_the_loss_is_eq_10_for_every_reduction_and_mask_power(reduction, mask_power):
    tensors, focus = pair(), focus_map()
    result = preference_loss(**tensors, focus=focus, beta=0.7, mask_power=mask_power, reduction=reduction)
    margin = numpy_margin(tensors, focus.double().numpy()[:, None] ** mask_power, 0.7, reduction)
    np.testing.assert_allclose(result.margin, margin, rtol=2e-4, atol=1e-5)
    assert result.loss.item() == pytest.approx(np.logaddexp(0, -margin).mean(), rel=1e-4)
    np.testing.assert_array_equal(result.accuracy, margin > 0)


def test_every_part_is_the_error_that_enters_the_margin():
    tensors = pair()
    result = preference_loss(**tensors, focus=focus_map(), beta=3.0)
    parts = result.parts
    assert list(parts) == ["policy_win", "policy_lose", "reference_win", "reference_lose"]
    delta = parts["policy_win"] - parts["reference_win"] - (parts["policy_lose"] - parts["reference_lose"])
    torch.testing.assert_close(result.margin, -1.5 * delta)
    squared = (tensors["policy_lose"] - tensors["target_lose"]) ** 2 * focus_map()[:, None] ** 2
    torch.testing.assert_close(parts["policy_lose"], squared.mean((1, 2, 3)))


def test_the_mask_stands_inside_the_norm_so_one_half_weighs_a_quarter_as_printed_and_a_half_with_power_one():
    tensors = pair()
    plain = preference_loss(**tensors, beta=1.0)
    half = torch.full((SHAPE[0], *SHAPE[2:]), 0.5)
    printed = preference_loss(**tensors, focus=half, beta=1.0)
    linear = preference_loss(**tensors, focus=half, beta=1.0, mask_power=1)
    torch.testing.assert_close(printed.margin, plain.margin / 4)
    torch.testing.assert_close(linear.margin, plain.margin / 2)


def test_a_binary_mask_weighs_the_same_for_either_mask_power():
    tensors, focus = pair(), (focus_map() > 0.5).float()
    first = preference_loss(**tensors, focus=focus, beta=1.0, mask_power=1)
    assert torch.equal(first.margin, preference_loss(**tensors, focus=focus, beta=1.0, mask_power=2).margin)


def test_reductions_differ_by_the_number_of_elements_and_by_the_mass_of_the_mask():
    tensors = pair()
    focus = torch.zeros(SHAPE[0], *SHAPE[2:])
    focus[:, :3, :2] = 1  # 6 of 30 positions
    margin = {
        reduction: preference_loss(**tensors, focus=focus, beta=1.0, reduction=reduction).margin
        for reduction in ("mean", "sum", "masked_mean")
    }
    torch.testing.assert_close(margin["sum"], margin["mean"] * 4 * 30)
    torch.testing.assert_close(margin["masked_mean"], margin["mean"] * 30 / 6)


def test_masked_mean_divides_by_the_weights_so_a_constant_mask_cancels():
    tensors, half = pair(), torch.full((SHAPE[0], *SHAPE[2:]), 0.5)
    plain = preference_loss(**tensors, beta=1.0)
    constant = preference_loss(**tensors, focus=half, beta=1.0, reduction="masked_mean")
    torch.testing.assert_close(constant.margin, plain.margin)


def test_beta_scales_the_margin():
    tensors = pair()
    torch.testing.assert_close(
        preference_loss(**tensors, beta=6.0).margin, 3 * preference_loss(**tensors, beta=2.0).margin
    )


# --- Limits ---


@pytest.mark.parametrize("reduction", ["mean", "sum", "masked_mean"])
def test_a_focus_of_ones_is_dpo_to_the_last_bit(reduction):
    losses, gradients = [], []
    for focus in (None, torch.ones(SHAPE[0], *SHAPE[2:])):
        tensors = pair()
        policy = tensors["policy_win"].requires_grad_()
        loss = preference_loss(**tensors, focus=focus, beta=5.0, reduction=reduction).loss
        losses.append(loss)
        gradients.append(torch.autograd.grad(loss, policy)[0])
    assert torch.equal(*losses) and torch.equal(*gradients)


@pytest.mark.parametrize("reduction", ["mean", "sum", "masked_mean"])
def test_a_policy_equal_to_the_reference_has_loss_log_2_and_accuracy_one_half(reduction):
    tensors = pair()
    tensors |= {"policy_win": tensors["reference_win"], "policy_lose": tensors["reference_lose"]}
    result = preference_loss(**tensors, focus=focus_map(), beta=5000.0, reduction=reduction)
    assert result.loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert result.accuracy.tolist() == [0.5] * 3


@pytest.mark.parametrize("reduction", ["mean", "sum", "masked_mean"])
def test_a_focus_of_zeros_has_loss_log_2_and_no_gradient(reduction):
    tensors = pair()
    for name in ("policy_win", "policy_lose"):
        tensors[name].requires_grad_()
    result = preference_loss(**tensors, focus=torch.zeros(3, 6, 5), beta=5000.0, reduction=reduction)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert tensors["policy_win"].grad.abs().sum() == tensors["policy_lose"].grad.abs().sum() == 0


def test_swapping_winner_and_loser_flips_the_margin():
    tensors = pair()
    there, back = (preference_loss(**t, focus=focus_map(), beta=2.0) for t in (tensors, swapped(tensors)))
    assert torch.equal(there.margin, -back.margin) and torch.equal(there.accuracy, 1 - back.accuracy)
    # −log σ(m) and −log σ(−m) differ by m.
    torch.testing.assert_close(back.loss - there.loss, there.margin.mean())


def test_nothing_outside_the_focus_reaches_the_loss():
    tensors, focus = pair(), torch.zeros(3, 6, 5)
    focus[:, 2:4] = 0.7
    before = preference_loss(**tensors, focus=focus, beta=2.0).loss
    for name in ("policy_win", "reference_lose", "target_win"):
        tensors[name][:, :, 4:] += 100
    assert torch.equal(preference_loss(**tensors, focus=focus, beta=2.0).loss, before)


def test_the_loss_falls_as_the_winner_is_predicted_better_and_as_the_loser_is_predicted_worse():
    tensors = pair()
    base = preference_loss(**tensors, beta=1.0).loss
    better = tensors | {"policy_win": tensors["policy_win"].lerp(tensors["target_win"], 0.5)}
    worse = tensors | {"policy_lose": tensors["policy_lose"].lerp(tensors["target_lose"], -0.5)}
    assert preference_loss(**better, beta=1.0).loss < base
    assert preference_loss(**worse, beta=1.0).loss < base


def test_the_gradient_in_one_dimension_is_the_one_derived_by_hand():
    # Winner: ε = 1, policy p = 0.4, reference 0.2; loser: ε = −1, policy q = 0.1, reference 0.5; M = 0.5, β = 3.
    p, q = torch.tensor(0.4, requires_grad=True), torch.tensor(0.1, requires_grad=True)
    cell = [torch.tensor(v) for v in (0.2, 0.5, 1.0, -1.0)]
    inputs = [x.reshape(1, 1, 1, 1) for x in (p, q, *cell)]
    loss = preference_loss(*inputs, focus=torch.full((1, 1, 1), 0.5), beta=3.0).loss
    loss.backward()
    # Δ = ¼ [(0.36 − 0.64) − (1.21 − 2.25)] = 0.19, margin = −1.5 · 0.19 = −0.285.
    # dL/dp = σ(−margin) · ½ β · ¼ · 2 (p − 1); dL/dq = −σ(−margin) · ½ β · ¼ · 2 (q + 1).
    sigma = 1 / (1 + math.exp(-0.285))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(0.285)), rel=1e-6)
    assert p.grad.item() == pytest.approx(sigma * 1.5 * 0.25 * 2 * (0.4 - 1), rel=1e-5)
    assert q.grad.item() == pytest.approx(-sigma * 1.5 * 0.25 * 2 * (0.1 + 1), rel=1e-5)


# --- Numerics and shapes ---


def test_bf16_predictions_are_compared_in_fp32_even_under_autocast():
    tensors = pair(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = preference_loss(**tensors, focus=focus_map().bfloat16(), beta=10.0)
    assert result.loss.dtype == result.margin.dtype == torch.float32
    margin = numpy_margin(tensors, focus_map().bfloat16().double().numpy()[:, None] ** 2, 10.0, "mean")
    np.testing.assert_allclose(result.margin, margin, rtol=1e-4, atol=1e-5)


def test_extreme_margins_give_finite_losses_and_gradients():
    tensors = pair()
    tensors["policy_win"].requires_grad_()
    result = preference_loss(**tensors, beta=1e6, reduction="sum")
    result.loss.backward()
    assert torch.isfinite(result.loss) and torch.isfinite(tensors["policy_win"].grad).all()


def test_the_reference_model_and_the_focus_receive_no_gradient_and_only_the_loss_has_one():
    tensors, focus = pair(), focus_map().requires_grad_()
    for tensor in tensors.values():
        tensor.requires_grad_()
    result = preference_loss(**tensors, focus=focus, beta=1.0)
    result.loss.backward()
    assert tensors["policy_win"].grad is not None and tensors["policy_lose"].grad is not None
    assert tensors["reference_win"].grad is None and tensors["reference_lose"].grad is None and focus.grad is None
    assert not any(x.requires_grad for x in (result.margin, result.accuracy, *result.parts.values()))


def test_a_focus_is_one_map_a_sample_or_broadcasts_to_the_predictions():
    tensors, focus = pair(), focus_map()
    base = preference_loss(**tensors, focus=focus, beta=1.0, reduction="masked_mean")
    for same in (focus[:, None], focus[:, None].expand(SHAPE)):
        assert torch.equal(preference_loss(**tensors, focus=same, beta=1.0, reduction="masked_mean").loss, base.loss)


def test_unfit_shapes_and_unknown_switches_are_named_in_the_error():
    tensors = pair()
    with pytest.raises(ValueError, match=r"weight map of .* does not fit predictions"):
        preference_loss(**tensors, focus=torch.ones(3, 3, 3), beta=1.0)
    with pytest.raises(ValueError, match="differ in shape"):
        preference_loss(**tensors | {"target_win": torch.zeros(3, 4, 1, 1)}, beta=1.0)
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, masked_mean"):
        preference_loss(**tensors, beta=1.0, reduction="none")
    with pytest.raises(ValueError, match="mask_power must be 2"):
        preference_loss(**tensors, beta=1.0, mask_power=3)
    with pytest.raises(ValueError, match="one number a sample"):
        preference_loss(**tensors, beta=1.0, weight=torch.ones(3, 1))


# --- The flow weight ---


def test_the_epsilon_weight_turns_velocity_errors_into_noise_errors():
    draw = torch.Generator().manual_seed(0)
    clean, noise, guess = (torch.randn(SHAPE, generator=draw) for _ in range(3))
    t = torch.tensor([0.1, 0.5, 0.9])
    time = t.reshape(-1, 1, 1, 1)
    noised, velocity = (1 - time) * clean + time * noise, noise - clean
    # The noise that a predicted velocity implies, from x_t = (1−t) x_0 + t ε and v = ε − x_0.
    guessed_noise = noised + (1 - time) * guess
    errors = sft_loss(guess, velocity, weight=flow_weight(t, "epsilon")).parts["policy_win"]
    torch.testing.assert_close(errors, (noise - guessed_noise).square().mean((1, 2, 3)))


def test_the_velocity_weight_changes_nothing():
    tensors, t = pair(), torch.tensor([0.0, 0.4, 1.0])
    plain = preference_loss(**tensors, beta=1.0)
    assert torch.equal(preference_loss(**tensors, beta=1.0, weight=flow_weight(t, "velocity")).loss, plain.loss)


def test_a_sample_weight_scales_that_samples_margin():
    tensors, weight = pair(), torch.tensor([1.0, 0.25, 0.0])
    plain = preference_loss(**tensors, focus=focus_map(), beta=1.0)
    weighted = preference_loss(**tensors, focus=focus_map(), beta=1.0, weight=weight)
    torch.testing.assert_close(weighted.margin, plain.margin * weight)


def test_flow_times_in_thousands_are_refused():
    with pytest.raises(ValueError, match=r"flow times lie in \[0, 1\]; got 3 to 999"):
        flow_weight(torch.tensor([3.0, 999.0]), "epsilon")
    with pytest.raises(ValueError, match="kind must be velocity or epsilon"):
        flow_weight(torch.tensor([0.5]), "sigma")


# --- SFT ---


def test_sft_is_the_mean_squared_error_of_the_winner():
    tensors = pair()
    prediction = tensors["policy_win"].requires_grad_()
    result = sft_loss(prediction, tensors["target_win"])
    expected = torch.nn.functional.mse_loss(prediction, tensors["target_win"])
    torch.testing.assert_close(result.loss, expected)
    gradients = (torch.autograd.grad(loss, prediction)[0] for loss in (result.loss, expected))
    torch.testing.assert_close(*gradients)
    assert result.margin is None and result.accuracy is None
    weighted = sft_loss(prediction, tensors["target_win"], weight=torch.tensor([2.0, 0.0, 0.0]))
    torch.testing.assert_close(weighted.loss, result.parts["policy_win"][0] * 2 / 3)


# --- PatchDPO ---


def patchdpo_inputs():
    tensors = pair()
    order = ("policy_win", "policy_lose", "target_win", "target_lose")
    return [tensors[name] for name in order]


def test_patchdpo_is_the_weighted_mean_over_the_joint_batch_without_a_sigmoid():
    inputs, maps = patchdpo_inputs(), (focus_map(1), focus_map(2))
    prediction, target = (
        np.concatenate([x.numpy() for x in inputs[:2]]),
        np.concatenate([x.numpy() for x in inputs[2:]]),
    )
    weights = np.concatenate([1 - maps[0].numpy(), maps[1].numpy()])[:, None]
    expected = ((prediction - target) ** 2 * weights).mean()
    result = patchdpo_loss(*inputs, *maps)
    assert result.loss.item() == pytest.approx(expected, rel=1e-5)
    assert list(result.parts) == ["reference_image", "generated"] and result.margin is None


def test_patchdpo_learns_nothing_from_reproduced_reference_patches_and_from_bad_generated_patches():
    inputs, full = patchdpo_inputs(), torch.ones(3, 6, 5)
    nothing = patchdpo_loss(*inputs, full, 0 * full)
    only_reference = patchdpo_loss(*inputs, 0 * full, 0 * full)
    only_generated = patchdpo_loss(*inputs, full, full)
    assert nothing.loss.item() == 0
    torch.testing.assert_close(only_reference.loss, (inputs[0] - inputs[2]).square().mean() / 2)
    torch.testing.assert_close(only_generated.loss, (inputs[1] - inputs[3]).square().mean() / 2)


def test_patchdpo_weighs_squared_errors_linearly_and_samples_by_their_weight():
    inputs, ones = patchdpo_inputs(), torch.ones(3, 6, 5)
    whole, half = patchdpo_loss(*inputs, ones, ones), patchdpo_loss(*inputs, ones, ones / 2)
    torch.testing.assert_close(half.loss, whole.loss / 2)
    weighted = patchdpo_loss(*inputs, 0 * ones, ones, weight=torch.tensor([0.0, 0.0, 3.0]))
    plain = patchdpo_loss(*inputs, 0 * ones, ones)
    expected = (plain.parts["reference_image"][2] + plain.parts["generated"][2]) * 3 / 6
    torch.testing.assert_close(weighted.loss, expected)


def test_patch_quality_is_the_cosine_of_the_best_fitting_reference_patch():
    generated = torch.tensor([[[2.0, 0, 0], [1, 1, 0], [0, 0, -5]]])
    reference = torch.tensor([[[7.0, 0, 0], [0, 0, 1]]])
    torch.testing.assert_close(patch_quality(generated, reference), torch.tensor([[1.0, 0.5**0.5, 0.0]]))
    # The other way round: was a patch of the reference reproduced? The second was not.
    torch.testing.assert_close(patch_quality(reference, generated), torch.tensor([[1.0, 0.0]]))
    # An opposite patch is as bad as an unrelated one: a negative weight would reward its error.
    assert patch_quality(generated[:, 2:], reference[:, 1:]).item() == 0


def test_patch_quality_of_a_shuffled_image_is_one_everywhere():
    features = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))
    shuffled = features[:, torch.randperm(16, generator=torch.Generator().manual_seed(1))]
    torch.testing.assert_close(patch_quality(features, 3 * shuffled), torch.ones(2, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quality = patch_quality(features.bfloat16(), shuffled.bfloat16())
    torch.testing.assert_close(quality, torch.ones(2, 16), atol=1e-5, rtol=0)


def test_every_objective_can_be_trained():
    """Ten steps on a free prediction lower each loss, through the one return type."""
    tensors, ones = pair(), torch.ones(3, 6, 5)
    fixed = [tensors[name] for name in NAMES[2:]]
    targets = fixed[2:]
    recipes = {
        "SFT": lambda win, lose: sft_loss(win, targets[0]),
        "DPO": lambda win, lose: preference_loss(win, lose, *fixed, beta=10.0),
        "FocusDPO": lambda win, lose: preference_loss(win, lose, *fixed, focus_map(), beta=10.0),
        "PatchDPO": lambda win, lose: patchdpo_loss(win, lose, *targets, ones / 2, ones / 2),
    }
    for name, recipe in recipes.items():
        predictions = [tensors[key].clone().requires_grad_() for key in NAMES[:2]]
        optimizer = torch.optim.Adam(predictions, lr=0.01)
        first = recipe(*predictions)
        assert isinstance(first, objectives.Objective)
        for _ in range(10):
            optimizer.zero_grad()
            recipe(*predictions).loss.backward()
            optimizer.step()
        assert recipe(*predictions).loss < first.loss, name


def test_errors_outside_the_focus_are_means_over_what_the_loss_does_not_see():
    target = torch.zeros(2, 1, 1, 3)
    policy, reference = torch.tensor([[1.0, 2, 3], [1, 1, 1]]), torch.tensor([[1.0, 1, 1], [2, 2, 2]])
    focus = torch.tensor([[0.5, 0, 0], [1, 1, 1.0]])  # of the first sample two places, of the second none
    found = errors_outside(policy.view(2, 1, 1, 3), reference.view(2, 1, 1, 3), target, focus.view(2, 1, 3))
    assert found["outside_policy"].tolist() == [(4 + 9) / 2, 0]
    assert found["outside_reference"].tolist() == [1, 0]
