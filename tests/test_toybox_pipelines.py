"""The toybox pipeline is an ordinary FLUX pipeline: built offline, saved, and loaded as published ones are."""

from itertools import combinations

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file
from tiny_fixtures import build_tiny_flux
from tiny_sdxl import WEIGHTS, load_tiny_sdxl, write_tiny_sdxl

from focusdpo_lib import backbones, params
from focusdpo_lib.backbones import SdxlIp
from focusdpo_lib.toybox import world
from focusdpo_lib.toybox.batches import to_pixels
from focusdpo_lib.toybox.ip_adapter import image_matrices, save_ip_adapter
from focusdpo_lib.toybox.pipelines import TEXT_LENGTH, build_autoencoder, build_flux, vocabulary
from focusdpo_lib.toybox.settings import SETTINGS
from focusdpo_lib.toybox.transformer import make_latents, training_sample
from focusdpo_lib.toybox.unet import new_backbone, save_backbone, train_sdxl_ip


@pytest.fixture(scope="module")
def loaded(tiny_flux):
    return FluxPipeline.from_pretrained(tiny_flux)


def test_every_word_of_a_caption_is_one_token_in_both_tokenizers(loaded):
    for tokenizer, extra in ((loaded.tokenizer, 2), (loaded.tokenizer_2, 1)):  # start and end; end
        seen = {}
        for word in vocabulary():
            ids = tokenizer(word).input_ids
            assert len(ids) == 1 + extra, word
            seen[word] = ids[extra - 1]
        assert len(set(seen.values())) == len(seen)


def test_the_longest_caption_fits_and_says_every_word(loaded):
    captions = [
        f"a {a} and a {b} {phrase}" for a, b in combinations(world.CLASSES, 2) for _, phrase in SETTINGS.values()
    ]
    longest = max(captions, key=lambda caption: len(caption.split()))
    words = longest.split()
    for tokenizer, extra in ((loaded.tokenizer, 2), (loaded.tokenizer_2, 1)):
        assert tokenizer.model_max_length == TEXT_LENGTH
        assert len(words) + extra <= TEXT_LENGTH
        singles = [tokenizer(word).input_ids[extra - 1] for word in words]
        assert tokenizer(longest).input_ids[extra - 1 : -1] == singles


def test_an_unknown_word_is_no_known_one(loaded):
    known = {loaded.tokenizer_2(word).input_ids[0] for word in vocabulary()}
    assert not known & set(loaded.tokenizer_2("zebra").input_ids)


@torch.no_grad()
def test_a_pipeline_comes_back_from_disk_the_same(tiny_flux, loaded):
    built = build_tiny_flux()
    prompts = ["a cat and a mug on a wooden floor", "a star at sunset"]
    expected, found = (p.encode_prompt(prompts, prompts, max_sequence_length=TEXT_LENGTH) for p in (built, loaded))
    assert torch.equal(expected[0], found[0])
    assert torch.equal(expected[1], found[1])
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        first, second = getattr(built, name).state_dict(), getattr(loaded, name).state_dict()
        assert all(torch.equal(second[key], value) for key, value in first.items())
    assert loaded.vae.config.shift_factor == 0.1
    assert dict(loaded.scheduler.config).items() >= {"shift": 1.0, "use_dynamic_shifting": False}.items()
    assert {p.suffix for p in tiny_flux.rglob("*") if p.is_file()} == {".json", ".safetensors"}


