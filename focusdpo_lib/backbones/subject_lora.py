"""UNO's LoRA as released: found, checked key by key, and put on a FLUX pipeline through diffusers' loader."""

import re
from pathlib import Path

from diffusers import FluxPipeline, FluxTransformer2DModel
from huggingface_hub import hf_hub_download
from safetensors import safe_open

RELEASED = "dit_lora.safetensors"
LAYOUT = re.compile(r"(double|single)_blocks\.\d+\.processor\.")


def load_subject_lora(pipeline: FluxPipeline, source: str | Path, revision: str | None = None) -> None:
    """Puts the LoRA on the pipeline's transformer; `source` is the file, a folder that holds it, or a hub id.

    Raises ValueError for a file in UNO's layout that lacks a key of this transformer or has one of another shape:
    diffusers would load the rest, and the base would silently be another model.
    """
    path = _file(source, revision)
    with safe_open(path, "pt") as file:
        found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (it is no dict)
    if any(LAYOUT.match(key) for key in found):
        _check(found, pipeline.transformer)
    pipeline.load_lora_weights(
        str(path.parent), weight_name=path.name, adapter_name="subject", use_safetensors=True, local_files_only=True
    )


def _file(source: str | Path, revision: str | None) -> Path:
    path = Path(source)
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise ValueError(f"the folder holds {len(files)} safetensors files: name the one to use")
        return files[0]
    return path if path.suffix == ".safetensors" else Path(hf_hub_download(str(source), RELEASED, revision=revision))


def _check(found: dict[str, tuple[int, ...]], transformer: FluxTransformer2DModel) -> None:
    """Compares keys and shapes with what UNO's processors hold; the rank is the file's own."""
    expected = _layers(transformer)
    missing = [f"{layer}.{part}.weight" for layer in expected for part in ("down", "up")]
    missing = [key for key in missing if key not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise ValueError(f"the key {missing[0]}{more} is missing")
    rank = found[f"{next(iter(expected))}.down.weight"][0]
    for layer, (inputs, outputs) in expected.items():
        for part, shape in (("down", (rank, inputs)), ("up", (outputs, rank))):
            key = f"{layer}.{part}.weight"
            if found[key] != shape:
                raise ValueError(f"the key {key} has the shape {found[key]} where the model needs {shape}")


def _layers(transformer: FluxTransformer2DModel) -> dict[str, tuple[int, int]]:
    """Widths (in, out) of every LoRA layer of UNO for a transformer; 1 is the image stream, 2 the text's."""
    width = transformer.inner_dim
    layers = {}
    for i in range(len(transformer.transformer_blocks)):
        for stream in "12":
            layers[f"double_blocks.{i}.processor.qkv_lora{stream}"] = width, 3 * width
            layers[f"double_blocks.{i}.processor.proj_lora{stream}"] = width, width
    for i, block in enumerate(transformer.single_transformer_blocks):
        layers[f"single_blocks.{i}.processor.qkv_lora"] = width, 3 * width
        layers[f"single_blocks.{i}.processor.proj_lora"] = block.proj_out.in_features, width
    return layers
