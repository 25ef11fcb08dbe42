"""What every family must do with every objective, with one subject and two: step, resume, sample, save, load."""

from itertools import combinations

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from tiny_models import write_tiny_sdxl_ip
from tiny_training import TRAINING, another

from focusdpo_lib import backbones, params
from focusdpo_lib.backbones.family import ADAPTER as POLICY
from focusdpo_lib.masks import CorrespondenceTap
from focusdpo_lib.training import ADAPTER, draws, step_objective, train
from focusdpo_lib.training.pairs import join, load, prepare, prepare_into

FAMILIES = ("flux_uno", "sdxl_ip")


@pytest.fixture(scope="session")
def models(tiny_flux, tmp_path_factory):
    """The folder of a tiny model of each family."""
    return {"flux_uno": tiny_flux, "sdxl_ip": write_tiny_sdxl_ip(tmp_path_factory.mktemp("models") / "sdxl_ip")}


@pytest.fixture(scope="session")
def prepared_by(models, pairs, patches, tmp_path_factory):
    """Pairs prepared with the encoders alone, saved, and read again: {family: {references: pairs}}."""
    found = {}
    for family, folder in models.items():
        encoders = backbones.load(settings(family, folder), parts="encoders")
        out = tmp_path_factory.mktemp(family)
        prepare_into(out, encoders, pairs, params.Masks(), patches=patches)
        join(out)
        found[family] = load(out)
    return found


def settings(family, folder, **changes):
    return params.section("backbone", {"family": family, "model": str(folder), "precision": "float32"} | changes)


def run(model, data, folder, objective, stop_after=None, beta=2000.0, **changes):
    training = params.section("training", TRAINING | {"steps": 3, "checkpoint_every": 1} | changes)
    typed = params.Objective(name=objective, beta=beta)
    train(model, data, folder, objective=typed, masks=params.Masks(), training=training, stop_after=stop_after)
    return model


def policy(model):
    return get_peft_model_state_dict(model.network, adapter_name=POLICY)


def predictions(model, data):
    (pairs,) = data.values()
    t = torch.full((2,), 0.5)
    with torch.no_grad():
        return model.predict(pairs.win[:2], t, pairs.conditioning[:2])


