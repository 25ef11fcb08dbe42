"""The model families behind one small interface: what training, masks and generation may know of a model."""

import re
import warnings
from pathlib import Path

import diffusers.utils.logging
import torch
import transformers.utils.logging
from safetensors import SafetensorError

from focusdpo_lib import params
from focusdpo_lib.backbones.conditioning import Conditioning
from focusdpo_lib.backbones.flux_uno import FluxUno

__all__ = ["BackboneError", "Conditioning", "FluxUno", "load"]

SHIPPED = Path(__file__).parent.parent / "toybox" / "weights"
FAMILIES = {"flux_uno": FluxUno}
HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*(?<!\.safetensors)")


class BackboneError(RuntimeError):
    """A model that cannot be loaded; the message says which, why and what to do."""


def model_path(settings: params.Backbone) -> str:
    """The folder or hub id that the settings name."""
    return str(SHIPPED / settings.family) if settings.model == "toybox" else settings.model


def identity(settings: params.Backbone) -> Path | str:
    """What a run that uses this backbone depends on: a folder by its content, a hub model by id and revision."""
    model = model_path(settings)
    return Path(model) if Path(model).is_dir() else f"{model}@{settings.revision or 'main'}"


def inputs(settings: params.Backbone) -> dict[str, Path | str]:
    """The inputs of a run that uses this backbone: the model, and the subject LoRA where there is one."""
    found: dict[str, Path | str] = {"model": identity(settings)}
    if settings.subject_lora is not None:
        lora = Path(settings.subject_lora)
        found["subject_lora"] = lora if lora.exists() else settings.subject_lora
    return found


def load(settings: params.Backbone, device: str | torch.device = "cpu") -> FluxUno:
    """The backbone that the settings name, frozen and in evaluation mode, on a device.

    Raises BackboneError when a model or LoRA is missing, incomplete or out of reach.
    """
    model, lora = model_path(settings), settings.subject_lora
    remedy = "run `make toybox-weights`" if settings.model == "toybox" else "correct backbone.model"
    _check(model, "model_index.json", f"the model {model}", remedy)
    if lora is not None:
        _check(lora, "", f"the subject LoRA {lora}", "correct backbone.subject_lora")
    if Path(model).is_dir():
        _quiet()
    try:
        return FAMILIES[settings.family].from_pretrained(
            model,
            device=device,
            revision=settings.revision,
            subject_lora=lora,
            precision=settings.precision,
            position_mode=settings.position_mode,
            sampling_shift=settings.sampling_shift,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if "out of memory" in str(error):
            raise
        reason = " ".join(str(error).split())[:300].rstrip(". ")
        what = f"the model {model}" + (f" with the subject LoRA {lora}" if lora else "")
        advice = "fetch it again" if Path(model).is_dir() else "go online, or name a folder that holds it"
        raise BackboneError(f"{what} cannot be loaded ({reason}): {advice}, or {remedy}") from error


def _check(name: str, needed: str, what: str, remedy: str) -> None:
    """What can be said before loading: a folder lacks a file, or a name is neither a file or folder nor a hub id."""
    path = Path(name)
    if path.is_dir() and not (path / needed).exists():
        raise BackboneError(f"{what} is a folder without {needed}, so it holds no diffusers pipeline: {remedy}")
    if not path.exists() and not HUB_ID.fullmatch(name):
        raise BackboneError(f"{what} does not exist: {remedy}")


def _quiet() -> None:
    """A folder loads in a moment and needs no progress bars; a download keeps them."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    # Autocast leaves the norms' weights in float32, as it should; torch only says that it has no fused kernel for that.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
