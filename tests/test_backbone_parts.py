"""Every part of a base is whole and of its kind, or nothing starts: libraries would draw at random what files lack."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_fixtures import build_tiny_flux
from tiny_sdxl import WEIGHTS, write_tiny_sdxl
from tiny_training import refusal
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from focusdpo_lib import backbones, params

ENCODER = "models/image_encoder"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folders of both families: flux, and sdxl with ip."""
    folder = write_tiny_sdxl(tmp_path_factory.mktemp("whole"))
    build_tiny_flux().save_pretrained(folder / "flux")
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "models")


def settings(folder, model):
    if model == "flux":
        return {"model": str(folder / "flux"), "precision": "float32"}
    names = {"family": "sdxl_ip", "model": str(folder / "sdxl"), "ip_adapter": str(folder / "ip")}
    return names | {"precision": "float32"}


def rewrite(path, change):
    """Changes the tensors of a file in place."""
    state = load_file(path)
    change(state)
    save_file(state, path, {"format": "pt"})


def without_the_last(state):
    del state[max(state)]


def with_one_more(state):
    state["one.more.weight"] = torch.zeros(2)


PARTS = [
    *(("flux", part) for part in ("text_encoder", "text_encoder_2", "transformer", "vae")),
    *(("sdxl", part) for part in ("text_encoder", "text_encoder_2", "unet", "vae")),
]


@pytest.mark.parametrize(("model", "part"), PARTS)
def test_a_part_whose_file_lacks_one_weight_does_not_load(folder, model, part, caplog):
    rewrite(next((folder / model / part).glob("*.safetensors")), without_the_last)
    message = refusal(**settings(folder, model))
    lacks = rf"\(its {part} lacks [\w.]+( and 1 more)? of the weights of a \w+\): fetch it again"
    assert re.search(f"^the model {folder}/{model} cannot be loaded {lacks}", message), message
    assert not caplog.records  # the libraries' own reports are that sentence


def test_half_a_file_counts_what_it_lacks(folder):
    def half(state):
        for key in sorted(state)[::2]:
            del state[key]

    path = folder / "flux" / "transformer" / "diffusion_pytorch_model.safetensors"
    count = len(load_file(path))
    rewrite(path, half)
    assert f" and {(count + 1) // 2 - 1} more of the weights of a FluxTransformer2DModel" in refusal(
        **settings(folder, "flux")
    )


@pytest.mark.parametrize("weights", ["int8", "nf4"])
def test_a_quantized_network_whose_file_lacks_a_weight_does_not_load(folder, weights, bitsandbytes_on_cpu):
    rewrite(folder / "flux" / "transformer" / "diffusion_pytorch_model.safetensors", without_the_last)
    use = settings(folder, "flux") | {"weights": weights, "precision": "bfloat16"}
    assert f"the model {folder}/flux cannot be loaded (" in refusal(**use)  # by diffusers, before it reports


@pytest.mark.parametrize(("model", "part"), [("flux", "transformer"), ("sdxl", "unet"), ("sdxl", "vae")])
def test_a_network_smaller_than_its_file_does_not_load(folder, model, part):
    rewrite(next((folder / model / part).glob("*.safetensors")), with_one_more)
    assert f"(its {part} has no place for one.more.weight of its files)" in refusal(**settings(folder, model))


def test_a_text_encoder_s_file_may_hold_the_rest_of_clip(folder):
    rewrite(folder / "flux" / "text_encoder" / "model.safetensors", with_one_more)
    backbones.load(params.Backbone(**settings(folder, "flux")))


@pytest.mark.parametrize("part", ["text_encoder", "transformer"])
def test_a_part_of_another_size_and_one_that_is_away_are_named(folder, part):
    config = folder / "flux" / part / "config.json"
    sizes = json.loads(config.read_text())
    name = "vocab_size" if part == "text_encoder" else "joint_attention_dim"
    config.write_text(json.dumps(sizes | {name: sizes[name] + 5}))
    message = refusal(**settings(folder, "flux"))
    assert str(sizes[name]) in message and str(sizes[name] + 5) in message
    shutil.rmtree(config.parent)
    assert f"(it lacks {part}/config.json)" in refusal(**settings(folder, "flux"))


@torch.no_grad()
def test_a_base_in_several_files_is_the_base(whole, tmp_path):
    build_tiny_flux().save_pretrained(tmp_path / "flux", max_shard_size="20KB")
    assert len(list((tmp_path / "flux" / "transformer").glob("*-of-*.safetensors"))) > 2
    models = [backbones.load(params.Backbone(**settings(at, "flux"))) for at in (whole, tmp_path)]
    for name in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        ours, theirs = (getattr(model.pipeline, name).state_dict() for model in models)
        assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())


# --- tokenizers ---


@pytest.mark.parametrize("model", ["flux", "sdxl"])
@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_a_tokenizer_without_a_vocabulary_does_not_load(folder, model, name):
    (folder / model / name / "tokenizer.json").unlink()
    message = refusal(**settings(folder, model))
    assert f"/{model} cannot be loaded (its {name} has no vocabulary): fetch it again" in message
    shutil.rmtree(folder / model / name)
    assert f"(its {name} has no vocabulary)" in refusal(**settings(folder, model))


@pytest.mark.parametrize(("model", "name"), [("flux", "tokenizer_2"), ("sdxl", "tokenizer")])
def test_a_tokenizer_of_another_encoder_does_not_load(folder, model, name):
    tokenizer = AutoTokenizer.from_pretrained(folder / model / name)
    before = len(tokenizer)
    rows = json.loads((folder / model / name.replace("tokenizer", "text_encoder") / "config.json").read_text())
    tokenizer.add_tokens([f"word{i}" for i in range(rows["vocab_size"] - before + 3)])
    tokenizer.save_pretrained(folder / model / name)
    expected = f"(its {name} knows {rows['vocab_size'] + 3} words, and its {name.replace('tokenizer', 'text_encoder')}"
    assert expected in refusal(**settings(folder, model))


