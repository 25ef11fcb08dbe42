"""Algorithm 1: what a step draws, computes and changes; what the log keeps; and that no kill leaves a trace."""

import math
import socket
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from scipy import stats
from tiny_training import TRAINING, adapter, assert_same_weights, child_train, load_tiny, tiny_train

from focusdpo_lib import grade, params
from focusdpo_lib.batch import warm
from focusdpo_lib.dip.dataset import DatasetError
from focusdpo_lib.masks import correspondence, detail_field, focus_field
from focusdpo_lib.runs import RunError
from focusdpo_lib.training import (
    ADAPTER,
    CHECKPOINT,
    LOG,
    Draw,
    TrainingError,
    draw_timesteps,
    draws,
    generator,
    log_rows,
    regions,
    step_objective,
    train,
)
from focusdpo_lib.training.loop import _gradients, _update
from focusdpo_lib.training.pairs import pixels, prepare

OBJECTIVES = ("sft", "dpo", "patchdpo", "focusdpo")
CHILDREN = warm.context  # imports once what every child needs


def read_log(folder):
    return pd.read_csv(folder / LOG)


def a_draw(pairs, rows=(0, 1, 2), count=2, seed=0):
    """Rows of prepared pairs with noise and times of our own."""
    source = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(rows), *pairs.win.shape[1:], generator=source)
    return Draw(count, torch.tensor(list(rows)), noise, torch.rand(len(rows), generator=source))


@pytest.fixture
def policy(backbone):
    """A backbone whose adapter is not zero any more."""
    backbone.add_adapter(2)
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in backbone.adapter_parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=source)
    return backbone


def one_step(backbone, pairs, draw, masks=None, **objective):
    return step_objective(
        backbone, pairs, draw, params.section("objective", objective), params.section("masks", masks or {})
    )


# --- What a step changes ---


@pytest.mark.parametrize("references", [1, 2])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_of_every_objective_changes_the_adapter_and_nothing_else(
    prepared, tiny_flux, tmp_path, objective, references
):
    trained = tiny_train(tiny_flux, {references: prepared[references]}, tmp_path, objective, steps=1)
    base = load_tiny(tiny_flux)
    for module in ("vae", "text_encoder", "text_encoder_2"):
        after = getattr(trained.pipeline, module).state_dict()
        assert all(torch.equal(after[k], v) for k, v in getattr(base.pipeline, module).state_dict().items())
    after = {k.replace(".base_layer", ""): v for k, v in trained.transformer.state_dict().items()}
    assert all(torch.equal(after[k], v) for k, v in base.transformer.state_dict().items())
    ups = [v for k, v in adapter(tmp_path).items() if "lora_B" in k]  # zero at the start
    moved = [bool(v.any()) for v in ups]
    assert all(moved[:-1])  # the last block's text stream ends unused only in models without single blocks
    assert read_log(tmp_path)["loss"].notna().all()


@pytest.mark.parametrize("objective", ["dpo", "focusdpo"])
def test_at_step_0_policy_and_reference_are_one_so_the_loss_is_log_2_and_accuracy_one_half(
    prepared, backbone, objective
):
    backbone.add_adapter(2)
    for count, pairs in prepared.items():
        loss, _ = one_step(backbone, pairs, a_draw(pairs, count=count), name=objective)
        assert loss.loss.item() == pytest.approx(math.log(2), abs=1e-6)
        assert loss.margin.abs().max() < 1e-4
        assert torch.equal(loss.accuracy, torch.full((3,), 0.5))
        loss.loss.backward()
        assert any(p.grad.abs().max() > 0 for p in backbone.adapter_parameters())


def test_focusdpo_with_a_focus_of_ones_takes_dpo_s_step_to_the_bit(prepared, policy):
    """With every token prior and γ = 0, Eq. 9 is M_d ⊙ M_prior: a detail field of ones makes M ≡ 1."""
    pairs = prepared[2]
    ones = replace(pairs, prior_tokens=torch.ones_like(pairs.prior_tokens), detail=torch.ones_like(pairs.detail))
    gradients = []
    for data, masks, name in ((pairs, None, "dpo"), (ones, {"gamma": 0.0}, "focusdpo"), (pairs, None, "focusdpo")):
        loss, focus = one_step(policy, data, a_draw(data), masks, name=name)
        loss.loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.adapter_parameters()]))
        policy.transformer.zero_grad()
        if data is ones:
            assert torch.equal(focus.focus, torch.ones_like(focus.focus))
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.allclose(gradients[0], gradients[2])