def test_diffusers_own_sampling_runs_on_it(loaded):
    loaded.set_progress_bar_config(disable=True)
    image = loaded("a cat in the snow", height=64, width=64, num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (64, 64, 3)


def test_the_prompt_reaches_both_text_encoders_per_word(loaded):
    """Pooled CLIP and T5 tell 'cat' from 'car'; T5's embeddings of a word's neighbours are padded alike."""
    first, second = (loaded.encode_prompt(p, p, max_sequence_length=TEXT_LENGTH) for p in ("a cat", "a car"))
    assert not torch.allclose(first[0], second[0], atol=1e-3)
    assert not torch.allclose(first[1], second[1], atol=1e-3)


def test_the_seed_decides_the_weights():
    first, again, other = (build_flux(build_autoencoder((8, 8, 8)), heads=1, head_dim=16, double_blocks=1,
                                      single_blocks=0, text_dim=16, seed=seed).transformer.state_dict()
                           for seed in (0, 0, 1))  # fmt: skip
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert not all(torch.equal(other[name], value) for name, value in first.items())


@pytest.mark.parametrize("head_dim", [16, 24, 32, 64, 128])
def test_rotary_channels_fill_every_head_in_even_parts(head_dim):
    pipeline = build_flux(
        build_autoencoder((8, 8, 8)), heads=1, head_dim=head_dim, double_blocks=1, single_blocks=0, text_dim=16
    )
    axes = pipeline.transformer.config.axes_dims_rope
    assert sum(axes) == head_dim
    assert all(axis > 0 and axis % 2 == 0 for axis in axes)


# --- The U-Net with its IP-Adapter ---


def test_an_ip_adapter_is_written_as_it_was_published(tmp_path):
    """Of a file in the published layout, written by hand and loaded by diffusers, the toybox writes the same again."""
    folder = write_tiny_sdxl(tmp_path)
    backbone = load_tiny_sdxl(folder)
    encoder = backbone.pipeline.image_encoder
    save_ip_adapter(tmp_path / "again", backbone.resampler, image_matrices(backbone.unet), encoder)
    first, second = (load_file(tmp_path / name / WEIGHTS) for name in ("ip", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@torch.no_grad()
def test_a_trained_backbone_comes_back_from_its_folder(tmp_path):
    backbone = new_backbone(build_autoencoder((8, 8, 8)), image_width=32, hidden=64, channels=(16, 32), head_dim=16)
    backbone.precision = torch.float32
    inputs = torch.randn(2, 8, 16, 16), torch.tensor([0.3, 0.9])
    photos = [torch.rand(2, 3, 32, 32) * 2 - 1]
    expected = backbone.predict(*inputs, backbone.condition(["a mug on a beach"] * 2, photos))
    save_backbone(backbone, tmp_path / "sdxl_ip", torch.float32)
    use = params.Backbone(family="sdxl_ip", model=str(tmp_path / "sdxl_ip"), precision="float32")
    again = backbones.load(use)
    assert torch.equal(again.predict(*inputs, again.condition(["a mug on a beach"] * 2, photos)), expected)


def test_latents_made_for_flux_are_shifted_to_what_sdxl_s_pipeline_decodes(tmp_path):
    """FLUX subtracts its autoencoder's shift from a latent, SDXL has none."""
    vae = build_autoencoder((8, 8, 8))
    vae.register_to_config(shift_factor=0.25, scaling_factor=2.0)
    make_latents(vae, tmp_path / "latents.safetensors", 0, 4, batch=4)
    seen = []

    def watched(self, latents, noise, t):
        seen.append(latents)
        return original(self, latents, noise, t)

    original = SdxlIp.noised
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SdxlIp, "noised", watched)
        sizes = {"image_width": 32, "hidden": 64, "channels": (16, 32), "head_dim": 16, "text_dim": 16}
        backbone, _ = train_sdxl_ip(vae, [tmp_path / "latents.safetensors"], tmp_path, 1, 2, sizes=sizes)
    assert vae.config.shift_factor == 0.25, "the FLUX pipeline shares it"
    known = load_file(tmp_path / "latents.safetensors")["target"].float() + 0.5
    assert all(any(torch.equal(row, one) for one in known) for row in seen[0])
    scene, photos = training_sample(0, 0)
    pixels = to_pixels(world.render(scene)[0][None])
    assert torch.allclose(backbone.encode_images(pixels)[0], known[0], atol=0.1)  # one of them was made in bfloat16
    assert len(photos) == 1 and photos[0].shape == (32, 32, 3)
