"""FLUX with UNO's reference tokens: `[text | target | reference 1 | reference 2 …]` through FluxTransformer2DModel.

References go through the same embedder as the target and share its timestep; only the target's tokens are predictions
(UNO, Wu et al. 2025). The target of training is the velocity ε − x_0 at x_t = (1 − t) x_0 + t ε.
"""

import math
from collections.abc import Sequence
from contextlib import contextmanager

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from PIL import Image
from transformers import CLIPTextModel, T5EncoderModel

from focusdpo_lib.backbones.conditioning import Conditioning
from focusdpo_lib.backbones.culprits import blaming
from focusdpo_lib.backbones.family import (
    QUANTIZED,
    TEXT_PARTS,
    Family,
    chosen_precision,
    compute_in,
    held,
    require_channels,
)
from focusdpo_lib.backbones.parts import load_pipeline
from focusdpo_lib.backbones.references import long_side
from focusdpo_lib.backbones.subject_lora import load_subject_lora
from focusdpo_lib.backbones.tokens import attention_hooks, output_hook, pack, position_ids, unpack

# UNO's own targets (R17): attention q, k, v and output of both streams in double blocks; q, k, v and output of single.
LORA_TARGETS = (
    r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
    r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_out)"
)
PARTS = {
    "text_encoder": CLIPTextModel,
    "text_encoder_2": T5EncoderModel,
    "transformer": FluxTransformer2DModel,
    "vae": AutoencoderKL,
}