# --- Every switch of the masks ---


class Recorder:
    reference_tokens = "own"

    def __init__(self, features, winners):
        self.features, self.winners, self.target, self.references = features, winners, [], []

    def __call__(self, layer, target, references):
        self.target.append(target[: self.winners])
        self.references.append([tokens[: self.winners] for tokens in references])


def focus_by_hand(backbone, pairs, draw, masks):
    """Steps 1–3 of Algorithm 1 from all tokens of a pass of our own, in one go."""
    settings = params.section("masks", masks)
    recorder = Recorder(settings.features, len(draw.rows))
    noised = backbone.noised(pairs.win[draw.rows], draw.noise, draw.t)
    with torch.no_grad():
        if settings.network == "reference":
            with backbone.reference_model():
                backbone.predict(noised, draw.t, pairs.conditioning[draw.rows], taps=recorder)
        else:
            backbone.predict(noised, draw.t, pairs.conditioning[draw.rows], taps=recorder)
    layers = {"double": [0, 1], "all": [0, 1, 2, 3]}.get(str(settings.layers), settings.layers)
    subjects = None
    if settings.pool == "subject":  # 2×2 latents a token
        subjects = [(cover[draw.rows].unfold(1, 2, 2).unfold(2, 2, 2).mean((3, 4)) >= 0.5) for cover in pairs.cover]
        subjects = [mask.float().flatten(1) for mask in subjects]
    scores = correspondence(
        [recorder.target[i] for i in layers], [recorder.references[i] for i in layers], settings.similarity, subjects
    )
    switches = {name: getattr(settings, name) for name in ("multi_subject", "tau", "gamma")}
    return focus_field(scores, pairs.prior_tokens[draw.rows], pairs.detail[draw.rows], (8, 8), **switches)


@pytest.mark.parametrize(
    "masks",
    [
        {},
        {"similarity": "printed"},
        {"layers": "all"},
        {"layers": [3]},
        {"features": "query"},
        {"features": "query_key"},
        {"pool": "all"},
        {"network": "policy"},
        {"multi_subject": "union"},
        {"tau": 1.0},
        {"tau": 1.0, "gamma": 0.9},
    ],
    ids=str,
)
def test_every_switch_of_the_masks_reaches_the_step(prepared, policy, masks):
    pairs = prepared[2]
    draw = a_draw(pairs, range(8))
    _, focus = one_step(policy, pairs, draw, masks)
    expected = focus_by_hand(policy, pairs, draw, masks)
    assert torch.allclose(focus.focus, expected.focus, atol=1e-6)
    assert torch.allclose(focus.coverage, expected.coverage)
    if masks:
        _, default = one_step(policy, pairs, draw)
        assert not torch.equal(focus.focus, default.focus)


def test_tau_and_gamma_decide_between_structure_and_detail(prepared, policy):
    pairs = prepared[2]
    draw = a_draw(pairs)
    prior = torch.nn.functional.interpolate(pairs.prior_tokens[draw.rows].amax(1).reshape(3, 1, 8, 8), (16, 16))[:, 0]
    _, structure = one_step(policy, pairs, draw, {"tau": 0.0})
    assert structure.coverage.min() > 0
    assert torch.equal(structure.focus, structure.structure)
    _, detail = one_step(policy, pairs, draw, {"tau": 1.0, "gamma": 0.0})
    assert torch.equal(detail.focus, pairs.detail[draw.rows] * prior)
    _, mixed = one_step(policy, pairs, draw, {"tau": 1.0, "gamma": 0.25})
    assert torch.allclose(mixed.focus, 0.25 * structure.structure + 0.75 * detail.focus)


@pytest.mark.parametrize(("masks", "window", "bins"), [({}, 9, 256), ({"entropy_window": 5}, 5, 256),
                                                       ({"entropy_bins": 16}, 9, 16)])  # fmt: skip
def test_entropy_window_and_bins_make_the_detail_field(backbone, pairs, prepared, masks, window, bins):
    """The window is 2 · (VAE stride 4) + 1 unless it is given."""
    single = [pair for pair in pairs if len(pair.references) == 1][:2]
    detail = prepare(backbone, single, params.section("masks", masks))[1].detail
    assert torch.equal(detail, detail_field(pixels([pair.win for pair in single]), (16, 16), window, bins))
    assert torch.allclose(detail, prepared[1].detail[:2], atol=1e-6) is (not masks)


