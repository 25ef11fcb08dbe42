"""SDXL with IP-Adapter-Plus: equal to diffusers' own pipeline; our adapter alone tells policy and reference apart."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.image_processor import IPAdapterMaskProcessor
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_sdxl import TOKENS, WEIGHTS, load_tiny_sdxl, write_tiny_sdxl
from tiny_training import TRAINING, tiny_pairs
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from focusdpo_lib import backbones, params
from focusdpo_lib.backbones import BackboneError, Conditioning
from focusdpo_lib.backbones.sdxl_ip import CLIP_MEAN, CLIP_STD, clip_pixels
from focusdpo_lib.evaluation.encoders import preprocess
from focusdpo_lib.training import draws, step_objective
from focusdpo_lib.training.pairs import prepare

PROMPTS = ["a cat in the snow", "a mug on a beach"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_sdxl(tmp_path_factory.mktemp("models"))


@pytest.fixture
def backbone(folder):
    return load_tiny_sdxl(folder, precision="float32")


def references(count=2, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.rand(2, 3, 32, 32, generator=draw) * 2 - 1 for _ in range(count)]


def sample(backbone, count=2):
    draw = torch.Generator().manual_seed(1)
    latents, t = torch.randn(2, 8, 16, 16, generator=draw), torch.rand(2, generator=draw)
    return latents, t, backbone.condition(PROMPTS, references(count))


def plain_pipeline(folder):
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder / "sdxl")
    subfolder, name = WEIGHTS.split("/")
    pipeline.load_ip_adapter(str(folder / "ip"), subfolder, name, "models/image_encoder")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def disturb(backbone, size=0.3):
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in backbone.adapter_parameters():
            weight += size * torch.randn(weight.shape, generator=draw)


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2])
def test_a_guided_sampling_run_is_the_library_s_own(folder, backbone, count):
    pipeline = plain_pipeline(folder)
    pictures = references(count)
    size = pipeline.image_encoder.config.image_size
    noise = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(3))
    theirs = []
    for i, prompt in enumerate(PROMPTS):  # it takes one set of images for all prompts of a call
        images = clip_pixels(torch.cat([p[[i]] for p in pictures]), size)
        seen, nothing = (
            pipeline.image_encoder(x, output_hidden_states=True).hidden_states[-2]
            for x in (images, torch.zeros_like(images))
        )
        embeds = torch.stack([nothing, seen])  # (unconditional and conditional, images, patches, d)
        theirs += pipeline(
            prompt, negative_prompt="", ip_adapter_image_embeds=[embeds], latents=noise[[i]], guidance_scale=5.0,
            num_inference_steps=4, output_type="latent", height=64, width=64,
        ).images  # fmt: skip
    theirs = torch.stack(theirs)
    ours = backbone.denoise(noise, backbone.condition(PROMPTS, pictures), 4, guidance=5.0)
    largest = theirs.abs().max()
    assert largest > 0.5
    assert (ours - theirs).abs().max() < 1e-5 * largest


def test_references_are_prepared_as_clip_takes_them():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)).resize((96, 72), 2)
    published = preprocess(image, 32, 32, CLIP_MEAN, CLIP_STD)  # by Pillow
    pixels = torch.from_numpy(np.asarray(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    assert (clip_pixels(pixels, 32)[0] - published).abs().mean() < 0.02
    assert clip_pixels(pixels, 32).shape == (1, 3, 32, 32)


def test_noise_follows_the_schedule_and_is_the_target(backbone):
    image, noise = torch.randn(3, 8, 4, 4), torch.randn(3, 8, 4, 4)
    t = torch.tensor([0.001, 0.5, 1.0])
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2  # "scaled linear"
    signal = (1 - beta).cumprod(0)[[0, 499, 999]].float().view(3, 1, 1, 1)
    expected = signal.sqrt() * image + (1 - signal).sqrt() * noise
    assert torch.allclose(backbone.noised(image, noise, t), expected, atol=1e-5)
    assert torch.equal(backbone.target(image, noise, t), noise)


@torch.no_grad()
def test_averaged_tokens_do_not_know_their_order_and_one_reference_is_its_own_average(folder, backbone):
    averaging = load_tiny_sdxl(folder, precision="float32", image_tokens="average")
    latents, t, condition = sample(averaging)
    swapped = Conditioning(condition.text, condition.pooled, condition.references[::-1])
    both = averaging.predict(latents, t, condition)
    assert torch.allclose(averaging.predict(latents, t, swapped), both, atol=1e-5)
    assert not torch.allclose(backbone.predict(latents, t, condition), both, atol=1e-4)
    latents, t, one = sample(backbone, 1)
    assert torch.equal(averaging.predict(latents, t, one), backbone.predict(latents, t, one))


@torch.no_grad()
def test_masks_bind_each_reference_to_its_region(folder, backbone):
    """Without any region a reference does nothing; with all of them in full, attentions add up instead of sharing."""
    masking = load_tiny_sdxl(folder, precision="float32", image_tokens="masks")
    latents, t, condition = sample(masking)
    assert condition.regions.shape == (2, 2, 64, 64)  # stripes, where nobody said where the subjects stand
    assert torch.equal(condition.regions.sum(1), torch.ones(2, 64, 64))
    assert condition.regions[:, 0, :, :32].all() and condition.regions[:, 1, :, 32:].all()

    def predicted(regions, references=condition.references):
        return masking.predict(latents, t, replace(condition, regions=regions, references=references))

    nothing = predicted(torch.zeros(2, 2, 16, 16))
    zero = tuple(torch.zeros_like(tokens) for tokens in condition.references)
    unseen = Conditioning(condition.text, condition.pooled, zero)
    assert torch.allclose(nothing, backbone.predict(latents, t, unseen), atol=1e-5)  # zero tokens have zero values
    left = torch.zeros(2, 2, 16, 16)
    left[:, 0, :, :8] = 1
    swapped = (condition.references[0], -condition.references[1])
    assert torch.equal(predicted(left), predicted(left, swapped))  # the second reference has no region
    assert not torch.allclose(predicted(left), nothing, atol=1e-4)


@torch.no_grad()
def test_masks_equal_the_library_s_own_and_one_reference_needs_none(folder):
    masking = load_tiny_sdxl(folder, precision="float32", image_tokens="masks", scale=0.7)
    latents, t, condition = sample(masking)
    steps = (t * 1000).ceil().long() - 1
    plain = plain_pipeline(folder)
    plain.set_ip_adapter_scale(0.7)
    plain.unet.encoder_hid_proj = torch.nn.Identity()
    for row in range(2):  # the library's own masks are one set for a batch
        regions = IPAdapterMaskProcessor().preprocess(list(condition.regions[row].numpy()), height=64, width=64)
        one = condition[[row]]
        size = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]])
        added = {"text_embeds": one.pooled, "time_ids": size, "image_embeds": [torch.stack(one.references, 1)]}
        masks = [regions.reshape(1, 2, *regions.shape[2:])]
        expected = plain.unet(latents[[row]], steps[[row]], one.text, added_cond_kwargs=added,
                              cross_attention_kwargs={"ip_adapter_masks": masks}).sample  # fmt: skip
        assert torch.allclose(masking.predict(latents, t, condition)[[row]], expected, atol=1e-5)
    assert sample(masking, 1)[2].regions is None


@torch.no_grad()
def test_with_masks_training_binds_references_to_the_winner_s_subjects_and_taps_see_all(folder):
    masking = load_tiny_sdxl(folder, precision="float32", image_tokens="masks")
    data = prepare(masking, tiny_pairs(2), params.Masks())
    assert data[1].conditioning.regions is None
    pairs = data[2]
    assert torch.equal(pairs.conditioning.regions.flatten(2), pairs.prior_tokens)
    tap = Recorder()
    masking.predict(pairs.win, torch.full((2,), 0.5), pairs.conditioning, taps=tap)
    assert all(len(keys) == 2 and keys[0].shape[1] == TOKENS for _, keys, _ in tap.seen.values())


class Recorder:
    samples = slice(None)

    def __init__(self, features="query_key", reference_tokens="image_keys"):
        self.features, self.reference_tokens, self.seen = features, reference_tokens, {}

    def __call__(self, layer, target, references, grid):
        assert layer not in self.seen
        self.seen[layer] = (target, references, grid)


@torch.no_grad()
def test_taps_get_queries_and_each_reference_s_keys_of_every_cross_attention(backbone):
    latents, t, condition = sample(backbone)
    tap, plain = Recorder(), backbone.predict(latents, t, condition)
    assert torch.equal(backbone.predict(latents, t, condition, taps=tap), plain)
    assert sorted(tap.seen) == backbone.attention_layers("all") == [0, 1, 2, 3]
    for layer, (target, keys, grid) in tap.seen.items():
        width = backbone.blocks[layer].attn2.inner_dim
        assert target.shape == (2, grid[0] * grid[1], width)
        weights = backbone.blocks[layer].attn2.processor.to_k_ip[0]
        for key, tokens in zip(keys, condition.references, strict=True):
            assert key.shape == (2, TOKENS, width)
            assert torch.allclose(key, weights(tokens), atol=1e-5)
    assert {grid for *_, grid in tap.seen.values()} == {(8, 8)}
    assert not any(module._forward_hooks for module in backbone.unet.modules())


TAPPED = {  # feature: (module of a block that makes the target's tokens, and a reference's)
    "block_output": ("", ""),
    "query": ("attn2.to_q", "attn2.to_q"),
    "query_key": ("attn1.to_q", "attn1.to_k"),
}


@torch.no_grad()
@pytest.mark.parametrize("features", TAPPED)
def test_the_network_looks_at_each_reference_alone_with_its_class_as_prompt_and_its_own_tokens(folder, features):
    """R7, own: expected tokens by hooks of our own on the plain pipeline's U-Net, one reference at a time."""
    backbone, plain = load_tiny_sdxl(folder, precision="float32"), plain_pipeline(folder)
    latents, t, _ = sample(backbone)
    words = [["cat", "mug"], ["duck", "car"]]
    condition = backbone.condition(PROMPTS, references(2), classes=words)
    steps = (t * 1000 - 1e-3).ceil().long() - 1
    draw, views, expected = torch.Generator().manual_seed(5), [], [[], []]
    of_target, of_reference = TAPPED[features]
    blocks = [m for m in plain.unet.modules() if type(m).__name__ == "BasicTransformerBlock"]
    for subject, (photo, names) in enumerate(zip(references(2), words, strict=True)):
        clean = plain.vae.encode(photo).latent_dist.mode() * plain.vae.config.scaling_factor
        noise = torch.randn(clean.shape, generator=draw)
        share = backbone.noising.alphas_cumprod[steps].view(-1, 1, 1, 1)
        noised = share.sqrt() * clean + (1 - share).sqrt() * noise
        views.append(condition.views[subject]._replace(latents=noised))
        text, _, pooled, _ = plain.encode_prompt(names, device="cpu", do_classifier_free_guidance=False)
        seen = clip_pixels(photo, plain.image_encoder.config.image_size)
        seen = plain.image_encoder(seen, output_hidden_states=True).hidden_states[-2]
        size = torch.tensor([[32.0, 32.0, 0.0, 0.0, 32.0, 32.0]]).expand(2, -1)
        added = {"text_embeds": pooled, "time_ids": size, "image_embeds": [seen[:, None]]}
        hooks = [
            (block.get_submodule(of_reference) if of_reference else block).register_forward_hook(
                lambda _, __, out, subject=subject: expected[subject].append(out)
            )
            for block in blocks
        ]
        plain.unet(noised, steps, text, added_cond_kwargs=added)
        for hook in hooks:
            hook.remove()
    condition, tap = replace(condition, views=tuple(views)), Recorder(features, "own")
    own = backbone.blocks[2].get_submodule(of_target) if of_target else backbone.blocks[2]
    targets = []
    hook = own.register_forward_hook(lambda _, __, out: targets.append(out))
    plain_prediction = backbone.predict(latents, t, condition)
    hook.remove()
    assert torch.equal(backbone.predict(latents, t, condition, taps=tap), plain_prediction)
    assert sorted(tap.seen) == [0, 1, 2, 3]
    assert torch.equal(tap.seen[2][0], targets[0])
    for layer, (_, found, grid) in tap.seen.items():
        assert grid == (8, 8)
        for subject, tokens in enumerate(found):
            assert tokens.shape[:2] == (2, 16)  # 8×8 latents at half the side
            assert torch.allclose(tokens, expected[subject][layer], atol=1e-5), (layer, subject)
    assert not any(module._forward_hooks for module in backbone.unet.modules())


