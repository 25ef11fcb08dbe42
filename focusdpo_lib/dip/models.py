"""The models of DIP's stages: a folder or hub id to a network and its processor, and one sentence where that fails."""

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from focusdpo_lib.backbones import is_hub_id
from focusdpo_lib.backbones.culprits import LOADING_ERRORS
from focusdpo_lib.backbones.loading import best_device, quiet, why


class StageError(RuntimeError):
    """A stage that cannot go on with any draft; the message says what, where and what to do."""


def load_model(kind: type, processor: type, source: str, revision: str | None, setting: str, **words) -> tuple:
    """(network in evaluation mode on the best device, its processor) from a folder or hub id of safetensors.

    `setting` is what names the source, as "segmentation.detector"; `words` are for the network's from_pretrained.
    Raises StageError where the model is missing, incomplete, gated or out of reach.
    """
    with loading(source, setting):
        network = load_network(kind, source, revision, setting, **words)
        return network, processor.from_pretrained(source, revision=revision)


def load_network(kind: type, source: str, revision: str | None, setting: str, **words) -> Any:
    """The network of `load_model` alone."""
    from focusdpo_lib.backbones.parts import load_whole  # imports diffusers

    with loading(source, setting):
        words |= {"revision": revision, "use_safetensors": True}
        return load_whole(kind, source, "it", **words).eval().requires_grad_(False).to(best_device())


class loading:
    """Within this context whatever fails is the fault of the model that a setting names, in one sentence."""

    def __init__(self, source: str, setting: str):
        self.source, self.setting = source, setting

    def __enter__(self) -> None:
        if not Path(self.source).exists() and not is_hub_id(self.source):
            raise StageError(f"the model {self.source} does not exist: correct {self.setting}")
        quiet(downloads=not Path(self.source).is_dir())

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, LOADING_ERRORS) and not isinstance(error, torch.OutOfMemoryError | StageError):
            reason = why(error, self.source, f"correct {self.setting}")
            raise StageError(f"the model {self.source} cannot be loaded {reason}") from error


def facts(source: str, revision: str | None) -> dict[str, str]:
    """A model as provenance names it, and as the data card looks for its licence."""
    return {"model": source, **({"revision": revision} if revision else {})}


def images(pixels: torch.Tensor) -> list[np.ndarray]:
    """Pixels (B, 3, H, W) in [-1, 1] as images (H, W, 3) of uint8. Raises StageError for NaN and infinity."""
    if not pixels.isfinite().all():
        raise StageError(
            "an image came out as NaN or infinity: a weight of the model overflows; set backbone.precision to float32"
        )
    return list(((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())


def batches(keys: Sequence[Hashable], size: int) -> Iterator[list[int]]:
    """Indices of at most `size` items with equal keys, which a model takes as one batch; in order within each."""
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    for indices in groups.values():
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


def seed_of(*what: Any) -> int:
    """A seed in [0, 2**63) from a stage's seed, a draft's id and whatever else tells two draws apart."""
    digest = hashlib.sha256("\0".join(map(str, what)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
