"""An IP-Adapter-Plus: found, checked key by key, and put on SDXL's U-Net by diffusers' loader."""

from contextlib import contextmanager, nullcontext
from pathlib import Path

from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from torch import nn

DEPTH = 4  # of every resampler that was published, and the one that diffusers makes


def load_ip_adapter(pipeline: StableDiffusionXLPipeline, source: str, weights: str, revision: str | None, cast: bool):
    """Puts the file `weights` of a folder or hub id `source` on the pipeline's U-Net.

    diffusers casts the U-Net then, which a quantized one refuses: not `cast`, it is left as it is. Raises ValueError
    for a file of another kind of IP-Adapter, or one that holds more or less than this U-Net takes: diffusers would
    leave the rest out.
    """
    if Path(weights).suffix != ".safetensors":
        raise ValueError(
            f"'{weights}' is no safetensors file, and the kit loads nothing else: correct backbone.ip_weights"
        )
    path = (
        Path(source) / weights if Path(source).is_dir() else Path(hf_hub_download(source, weights, revision=revision))
    )
    with safe_open(path, "pt") as file:
        found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (it is no dict)
    _check(found, pipeline.unet)
    with nullcontext() if cast else _uncast(pipeline.unet):
        pipeline.load_ip_adapter(str(path.parent), subfolder="", weight_name=path.name, image_encoder_folder=None)


def _check(found: dict[str, tuple[int, ...]], unet: UNet2DConditionModel) -> None:
    """Compares keys, and shapes where the U-Net decides them, with those of an IP-Adapter-Plus."""
    expected = _resampler() | _attention(unet)
    if "image_proj.latents" not in found:
        raise ValueError("it lacks image_proj.latents, where an IP-Adapter-Plus has its resampler")
    for key in sorted(expected.keys() | found.keys()):
        if key not in found:
            raise ValueError(f"its key {key} is missing")
        if key not in expected:
            raise ValueError(f"its key {key} belongs to nothing in an IP-Adapter-Plus for this model")
        if expected[key] not in (None, found[key]):
            raise ValueError(f"its key {key} has the shape {found[key]} where the model needs {expected[key]}")


def _resampler() -> dict[str, None]:
    """The keys of a resampler, whose shapes are its own."""
    keys = [
        "latents",
        *(f"{name}.{kind}" for name in ("proj_in", "proj_out", "norm_out") for kind in ("weight", "bias")),
    ]
    for i in range(DEPTH):
        keys += [f"layers.{i}.{name}.{kind}" for name in ("0.norm1", "0.norm2", "1.0") for kind in ("weight", "bias")]
        keys += [f"layers.{i}.{name}.weight" for name in ("0.to_q", "0.to_kv", "0.to_out", "1.1", "1.3")]
    return dict.fromkeys(f"image_proj.{key}" for key in keys)


def _attention(unet: UNet2DConditionModel) -> dict[str, tuple[int, int]]:
    """The keys and shapes (out, in) of the image's keys and values, numbered 1, 3, 5, … as the U-Net's are listed."""
    crossed = [name.removesuffix(".processor") for name in unet.attn_processors if name.endswith("attn2.processor")]
    return {
        f"ip_adapter.{2 * i + 1}.{kind}.weight": (unet.get_submodule(name).inner_dim, unet.config.cross_attention_dim)
        for i, name in enumerate(crossed)
        for kind in ("to_k_ip", "to_v_ip")
    }


@contextmanager
def _uncast(unet: nn.Module):
    """load_ip_adapter ends by casting the U-Net to the dtype that it has, which a quantized one refuses."""
    unet.to = lambda *words, **settings: unet
    try:
        yield
    finally:
        del unet.to