# --- Every switch of the objective ---


@pytest.mark.parametrize(
    "switch",
    [{}, {"mask_power": 1}, {"reduction": "sum"}, {"reduction": "masked_mean"}, {"flow_weight": "epsilon"},
     {"beta": 3.0}],
    ids=str,
)  # fmt: skip
def test_the_margin_is_eq_10_for_every_switch_of_the_objective(prepared, policy, switch):
    pairs = prepared[1]
    draw = a_draw(pairs, count=1)
    settings = {"beta": 2000.0, "mask_power": 2, "reduction": "mean", "flow_weight": "velocity"} | switch
    masks = {"tau": 1.0}  # a focus with values between 0 and 1
    loss, focus = one_step(policy, pairs, draw, masks, **settings)
    weight = focus.focus[:, None].double().numpy() ** settings["mask_power"] * np.ones((1, 8, 1, 1))

    def errors(latents):
        noised = policy.noised(latents, draw.noise, draw.t)
        error = (policy.predict(noised, draw.t, pairs.conditioning[draw.rows]) - (draw.noise - latents)).detach()
        total = (weight * error.double().numpy() ** 2).sum((1, 2, 3))
        total /= {"sum": 1, "mean": error[0].numel(), "masked_mean": weight.sum((1, 2, 3))}[settings["reduction"]]
        return total * ((1 - draw.t.numpy()) ** 2 if settings["flow_weight"] == "epsilon" else 1)

    win, lose = pairs.win[draw.rows], pairs.lose[draw.rows]
    difference = errors(win) - errors(lose)
    with policy.reference_model():
        difference -= errors(win) - errors(lose)
    margin = -0.5 * settings["beta"] * difference
    assert loss.margin.numpy() == pytest.approx(margin, rel=2e-3, abs=2e-3 * abs(margin).max())
    assert loss.loss.item() == pytest.approx(np.logaddexp(0, -margin).mean(), rel=1e-2)
    if switch:
        default, _ = one_step(policy, pairs, draw, masks)
        assert not torch.allclose(loss.margin, default.margin, rtol=1e-2)


def test_patchdpo_weighs_by_the_pair_s_own_quality_maps(prepared, policy):
    pairs = prepared[1]
    assert pairs.quality.shape == (8, 2, 16, 16)
    draw = a_draw(pairs, count=1)
    full = replace(pairs, quality=torch.stack([torch.zeros(8, 16, 16), torch.ones(8, 16, 16)], 1))
    both, _ = one_step(policy, full, draw, name="patchdpo")  # weights of one: the mean over winners and losers
    sft, _ = one_step(policy, full, draw, name="sft")
    losers, _ = one_step(policy, replace(full, win=full.lose), draw, name="sft")
    assert both.loss.item() == pytest.approx((sft.loss.item() + losers.loss.item()) / 2, rel=1e-5)
    measured, _ = one_step(policy, pairs, draw, name="patchdpo")
    assert measured.loss < both.loss


def test_the_first_map_rates_the_winner_s_patches_and_the_second_the_loser_s(pairs, prepared, patches):
    single = [pair for pair in pairs if len(pair.references) == 1]
    win, lose = (torch.nn.functional.normalize(patches(pixels([getattr(p, k) for p in single])), dim=-1)
                 for k in ("win", "lose"))  # fmt: skip
    cosines = win @ lose.mT
    for column, best in enumerate((cosines.amax(2), cosines.amax(1))):
        grid = torch.nn.functional.interpolate(best.clamp(0, 1).view(8, 1, 4, 4), (16, 16), mode="bilinear")[:, 0]
        assert torch.allclose(prepared[1].quality[:, column], grid, atol=1e-5)


# --- What a step draws ---


@pytest.mark.parametrize(
    ("kind", "distribution"),
    [
        ("uniform", lambda t: t),
        ("uno_shift", lambda t: t / (1.9 - 0.9 * t)),  # t = s u / (1 + (s − 1) u), solved for u
        ("logit_normal", lambda t: stats.norm.cdf(np.log(t / (1 - t)))),
    ],
)
def test_timesteps_follow_their_closed_form(kind, distribution):
    t = draw_timesteps(kind, 20_000, generator(0), shift=1.9)
    assert t.min() > 0
    assert t.max() <= 1
    assert stats.kstest(t.numpy().astype(float), distribution).pvalue > 0.01


