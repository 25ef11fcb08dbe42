"""What repaints inside a mask: FLUX.1-Fill or an SDXL inpainting model, by diffusers' own pipelines."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from focusdpo_lib import params
from focusdpo_lib.backbones.loading import best_device
from focusdpo_lib.dip.models import facts, loading

DEFAULTS = {
    "flux_fill": "black-forest-labs/FLUX.1-Fill-dev",
    "sdxl": "diffusers/stable-diffusion-xl-1.0-inpainting-0.1",
}


class Painter:
    """A pipeline that fills in. Raises StageError where its model cannot be loaded."""

    def __init__(self, settings: params.Disruption):
        source, revision = settings.model or DEFAULTS[settings.painter], settings.revision
        with loading(source, "disruption.model"):
            self.pipeline = _load(settings.painter, source, revision, getattr(torch, settings.weights))
        self.pipeline.to(best_device()).set_progress_bar_config(disable=True)
        self.settings, self.model = settings, facts(source, revision)
        stride = self.pipeline.vae_scale_factor
        self.multiple = 2 * stride if settings.painter == "flux_fill" else math.lcm(8, stride)  # of an image's sides

    @torch.no_grad()
    def paint(
        self,
        images: Sequence[np.ndarray],
        masks: Sequence[np.ndarray],
        prompts: Sequence[str],
        seeds: Sequence[int],
        denoising: float,
    ) -> list[np.ndarray]:
        """Images (H, W, 3) of one size, repainted in their masks (H, W) and, by the autoencoder, touched outside them.

        `denoising` in (0, 1]: how much of the way back to noise. An image's noise is its seed's alone.
        """
        height, width = (-(-side // self.multiple) * self.multiple for side in images[0].shape[:2])
        words = {"max_sequence_length": self._length()} if self.settings.painter == "flux_fill" else {}
        painted = self.pipeline(
            prompt=list(prompts),
            image=[_resized(Image.fromarray(image), width, height, Image.Resampling.LANCZOS) for image in images],
            mask_image=[_resized(Image.fromarray(m), width, height, Image.Resampling.NEAREST) for m in masks],
            height=height,
            width=width,
            strength=denoising,
            num_inference_steps=self.settings.steps,
            guidance_scale=self.settings.guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            **words,
        ).images
        high, wide = images[0].shape[:2]
        return [np.asarray(_resized(each, wide, high, Image.Resampling.LANCZOS)) for each in painted]

    def _length(self) -> int:
        return min(self.pipeline.tokenizer_2.model_max_length, 512)


def _load(painter: str, source: str, revision: str | None, dtype: torch.dtype):
    """The pipeline, every part in one dtype: FLUX's own code hands the autoencoder what the text encoders give."""
    import diffusers

    from focusdpo_lib.backbones import flux_uno, sdxl_ip
    from focusdpo_lib.backbones.parts import load_pipeline

    kind = diffusers.FluxFillPipeline if painter == "flux_fill" else diffusers.StableDiffusionXLInpaintPipeline
    parts = {"flux_fill": flux_uno, "sdxl": sdxl_ip}[painter].PARTS
    pipeline = load_pipeline(kind, parts, source, revision, (), lambda name: {"dtype": dtype})
    if painter == "flux_fill" and pipeline.transformer.config.in_channels <= pipeline.transformer.out_channels:
        raise ValueError("its network takes no mask: it is FLUX.1-Fill that fills in, and no other FLUX")
    return pipeline


def _resized(picture: Image.Image, width: int, height: int, how: Image.Resampling) -> Image.Image:
    return picture if picture.size == (width, height) else picture.resize((width, height), how)
