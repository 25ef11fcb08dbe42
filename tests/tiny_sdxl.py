"""SDXL with IP-Adapter-Plus at its smallest, random weights, written in the layout in which both are published."""

from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from focusdpo_lib.backbones.sdxl_ip import SdxlIp
from focusdpo_lib.toybox.pipelines import TEXT_LENGTH, build_autoencoder, build_clip_tokenizer

TEXT, IMAGE, TOKENS = 16, 24, 16
WEIGHTS = "sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors"


def build_tiny_sdxl(**changes) -> StableDiffusionXLPipeline:
    """Stride 4, 64×64 pixels are 16×16 latents; cross-attention at 8×8 and, once more, at 16×16."""
    torch.manual_seed(0)
    tokenizer = build_clip_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH, projection_dim=TEXT, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=8, out_channels=8, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1), attention_head_dim=(2, 4), use_linear_projection=True,
        cross_attention_dim=2 * TEXT, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=TEXT + 6 * 8, norm_num_groups=8,
    )  # fmt: skip
    vae = build_autoencoder((8, 8, 8))
    vae.register_to_config(scaling_factor=0.5, shift_factor=None)
    parts = {
        "vae": vae,
        "text_encoder": CLIPTextModel(text),
        "text_encoder_2": CLIPTextModelWithProjection(text),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "unet": unet,
        "scheduler": EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    }
    return StableDiffusionXLPipeline(**parts | changes, add_watermarker=False)


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