def settings(**values):
    return params.section("training", TRAINING | values)


def test_an_epoch_passes_over_every_pair_once_in_batches_of_one_number_of_references(prepared):
    at = draws(prepared, settings(batch_size=4))
    epochs = []
    for epoch in range(3):
        steps = [at(4 * epoch + i) for i in range(4)]
        seen = [(draw.count, row) for draw in steps for row in draw.rows.tolist()]
        assert sorted(seen) == [(count, row) for count in (1, 2) for row in range(8)]
        epochs.append(seen)
    mates = [{frozenset(seen[i : i + 4]) for i in range(0, 16, 4)} for seen in epochs]
    assert mates[0] != mates[1] != mates[2]  # not only the order of the batches, also who is in one with whom


def test_a_draw_depends_on_seed_and_step_alone(prepared):
    first, again, other = (draws(prepared, settings(seed=seed)) for seed in (0, 0, 1))
    for step in (9, 2, 30, 2):
        a, b, c = (at(step) for at in (first, again, other))
        assert torch.equal(a.rows, b.rows)
        assert torch.equal(a.noise, b.noise)
        assert torch.equal(a.t, b.t)
        assert not torch.equal(a.noise, c.noise)
    assert not torch.equal(first(2).t, first(3).t)


def test_every_process_and_micro_batch_gets_its_own_part_of_one_draw(prepared):
    whole = draws(prepared, settings(batch_size=2, gradient_accumulation=2), processes=2)(0)
    assert len(whole.rows) == len(whole.noise) == len(whole.t) == 8
    assert torch.equal(torch.cat([whole.part(i, i + 2).noise for i in (0, 2, 4, 6)]), whole.noise)
    assert len(set(whole.rows.tolist())) == 8


def test_too_few_pairs_for_a_step_is_an_error_that_says_how_many(prepared):
    with pytest.raises(TrainingError, match=r"a step takes 9 pairs, but only 8 with 1 reference\(s\)"):
        draws(prepared, settings(batch_size=3, gradient_accumulation=3))


# --- What is computed once ---


def test_images_texts_and_details_are_computed_once_per_dataset_and_never_in_a_step(backbone, pairs, tmp_path):
    counts = {"images": 0, "texts": 0}

    def count(what, argument):
        def hook(module, arguments, named, output):
            counts[what] += len(arguments[0] if arguments else named[argument])

        return hook

    backbone.vae.encoder.register_forward_hook(count("images", "sample"), with_kwargs=True)
    backbone.pipeline.text_encoder_2.register_forward_hook(count("texts", "input_ids"), with_kwargs=True)
    data = prepare(backbone, pairs, params.Masks(), batch_size=3)
    once = {"images": 8 * (2 + 1) + 8 * (2 + 2), "texts": 16}  # winner, loser and references
    assert counts == once
    train(backbone, data, tmp_path, objective=params.Objective(), masks=params.Masks(), training=settings(steps=3))
    assert counts == once


def test_preparing_in_smaller_batches_gives_the_same_data_in_order(backbone, pairs, prepared, patches):
    small = prepare(backbone, pairs, params.Masks(), patches=patches, batch_size=3)
    for count, expected in prepared.items():
        assert small[count].ids == expected.ids == tuple(p.id for p in pairs if len(p.references) == count)
        for name in ("win", "lose", "prior_tokens", "detail", "quality"):
            assert torch.allclose(getattr(small[count], name), getattr(expected, name), atol=1e-4)
        assert torch.allclose(small[count].conditioning.text, expected.conditioning.text, atol=1e-5)
        assert len(expected.conditioning.references) == count


def test_a_subject_too_small_for_any_token_is_named(backbone, pairs):
    speck = np.zeros((64, 64), bool)
    speck[10, 10] = True
    pair = next(p for p in pairs if len(p.references) == 2)
    with pytest.raises(DatasetError, match=f"pair {pair.id}: the mask of its {pair.subjects[1]} covers half of no"):
        prepare(backbone, [replace(pair, masks=(pair.masks[0], speck))], params.Masks())