@torch.no_grad()
def test_only_the_samples_that_are_looked_at_go_through_the_network_again(backbone):
    latents, t, _ = sample(backbone)
    condition = backbone.condition(PROMPTS, references(1), classes=[["cat", "mug"]])
    whole, half = Recorder("query", "own"), Recorder("query", "own")
    half.samples = slice(0, 1)
    for tap in (whole, half):
        backbone.predict(latents, t, condition, taps=tap)
    for layer, (target, (tokens,), _) in half.seen.items():
        assert len(target) == 2 and len(tokens) == 1
        assert torch.allclose(tokens, whole.seen[layer][1][0][:1], atol=1e-5)


def test_a_conditioning_without_views_is_named(backbone):
    with pytest.raises(ValueError, match="no views of its references: call `condition` with `classes`"):
        backbone.predict(*sample(backbone), taps=Recorder("query", "own"))


@torch.no_grad()
def test_the_reference_model_is_the_base_with_its_ip_adapter_to_the_bit(backbone):
    inputs = sample(backbone)
    base = backbone.predict(*inputs)
    backbone.add_adapter(4)
    assert torch.equal(backbone.predict(*inputs), base)  # an untrained adapter changes nothing
    disturb(backbone)
    policy = backbone.predict(*inputs)
    assert not torch.allclose(policy, base, atol=1e-3)
    with backbone.reference_model():
        assert torch.equal(backbone.predict(*inputs), base)
    assert torch.equal(backbone.predict(*inputs), policy)
    without = Conditioning(inputs[2].text, inputs[2].pooled, tuple(torch.zeros_like(r) for r in inputs[2].references))
    with backbone.reference_model():
        assert not torch.allclose(backbone.predict(*inputs[:2], without), base, atol=1e-3)  # it does see references