def test_tokenizers_in_each_other_s_place_do_not_load(folder):
    first, second = folder / "flux" / "tokenizer", folder / "flux" / "tokenizer_2"
    first.rename(folder / "away"), second.rename(first), (folder / "away").rename(second)
    assert "cannot be loaded (" in refusal(**settings(folder, "flux"))


@pytest.mark.parametrize("length", [13, 512])
def test_a_tokenizer_that_cuts_later_than_its_encoder_reads_does_not_load(folder, length):
    config = folder / "sdxl" / "tokenizer_2" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": length}))
    expected = f"(its tokenizer_2 cuts after {length} words, and its encoder reads 12)"
    assert expected in refusal(**settings(folder, "sdxl"))


# --- what the U-Net was trained to predict ---


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_a_u_net_that_predicts_something_else_than_the_noise_does_not_load(folder, prediction):
    config = folder / "sdxl" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": prediction}))
    expected = f"(its U-Net predicts {prediction} by its scheduler_config.json, and the kit trains epsilon alone)"
    assert expected in refusal(**settings(folder, "sdxl"))


# --- the IP-Adapter and its image encoder ---

SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
SEEN = {"image_size": 32, "patch_size": 8}
TEXT = CLIPTextConfig(**SIZES, intermediate_size=32, vocab_size=99, bos_token_id=0, eos_token_id=1)
OTHERS = {
    "CLIP's text": lambda: CLIPTextModelWithProjection(TEXT),
    "DINOv2": lambda: Dinov2Model(Dinov2Config(**SIZES, **SEEN)),
    "SigLIP": lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES, **SEEN, intermediate_size=32)),
}


@pytest.mark.parametrize("other", OTHERS)
def test_an_image_encoder_of_another_kind_does_not_load(folder, other):
    shutil.rmtree(folder / "ip" / ENCODER)
    OTHERS[other]().save_pretrained(folder / "ip" / ENCODER)
    message = refusal(**settings(folder, "sdxl"))
    start, end = f"the image encoder {folder}/ip/{ENCODER} cannot be loaded (it ", "correct backbone.ip_encoder"
    assert message.startswith(start) and message.endswith(end) and "vision_model.embeddings" in message


@pytest.mark.parametrize("gone", ["vision_model.encoder.layers.1.", "vision_model.pre_layrnorm.weight"])
def test_an_image_encoder_whose_file_lacks_weights_does_not_load(folder, gone):
    def lose(state):
        for key in [key for key in state if key.startswith(gone)]:
            del state[key]

    rewrite(folder / "ip" / ENCODER / "model.safetensors", lose)
    message = refusal(**settings(folder, "sdxl"))
    assert f"(it lacks {gone}" in message and message.endswith("correct backbone.ip_encoder")


def test_an_image_encoder_needs_no_projection(folder):
    shutil.rmtree(folder / "ip" / ENCODER)
    CLIPVisionModel(CLIPVisionConfig(**SIZES, **SEEN, intermediate_size=32)).save_pretrained(folder / "ip" / ENCODER)
    backbones.load(params.Backbone(**settings(folder, "sdxl")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # the tiny U-Net has four cross-attentions: 1, 3, 5 and 7
        (
            {"ip_adapter.9.to_k_ip.weight": (16, 32)},
            "ip_adapter.9.to_k_ip.weight belongs to nothing in an IP-Adapter-Pl",
        ),
        (
            {"ip_adapter.5.to_k_lora.down.weight": (4, 16)},
            "ip_adapter.5.to_k_lora.down.weight belongs to nothing in an",
        ),
        ({"image_proj.extra": (1,)}, "image_proj.extra belongs to nothing in an IP-Adapter-Plus for this model"),
        (
            {"image_proj.perceiver_resampler.proj_in.weight": (64, 24)},
            "proj_in.weight belongs to nothing in an IP-Adap",
        ),
        ({"image_proj.layers.4.0.to_q.weight": (64, 64)}, "image_proj.layers.4.0.to_q.weight belongs to nothing in an"),
        ({"image_proj.layers.3.1.3.weight": None}, "image_proj.layers.3.1.3.weight is missing"),
        ({"ip_adapter.7.to_v_ip.weight": None}, "ip_adapter.7.to_v_ip.weight is missing"),
        ({"ip_adapter.7.to_v_ip.weight": (32, 24)}, "has the shape (32, 24) where the model needs (32, 32)"),
    ],
)
def test_an_ip_adapter_with_more_or_less_than_the_u_net_takes_does_not_load(folder, change, message):
    def changed(state):
        for key, shape in change.items():
            state.pop(key, None)
            if shape:
                state[key] = torch.zeros(shape)

    rewrite(folder / "ip" / WEIGHTS, changed)
    found = refusal(**settings(folder, "sdxl"))
    assert found.startswith(f"the IP-Adapter {folder}/ip cannot be loaded (its key ") and message in found
    assert found.endswith("correct backbone.ip_adapter")


def test_an_ip_adapter_that_is_no_safetensors_file_does_not_load(folder):
    (folder / "ip" / WEIGHTS).rename(folder / "ip" / "adapter.bin")
    message = refusal(**settings(folder, "sdxl"), ip_weights="adapter.bin")
    assert "('adapter.bin' is no safetensors file, and the kit loads nothing else: correct backbone.ip_w" in message