def test_a_reference_whose_subject_covers_no_token_is_named(backbone, pairs):
    pair = next(p for p in pairs if len(p.references) == 2)
    speck = np.zeros((32, 32), bool)
    speck[:4, :7] = True  # less than half of an 8×8 token
    small = replace(pair, reference_masks=(pair.reference_masks[0], speck))
    says = f"pair {pair.id}: the mask of its {pair.subjects[1]} covers half of no token of its reference: .*pool to all"
    with pytest.raises(DatasetError, match=says):
        prepare(backbone, [small], params.Masks())
    assert prepare(backbone, [small], params.Masks(pool="all"))[2].cover == ()
    large = speck.copy()
    large[:4, :8] = True  # half of it
    assert prepare(backbone, [replace(pair, reference_masks=(large, large))], params.Masks())[2].cover[0].sum() == 2


def test_pairs_without_reference_masks_train_only_where_all_tokens_are_pooled(backbone, pairs, tiny_flux, tmp_path):
    bare = prepare(backbone, [replace(pair, reference_masks=()) for pair in pairs], params.Masks())
    with pytest.raises(TrainingError, match="the prepared pairs have no reference masks: prepare them with"):
        tiny_train(tiny_flux, bare, tmp_path / "subject", steps=1)
    with pytest.raises(DatasetError, match=r"and those with it lack reference_masks, .*: add them, or set masks.pool"):
        grade.look(backbone, bare[1], 0.5, params.Masks())
    tiny_train(tiny_flux, bare, tmp_path / "all", masks={"pool": "all"}, steps=1)
    tiny_train(tiny_flux, bare, tmp_path / "dpo", objective="dpo", steps=1)


def test_a_training_whose_masks_find_nothing_says_so_once(prepared, tiny_flux, tmp_path, capsys):
    """The tiny model has random weights: its tokens correspond to nothing."""
    tiny_train(tiny_flux, prepared, tmp_path / "focus", steps=4, checkpoint_every=2)
    assert capsys.readouterr().out.count("warning: correspondence tells nothing: M' hits 0.") == 1
    tiny_train(tiny_flux, prepared, tmp_path / "dpo", objective="dpo", steps=2)
    assert "warning" not in capsys.readouterr().out


def test_images_that_cannot_form_a_batch_are_named(backbone, pairs):
    first, second = [p for p in pairs if len(p.references) == 1][:2]
    wide = np.zeros((32, 40, 3), np.uint8)
    with pytest.raises(DatasetError, match=f"pair {second.id}: winner and references are 64×64 and 40×32 pixels"):
        prepare(backbone, [first, replace(second, references=(wide,))], params.Masks())
    with pytest.raises(DatasetError, match=r"are 64×64 and 39×32 pixels: crop the one of 39×32 to multiples of 8"):
        prepare(backbone, [replace(first, references=(wide[:, :39],))], params.Masks())


# --- The log ---