def test_the_adapter_sits_on_every_attention_and_on_the_image_keys_and_values(backbone):
    backbone.add_adapter(4)
    layers = {n.split(".lora_")[0] for n, p in backbone.unet.named_parameters() if p.requires_grad}
    ends = {name.split("transformer_blocks.0.")[1] for name in layers}
    common = {f"{a}.{m}" for a in ("attn1", "attn2") for m in ("to_q", "to_k", "to_v", "to_out.0")}
    assert ends == common | {"attn2.processor.to_k_ip.0", "attn2.processor.to_v_ip.0"}
    assert len(layers) == 4 * 10


@torch.no_grad()
def test_a_saved_adapter_comes_back_and_loads_in_a_plain_pipeline(folder, backbone, tmp_path):
    backbone.add_adapter(4, alpha=2.0)
    disturb(backbone)
    backbone.save_adapter(tmp_path)
    inputs = sample(backbone)
    expected = backbone.predict(*inputs)
    again = load_tiny_sdxl(folder, precision="float32")
    assert not torch.allclose(again.predict(*inputs), expected, atol=1e-3)
    again.load_adapter(tmp_path)
    assert torch.equal(again.predict(*inputs), expected)
    plain = plain_pipeline(folder)
    plain.load_lora_weights(tmp_path)
    ours = backbones.SdxlIp(plain, precision="float32")
    assert torch.equal(ours.predict(*inputs), expected)


