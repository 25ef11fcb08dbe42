"""SDXL with IP-Adapter-Plus at its smallest, random weights, written in the layout in which both are published."""

from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from focusdpo_lib.backbones.sdxl_ip import SdxlIp
from focusdpo_lib.toybox.pipelines import build_autoencoder, build_sdxl

TEXT, IMAGE, TOKENS = 16, 24, 16
WEIGHTS = "sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors"


def build_tiny_sdxl(**changes) -> StableDiffusionXLPipeline:
    """Stride 4: 64×64 pixels are 16×16 latents, with cross-attention at 8×8."""
    vae = build_autoencoder((8, 8, 8))
    vae.register_to_config(scaling_factor=0.5)
    return build_sdxl(vae, channels=(16, 32), head_dim=8, blocks=1, text_dim=TEXT, **changes)


def write_tiny_ip_adapter(folder: Path, unet: UNet2DConditionModel, depth: int = 4) -> None:
    """An IP-Adapter-Plus file under its published key names, and its image encoder in a folder of its own."""
    torch.manual_seed(1)
    hidden, out = 64, unet.config.cross_attention_dim
    state = {"latents": torch.randn(1, TOKENS, hidden) / 8}
    shapes = {"proj_in": (hidden, IMAGE), "proj_out": (out, hidden), "norm_out": (out,)}
    for i in range(depth):
        block = f"layers.{i}."
        shapes |= {block + "0.norm1": (hidden,), block + "0.norm2": (hidden,), block + "1.0": (hidden,)}
        for name, shape in (("0.to_q", (64, hidden)), ("0.to_kv", (128, hidden)), ("0.to_out", (hidden, 64)),
                            ("1.1", (4 * hidden, hidden)), ("1.3", (hidden, 4 * hidden))):  # fmt: skip
            state[f"{block}{name}.weight"] = torch.randn(shape) / shape[1] ** 0.5
    for name, shape in shapes.items():
        norm = len(shape) == 1
        state[f"{name}.weight"] = torch.ones(shape) if norm else torch.randn(shape) / shape[1] ** 0.5
        state[f"{name}.bias"] = torch.zeros(shape[0])
    file = {f"image_proj.{key}": value for key, value in state.items()}
    for number, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            module = unet.get_submodule(name.removesuffix(".processor"))
            for key in ("to_k_ip", "to_v_ip"):
                file[f"ip_adapter.{number}.{key}.weight"] = torch.randn(module.inner_dim, out) / out**0.5
    path = folder / WEIGHTS
    path.parent.mkdir(parents=True)
    save_file(file, path)
    vision = CLIPVisionConfig(
        hidden_size=IMAGE, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=32,
        patch_size=8, projection_dim=TEXT,
    )  # fmt: skip
    CLIPVisionModelWithProjection(vision).save_pretrained(folder / "models" / "image_encoder")


def write_tiny_sdxl(folder: Path, **changes) -> Path:
    """folder/sdxl (a pipeline) and folder/ip (weight file and image encoder)."""
    pipeline = build_tiny_sdxl(**changes)
    pipeline.save_pretrained(folder / "sdxl")
    write_tiny_ip_adapter(folder / "ip", pipeline.unet)
    return folder


def load_tiny_sdxl(folder: Path, **settings) -> SdxlIp:
    return SdxlIp.from_pretrained(
        str(folder / "sdxl"),
        ip_adapter=str(folder / "ip"),
        ip_weights=WEIGHTS,
        ip_encoder="models/image_encoder",
        **settings,
    )
