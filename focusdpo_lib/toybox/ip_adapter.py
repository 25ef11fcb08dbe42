"""An IP-Adapter-Plus for a toybox U-Net, in the layout in which IP-Adapters are published and diffusers loads them."""

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import IPAdapterPlusImageProjection
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from focusdpo_lib.params import Backbone
from focusdpo_lib.toybox import world

TOKENS = 16  # image tokens of one reference
# Where a layer of the resampler, and what follows its norms, stands in the published files.
ATTENTION = {"ln0": "0.norm1", "ln1": "0.norm2", "attn.to_q": "0.to_q", "attn.to_out.0": "0.to_out"}
FEED_FORWARD = {"ff.0": "1.0", "ff.1.net.0.proj": "1.1", "ff.1.net.2": "1.3"}


def build_image_encoder(width: int = 128, layers: int = 4, heads: int = 4) -> CLIPVisionModelWithProjection:
    """CLIP's vision encoder for reference photos: 64 patches of 4×4 pixels."""
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=heads,
        image_size=world.REFERENCE_SIZE, patch_size=4, projection_dim=width,
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config)


def cross_attentions(unet: UNet2DConditionModel) -> dict[int, nn.Module]:
    """The cross-attentions by the number that published files give them: their place among all attentions."""
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    return {n: unet.get_submodule(name) for n, name in enumerate(names) if name.endswith("attn2")}


def published_resampler(resampler: IPAdapterPlusImageProjection) -> dict[str, torch.Tensor]:
    """The resampler's weights under their published names; keys and values are one matrix there."""
    state, renamed = dict(resampler.state_dict()), {}
    for i in range(len(resampler.layers)):
        key, value = (state.pop(f"layers.{i}.attn.to_{x}.weight") for x in "kv")
        renamed[f"layers.{i}.0.to_kv.weight"] = torch.cat([key, value])
    for name, value in state.items():
        for ours, theirs in (ATTENTION | FEED_FORWARD).items():
            name = name.replace(f".{ours}.", f".{theirs}.") if name.startswith("layers.") else name
        renamed[name] = value
    return renamed


def save_ip_adapter(
    folder: Path,
    resampler: IPAdapterPlusImageProjection,
    matrices: dict[int, dict[str, torch.Tensor]],
    encoder: CLIPVisionModelWithProjection,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes an IP-Adapter to `folder`: weight file and image encoder stand where the published ones do.

    `matrices` holds to_k_ip and to_v_ip, (inner width, token width) each, of every cross-attention by its number.
    """
    file = {f"image_proj.{name}": value for name, value in published_resampler(resampler).items()}
    for number, pair in matrices.items():
        file |= {f"ip_adapter.{number}.{name}.weight": value for name, value in pair.items()}
    path = Path(folder) / Backbone().ip_weights
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().to(dtype, copy=True).contiguous() for name, value in file.items()}, path)
    encoder.to(dtype).save_pretrained(Path(folder) / Backbone().ip_encoder)


def image_matrices(unet: UNet2DConditionModel) -> dict[int, dict[str, torch.Tensor]]:
    """to_k_ip and to_v_ip of every cross-attention of a U-Net with an IP-Adapter, by number."""
    processors = {number: attention.processor for number, attention in cross_attentions(unet).items()}
    return {n: {name: getattr(p, name)[0].weight for name in ("to_k_ip", "to_v_ip")} for n, p in processors.items()}


def new_ip_adapter(folder: Path, unet: UNet2DConditionModel, hidden: int = 128, **sizes) -> None:
    """Writes an IP-Adapter with random weights, in torch's default dtype, for a U-Net that has none.

    `hidden` is the resampler's width; `sizes` are the image encoder's.
    """
    encoder, width = build_image_encoder(**sizes), unet.config.cross_attention_dim
    resampler = IPAdapterPlusImageProjection(
        encoder.config.hidden_size, width, hidden, heads=hidden // 64, num_queries=TOKENS
    )
    matrices = {
        number: {name: nn.Linear(width, attention.inner_dim, bias=False).weight for name in ("to_k_ip", "to_v_ip")}
        for number, attention in cross_attentions(unet).items()
    }
    save_ip_adapter(folder, resampler, matrices, encoder, torch.get_default_dtype())