def test_the_focus_weight_lies_on_the_latent_grid_inside_the_subjects(backbone):
    data = prepare(backbone, tiny_pairs(2), params.Masks())
    at = draws(data, params.section("training", TRAINING))
    backbone.add_adapter(2)
    pairs = data[at(0).count]
    _, focus = step_objective(backbone, pairs, at(0), params.Objective(), params.Masks())
    assert pairs.token_grid == (16, 16) and focus.focus.shape == (2, 16, 16)
    prior = pairs.prior_tokens[at(0).rows].amax(1).reshape(2, 16, 16)
    assert (focus.focus * (1 - prior)).abs().max() == 0 < focus.focus.max()


def test_settings_load_it_and_what_is_missing_is_named(folder, tmp_path):
    def load(**changes):
        values = {"family": "sdxl_ip", "model": f"{folder}/sdxl", "ip_adapter": f"{folder}/ip", "precision": "float32"}
        return backbones.load(params.section("backbone", values | changes))

    assert isinstance(load(ip_scale=0.5), backbones.SdxlIp)
    with pytest.raises(BackboneError, match=r"^backbone.ip_adapter is missing: name"):
        load(ip_adapter=None)
    with pytest.raises(BackboneError, match=r"^the IP-Adapter .* does not exist: correct backbone.ip_adapter$"):
        load(ip_adapter=f"{tmp_path}/none")
    with pytest.raises(BackboneError, match=r"^the IP-Adapter .* is a folder without other.safetensors"):
        load(ip_weights="other.safetensors")