@pytest.mark.parametrize("references", [1, 2])
@pytest.mark.parametrize("objective", ["sft", "dpo", "patchdpo", "focusdpo"])
@pytest.mark.parametrize("family", FAMILIES)
def test_step_resume_sample_save_and_load(family, objective, references, models, prepared_by, tmp_path):
    use = settings(family, models[family])
    data = {references: prepared_by[family][references]}
    whole = run(another(use, parts="network"), data, tmp_path / "whole", objective)
    run(another(use, parts="network"), data, tmp_path / "broken", objective, stop_after=2)
    resumed = run(another(use, parts="network"), data, tmp_path / "broken", objective)
    ours, theirs = policy(whole), policy(resumed)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert any(value.abs().max() > 0 for name, value in ours.items() if "lora_B" in name), "the steps moved nothing"

    again = another(use)
    base = predictions(again, data)
    again.load_adapter(tmp_path / "whole" / ADAPTER)
    expected = predictions(whole, data)
    assert torch.equal(predictions(again, data), expected)
    assert not torch.equal(expected, base)
    condition = data[references].conditioning[:2]
    images = again.sample(condition, [1, 2], (64, 64), steps=2, guidance=1.0 if family == "flux_uno" else 2.0)
    assert images.shape == (2, 3, 64, 64) and images.isfinite().all() and images.std() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_encoders_alone_prepare_what_the_whole_model_prepares(family, models, pairs, patches, prepared_by):
    whole = prepare(backbones.load(settings(family, models[family])), pairs, params.Masks(), patches=patches)
    for count, expected in whole.items():
        found = prepared_by[family][count]
        assert found.ids == expected.ids and found.token_grid == expected.token_grid
        for name in ("win", "lose", "prior_tokens", "detail", "quality"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert torch.equal(found.conditioning.text, expected.conditioning.text)
        assert torch.equal(found.conditioning.pooled, expected.conditioning.pooled)
        assert len(found.conditioning.references) == count
        for ours, theirs in zip(found.conditioning.references, expected.conditioning.references, strict=True):
            assert torch.equal(ours, theirs)


def test_a_step_looks_at_references_noised_as_far_as_the_target_with_noise_of_their_own(
    models, prepared_by, monkeypatch
):
    """R7; x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε by the scheduler's own table."""
    model, seen = backbones.load(settings("sdxl_ip", models["sdxl_ip"])), []
    look = model._look_at_references
    monkeypatch.setattr(model, "_look_at_references", lambda taps, t, c: seen.append(c) or look(taps, t, c))
    pairs = prepared_by["sdxl_ip"][2]
    draw = draws({2: pairs}, params.Training(batch_size=4))(3).part(1, 3)
    model.add_adapter(2)
    step_objective(model, pairs, draw, params.Objective(), params.Masks())
    share = model.noising.alphas_cumprod[(draw.t * 1000 - 1e-3).ceil().long() - 1].view(-1, 1, 1, 1)
    for subject, view in enumerate(seen[0].views):
        clean, noise = pairs.conditioning.views[subject].latents[draw.rows], draw.view_noise[subject]
        assert torch.allclose(view.latents, share.sqrt() * clean + (1 - share).sqrt() * noise, atol=1e-5)
    whole = draws({2: pairs}, params.Training(batch_size=4))(3)
    assert all(torch.equal(part, all_[1:3]) for part, all_ in zip(draw.view_noise, whole.view_noise, strict=True))
    drawn = [whole.noise[:, :, :8, :8], *whole.view_noise]
    assert not any(torch.equal(a, b) for a, b in combinations(drawn, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_training_loads_no_encoder(family, models):
    network = backbones.load(settings(family, models[family]), parts="network")
    for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "image_encoder"):
        assert getattr(network.pipeline, name, None) is None, name
    assert backbones.load(settings("flux_uno", models["flux_uno"]), parts="encoders").transformer is None


def test_an_adapter_is_the_same_file_every_time(models, tmp_path):
    """Of eight, two facts in the header would else stand in either order."""
    model = backbones.load(settings("flux_uno", models["flux_uno"]), parts="network")
    model.add_adapter(2)
    for i in range(8):
        model.save_adapter(tmp_path / str(i))
    assert len({(tmp_path / str(i) / "pytorch_lora_weights.safetensors").read_bytes() for i in range(8)}) == 1
    assert load_file(tmp_path / "0" / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("cut", [0, 100])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_damaged_adapter_is_one_sentence(family, cut, models, tmp_path):
    model = backbones.load(settings(family, models[family]), parts="network")
    model.add_adapter(2)
    model.save_adapter(tmp_path / "run" / ADAPTER)
    (weights,) = (tmp_path / "run" / ADAPTER).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:cut])
    expected = (
        rf"^the adapter {tmp_path}/run/adapter cannot be loaded \(.*\): delete {tmp_path}/run and train it again$"
    )
    with pytest.raises(ValueError, match=expected):
        model.load_adapter(tmp_path / "run" / ADAPTER)


@pytest.mark.parametrize("weights", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_in_half_precision_trains_float32_adapters(family, weights, models, prepared_by, tmp_path):
    use = settings(family, models[family], weights=weights, precision="auto")
    model = backbones.load(use, parts="network")
    base = {name: value.clone() for name, value in model.network.state_dict().items()}
    half = getattr(torch, weights)
    assert {v.dtype for v in base.values() if v.is_floating_point()} == {half} and model.precision == half
    assert model.vae.dtype == torch.float32
    run(model, prepared_by[family], tmp_path, "focusdpo", learning_rate=1e-5)
    assert {p.dtype for p in model.adapter_parameters()} == {torch.float32}
    assert any(value.abs().max() > 0 for name, value in policy(model).items() if "lora_B" in name)
    now = {name.replace(".base_layer", ""): value for name, value in model.network.state_dict().items()}
    assert all(torch.equal(now[name], value) for name, value in base.items()), "the base moved"


def test_gradients_in_float16_are_scaled_on_their_way_and_back(models, prepared_by, tmp_path):
    """A float16 run of small gradients steps as the float32 run does; unscaled, most of them would be 0."""
    data = {1: prepared_by["flux_uno"][1]}
    stepped = {}
    for weights in ("float32", "float16"):
        model = backbones.load(settings("flux_uno", models["flux_uno"], weights=weights, precision=weights))
        stepped[weights] = policy(run(model, data, tmp_path / weights, "dpo", steps=1, beta=1e-2))
    for name, value in stepped["float32"].items():
        if "lora_B" in name:  # Adam's first step is the learning rate times the gradient's sign
            same = (value.sign() == stepped["float16"][name].sign()).float().mean()
            assert same > 0.9, name


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_blocks_take_the_same_steps(family, models, prepared_by, tmp_path, monkeypatch):
    """With dynamo's back end of plain torch: what is compiled must still see hooks, adapter switches and gradients."""
    data, compiled = {1: prepared_by[family][1]}, []
    eager = run(backbones.load(settings(family, models[family])), data, tmp_path / "eager", "focusdpo", steps=2)
    original = torch.nn.Module.compile

    def compile_eagerly(self, *a, **k):
        compiled.append(type(self).__name__)
        original(self, *a, **{**k, "backend": "eager"})

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    torch._dynamo.reset()
    model = backbones.load(settings(family, models[family]))
    # Every layer and step has a tap's hook of its own; none may make its block compile anew.
    with torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=True):
        run(model, data, tmp_path / "compiled", "focusdpo", steps=2, compile=True)
    repeated = {
        "flux_uno": {"FluxTransformerBlock", "FluxSingleTransformerBlock"},
        "sdxl_ip": {"BasicTransformerBlock"},
    }
    assert set(compiled) == repeated[family]
    for name, value in policy(eager).items():
        torch.testing.assert_close(policy(model)[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("references", [1, 2, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_any_number_of_references_of_different_sizes(family, references, models):
    """Each reference matters, whatever its size; masks count one subject each."""
    model = backbones.load(settings(family, models[family]))
    source = torch.Generator().manual_seed(0)
    sizes = [(32, 32), (32, 48), (64, 32), (16, 16)][:references]
    photos = [torch.rand(2, 3, *size, generator=source) * 2 - 1 for size in sizes]
    words = [["mug", "duck"]] * references
    condition = model.condition(["a mug on a beach", "a duck in the snow"], photos, classes=words)
    noised, t = torch.randn(2, 8, 16, 16, generator=source), torch.tensor([0.3, 0.9])
    tap = CorrespondenceTap(model.attention_layers("all"), grid=model.token_grid((16, 16)), samples=slice(0, 2))
    prediction = model.predict(noised, t, condition, taps=tap)
    assert prediction.shape == noised.shape
    assert tap.result().shape[:2] == (2, references)
    for changed in range(references):
        others = [-photo if i == changed else photo for i, photo in enumerate(photos)]
        condition = model.condition(["a mug on a beach", "a duck in the snow"], others)
        assert not torch.allclose(model.predict(noised, t, condition), prediction, atol=1e-5), changed
    images = model.sample(condition, [1, 2], (64, 64), steps=1)
    assert images.shape == (2, 3, 64, 64)
