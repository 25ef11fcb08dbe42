"""The subject LoRA, UNO's as released or another: found, checked key by key, and put on FLUX by diffusers' loader."""

import re
from pathlib import Path

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from huggingface_hub import hf_hub_download
from safetensors import safe_open

RELEASED = "dit_lora.safetensors"
LAYOUT = re.compile(r"(double|single)_blocks\.\d+\.processor\.")

# The parts of a layer in diffusers' names (the last two: a bias, DoRA's lengths), and which side of the layer a
# dimension of each must be as wide as.
SIDES = {
    "A.weight": ("in_features", -1),
    "B.weight": ("out_features", 0),
    "B.bias": ("out_features", 0),
    "magnitude_vector": ("out_features", 0),
}


def load_subject_lora(pipeline: FluxPipeline, source: str | Path, revision: str | None = None) -> None:
    """Puts the LoRA on the pipeline's transformer; `source` is the file, a folder that holds it, or a hub id.

    Raises ValueError for a key that belongs nowhere in this transformer or has another shape, and for a file in UNO's
    layout that lacks one: diffusers would load the rest, or nothing, and the base would silently be another model.
    """
    path = _file(source, revision)
    with safe_open(path, "pt") as file:
        found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (it is no dict)
    if any(LAYOUT.match(key) for key in found):
        _check(found, pipeline.transformer)
    local = {"weight_name": path.name, "use_safetensors": True, "local_files_only": True}
    _check_places(pipeline.lora_state_dict(str(path.parent), **local), pipeline.transformer)
    pipeline.load_lora_weights(str(path.parent), adapter_name="subject", **local)


def _file(source: str | Path, revision: str | None) -> Path:
    path = Path(source)
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise ValueError(f"the folder holds {len(files)} safetensors files: name the one to use")
        return files[0]
    if path.exists() and path.suffix != ".safetensors":
        raise ValueError("it is no safetensors file, and the kit loads nothing else: convert it where you trust it")
    return path if path.suffix == ".safetensors" else Path(hf_hub_download(str(source), RELEASED, revision=revision))


def _check_places(state: dict[str, torch.Tensor], transformer: FluxTransformer2DModel) -> None:
    """Whether every weight, under the name that diffusers gives it whatever the file's layout, has a layer to go to."""
    layers = {f"transformer.{n}": m for n, m in transformer.named_modules() if hasattr(m, "in_features")}
    for key, weight in state.items():
        name, _, part = key.partition(".lora_")
        if f"transformer.{name}" in layers:
            raise ValueError(
                f"its key {key} lacks the prefix 'transformer.': write it with diffusers' save_lora_weights"
            )
        if name not in layers or not part:
            raise ValueError(f"its key {key} belongs to nothing in the transformer, so it is no LoRA of this model")
        if part not in SIDES:  # peft's own names, with the adapter's in them, would leave the layer without weights
            raise ValueError(f"its key {key} does not end as diffusers' do: write it with diffusers' save_lora_weights")
        side, dimension = SIDES[part]
        if weight.shape[dimension] != getattr(layers[name], side):
            raise ValueError(f"its key {key} has the shape {tuple(weight.shape)}, which does not fit this model")
    _check_pairs(state)


def _check_pairs(state: dict[str, torch.Tensor]) -> None:
    """Whether every layer has both matrices, A (rank, in) and B (out, rank)."""
    if not state:
        raise ValueError("it holds no weights")
    for name in dict.fromkeys(key.partition(".lora_")[0] for key in state):
        keys = [f"{name}.lora_{side}.weight" for side in "AB"]
        if lost := [key for key in keys if key not in state]:
            raise ValueError(f"the key {lost[0]} is missing")
        down, up = (tuple(state[key].shape) for key in keys)
        if down[0] != up[-1]:
            raise ValueError(f"its key {keys[1]} has the shape {up}, which does not fit {keys[0]} of {down}")


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