@pytest.mark.parametrize("size", [(96, 64), (64, 200), (128, 128)])
def test_a_photo_is_seen_in_sampling_as_it_is_in_training(backbone, size):
    """Fine stripes, whichever way the photo lies: neither side is scaled below the encoder's and blown up again."""
    x, y = np.mgrid[0 : size[1], 0 : size[0]][::-1]
    fine = (127.5 + 127.5 * np.sin(x / 1.5) * np.sin(y / 1.5)).round().astype(np.uint8)
    photo = Image.fromarray(np.dstack([fine] * 3))
    whole = torch.from_numpy(np.asarray(photo, np.float32)).permute(2, 0, 1)[None] / 127.5 - 1  # as from a dataset
    trained, sampled = clip_pixels(whole, 32), clip_pixels(backbone.reference(photo, 8, "bicubic")[None], 32)
    assert sampled.shape == (1, 3, 32, 32) and trained.std() > 0.05
    assert (trained - sampled).abs().max() < 0.02 * trained.std() + 0.02  # what rounding to 256 levels leaves


def ip_adapter(tmp_path, **changes):
    """The tiny IP-Adapter with other weights in its file."""
    write_tiny_sdxl(tmp_path)
    kept = {key: value for key, value in load_file(tmp_path / "ip" / WEIGHTS).items() if key.startswith("ip_adapter.")}
    save_file({**kept, **changes}, tmp_path / "ip" / WEIGHTS)
    values = {"family": "sdxl_ip", "model": f"{tmp_path}/sdxl", "ip_adapter": f"{tmp_path}/ip", "precision": "float32"}
    return params.section("backbone", values)


def test_an_ip_adapter_of_another_kind_does_not_load(tmp_path):
    width = 16
    plain = {"proj.weight": (4 * width, 16), "proj.bias": (4 * width,), "norm.weight": (width,), "norm.bias": (width,)}
    full = {"proj.0.weight": (24, 24), "proj.0.bias": (24,), "proj.2.weight": (width, 24), "proj.2.bias": (width,)}
    for name, shapes in (("plain", plain), ("full", full), ("face", full | {"norm.weight": (width,)})):
        weights = {f"image_proj.{key}": torch.zeros(shape) for key, shape in shapes.items()}
        said = r"\(it lacks image_proj.latents, where an IP-Adapter-Plus has its resampler\): .*correct backbone.ip_ada"
        with pytest.raises(BackboneError, match=rf"^the IP-Adapter .* {said}"):
            backbones.load(ip_adapter(tmp_path / name, **weights))


def test_an_image_encoder_that_the_adapter_was_not_trained_with_does_not_load(tmp_path):
    write_tiny_sdxl(tmp_path)
    sizes = {"intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}
    wide = CLIPVisionModelWithProjection(CLIPVisionConfig(hidden_size=40, patch_size=8, **sizes))
    wide.save_pretrained(tmp_path / "ip" / "models" / "image_encoder")
    values = {"family": "sdxl_ip", "model": f"{tmp_path}/sdxl", "ip_adapter": f"{tmp_path}/ip", "precision": "float32"}
    with pytest.raises(
        BackboneError, match=r"^the image encoder .* \(it is 40 wide, .* one of 24\): .*backbone.ip_enc"
    ):
        backbones.load(params.section("backbone", values))
    shutil.rmtree(tmp_path / "ip" / "models" / "image_encoder")
    with pytest.raises(BackboneError, match=r"^the image encoder .* cannot be loaded"):
        backbones.load(params.section("backbone", values))
