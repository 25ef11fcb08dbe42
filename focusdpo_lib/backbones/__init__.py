"""The model families behind one small interface: what training, masks and generation may know of a model."""

from focusdpo_lib.backbones.conditioning import Conditioning, View
from focusdpo_lib.backbones.interface import Backbone
from focusdpo_lib.backbones.loading import CLASSES, BackboneError, best_device, family_class, identity, inputs, load
from focusdpo_lib.backbones.revisions import is_hub_id, pin, pinned, with_commits


def __getattr__(name: str):
    """FluxUno and SdxlIp, whose modules import diffusers, only where they are asked for."""
    for key, class_name in CLASSES.items():
        if class_name == name:
            return family_class(key)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
