"""FLUX with UNO's references: equal to UNO's own code, and our adapter alone tells policy and reference apart."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from tiny_fixtures import build_tiny_flux
from tiny_training import load_tiny, refusal

from focusdpo_lib.backbones import BackboneError, Conditioning, FluxUno, parity
from focusdpo_lib.backbones.tokens import pack, position_ids, unpack

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures" / "uno"
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"UNO's recorded cases are not at {FIXTURES}")
CASES = ("case1", "case2")


def sample(backbone, batch=2, references=((8, 8), (4, 8)), size=(16, 16), seed=0):
    """Random latents, times and conditioning."""
    draw = torch.Generator().manual_seed(seed)
    channels = backbone.transformer.config.in_channels // 4
    text, pooled = backbone.encode_prompts(["a cat in the snow", "a mug on a beach"][:batch])
    latents = [torch.randn(batch, channels, *s, generator=draw) for s in (size, *references)]
    t = torch.rand(batch, generator=draw)
    return latents[0], t, Conditioning(text, pooled, tuple(latents[1:]))


def disturb(backbone, seed=0, size=0.3):
    """Gives the adapter random weights, as a training would."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in backbone.adapter_parameters():
            weight += size * torch.randn(weight.shape, generator=draw)


@pytest.fixture(scope="module")
def subject_lora(tiny_flux, tmp_path_factory):
    """A LoRA that is a part of the base, as UNO's is of FLUX."""
    backbone = load_tiny(tiny_flux)
    backbone.add_adapter(3, targets=["to_q", "to_k", "proj_out"], seed=5)
    disturb(backbone, seed=5)
    folder = tmp_path_factory.mktemp("subject")
    backbone.save_adapter(folder)
    return folder / "pytorch_lora_weights.safetensors"


# --- Tokens and their positions ---


def test_a_token_is_a_square_of_four_latents_channel_by_channel_and_tokens_run_row_by_row():
    latents = torch.arange(32.0).reshape(1, 2, 4, 4)  # the second channel is 16 higher
    first = [0, 1, 4, 5, 16, 17, 20, 21]
    assert pack(latents)[0].tolist() == [first] + [[v + o for v in first] for o in (2, 8, 10)]


def test_unpacking_undoes_packing_for_sizes_that_are_not_square():
    latents = torch.randn(2, 3, 4, 10)
    assert torch.equal(unpack(pack(latents), 4, 10), latents)


@pytest.mark.parametrize(
    ("mode", "first", "second"),
    [("d", (2, 3), (2 + 4, 3 + 1)), ("h", (2, 0), (2 + 4, 0)), ("w", (0, 3), (0, 3 + 1)), ("o", (0, 0), (0, 0))],
)
def test_a_reference_starts_where_everything_before_it_ends(mode, first, second):
    ids = position_ids((2, 3), [(4, 1), (1, 2)], mode).tolist()
    assert ids[:6] == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]]
    y, x = first
    assert ids[6:10] == [[0, y, x], [0, y + 1, x], [0, y + 2, x], [0, y + 3, x]]
    y, x = second
    assert ids[10:] == [[0, y, x], [0, y, x + 1]]


# --- UNO's own numbers ---


@pytest.fixture(scope="module", params=CASES)
def uno(request, tmp_path_factory):
    """(backbone with the recorded transformer and UNO's LoRA, the recorded inputs and outputs)."""
    folder = FIXTURES / request.param
    transformer = FluxTransformer2DModel(**json.loads((folder / "config.json").read_text())["flux_config"])
    transformer.load_state_dict(load_file(folder / "transformer.safetensors"))
    pipeline = build_tiny_flux()
    pipeline.register_modules(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    )
    model = tmp_path_factory.mktemp("uno") / "flux"
    pipeline.save_pretrained(model)
    backbone = load_tiny(model, subject_lora=str(folder / "uno_lora.safetensors"))
    return backbone, load_file(folder / "io.safetensors")


def recorded_condition(io):
    references = tuple(io[name] for name in sorted(io) if name.startswith("ref_latents"))
    return Conditioning(io["text_embeds"], io["pooled_text"], references)


