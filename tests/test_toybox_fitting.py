"""The recipe's training loop: its schedule by hand, and that interruptions leave no trace in the weights."""

import math

import pytest
import torch
from torch import nn

from focusdpo_lib.toybox.fitting import fit, learning_rate

WEIGHTS = torch.tensor([[1.0, -2.0, 3.0]])


class Killed(Exception):
    pass


def run(folder, steps=12, die_at=None, broken_at=None, **options):
    """Fits a line with two optimizers; returns (weights, curve, steps that were computed)."""
    torch.manual_seed(0)
    modules = nn.ModuleDict({"line": nn.Linear(3, 1)})
    optimizers = [torch.optim.AdamW([modules["line"].weight], lr=0.1), torch.optim.SGD([modules["line"].bias], lr=0.01)]
    computed = []

    def loss_at(step):
        if step == die_at:
            raise Killed
        computed.append(step)
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        loss = (modules["line"](x) - x @ WEIGHTS.T).square().mean()
        return loss * (math.nan if step == broken_at else 1), {"step_again": step}

    options = {"save_every_s": 0.0, "log_every": 2} | options
    curve = fit("line", modules, optimizers, loss_at, steps, folder, **options)
    return torch.cat([p.detach().flatten() for p in modules.parameters()]), curve, computed


def test_the_schedule_warms_up_stays_and_falls_to_zero_on_half_a_cosine():
    def rate(step):
        return learning_rate(step, 1000, 2.0, warmup=100, decay_from=0.5)

    assert rate(0) == pytest.approx(2.0 / 100)
    assert rate(49) == pytest.approx(1.0)
    assert rate(99) == rate(300) == rate(500) == 2.0
    assert rate(750) == pytest.approx(1.0)  # cos(π/2) = 0
    assert rate(625) == pytest.approx(1 + math.cos(math.pi / 4))
    assert rate(1000) == pytest.approx(0.0)


def test_every_optimizer_follows_the_schedule_from_its_own_peak(tmp_path, monkeypatch):
    seen = []
    original = torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD, "step", lambda self, *a: (seen.append(self.param_groups[0]["lr"]), original(self, *a))
    )
    for decay_from in (0.5, 0.8):
        seen.clear()
        run(tmp_path / str(decay_from), steps=40, decay_from=decay_from)
        assert seen == [pytest.approx(learning_rate(step, 40, 0.01, decay_from=decay_from)) for step in range(40)]


@pytest.mark.parametrize("die_at", [1, 4, 7, 11])
def test_a_run_that_was_killed_ends_with_the_same_bits_and_curve(tmp_path, die_at):
    expected, expected_curve, _ = run(tmp_path / "unbroken")
    with pytest.raises(Killed):
        run(tmp_path / "killed", die_at=die_at)
    weights, curve, computed = run(tmp_path / "killed")
    assert computed[0] == die_at // 2 * 2  # the last checkpoint: one every two steps
    assert torch.equal(weights, expected)
    assert curve == expected_curve


def test_a_finished_fit_returns_at_once_with_its_weights(tmp_path):
    expected, expected_curve, _ = run(tmp_path)
    weights, curve, computed = run(tmp_path)
    assert computed == []
    assert torch.equal(weights, expected)
    assert curve == expected_curve


def test_the_curve_holds_means_over_the_steps_since_the_last_entry(tmp_path):
    _, curve, _ = run(tmp_path, log_every=4)
    assert [entry["step"] for entry in curve] == [4, 8, 12]
    assert [entry["step_again"] for entry in curve] == [1.5, 5.5, 9.5]
    assert curve[-1]["loss"] < curve[0]["loss"]


def test_a_finished_run_of_another_number_of_steps_is_refused(tmp_path):
    run(tmp_path, steps=4)
    with pytest.raises(
        ValueError, match="holds a run of 4 steps, not 6, whose learning rate has begun to fall: delete"
    ):
        run(tmp_path, steps=6)


def test_a_run_can_be_made_longer_while_its_learning_rate_has_not_begun_to_fall(tmp_path):
    expected, _, _ = run(tmp_path / "unbroken")
    with pytest.raises(Killed):
        run(tmp_path / "longer", steps=8, die_at=4)
    weights, _, computed = run(tmp_path / "longer")
    assert computed[0] == 4
    assert torch.equal(weights, expected)


def test_a_loss_that_is_no_number_ends_the_fit_and_keeps_the_checkpoint(tmp_path):
    with pytest.raises(RuntimeError, match="the loss of line is nan at step 5"):
        run(tmp_path, broken_at=5)
    _, _, computed = run(tmp_path)
    assert computed[0] == 4


def test_a_disk_that_fills_up_leaves_the_last_whole_checkpoint(tmp_path, monkeypatch):
    save, calls = torch.save, []

    def full_at_the_third(state, path):
        calls.append(1)
        if len(calls) == 3:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", full_at_the_third)
    with pytest.raises(RuntimeError, match="no space left to write"):
        run(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["line.checkpoint"]
    _, _, computed = run(tmp_path)
    assert computed[0] == 4