def test_the_log_has_a_row_a_pair_and_step_with_everything_the_figures_need(prepared, tiny_flux, tmp_path):
    tiny_train(tiny_flux, prepared, tmp_path, steps=4)
    log = read_log(tmp_path)
    errors = ["policy_win", "policy_lose", "reference_win", "reference_lose"]
    named = ["step", "pair", "references", "loss", "t", "margin", "accuracy", *errors]
    named += ["outside_policy", "outside_reference", "coverage", "hit", "confusion", "chance", "branch"]
    assert list(log) == named
    assert log["step"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    at = draws(prepared, settings())
    for step, rows in log.groupby("step"):
        draw = at(int(step))
        assert rows["pair"].tolist() == [prepared[draw.count].ids[i] for i in draw.rows]
        assert rows["t"].to_numpy() == pytest.approx(draw.t.numpy(), abs=1e-7)
    margin = -0.5 * 2000 * (log.policy_win - log.reference_win - log.policy_lose + log.reference_lose)
    assert log["margin"].to_numpy() == pytest.approx(margin.to_numpy(), abs=1e-3)
    assert log["loss"].to_numpy() == pytest.approx(
        np.log1p(np.exp(-log["margin"])).groupby(log["step"]).transform("mean").to_numpy(), abs=1e-5
    )
    assert (log["branch"] == np.where(log["coverage"] > 0.1, "structure", "fused")).all()


def test_a_coverage_of_exactly_tau_is_logged_as_the_branch_that_eq_9_takes(prepared, policy):
    """As a Python float, a coverage of 1/10 in fp32 is larger than 0.1."""
    pairs = prepared[1]
    draw = a_draw(pairs, count=1)
    loss, focus = one_step(policy, pairs, draw)
    coverage = torch.tensor([0.1, 0.1000001, 0.0])
    rows = log_rows(0, pairs, draw, loss, focus._replace(coverage=coverage), 0.1)
    assert [row["branch"] for row in rows] == ["fused", "structure", "fused"]


# --- Learning ---


def test_preference_training_learns_four_pairs_by_heart(prepared, tiny_flux, tmp_path):
    few = replace(prepared[1], **{name: getattr(prepared[1], name)[:4] for name in ("ids", "win", "lose", "detail")},
                  conditioning=prepared[1].conditioning[:4], prior_tokens=prepared[1].prior_tokens[:4])  # fmt: skip
    objective = {"name": "dpo", "beta": 500.0}
    tiny_train(tiny_flux, {1: few}, tmp_path, objective, steps=40, batch_size=4, lora={"rank": 8})
    log = read_log(tmp_path)
    begin, end = log[log.step < 10], log[log.step >= 30]
    assert end["accuracy"].mean() > 0.9
    assert end["loss"].mean() < 0.7 * begin["loss"].mean()
    assert end["margin"].mean() > begin["margin"].mean()


def test_warm_up_and_clipping_bound_the_first_steps(prepared, tiny_flux, tmp_path):
    """Adam's first step moves a weight by the learning rate; half of a warm-up of two steps is half of it."""
    tiny_train(tiny_flux, prepared, tmp_path / "whole", "sft", steps=1)
    tiny_train(tiny_flux, prepared, tmp_path / "half", "sft", steps=1, warmup_steps=2)
    whole, half = adapter(tmp_path / "whole"), adapter(tmp_path / "half")
    ups = [name for name in whole if "lora_B" in name]
    assert max(whole[name].abs().max() for name in ups) == pytest.approx(1e-2, rel=1e-3)
    assert max(half[name].abs().max() for name in ups) == pytest.approx(5e-3, rel=1e-3)


# --- Kills, resumes and several processes ---


@pytest.fixture(scope="module")
def unbroken(prepared, tiny_flux, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    tiny_train(tiny_flux, prepared, folder, steps=7, checkpoint_every=2)
    return folder


@pytest.mark.parametrize("stop", [1, 2, 5], ids=["before a checkpoint", "at a checkpoint", "after a checkpoint"])
def test_a_run_that_was_cut_short_ends_with_the_same_weights_and_log(prepared, tiny_flux, tmp_path, unbroken, stop):
    tiny_train(tiny_flux, prepared, tmp_path, steps=7, checkpoint_every=2, stop_after=stop)
    assert read_log(tmp_path)["step"].max() == stop - 1
    assert not (tmp_path / ADAPTER).exists()
    with open(tmp_path / LOG, "a") as log:
        log.write("1")  # a row that a kill cut short: it would read as step 1
    tiny_train(tiny_flux, prepared, tmp_path, steps=7, checkpoint_every=2)
    assert_same_weights(tmp_path, unbroken)
    assert (tmp_path / LOG).read_bytes() == (unbroken / LOG).read_bytes()


def test_a_killed_process_leaves_a_run_that_ends_like_an_unbroken_one(prepared, tiny_flux, tmp_path):
    long = {"steps": 500, "checkpoint_every": 2}
    child = CHILDREN.Process(target=child_train, args=(tiny_flux, tmp_path, long), daemon=True)
    child.start()
    while not (tmp_path / CHECKPOINT).exists():
        assert child.is_alive()
        time.sleep(0.01)
    child.kill()
    child.join()
    assert not (tmp_path / ADAPTER).exists()
    reached = int(read_log(tmp_path)["step"].max())
    tiny_train(tiny_flux, prepared, tmp_path, steps=reached + 5, checkpoint_every=1000)
    tiny_train(tiny_flux, prepared, tmp_path / "whole", steps=reached + 5, checkpoint_every=1000)
    assert_same_weights(tmp_path, tmp_path / "whole")
    assert (tmp_path / LOG).read_bytes() == (tmp_path / "whole" / LOG).read_bytes()


def test_two_processes_end_like_one_that_accumulates_gradients(prepared, tiny_flux, tmp_path):
    tiny_train(tiny_flux, prepared, tmp_path / "one", steps=3, gradient_accumulation=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [(tiny_flux, tmp_path / "two", {"steps": 3}, rank, 2, port) for rank in range(2)]
    children = [CHILDREN.Process(target=child_train, args=these, daemon=True) for these in arguments]
    for child in children:
        child.start()
    for child in children:
        child.join(300)
        assert child.exitcode == 0
    assert_same_weights(tmp_path / "two", tmp_path / "one", exactly=False)
    one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    pd.testing.assert_frame_equal(one, two, rtol=1e-3, atol=1e-3)


def test_accumulated_gradients_are_those_of_the_whole_batch(prepared, policy):
    """Adam forgives a wrong scale, so the gradients themselves are compared."""
    pairs, found = prepared[1], []
    for micro in (4, 2, 1):
        training = settings(batch_size=micro, gradient_accumulation=4 // micro)
        draw = draws({1: pairs}, training)(0)
        _gradients(policy, pairs, draw, 0, params.Objective(), params.Masks(), training, Accelerator(cpu=True))
        found.append(torch.cat([p.grad.flatten() for p in policy.adapter_parameters()]))
        policy.transformer.zero_grad()
    assert found[0].abs().max() > 1e-3
    for gradient in found[1:]:
        assert torch.allclose(gradient, found[0], rtol=1e-2, atol=1e-3 * found[0].abs().max())


def test_a_scaled_gradient_is_clipped_and_stepped_at_its_own_size():
    """Adam forgives a wrong scale, clipping does not: plain descent shows both."""
    for size, step in ((0.5, 0.5), (2.0, 1.0)):  # below the clip and above it
        weight = torch.nn.Parameter(torch.zeros(2))
        weight.grad = 2.0**12 * size * torch.tensor([0.6, -0.8])
        optimizer = torch.optim.SGD([weight], lr=1.0)
        training = settings(learning_rate=1.0, max_grad_norm=1.0)
        norm = _update([weight], optimizer, training, 0, Accelerator(cpu=True), loss_scale=2.0**12)
        assert norm.item() == pytest.approx(size)
        assert weight.tolist() == pytest.approx([-0.6 * step, 0.8 * step], rel=1e-5)


def test_a_checkpoint_of_another_adapter_is_refused(prepared, tiny_flux, tmp_path):
    tiny_train(tiny_flux, prepared, tmp_path, steps=3, checkpoint_every=1)
    with pytest.raises(RunError, match="is of another adapter"):
        tiny_train(tiny_flux, prepared, tmp_path, steps=3, lora={"rank": 3})


def test_a_loss_that_is_no_number_names_the_pairs_and_keeps_the_checkpoint(prepared, tiny_flux, tmp_path):
    pairs = replace(prepared[1], lose=prepared[1].lose.clone())
    at = draws({1: pairs}, settings())
    bad = at(3).rows[0]  # all eight pairs are seen once in steps 0–3
    pairs.lose[bad, 0, 0, 0] = float("nan")
    with pytest.raises(TrainingError) as caught:
        tiny_train(tiny_flux, {1: pairs}, tmp_path, "dpo", steps=6, checkpoint_every=1)
    message = str(caught.value)
    assert message.startswith("the loss of step 3 is nan on the pairs ")
    assert all(pairs.ids[i] in message for i in at(3).rows)
    assert "\n" not in message and message.endswith("the last checkpoint is kept, and the run goes on from it")
    assert read_log(tmp_path)["step"].max() == 2
    assert all(torch.isfinite(value).all() for value in load_file(tmp_path / CHECKPOINT).values())


def test_at_the_first_step_neither_a_checkpoint_nor_a_learning_rate_is_spoken_of(prepared, tiny_flux, tmp_path):
    pairs = replace(prepared[1], win=torch.full_like(prepared[1].win, float("inf")))
    with pytest.raises(
        TrainingError, match=r"^the loss of step 0 is nan .* look at them or set backbone.precision to fl"
    ):
        tiny_train(tiny_flux, {1: pairs}, tmp_path, "sft", steps=2)


def test_a_gradient_that_is_no_number_never_reaches_a_checkpoint(prepared, backbone, tmp_path):
    """The loss may be finite where its gradient is not: here a hook makes it so at the second backward pass."""
    backbone.add_adapter(2)
    calls = []

    def poison(gradient):
        calls.append(1)
        return gradient * float("inf") if len(calls) == 2 else gradient

    backbone.vae.requires_grad_(False)
    original = backbone.predict

    def predict(*arguments, **named):
        output = original(*arguments, **named)
        if output.requires_grad:
            output.register_hook(poison)
        return output

    backbone.predict = predict
    with pytest.raises(TrainingError, match=r"the gradient of step 1 is (nan|inf)"):
        train(
            backbone, prepared, tmp_path, objective=params.Objective(name="dpo"), masks=params.Masks(),
            training=settings(steps=5, checkpoint_every=1),
        )  # fmt: skip
    assert all(torch.isfinite(value).all() for value in load_file(tmp_path / CHECKPOINT).values())


def test_patchdpo_without_quality_maps_says_what_is_missing(prepared, tiny_flux, tmp_path):
    data = {count: replace(pairs, quality=None) for count, pairs in prepared.items()}
    with pytest.raises(TrainingError, match="prepare the pairs with a vision encoder"):
        tiny_train(tiny_flux, data, tmp_path, "patchdpo", steps=1)


@pytest.mark.parametrize("network", ["reference", "policy"])
def test_gradient_checkpointing_gives_the_same_gradients_and_masks(prepared, policy, network):
    def gradients():
        loss, focus = one_step(
            policy, prepared[2], a_draw(prepared[2]), {"network": network}, name="focusdpo", beta=50.0
        )
        loss.loss.backward()
        found = [p.grad.clone() for p in policy.adapter_parameters()]
        for parameter in policy.adapter_parameters():
            parameter.grad = None
        return found, focus.focus

    expected, focus = gradients()
    policy.network.enable_gradient_checkpointing()  # runs each block again, under whatever adapter is then switched on
    again, focus_again = gradients()
    assert max(g.abs().max() for g in expected) > 1e-4
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(expected, again, strict=True))
    assert torch.equal(focus, focus_again)


def test_bfloat16_lora_weights_would_not_move_at_the_paper_s_learning_rates():
    """R16: Adam moves a weight by about lr a step; bf16 keeps 8 bits, so near 0.02 the next number is 6e-5 away."""

    def moved(dtype, lr, steps=20):
        weight = torch.full((1000,), 0.02, dtype=dtype, requires_grad=True)
        start, optimizer = weight.detach().clone(), torch.optim.AdamW([weight], lr=lr, weight_decay=0.0)
        for _ in range(steps):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        return (weight.detach() - start).abs().max().item()

    for lr in (1e-8, 1e-5):
        assert moved(torch.bfloat16, lr) == 0
        assert moved(torch.float32, lr) == pytest.approx(20 * lr, rel=0.05 if lr > 1e-6 else 0.5)


def test_errors_by_region_are_those_of_a_plain_loop_and_equal_without_training(
    prepared, pairs, policy, tmp_path, monkeypatch
):
    monkeypatch.setattr(regions, "CELLS", 3 * 16**2)  # three pairs a batch
    table = measured(policy, pairs, tmp_path / "trained")
    noise = {c: torch.randn(p.win.shape, generator=torch.Generator().manual_seed(c)) for c, p in prepared.items()}
    totals, areas = 0.0, 0.0
    for count, few in prepared.items():
        inside = few.prior_tokens.amax(1).reshape(-1, *few.token_grid)
        inside = inside.repeat_interleave(2, 1).repeat_interleave(2, 2)  # a token is 2×2 latents
        for i in range(len(few)):
            x, e, t = few.lose[[i]], noise[count][[i]], torch.tensor([0.5])
            with torch.no_grad():
                prediction = policy.predict(0.5 * x + 0.5 * e, t, few.conditioning[[i]])
            totals += ((prediction - (e - x)) ** 2).mean(1)[0][inside[i] == 0].sum().item()
            areas += (inside[i] == 0).sum().item()
    assert table.loc[("loser", "background"), "trained"] == pytest.approx(totals / areas, rel=1e-4)
    assert abs(table["change"]).max() > 1e-3
    policy.add_adapter(2)
    assert (measured(policy, pairs, tmp_path / "untrained")["change"] == 0).all()


def measured(policy, pairs, folder):
    regions.measure_into(folder, policy, pairs, params.Masks(), times=(0.5,))
    return regions.table(folder)