@needs_fixtures
def test_position_ids_are_uno_s(uno):
    _, io = uno
    recorded = torch.cat([io["target_ids"], *(io[name] for name in sorted(io) if name.startswith("ref_ids"))])
    grids = [(x.shape[-2] // 2, x.shape[-1] // 2) for x in recorded_condition(io).references]
    height, width = io["target_latents"].shape[-2:]
    assert torch.equal(position_ids((height // 2, width // 2), grids), recorded)


@needs_fixtures
def test_full_size_schedules_of_sampling_and_training_are_uno_s(uno):
    backbone, _ = uno
    recorded = json.loads((FIXTURES / "schedules.json").read_text())
    for side in (512, 704):
        ours = backbone.sampling_times((side // 8, side // 8), 25)
        assert (ours - torch.tensor(recorded[f"{side}x{side}x25"])).abs().max() < 1e-6
    s, u = backbone.timestep_shift((64, 64)), torch.linspace(1, 0, 1000, dtype=torch.float64)
    assert math.log(s) == pytest.approx(0.63)
    assert (s * u / (1 + (s - 1) * u) - torch.tensor(recorded["train_512"])).abs().max() < 1e-6


def test_the_library_s_own_shift_counts_tokens_rightly():
    pipeline = build_tiny_flux()
    pipeline.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    for name, mu in (("uno", 0.5 + (16 - 256) * 0.65 / 3840), ("library", 0.5 + (1024 - 256) * 0.65 / 3840)):
        times = FluxUno(pipeline, sampling_shift=name).sampling_times((64, 64), 2)
        expected = math.exp(mu) / (math.exp(mu) + 1)  # of the even time 1/2; by hand: 0.459 and 0.63 for 512 × 512
        assert times[1].item() == pytest.approx(expected, abs=1e-6)


@needs_fixtures
def test_ids_prediction_and_sampling_run_are_uno_s_to_1e_5_and_more_is_a_failure(tmp_path):
    """In a process of its own: MKL's path for all processors must be chosen before it computes.

    Without MKL an exp that rounds otherwise, multiplied by 1000, makes it 3e-5.
    """
    limit = 1e-5 if torch.backends.mkl.is_available() else 3e-5
    changed = tmp_path / "changed"
    shutil.copytree(FIXTURES / "case1", changed)
    io = load_file(changed / "io.safetensors")
    save_file(io | {"denoised_packed": io["denoised_packed"] + 2 * limit}, changed / "io.safetensors")
    code = "import sys; from focusdpo_lib.backbones.parity import main; print(main(sys.argv[1:3]), main(sys.argv[3:]))"
    words = [sys.executable, "-c", code, *(str(FIXTURES / case) for case in CASES), str(changed)]
    found = subprocess.run(words, capture_output=True, text=True)
    lines = re.findall(r"^(\w+): (.+?) +(\S+e-?\S+)$", found.stdout, re.MULTILINE)
    names = ["position ids", "prediction", "sampling times", "sampled latents"]
    assert [line[:2] for line in lines] == [(case, name) for case in (*CASES, "changed") for name in names]
    assert max(float(deviation) for *_, deviation in lines[:8]) < limit < float(lines[-1][-1])
    assert found.stdout.splitlines()[-1] == "0 1", found.stdout + found.stderr
    assert found.stdout.count("within") == found.stdout.count("ABOVE") == 1
    assert all(load_file(FIXTURES / case / "io.safetensors")["prediction_packed"].abs().max() > 0.1 for case in CASES)


@needs_fixtures
def test_parity_names_a_missing_file(tmp_path):
    shutil.copy(FIXTURES / "case1" / "config.json", tmp_path)
    with pytest.raises(BackboneError, match=r"lacks transformer\.safetensors, uno_lora\.safetensors, io\.safetensors"):
        parity.load_case(tmp_path)


def test_parity_fails_on_what_is_no_number(monkeypatch, capsys):
    monkeypatch.setenv("MKL_CBWR", "AUTO")  # what is set already stays
    monkeypatch.setattr(parity, "load_case", lambda folder: (folder, None))
    monkeypatch.setattr(parity, "deviations", lambda *case: {"prediction": 1e-7, "sampled latents": math.nan})
    assert parity.main(["somewhere"]) == 1
    assert "ABOVE" in capsys.readouterr().out


# --- What the backbone computes ---


def test_latents_are_the_posterior_s_mean_shifted_and_scaled_and_decoding_takes_that_back(backbone):
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        mean = backbone.vae.encode(pixels).latent_dist.mean
        assert torch.allclose(backbone.encode_images(pixels), (mean - 0.1) * 0.5)  # as tiny_fixtures sets them
        assert torch.allclose(
            backbone.decode((mean - 0.1) * 0.5), backbone.vae.decode(mean).sample.clamp(-1, 1), atol=1e-4
        )


def test_noise_and_image_are_the_ends_of_a_straight_path_and_the_target_is_its_slope(backbone):
    image, noise = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
    low, high = torch.tensor([0.0, 0.25]), torch.tensor([1.0, 0.75])
    start, end = backbone.noised(image, noise, low), backbone.noised(image, noise, high)
    assert torch.equal(start[0], image[0])
    assert torch.equal(end[0], noise[0])
    slope = (end - start) / (high - low).view(2, 1, 1, 1)
    assert torch.allclose(slope, backbone.target(image, noise, low), atol=1e-6)


@torch.no_grad()
def test_a_prediction_does_not_depend_on_batch_mates(backbone):
    latents, t, condition = sample(backbone)
    both = backbone.predict(latents, t, condition)
    for i in range(2):
        alone = backbone.predict(latents[[i]], t[[i]], condition[[i]])
        assert torch.allclose(alone, both[[i]], atol=1e-5)
    assert not torch.allclose(both[0], both[1], atol=1e-2)


@torch.no_grad()
def test_every_reference_and_its_place_count(backbone, tiny_flux):
    latents, t, condition = sample(backbone)
    prediction = backbone.predict(latents, t, condition)
    for s in range(2):
        changed = [r.clone() for r in condition.references]
        changed[s] += 1
        other = backbone.predict(latents, t, Conditioning(condition.text, condition.pooled, tuple(changed)))
        assert not torch.allclose(other, prediction, atol=1e-3)
    elsewhere = load_tiny(tiny_flux, position_mode="o").predict(latents, t, condition)
    assert not torch.allclose(elsewhere, prediction, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("distilled", [True, False])
def test_guidance_reaches_a_model_with_a_guidance_embedding_and_no_other(distilled):
    backbone = FluxUno(build_tiny_flux(guidance_embeds=distilled), precision="float32")
    latents, t, condition = sample(backbone)
    weak, strong = (backbone.predict(latents, t, condition, guidance=g) for g in (1.0, 4.0))
    assert torch.equal(weak, strong) is not distilled


def test_bfloat16_is_mixed_precision_with_float32_results(backbone, tiny_flux):
    latents, t, condition = sample(backbone)
    mixed = load_tiny(tiny_flux, precision="bfloat16")
    with torch.no_grad():
        exact, rough = backbone.predict(latents, t, condition), mixed.predict(latents, t, condition)
    assert rough.dtype == torch.float32
    assert next(mixed.transformer.parameters()).dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.1  # bfloat16 keeps 8 bits


# --- Taps ---


class Recorder:
    reference_tokens = "own"

    def __init__(self, features):
        self.features, self.seen = features, {}

    def __call__(self, layer, target, references):
        assert layer not in self.seen
        self.seen[layer] = (target, references)


def watched(backbone, modules, run):
    """The outputs of modules while `run` runs, by hooks of our own."""
    outputs = {}
    handles = [m.register_forward_hook(lambda _, __, out, k=k: outputs.update({k: out})) for k, m in modules.items()]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return outputs


def test_block_outputs_are_tapped_at_the_target_s_and_the_references_tokens_only(backbone):
    latents, t, condition = sample(backbone)  # 64 target tokens, references of 16 and 8
    blocks = [*backbone.transformer.transformer_blocks, *backbone.transformer.single_transformer_blocks]
    tap = Recorder("block_output")
    streams = watched(backbone, dict(enumerate(blocks)), lambda: backbone.predict(latents, t, condition, taps=tap))
    assert sorted(tap.seen) == [0, 1, 2, 3]
    for layer, (target, (first, second)) in tap.seen.items():
        image = streams[layer][1]
        assert image.shape[1] == 64 + 16 + 8
        assert torch.equal(target, image[:, :64])
        assert torch.equal(first, image[:, 64:80])
        assert torch.equal(second, image[:, 80:])


@pytest.mark.parametrize("features", ["query", "query_key"])
def test_queries_and_keys_are_the_normalised_projections_of_image_tokens(backbone, features):
    latents, t, condition = sample(backbone)
    blocks = [*backbone.transformer.transformer_blocks, *backbone.transformer.single_transformer_blocks]
    projections = {(i, name): getattr(b.attn, f"to_{name}") for i, b in enumerate(blocks) for name in "qk"}
    tap = Recorder(features)
    outputs = watched(backbone, projections, lambda: backbone.predict(latents, t, condition, taps=tap))
    text = condition.text.shape[1]
    assert sorted(tap.seen) == [0, 1, 2, 3]

    def normalised(layer, name):
        """RMS norm over each head's 16 channels (its learnt weights are 1), image tokens only, heads side by side."""
        x = outputs[layer, name].unflatten(2, (2, 16))
        x = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return x.flatten(2)[:, text if layer > 1 else 0 :]

    for layer, (target, (first, second)) in tap.seen.items():
        assert torch.allclose(target, normalised(layer, "q")[:, :64], atol=1e-5)
        keys = normalised(layer, {"query": "q", "query_key": "k"}[features])
        assert torch.allclose(first, keys[:, 64:80], atol=1e-5)
        assert torch.allclose(second, keys[:, 80:], atol=1e-5)


def test_taps_change_nothing_and_are_gone_after_a_pass_that_failed(backbone):
    latents, t, condition = sample(backbone)

    def fails(*arguments):
        raise KeyError("tap")

    fails.features, fails.reference_tokens = "query_key", "own"
    with torch.no_grad():
        plain = backbone.predict(latents, t, condition)
        with pytest.raises(KeyError):
            backbone.predict(latents, t, condition, taps=fails)
        assert torch.equal(backbone.predict(latents, t, condition, taps=Recorder("query_key")), plain)
    assert not any(module._forward_hooks for module in backbone.transformer.modules())


def test_keys_of_image_tokens_are_a_reading_of_the_u_net_alone(backbone):
    tap = Recorder("query_key")
    tap.reference_tokens = "image_keys"
    with pytest.raises(ValueError, match=r"masks\.reference_tokens image_keys is a reading of the U-Net: set own"):
        backbone.predict(*sample(backbone), taps=tap)


def test_layers_are_the_double_blocks_all_blocks_or_a_list_of_existing_ones(backbone):
    assert backbone.attention_layers("double") == [0, 1]
    assert backbone.attention_layers("all") == [0, 1, 2, 3]
    assert backbone.attention_layers([3, 1]) == [3, 1]
    with pytest.raises(ValueError, match=r"masks.layers names the layers \[4\], but this model has layers 0 to 3"):
        backbone.attention_layers([1, 4])
    with pytest.raises(ValueError, match="is an empty list"):
        backbone.attention_layers([])


# --- Policy and reference model ---


@torch.no_grad()
def test_an_untrained_adapter_changes_nothing_to_the_bit(backbone):
    inputs = sample(backbone)
    before = backbone.predict(*inputs)
    backbone.add_adapter(4)
    assert torch.equal(backbone.predict(*inputs), before)


@torch.no_grad()
def test_the_reference_model_is_the_base_with_its_subject_lora_to_the_bit(tiny_flux, subject_lora):
    bare = load_tiny(tiny_flux)
    backbone = load_tiny(tiny_flux, subject_lora=str(subject_lora))
    inputs = sample(backbone)
    base = backbone.predict(*inputs)
    assert not torch.allclose(base, bare.predict(*inputs), atol=1e-3)
    backbone.add_adapter(4)
    disturb(backbone)
    policy = backbone.predict(*inputs)
    assert not torch.allclose(policy, base, atol=1e-3)
    with backbone.reference_model():
        assert torch.equal(backbone.predict(*inputs), base)
    assert torch.equal(backbone.predict(*inputs), policy)


def trainable(backbone):
    return [name for name, parameter in backbone.transformer.named_parameters() if parameter.requires_grad]


def test_only_our_adapter_trains_also_after_the_reference_model_was_used_and_failed(tiny_flux, subject_lora):
    backbone = load_tiny(tiny_flux, subject_lora=str(subject_lora))
    assert trainable(backbone) == []
    backbone.add_adapter(4)
    ours = trainable(backbone)
    assert ours
    assert all(".policy." in name for name in ours)
    with backbone.reference_model():
        pass
    assert trainable(backbone) == ours
    with pytest.raises(KeyError), backbone.reference_model():
        raise KeyError
    assert trainable(backbone) == ours
    inputs = sample(backbone)
    disturb(backbone)
    with torch.no_grad(), backbone.reference_model():
        reference = backbone.predict(*inputs)
    assert not torch.allclose(backbone.predict(*inputs), reference, atol=1e-3)


def test_the_adapter_sits_on_uno_s_own_targets(backbone):
    backbone.add_adapter(4)
    layers = {name.split(".lora_")[0] for name in trainable(backbone)}
    double = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    expected = {f"transformer_blocks.{i}.attn.{name}" for i in range(2) for name in double}
    single = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_out")
    expected |= {f"single_transformer_blocks.{i}.{name}" for i in range(2) for name in single}
    assert layers == expected


def test_the_seed_decides_the_adapter_and_leaves_the_global_generator_alone(backbone):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    backbone.add_adapter(4, seed=3)
    assert torch.equal(torch.rand(1), expected)
    first = [p.clone() for p in backbone.adapter_parameters()]
    backbone.add_adapter(4, seed=3)  # replaces the one before
    assert all(torch.equal(a, b) for a, b in zip(first, backbone.adapter_parameters(), strict=True))
    backbone.add_adapter(4, seed=4)
    assert not all(torch.equal(a, b) for a, b in zip(first, backbone.adapter_parameters(), strict=True))


@torch.no_grad()
@pytest.mark.parametrize(("alpha", "targets"), [(None, None), (1.0, None), (8.0, ["to_q", "to_v"])])
def test_a_saved_adapter_comes_back_and_loads_in_a_plain_flux_pipeline(tiny_flux, tmp_path, alpha, targets):
    backbone = load_tiny(tiny_flux)
    backbone.add_adapter(4, alpha, targets)
    disturb(backbone)
    backbone.save_adapter(tmp_path)
    inputs = sample(backbone)
    expected = backbone.predict(*inputs)
    again = load_tiny(tiny_flux)
    assert not torch.allclose(again.predict(*inputs), expected, atol=1e-3)
    again.load_adapter(tmp_path)
    assert torch.equal(again.predict(*inputs), expected)
    again.load_adapter(tmp_path)  # a second time replaces the first
    assert torch.equal(again.predict(*inputs), expected)
    plain = FluxPipeline.from_pretrained(tiny_flux)
    plain.load_lora_weights(tmp_path)
    assert torch.equal(FluxUno(plain, precision="float32").predict(*inputs), expected)


@torch.no_grad()
@pytest.mark.filterwarnings("error:Already found")
def test_an_adapter_loads_on_top_of_the_subject_lora(tiny_flux, subject_lora, tmp_path):
    backbone = load_tiny(tiny_flux, subject_lora=str(subject_lora))
    backbone.add_adapter(4)
    disturb(backbone)
    backbone.save_adapter(tmp_path)
    inputs = sample(backbone)
    again = load_tiny(tiny_flux, subject_lora=str(subject_lora))
    again.load_adapter(tmp_path)
    assert torch.allclose(again.predict(*inputs), backbone.predict(*inputs), atol=1e-6)
    with backbone.reference_model(), again.reference_model():
        assert torch.equal(again.predict(*inputs), backbone.predict(*inputs))


# --- Models that are not there ---


def test_a_missing_or_wrong_folder_is_named_in_one_sentence(tmp_path):
    missing = f"{tmp_path}/nothing"
    assert refusal(model=missing) == f"the model {missing} does not exist: correct backbone.model"
    assert refusal(model="./nothing/here") == "the model ./nothing/here does not exist: correct backbone.model"
    assert refusal(model="some--one/model") == "the model some--one/model does not exist: correct backbone.model"
    assert "without model_index.json" in refusal(model=str(tmp_path))


def test_a_hub_model_that_cannot_be_reached_is_named_in_one_sentence(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refusal(model="nobody/nothing")
    assert message.startswith("the model nobody/nothing cannot be loaded (")
    assert message.endswith("go online once, name a folder that holds it, or correct backbone.model")


def test_missing_and_damaged_weight_files_are_named(tiny_flux, tmp_path, subject_lora):
    build_tiny_flux().save_pretrained(tmp_path / "flux")
    weights = tmp_path / "flux" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert f"the model {tmp_path}/flux cannot be loaded" in refusal(model=f"{tmp_path}/flux")
    weights.unlink()
    assert "diffusion_pytorch_model" in refusal(model=f"{tmp_path}/flux")
    lora = f"{tmp_path}/none.safetensors"
    expected = f"the subject LoRA {lora} does not exist: correct backbone.subject_lora"
    assert refusal(model=str(tiny_flux), subject_lora=lora) == expected
    (tmp_path / "half.safetensors").write_bytes(subject_lora.read_bytes()[:100])
    assert "half.safetensors" in refusal(model=str(tiny_flux), subject_lora=f"{tmp_path}/half.safetensors")


WIDTH = 32  # of the tiny transformer: two heads of 16


def lora_of(layers):
    """A LoRA in diffusers' layout, of rank 2, on layers {name: (in, out)}."""
    return {
        f"{name}.lora_{side}.weight": torch.zeros(shape)
        for name, (inputs, outputs) in layers.items()
        for side, shape in (("A", (2, inputs)), ("B", (outputs, 2)))
    }


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"transformer.transformer_blocks.19.attn.to_q": (WIDTH, WIDTH)}, "belongs to nothing in the transformer"),
        ({"transformer.transformer_blocks.0.attn.to_q": (48, WIDTH)}, r"has the shape \(2, 48\), which does not fit"),
        ({"transformer.transformer_blocks.0.attn.to_q": (WIDTH, 48)}, r"has the shape \(48, 2\), which does not fit"),
        (
            {"transformer_blocks.0.attn.to_q": (WIDTH, WIDTH)},
            "lacks the prefix 'transformer.': write it with diffusers",
        ),
        ({"unet.mid_block.attentions.0.to_q": (WIDTH, WIDTH)}, "belongs to nothing in the transformer"),
        ({"text_encoder.layers.0.self_attn.q_proj": (WIDTH, WIDTH)}, "belongs to nothing in the transformer"),
    ],
)
def test_a_subject_lora_of_another_model_or_layout_does_not_load(tiny_flux, tmp_path, layers, message):
    path = tmp_path / "other.safetensors"
    save_file(lora_of(layers), path)
    found = refusal(model=str(tiny_flux), subject_lora=str(path))
    assert re.match(
        rf"the subject LoRA {path} cannot be loaded \(its key .*{message}.*correct backbone.subject_lora$", found
    )


def to_q(part, block=0):
    return f"transformer.transformer_blocks.{block}.attn.to_q.{part}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"lora_A.default.weight": (2, WIDTH), "lora_A.weight": None},
            "lora_A.default.weight does not end as diffusers",
        ),
        (
            {"lora_B.policy.weight": (WIDTH, 2)},
            "lora_B.policy.weight does not end as diffusers' do: write it with diff",
        ),
        ({"lora_embedding_A": (2, WIDTH)}, "lora_embedding_A does not end as diffusers' do"),
        ({"lora_B.weight": None}, "lora_B.weight is missing"),
        ({"lora_A.weight": None}, "lora_A.weight is missing"),
        (
            {"lora_B.weight": (WIDTH, 3)},
            r"lora_B.weight has the shape (32, 3), which does not fit .*lora_A.weight of (2, 32)",
        ),
        ({"lora_magnitude_vector": (WIDTH + 1,)}, "lora_magnitude_vector has the shape (33,), which does not fit this"),
    ],
)
def test_a_layer_of_a_subject_lora_has_both_matrices_under_diffusers_names(tiny_flux, tmp_path, change, message):
    state = lora_of({to_q("")[:-1]: (WIDTH, WIDTH), to_q("", 1)[:-1]: (WIDTH, WIDTH)})
    for part, shape in change.items():
        state.pop(to_q(part), None)
        if shape:
            state[to_q(part)] = torch.zeros(shape)
    save_file(state, tmp_path / "lora.safetensors")
    found = refusal(model=str(tiny_flux), subject_lora=f"{tmp_path}/lora.safetensors")
    assert found.startswith(f"the subject LoRA {tmp_path}/lora.safetensors cannot be loaded (")
    assert re.search(message.replace("(", r"\(").replace(")", r"\)"), found) and found.endswith("backbone.subject_lora")


@pytest.mark.parametrize("extra", ["lora_B.bias", "lora_magnitude_vector"])
def test_a_subject_lora_may_have_biases_and_lengths(tiny_flux, tmp_path, extra):
    state = lora_of({to_q("")[:-1]: (WIDTH, WIDTH)}) | {to_q(extra): torch.ones(WIDTH)}
    save_file(state, tmp_path / "lora.safetensors")
    inputs = sample(load_tiny(tiny_flux))
    moved = load_tiny(tiny_flux, subject_lora=f"{tmp_path}/lora.safetensors")
    assert not torch.allclose(moved.predict(*inputs), load_tiny(tiny_flux).predict(*inputs), atol=1e-4)


def test_a_subject_lora_in_the_layout_of_diffusers_moves_the_model(tiny_flux, tmp_path):
    plain = load_tiny(tiny_flux)
    layers = {"transformer.transformer_blocks.0.attn.to_q": (WIDTH, WIDTH)}
    save_file({key: torch.ones_like(value) for key, value in lora_of(layers).items()}, tmp_path / "lora.safetensors")
    inputs = sample(plain)
    moved = load_tiny(tiny_flux, subject_lora=str(tmp_path / "lora.safetensors"))
    assert not torch.allclose(moved.predict(*inputs), plain.predict(*inputs), atol=1e-3)


def test_models_in_another_form_get_advice_that_fits(tiny_flux, tmp_path):
    single = tmp_path / "flux1-dev.safetensors"
    single.write_bytes(b"")
    assert "is a single file: make a folder of it with diffusers' FluxPipeline.from_single" in refusal(
        model=str(single)
    )
    for name, message in (("model.fp16.safetensors", "holds its variant fp16 alone"), ("model.bin", "no safetensors")):
        folder = shutil.copytree(tiny_flux, tmp_path / name)
        weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_name(f"diffusion_pytorch_{name}"))
        assert message in refusal(model=str(folder))
    lora = tmp_path / "lora.bin"
    lora.write_bytes(b"")
    assert "it is no safetensors file" in refusal(model=str(tiny_flux), subject_lora=str(lora))


def test_a_pipeline_of_another_family_or_task_does_not_load(tiny_flux, tmp_path):
    folder = shutil.copytree(tiny_flux, tmp_path / "other")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"FluxPipeline"', '"FluxFillPipeline"'))
    assert "is a FluxFillPipeline, and backbone.family flux_uno needs a FluxPipeline" in refusal(model=str(folder))
    for damaged in ("{half", "[]", "{}"):
        index.write_text(damaged)
        assert "has a damaged model_index.json: fetch it again" in refusal(model=str(folder))
    pipeline = FluxPipeline.from_pretrained(tiny_flux)
    sizes = dict(pipeline.transformer.config)
    wider = {"in_channels": 6 * sizes["in_channels"], "out_channels": sizes["in_channels"]}
    pipeline.transformer = FluxTransformer2DModel.from_config(sizes | wider)
    pipeline.save_pretrained(tmp_path / "fill")
    message = refusal(model=str(tmp_path / "fill"))
    assert f"its network takes {wider['in_channels']} channels and gives {sizes['in_channels']}: it is" in message


def test_an_adapter_folder_without_an_adapter_is_named(backbone, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        backbone.load_adapter(tmp_path)


# --- Sampling ---


def test_the_noise_of_a_sample_depends_on_its_seed_alone(backbone):
    _, _, condition = sample(backbone)
    both = backbone.sample(condition, [7, 8], (64, 64), steps=3)
    assert both.shape == (2, 3, 64, 64)
    alone = backbone.sample(condition[[1]], [8], (64, 64), steps=3)
    assert torch.allclose(alone, both[[1]], atol=1e-5)
    assert not torch.allclose(backbone.sample(condition[[1]], [7], (64, 64), steps=3), alone, atol=1e-2)


def test_an_unshifted_schedule_is_even_and_sampling_is_euler_s_method(backbone):
    latents, _, condition = sample(backbone)
    assert torch.allclose(backbone.sampling_times(latents.shape, 4), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))
    expected = latents
    with torch.no_grad():
        for t in (1.0, 0.75, 0.5, 0.25):
            expected = expected - 0.25 * backbone.predict(expected, torch.full((2,), t), condition)
    assert torch.allclose(backbone.denoise(latents, condition, 4), expected, atol=1e-5)


def test_a_size_that_does_not_fill_the_tokens_is_refused(backbone):
    _, _, condition = sample(backbone)
    with pytest.raises(ValueError, match="60×64 pixels: both must be multiples of 8"):
        backbone.sample(condition, [1, 2], (60, 64), steps=1)
