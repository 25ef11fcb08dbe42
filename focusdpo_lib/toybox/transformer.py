"""The toybox's UNO-style transformer: the latents it learns from, and its training."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from focusdpo_lib.backbones import Conditioning, FluxUno
from focusdpo_lib.runs import atomic
from focusdpo_lib.toybox import world
from focusdpo_lib.toybox.batches import generator, to_pixels
from focusdpo_lib.toybox.fitting import fit
from focusdpo_lib.toybox.pipelines import build_flux

SIZES = {"heads": 6, "head_dim": 32, "double_blocks": 2, "single_blocks": 4}  # 5.1 M parameters
SINGLES = 900  # a fixed number, so that a longer run starts as a shorter one does


def training_sample(seed: int, index: int) -> tuple[world.Scene, list[np.ndarray]]:
    """Sample `index` of the training world: its scene and a photo of each subject; odd indices show two subjects."""
    rng = np.random.default_rng([seed, index])
    subjects = world.sample_subjects(rng, 1 + index % 2)
    scene = world.sample_scene(rng, subjects)
    return scene, [world.halve(world.photo(s, int(rng.integers(2**31)))) for s in subjects]


def make_latents(vae: AutoencoderKL, path: Path, first: int, count: int, seed: int = 0, batch: int = 50) -> None:
    """Encodes samples first … first + count − 1 of the training world and writes them as one safetensors file.

    target (N, 8, 16, 16) and references (N, 2, 8, 8, 8) in float16, scaled as the pipeline scales them; subject
    (N, 16, 16), the share of each latent cell that subjects cover; captions in the header. Even samples show one
    subject (their second reference is zero), odd ones two.
    """
    if path.exists():
        return
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    captions, columns = [], {"target": [], "references": [], "subject": []}

    def encode(images):
        with torch.no_grad(), torch.autocast(vae.device.type, torch.bfloat16):
            pixels = to_pixels(np.stack(images)).to(vae.device, memory_format=torch.channels_last)
            return ((vae.encode(pixels).latent_dist.mode().float() - shift) * scale).half().cpu().contiguous()

    for start in range(first, first + count, batch):
        scenes, photos, covers = [], [], []
        for i in range(start, start + batch):
            scene, references = training_sample(seed, i)
            image, masks = world.render(scene)
            scenes.append(image)
            covers.append(masks.any(0))
            captions.append(scene.caption)
            photos += (references * 2)[:2]
        references = encode(photos).unflatten(0, (batch, 2))
        references[::2, 1] = 0
        cells = torch.from_numpy(np.stack(covers)).float()[:, None]
        columns["target"].append(encode(scenes))
        columns["references"].append(references)
        columns["subject"].append(F.avg_pool2d(cells, 4)[:, 0].half())
    with atomic(path) as partial_path:
        save_file(
            {name: torch.cat(parts) for name, parts in columns.items()},
            partial_path,
            metadata={"captions": json.dumps(captions)},
        )


def load_latents(paths: list[Path]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors and captions of `make_latents` files, joined in order."""
    columns, captions = [], []
    for path in paths:
        with safe_open(path, "pt") as file:
            captions += json.loads(file.metadata()["captions"])
        columns.append(load_file(path))
    return {name: torch.cat([c[name] for c in columns]) for name in columns[0]}, captions


def split_parameters(transformer: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices that Muon moves: attention and MLP weights of the blocks, everything else for AdamW)."""
    muon, rest = [], []
    for name, parameter in transformer.named_parameters():
        inside = "blocks." in name and parameter.ndim == 2 and ".linear." not in name
        (muon if inside else rest).append(parameter)
    return muon, rest


def train_flux(
    vae: AutoencoderKL,
    latents: list[Path],
    folder: Path,
    steps: int,
    batch: int = 48,
    seed: int = 0,
    device: str = "cpu",
    *,
    sizes: dict | None = None,
    **options,
) -> tuple[FluxPipeline, list[dict]]:
    """Trains transformer and text encoders from nothing on the velocity target; returns the pipeline and the curve.

    Samples with one subject only for the first `SINGLES` steps, then with one and two in turn, so that a batch has one
    count of references. Errors inside subjects weigh five times; t is logit-normal. Resumable in `folder`;
    `options` go to `fit`.
    """
    pipeline = build_flux(vae, seed=seed, **(sizes or SIZES)).to(device)
    backbone = FluxUno(pipeline, precision="bfloat16")
    modules = nn.ModuleDict(
        {"transformer": pipeline.transformer, "clip": pipeline.text_encoder, "t5": pipeline.text_encoder_2}
    )
    modules.requires_grad_(True)
    muon, rest = split_parameters(pipeline.transformer)
    rest += [*modules["clip"].parameters(), *modules["t5"].parameters()]
    optimizers = [
        torch.optim.Muon(muon, lr=2e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    data, captions = load_latents(latents)
    pairs = len(captions) // 2

    def loss_at(step):
        draw = generator(seed, step)
        count = 1 if step < SINGLES else 1 + step % 2
        at = 2 * torch.randint(pairs, (batch,), generator=draw) + count - 1
        clean = data["target"][at].float().to(device)
        noise = torch.randn(clean.shape, generator=draw).to(device)
        t = torch.sigmoid(1.2 * torch.randn(batch, generator=draw)).to(device)
        references = tuple(data["references"][at, s].float().to(device) for s in range(count))
        with backbone.autocast():
            text, pooled = backbone.encode_prompts([captions[i] for i in at.tolist()])
        noised = backbone.noised(clean, noise, t)
        velocity = backbone.predict(noised, t, Conditioning(text, pooled, references))
        error = (velocity - backbone.target(clean, noise, t)) ** 2
        inside = data["subject"][at].float().to(device)[:, None]
        plain = error.mean().item()
        return (error * (1 + 4 * inside)).mean() / (1 + 4 * inside.mean()), {f"mse_{count}": plain}

    curve = fit("flux_uno", modules, optimizers, loss_at, steps, folder, decay_from=0.6, **options)
    return pipeline, curve
