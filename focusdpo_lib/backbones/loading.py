"""From settings to a backbone: checked before, loaded, and one sentence where that fails."""

import json
import logging
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, OfflineModeIsEnabled

from focusdpo_lib import params
from focusdpo_lib.backbones.culprits import LOADING_ERRORS
from focusdpo_lib.backbones.interface import Backbone
from focusdpo_lib.backbones.revisions import is_hub_id

CLASSES = {"flux_uno": "FluxUno", "sdxl_ip": "SdxlIp"}  # each in the module of its family
INDEX = "model_index.json"  # in the folder of every pipeline


class BackboneError(RuntimeError):
    """A model that cannot be loaded; the message says which, why and what to do."""


def best_device() -> str:
    """Where models run on this machine: a CUDA GPU, an Apple GPU, or the CPU. The kit asks nowhere else."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def family_class(name: str) -> type[Backbone]:
    """The class of a family. Its module imports diffusers, which takes seconds: only what loads a model asks for it."""
    return getattr(import_module(f"focusdpo_lib.backbones.{name}"), CLASSES[name])


def identity(settings: params.Backbone) -> Path | str:
    """What a run that uses this backbone depends on: a folder by its content, a hub model by id and revision."""
    model = params.shipped(settings.family, settings.model)
    return Path(model) if Path(model).is_dir() else f"{model}@{settings.revision or 'main'}"


def inputs(settings: params.Backbone) -> dict[str, Path | str]:
    """The inputs of a run that uses this backbone: the model, and the subject LoRA or IP-Adapter where there is one."""
    found: dict[str, Path | str] = {"model": identity(settings)}
    for name in ("subject_lora", "ip_adapter"):
        if (value := getattr(settings, name)) is not None:
            found[name] = Path(value) if Path(value).exists() else value
    return found


def load(settings: params.Backbone, device: str | torch.device = "cpu", parts: str = "all") -> Backbone:
    """The backbone that the settings name, frozen and in evaluation mode, on a device.

    `parts` leaves out what is not needed: "encoders" is enough to prepare pairs, "network" to train on them. Raises
    BackboneError when a model, LoRA or IP-Adapter is missing, incomplete, gated or out of reach.
    """
    model = params.shipped(settings.family, settings.model)
    remedy = "run `make toybox-weights`" if settings.model == "toybox" else "correct backbone.model"
    _check(model, INDEX, f"the model {model}", remedy)
    if (form := _other_form(Path(model), settings.family)) is not None:
        raise BackboneError(f"the model {model} {form}, or correct backbone.model")
    extras = _extras(settings)
    for name, needed in (("subject_lora", ""), ("ip_adapter", settings.ip_weights)):
        if (source := extras.get(name)) is not None:
            _check(source, needed, f"the {WORDS[name]} {source}", f"correct backbone.{name}")
    if settings.weights in ("int8", "nf4") and find_spec("bitsandbytes") is None:
        raise BackboneError(f"backbone.weights {settings.weights} needs bitsandbytes: install the extra [quantized]")
    shared = {"precision": settings.precision, "weights": settings.weights, "revision": settings.revision}
    try:
        here = Path(model).is_dir() or isinstance(try_to_load_from_cache(model, INDEX, revision=settings.revision), str)
        quiet(downloads=not here)
        return family_class(settings.family).from_pretrained(model, device=device, parts=parts, **shared, **extras)
    except LOADING_ERRORS as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        what, source = "the model", model
        if (setting := getattr(error, "setting", None)) is not None:
            what, remedy = f"the {WORDS[setting]}", f"correct backbone.{setting}"
            source = extras[setting] if setting != "ip_encoder" else f"{extras['ip_adapter']}/{extras[setting]}"
        raise BackboneError(f"{what} {source} cannot be loaded {why(error, source, remedy)}") from error


def why(error: Exception, source: str, remedy: str) -> str:
    """The reason in brackets and what to do; what the hub said is found behind the errors that wrap it."""
    behind = [error]
    while following := behind[-1].__cause__ or behind[-1].__context__:
        behind.append(following)
    if any(isinstance(e, GatedRepoError) for e in behind):
        return (
            "(it is gated): accept its licence on its page at the hub and log in with `hf auth login`, or set HF_TOKEN"
        )
    reason = " ".join(str(error).split())[:300].rstrip(". ")
    if "No GPU found" in reason:
        return "(a quantized base needs a GPU): set backbone.weights to bfloat16 or float32"
    if any(isinstance(e, LocalEntryNotFoundError | OfflineModeIsEnabled) for e in behind):
        return (
            f"(not in the cache, and the hub is out of reach): go online once, name a folder that holds it, or {remedy}"
        )
    advice = "fetch it again" if Path(source).exists() else "go online, or name a folder that holds it"
    return f"({reason}): {advice}, or {remedy}"


WORDS = {"subject_lora": "subject LoRA", "ip_adapter": "IP-Adapter", "ip_encoder": "image encoder"}


def _extras(settings: params.Backbone) -> dict:
    """The settings that only one family knows, by the names of its constructor."""
    extras = settings.model_dump(include=set(params.FAMILY_SETTINGS[settings.family]))
    if settings.family == "sdxl_ip":
        extras |= {"scale": extras.pop("ip_scale"), "ip_adapter": _ip_adapter(settings)}
    return extras


def _ip_adapter(settings: params.Backbone) -> str:
    """The IP-Adapter named, or the one that lies in the model's folder, as the shipped model's does."""
    model = Path(params.shipped(settings.family, settings.model))
    if settings.ip_adapter is None and settings.model != "toybox" and not (model / "ip_adapter").is_dir():
        raise BackboneError("backbone.ip_adapter is missing: name the folder or hub id of an SDXL IP-Adapter-Plus")
    return settings.ip_adapter or str(model / "ip_adapter")


def _check(name: str, needed: str, what: str, remedy: str) -> None:
    """What can be said before loading: a folder lacks a file, or a name is neither a file or folder nor a hub id."""
    path = Path(name)
    if path.is_dir() and not (path / needed).exists():
        raise BackboneError(f"{what} is a folder without {needed}: {remedy}")
    if not path.exists() and not is_hub_id(name):
        raise BackboneError(f"{what} does not exist: {remedy}")


def _other_form(model: Path, family: str) -> str | None:
    """What a model on this machine is instead of a folder of safetensors, and how to make one of it."""
    pipeline = {"flux_uno": "FluxPipeline", "sdxl_ip": "StableDiffusionXLPipeline"}[family]
    save = "save_pretrained, which writes safetensors"
    if model.is_file():
        return f"is a single file: make a folder of it with diffusers' {pipeline}.from_single_file and {save}"
    if (model / INDEX).is_file():
        try:
            made_for = json.loads((model / INDEX).read_text(encoding="utf-8"))["_class_name"]
        except (ValueError, KeyError, TypeError):
            return f"has a damaged {INDEX}: fetch it again"
        if made_for != pipeline:
            return f"is a {made_for}, and backbone.family {family} needs a {pipeline}: correct backbone.family"
    for part in (path.parent for path in sorted(model.glob("*/config.json"))):
        names = [path.name for path in part.iterdir() if path.suffix in (".safetensors", ".bin")]
        if names and all(name.endswith(".bin") for name in names):
            return f"has {part.name}/{names[0]} and no safetensors: load it where you trust it, and {save}"
        if names and all(".fp16." in name or name.endswith(".bin") for name in names):
            return f"holds its variant fp16 alone ({part.name}): load it with variant='fp16', and {save} of no variant"
    return None


def quiet(downloads: bool) -> None:
    """What is on this machine loads in a moment and needs no progress bars; a download keeps them."""
    import diffusers.utils.logging
    import transformers.utils.logging

    if not downloads:
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    diffusers_own = ("models.modeling_utils", "loaders.ip_adapter", "loaders.lora_base", "pipelines.pipeline_utils")
    for name in (*(f"diffusers.{name}" for name in diffusers_own), "transformers.modeling_utils"):
        logging.getLogger(name).addFilter(_says_something)
    # Autocast leaves the norms' weights in float32, as it should; torch only says that it has no fused kernel for that.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")


# What diffusers warns of and is meant: a cast that spares no module, no image encoder where training needs none, half
# precision on a CPU, which is slow but right, a LoRA that leaves the text encoder alone, and the cache in place of a
# hub out of reach (what is not in it is an error). And what files lack, which `parts` looks at itself.
MEANT = (
    *("kept in float32: []", "image_encoder is not loaded since", "cannot run with `cpu` device"),
    *("No LoRA keys associated to CLIPTextModel", "Couldn't connect to the Hub"),
    *("are newly initialized", "were not used when initializing", "LOAD REPORT", "checkpoint seem corrupted"),
)


def _says_something(record: logging.LogRecord) -> bool:
    return not any(words in record.getMessage() for words in MEANT)
