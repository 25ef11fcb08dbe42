"""What training, masks and generation may know of a model; everything else stays behind it (see `family`)."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import nn

from focusdpo_lib.backbones.conditioning import Conditioning


class Backbone(Protocol):
    """A frozen text-to-image model that takes reference images, and the one adapter that training moves.

    Pixels (B, 3, H, W) in [-1, 1]; latents (B, C, h, w), h = H / stride; t (B,) in (0, 1], 1 the noisiest.
    """

    network: nn.Module  # the transformer or U-Net that carries the adapter
    part: str  # its name in the pipeline, "transformer" or "unet"
    predicts: str  # "velocity" or "epsilon"
    device: torch.device
    precision: torch.dtype  # of arithmetic
    stride: int  # pixels a latent
    multiple: int  # the sides of an image are multiples of so many pixels
    reference_multiple: int  # and those of a reference that masks are derived from

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels → normalised latents."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents → pixels."""

    def reference(self, photo: Image.Image, side: int, resampling: str) -> torch.Tensor:
        """Pixels (3, h, w) in [-1, 1] of an RGB photo as the model takes its references."""

    def condition(
        self,
        prompts: list[str],
        references: Sequence[torch.Tensor],
        regions: torch.Tensor | None = None,
        classes: Sequence[Sequence[str]] = (),
    ) -> Conditioning:
        """Everything a prediction is conditioned on, for B prompts and S batches of reference pixels (B, 3, h, w)."""

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t."""

    def target(self, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What `predict` should say of x_t."""

    def predict(
        self, noised: torch.Tensor, t: torch.Tensor, conditioning: Conditioning, taps: Callable | None = None
    ) -> torch.Tensor:
        """The network's prediction at x_t, float32; `taps(layer, target, references, grid)` sees tokens on the way.

        With taps whose `reference_tokens` are "own", the conditioning's views, if any, are noised as the target is.
        """

    def sample(
        self, conditioning: Conditioning, seeds: Sequence[int], size: tuple[int, int], steps: int, guidance: float = 1.0
    ) -> torch.Tensor:
        """Pixels of `size` (H, W) by the model's own scheduler; each sample's noise is its seed's alone."""

    def token_grid(self, size: Sequence[int]) -> tuple[int, int]:
        """The grid of target tokens on which masks are derived, for latents of a size."""

    def attention_layers(self, which: str | list[int]) -> list[int]:
        """The layers that a setting of `masks.layers` names (R2, R7)."""

    def timestep_shift(self, size: Sequence[int]) -> float:
        """The shift of training times (R15, "uno_shift") for latents of a size."""

    def add_adapter(
        self, rank: int, alpha: float | None = None, targets: list[str] | None = None, seed: int = 0
    ) -> None:
        """Puts a fresh adapter on the network, the only weights with gradients."""

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The adapter's weights."""

    def reference_model(self) -> AbstractContextManager:
        """Within this context the adapter, and it alone, is off."""

    def save_adapter(self, folder: Path) -> None: ...

    def load_adapter(self, folder: Path) -> None: ...