class FluxUno(Family):
    """A FLUX pipeline with UNO's conditioning, frozen but for the adapter that `add_adapter` puts on it."""

    part, targets, predicts = "transformer", LORA_TARGETS, "velocity"

    def __init__(
        self,
        pipeline: FluxPipeline,
        *,
        precision: str = "auto",
        weights: str = "float32",
        position_mode: str = "d",
        sampling_shift: str = "uno",
    ):
        self.pipeline = pipeline
        self.transformer, self.vae = pipeline.transformer, pipeline.vae
        self.network = self.transformer
        for module in (self.transformer, self.vae, pipeline.text_encoder, pipeline.text_encoder_2):
            if module is not None:  # see `parts` below
                module.requires_grad_(False).eval()
        self.device = (self.vae if self.transformer is None else self.transformer).device
        self.precision = chosen_precision(precision, self.device, weights)
        if weights in QUANTIZED and self.network is not None:
            compute_in(self.network, self.precision)
        self.position_mode, self.sampling_shift = position_mode, sampling_shift
        self.text_length = min(pipeline.tokenizer_2.model_max_length, 512) if pipeline.tokenizer_2 else 512
        self.stride = pipeline.vae_scale_factor
        self.multiple = self.reference_multiple = 2 * self.stride
        self.double_blocks = 0 if self.transformer is None else len(self.transformer.transformer_blocks)

    @classmethod
    def from_pretrained(
        cls,
        model,
        *,
        device="cpu",
        revision=None,
        subject_lora=None,
        subject_revision=None,
        weights: str = "float32",
        parts: str = "all",
        **settings,
    ) -> "FluxUno":
        """Loads a pipeline folder or hub id (safetensors only) and, if given, the subject LoRA, a part of the base.

        `parts`: "encoders" leaves out the transformer, as `prepare` does without it; "network" leaves out the text
        encoders, which training does without, and keeps the autoencoder on the CPU.
        """
        absent = {"network": TEXT_PARTS, "encoders": ("transformer",)}.get(parts, ())
        precision = chosen_precision(settings.get("precision", "auto"), torch.device(device), weights)
        pipeline = load_pipeline(
            *(FluxPipeline, PARTS, model, revision, absent),
            held=lambda name: held(name, cls.part, weights, precision),
        )
        if pipeline.transformer is not None:
            require_channels(pipeline.transformer)
        if subject_lora is not None and parts != "encoders":
            with blaming("subject_lora"):
                load_subject_lora(pipeline, subject_lora, subject_revision)
        (pipeline.transformer if parts == "network" else pipeline).to(device)
        return cls(pipeline, weights=weights, **settings)

    def token_grid(self, size: Sequence[int]) -> tuple[int, int]:
        """The grid (h, w) of the target's tokens for latents of `size` (H, W)."""
        return size[-2] // 2, size[-1] // 2

    def attention_layers(self, which: str | list[int]) -> list[int]:
        """R2: "double" are the double-stream blocks, "all" those and the single-stream ones; or indices as they are."""
        total = self.double_blocks + len(self.transformer.single_transformer_blocks)
        if isinstance(which, str):
            return list(range(self.double_blocks if which == "double" else total))
        if bad := [i for i in which if not 0 <= i < total]:
            raise ValueError(f"masks.layers names the layers {bad}, but this model has layers 0 to {total - 1}")
        if not which:
            raise ValueError('masks.layers is an empty list: name at least one layer, or "double" or "all"')
        return list(which)

    # --- images, prompts and references to what the transformer sees -------------------------------------------------

    @torch.no_grad()
    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] → latents (B, C, H/stride, W/stride), float32: the posterior's mean."""
        with self.autocast():
            mean = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist.mode().float()
        return (mean - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) → pixels (B, 3, H, W) in [-1, 1], float32."""
        latents = latents.to(self.device) / self.vae.config.scaling_factor + self.vae.config.shift_factor
        with self.autocast():
            return self.vae.decode(latents.to(self.vae.dtype)).sample.float().clamp(-1, 1)

    def encode_prompts(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts → T5 token embeddings (B, L, d) and CLIP's pooled embedding (B, d_pooled)."""
        text, pooled, _ = self.pipeline.encode_prompt(texts, texts, self.device, max_sequence_length=self.text_length)
        return text, pooled

    def reference(self, photo: Image.Image, side: int, resampling: str) -> torch.Tensor:
        """A photo as UNO takes it: its long side scaled to `side`, cut to whole tokens."""
        return long_side(photo, side, self.multiple, resampling)

    @torch.no_grad()
    def encode_references(self, images: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """One batch of reference pixels (B, 3, h, w) per subject → one batch of latents per subject."""
        return tuple(self.encode_images(image) for image in images)

    # --- the diffusion -----------------------------------------------------------------------------------------------

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t = (1 − t) x_0 + t ε, for t (B,) in [0, 1]."""
        t = t.view(-1, 1, 1, 1)
        return (1 - t) * latents + t * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The velocity ε − x_0."""
        return noise - latents

    def _mu(self, tokens: int) -> float:
        """The library's own resolution-dependent shift for a number of tokens."""
        c = self.pipeline.scheduler.config
        return calculate_shift(tokens, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)

    def timestep_shift(self, size: Sequence[int]) -> float:
        """s = exp(mu), by which UNO's training shifts a uniform time u to s u / (1 + (s − 1) u), for latents (H, W)."""
        return math.exp(self._mu(math.prod(self.token_grid(size))))

    def sampling_times(self, size: Sequence[int], steps: int) -> torch.Tensor:
        """The scheduler, set to the (steps + 1,) times in [0, 1] of a sampling run for latents of `size` (H, W).

        UNO's sampling shifts by a token count of H W / 256 where its training, rightly, has H W / 4: mu is 0.459 and
        not 0.63 for 512 × 512 pixels. Its published numbers come from there, so a `sampling_shift` of "uno" does the
        same; "library" counts as the training does. A model without resolution-dependent shift has neither.
        """
        scheduler = self.pipeline.scheduler
        tokens = size[-2] * size[-1] // (256 if self.sampling_shift == "uno" else 4)
        mu = self._mu(tokens) if scheduler.config.use_dynamic_shifting else None
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), device=self.device, mu=mu)
        return scheduler.sigmas

    def predict(self, noised, t, conditioning: Conditioning, taps=None, guidance: float = 1.0) -> torch.Tensor:
        """The velocity at x_t (B, C, H, W) and t (B,) in [0, 1], as float32 (B, C, H, W).

        `taps(layer, target_tokens, reference_tokens)` is called in every attention block with tokens of the target
        (B, P_t, d) and a list of each reference's (B, P_r, d); layers count the double blocks, then the single. By
        `taps.features` they are the block's output, the attention's queries, or target queries and reference keys (R3).
        `guidance` is a number, or one a sample (B,); a model without that input has none.
        """
        height, width = noised.shape[-2:]
        tokens = [pack(x) for x in (noised, *conditioning.references)]
        grids = [(x.shape[-2] // 2, x.shape[-1] // 2) for x in (noised, *conditioning.references)]
        distilled = self.transformer.config.guidance_embeds
        with (
            self.autocast(),
            self.attention(),
            self._tapped(taps, conditioning.text.shape[1], [x.shape[1] for x in tokens]),
        ):
            output = self.transformer(
                hidden_states=torch.cat(tokens, 1).to(self.transformer.dtype),
                encoder_hidden_states=conditioning.text.to(self.transformer.dtype),
                pooled_projections=conditioning.pooled.to(self.transformer.dtype),
                timestep=t,
                img_ids=position_ids(grids[0], grids[1:], self.position_mode).to(self.device),
                txt_ids=torch.zeros(conditioning.text.shape[1], 3, device=self.device),
                guidance=torch.zeros_like(t) + guidance if distilled else None,
                return_dict=False,
            )[0]
        return unpack(output[:, : tokens[0].shape[1]].float(), height, width)

    @contextmanager
    def _tapped(self, taps, text_tokens: int, lengths: list[int]):
        """Calls `taps` with the target and reference tokens of each block while the transformer runs."""
        if taps is not None and taps.reference_tokens != "own":
            raise ValueError("masks.reference_tokens image_keys is a reading of the U-Net: set own")
        handles = []
        blocks = (*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks)
        for layer, block in enumerate(blocks if taps is not None else ()):
            skipped = 0 if layer < self.double_blocks else text_tokens  # single blocks attend to text and image as one
            if taps.features == "block_output":
                handles.append(block.register_forward_hook(output_hook(taps, layer, lengths)))
            else:
                handles += attention_hooks(taps, layer, block.attn, skipped, lengths)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # --- sampling ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def denoise(self, latents: torch.Tensor, conditioning: Conditioning, steps: int, guidance=1.0) -> torch.Tensor:
        """Noise (B, C, h, w) → latents, by the pipeline's own scheduler."""
        scheduler = self.pipeline.scheduler
        times = self.sampling_times(latents.shape, steps)
        for t, timestep in zip(times[:-1], scheduler.timesteps, strict=True):
            velocity = self.predict(latents, t.expand(len(latents)), conditioning, guidance=guidance)
            latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        return latents
