"""A pipeline part by part, each with its library's report of what its files lack: that would be drawn at random."""

from collections.abc import Callable, Mapping
from pathlib import Path

from diffusers import DiffusionPipeline, ModelMixin
from torch import nn
from transformers import PreTrainedModel

ENCODER = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"}  # what reads the words of each
WORDS = ("dog", "mug")


def load_pipeline(
    kind: type[DiffusionPipeline],
    parts: Mapping[str, type[nn.Module]],
    model: str,
    revision: str | None,
    absent: tuple[str, ...],
    held: Callable[[str], dict],
) -> DiffusionPipeline:
    """A pipeline of a `kind` from a folder or hub id of safetensors, without the parts that are `absent`.

    `parts` are the classes of its networks by name; `held(name)` are arguments of their from_pretrained. Raises
    ValueError for a part whose files lack weights and for a tokenizer that cannot be its encoder's.
    """
    without = dict.fromkeys(absent)
    if not Path(model).is_dir():
        model = kind.download(model, revision=revision, use_safetensors=True, **without)
    if lost := [name for name in parts if name not in absent and not (Path(model) / name / "config.json").is_file()]:
        raise ValueError(f"it lacks {lost[0]}/config.json")
    loaded = {
        name: load_whole(part, Path(model) / name, f"its {name}", use_safetensors=True, **held(name))
        for name, part in parts.items()
        if name not in absent
    }
    pipeline = kind.from_pretrained(model, **without, **loaded)
    for name, encoder in ENCODER.items():
        if name not in absent:
            _require_words(getattr(pipeline, name), name, getattr(pipeline, encoder))
    return pipeline


def load_whole(kind: type[nn.Module], source: Path | str, what: str, unused: str | None = None, **words) -> nn.Module:
    """A part by its class's from_pretrained, which takes `words`; `what` is what errors call it.

    Raises ValueError for files that lack weights of the part, but for those that begin with `unused`, or hold them in
    another shape; and for weights that a diffusion network or an autoencoder has no place for. (The file of a text
    encoder may hold all of CLIP.)
    """
    if issubclass(kind, PreTrainedModel):  # what does not fit is in the report then; diffusers says it in its error
        words |= {"ignore_mismatched_sizes": True}
    part, report = kind.from_pretrained(source, output_loading_info=True, **words)
    if misshapen := sorted(report["mismatched_keys"], key=str):
        key, found, needed = misshapen[0]
        raise ValueError(f"{what} has {key} in the shape {tuple(found)} where its config.json needs {tuple(needed)}")
    missing = sorted(key for key in report["missing_keys"] if not (unused and key.startswith(unused)))
    if missing:
        raise ValueError(f"{what} lacks {_some(missing)} of the weights of a {kind.__name__}")
    quantized = getattr(part.config, "quantization_config", None)  # such files hold more than weights
    if isinstance(part, ModelMixin) and not quantized and (spare := sorted(report["unexpected_keys"])):
        raise ValueError(f"{what} has no place for {_some(spare)} of its files")
    return part


def _some(keys: list[str]) -> str:
    return f"{keys[0]} and {len(keys) - 1} more" if keys[1:] else keys[0]


def _require_words(tokenizer, name: str, encoder: nn.Module) -> None:
    """Raises ValueError for a tokenizer without a vocabulary, or of an encoder that is not this one.

    Where its files are missing, transformers makes one that knows no word and says nothing.
    """
    first, second = (tokenizer(word).input_ids for word in WORDS) if tokenizer else (None, None)
    if first == second:
        raise ValueError(f"its {name} has no vocabulary")
    known, rows = len(tokenizer), encoder.get_input_embeddings().num_embeddings
    if known > rows:
        raise ValueError(f"its {name} knows {known} words, and its {ENCODER[name]} has {rows}")
    length = getattr(encoder.config, "max_position_embeddings", None)  # T5 has none: it reads any length
    if length is not None and tokenizer.model_max_length > length:
        raise ValueError(
            f"its {name} cuts after {tokenizer.model_max_length:.4g} words, and its encoder reads {length}"
        )
