"""What fills in, at its smallest and with random weights: FLUX.1-Fill and an SDXL inpainting model."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FluxFillPipeline,
    FluxTransformer2DModel,
    StableDiffusionXLInpaintPipeline,
    UNet2DConditionModel,
)
from tiny_fixtures import build_tiny_flux
from tiny_sdxl import build_tiny_sdxl


def write_tiny_fill(folder: Path) -> Path:
    """FLUX's transformer with a mask and what is left of the image beside its latents: 32 + 32 + 4 · 4² channels."""
    flux = build_tiny_flux()
    torch.manual_seed(1)
    transformer = FluxTransformer2DModel(**_sizes(flux.transformer) | {"in_channels": 128, "out_channels": 32})
    names = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    parts = {name: getattr(flux, name) for name in names}
    FluxFillPipeline(**parts, transformer=transformer).save_pretrained(folder)
    return folder


def write_tiny_sdxl_inpainting(folder: Path) -> Path:
    """4 latent channels, as the pipeline insists; its U-Net takes 4 + 4 + 1."""
    sdxl = build_tiny_sdxl()
    torch.manual_seed(1)
    vae = AutoencoderKL(**_sizes(sdxl.vae) | {"latent_channels": 4})
    unet = UNet2DConditionModel(**_sizes(sdxl.unet) | {"in_channels": 9, "out_channels": 4})
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    parts = {name: getattr(sdxl, name) for name in names} | {"vae": vae, "unet": unet}
    StableDiffusionXLInpaintPipeline(**parts, add_watermarker=False).save_pretrained(folder)
    return folder


def _sizes(part) -> dict:
    return {name: value for name, value in part.config.items() if not name.startswith("_")}
