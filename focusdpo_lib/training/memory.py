"""What to do when a model does not fit: the presets of params/paper/memory, from the fastest to the smallest."""

from contextlib import AbstractContextManager

import torch

from focusdpo_lib import params

PRESETS = "params/paper/memory"


class MemoryShortageError(RuntimeError):
    """The device has too little memory; the message says which settings need less."""


def advice(backbone: params.Backbone, training: params.Training | None = None) -> str:
    """The next smaller preset for these settings; `training` is None where nothing is trained."""
    if backbone.weights == "float32":
        return f"hold the base in bfloat16, as {PRESETS}/80gb.yaml does, under another run name"
    if training is not None and not training.gradient_checkpointing:
        return f"turn gradient checkpointing on, as {PRESETS}/48gb.yaml does, under another run name"
    if backbone.weights != "nf4":
        return f"quantize the base, as {PRESETS}/24gb.yaml does, under another run name"
    if training is not None and training.batch_size > 1:
        return "lower training.batch_size and raise training.gradient_accumulation instead"
    return "no preset is smaller: use smaller images or references, or a device with more memory"


class MemoryAdvice(AbstractContextManager):
    """Within this context running out of device memory raises MemoryShortageError with `advice`."""

    def __init__(
        self, backbone: params.Backbone, training: params.Training | None = None, preparing: bool = False
    ) -> None:
        self.backbone, self.training, self.preparing = backbone, training, preparing

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, torch.OutOfMemoryError) or "MPS backend out of memory" in str(error):
            what = "train" if self.training else "prepare pairs" if self.preparing else "sample"
            remedy = advice(self.backbone, self.training)
            if self.preparing and self.backbone.weights != "float32":  # a preset changes nothing for the encoders
                remedy = "prepare them once where there is more, and train on the same results folder"
            device = torch.cuda.get_device_name() if torch.cuda.is_initialized() else "the device"
            raise MemoryShortageError(
                f"{device} has too little memory to {what} with {self.backbone.model} in {self.backbone.weights}: "
                f"{remedy}"
            ) from error
