"""The toybox's U-Net with an IP-Adapter-Plus: its training from nothing, and its folder."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional as F

from focusdpo_lib.backbones import Conditioning, SdxlIp
from focusdpo_lib.backbones.sdxl_ip import clip_pixels
from focusdpo_lib.params import Backbone
from focusdpo_lib.toybox.batches import VALUES, generator, slot_labels, to_pixels
from focusdpo_lib.toybox.fitting import fit
from focusdpo_lib.toybox.ip_adapter import image_matrices, new_ip_adapter, save_ip_adapter
from focusdpo_lib.toybox.pipelines import build_sdxl
from focusdpo_lib.toybox.transformer import load_latents, training_sample

SINGLES = 900  # steps with one subject only, at the start
UNCONDITIONAL = 0.1  # share of samples without prompt and reference, for guidance


def new_backbone(
    vae: AutoencoderKL, seed: int = 0, device: str = "cpu", *, image_width: int = 128, hidden: int = 128, **sizes
) -> SdxlIp:
    """An untrained U-Net and IP-Adapter, through the loaders of the published ones.

    `image_width` and `hidden` are the widths of image encoder and resampler; `sizes` go to `build_sdxl`.
    """
    pipeline, settings = build_sdxl(vae, seed=seed, **sizes), Backbone()
    with TemporaryDirectory() as folder:
        new_ip_adapter(Path(folder), pipeline.unet, hidden, width=image_width)
        path = Path(settings.ip_weights)
        pipeline.load_ip_adapter(
            folder, subfolder=str(path.parent), weight_name=path.name, image_encoder_folder=settings.ip_encoder
        )
    return SdxlIp(pipeline.to(device), precision="bfloat16")


def save_backbone(backbone: SdxlIp, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Writes the pipeline folder, and the IP-Adapter in its subfolder `ip_adapter`; the backbone is spent by it."""
    pipeline = backbone.pipeline
    encoder, matrices = pipeline.image_encoder, image_matrices(backbone.unet)
    save_ip_adapter(Path(folder) / "ip_adapter", backbone.resampler, matrices, encoder, dtype)
    pipeline.unload_ip_adapter()
    pipeline.to("cpu", dtype).save_pretrained(folder)


def split_parameters(unet: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices that Muon moves: those of the transformer blocks, everything else for AdamW)."""
    muon, rest = [], []
    for name, parameter in unet.named_parameters():
        (muon if "transformer_blocks." in name and parameter.ndim == 2 else rest).append(parameter)
    return muon, rest


def train_sdxl_ip(
    vae: AutoencoderKL,
    latents: list[Path],
    folder: Path,
    steps: int,
    batch: int = 32,
    seed: int = 0,
    device: str = "cpu",
    *,
    sizes: dict | None = None,
    **options,
) -> tuple[SdxlIp, list[dict]]:
    """Trains U-Net, resampler, image and text encoders from nothing to predict ε; returns the backbone and the curve.

    The published image encoder was trained before, on captions that name what is seen; here heads on its embedding that
    name the five attributes train along with it. One subject only for the first `SINGLES` steps, then two in every
    third. Errors inside subjects weigh five times. Resumable in `folder`; `options` go to `fit`.
    """
    offset = (vae.config.shift_factor or 0.0) * vae.config.scaling_factor  # the latents were made for FLUX
    backbone = new_backbone(vae, seed, device, **(sizes or {}))
    pipeline, encoder = backbone.pipeline, backbone.pipeline.image_encoder
    heads = nn.ModuleDict(
        {name: nn.Linear(encoder.config.projection_dim, len(values)) for name, values in VALUES.items()}
    ).to(device)
    modules = nn.ModuleDict(
        {
            "unet": backbone.unet.to(memory_format=torch.channels_last),
            "resampler": backbone.resampler,
            "image_encoder": encoder,
            "text_encoder": pipeline.text_encoder,
            "text_encoder_2": pipeline.text_encoder_2,
            "heads": heads,
        }
    )
    modules.requires_grad_(True)
    muon, rest = split_parameters(backbone.unet)
    rest += [p for name, module in modules.items() if name != "unet" for p in module.parameters()]
    optimizers = [
        torch.optim.Muon(muon, lr=2e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=8e-4, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    data, captions = load_latents(latents)

    def loss_at(step):
        draw = generator(seed, step)
        count = 2 if step >= SINGLES and step % 3 == 2 else 1
        at = 2 * torch.randint(len(captions) // 2, (batch,), generator=draw) + count - 1
        clean = data["target"][at].float().to(device) + offset
        noise = torch.randn(clean.shape, generator=draw).to(device)
        t = (1 - torch.rand(batch, generator=draw)).to(device)
        kept = torch.rand(batch, generator=draw) >= UNCONDITIONAL
        samples = [training_sample(seed, i) for i in at.tolist()]
        with backbone.autocast(), backbone.attention():
            text, pooled = backbone.encode_prompts(
                [captions[i] if keep else "" for i, keep in zip(at.tolist(), kept, strict=True)]
            )
            tokens, named = see(samples, kept, count)
        noised = backbone.noised(clean, noise, t)
        epsilon = backbone.predict(noised, t, Conditioning(text, pooled, tokens))
        error = (epsilon - noise) ** 2
        inside = data["subject"][at].float().to(device)[:, None]
        loss = (error * (1 + 4 * inside)).mean() / (1 + 4 * inside.mean())
        return loss + 0.1 * named, {f"mse_{count}": error.mean().item(), "named": named.item()}

    def see(samples, kept, count):
        """Image tokens of each subject's photos, and the cross-entropy of the attributes that the heads name."""
        photos = np.stack([photos[k] for k in range(count) for _, photos in samples])
        labels = torch.tensor([slot_labels(scene.identities[k]) for k in range(count) for scene, _ in samples])
        pixels = clip_pixels(to_pixels(photos).to(device), encoder.config.image_size)
        output = encoder(pixels * kept.repeat(count).to(device)[:, None, None, None], output_hidden_states=True)
        labels[~kept.repeat(count)] = -100
        guesses = [head(output.image_embeds) for head in heads.values()]
        named = [F.cross_entropy(guess, label) for guess, label in zip(guesses, labels.to(device).T, strict=True)]
        return backbone.resampler(output.hidden_states[-2]).chunk(count), sum(named) / len(named)

    curve = fit("sdxl_ip", modules, optimizers, loss_at, steps, folder, decay_from=0.6, **options)
    return backbone, curve
