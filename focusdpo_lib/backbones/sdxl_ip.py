"""SDXL with IP-Adapter-Plus: references enter the U-Net as image tokens, through decoupled cross-attention.

The target of training is the noise ε at x_t of the pipeline's own noise schedule. A reference is what the adapter's
resampler makes of it, 16 tokens; several references are joined by `image_tokens`: side by side in one softmax
("concatenate"), as their mean ("average", PatchDPO's protocol), or each in an attention of its own that acts in its
subject's region alone ("masks", the pipeline's `ip_adapter_masks`).
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from focusdpo_lib.backbones.conditioning import Conditioning, View
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
from focusdpo_lib.backbones.ip_adapter import load_ip_adapter
from focusdpo_lib.backbones.parts import load_pipeline, load_whole
from focusdpo_lib.backbones.references import centre_square

# R17: every attention's q, k, v and output, and IP-Adapter's own keys and values.
LORA_TARGETS = r".*\.attn[12]\.(to_[qkv]|to_out\.0|processor\.to_[kv]_ip\.\d+)"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
DECODED = 2**20  # pixels that the autoencoder decodes at once, in float32: gigabytes
T = 1000  # steps of the noise schedule
PARTS = {
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
}


def clip_pixels(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """Pixels (B, 3, h, w) in [-1, 1] as CLIP takes them: short side to `size`, bicubic; centre crop; normalised."""
    h, w = pixels.shape[-2:]
    scaled = (size * h // min(h, w), size * w // min(h, w))
    pixels = F.interpolate(pixels, scaled, mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = ((side - size) // 2 for side in scaled)
    mean, std = (torch.tensor(x, device=pixels.device).view(3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
    return ((pixels[..., top : top + size, left : left + size] + 1) / 2 - mean) / std


def stripes(references: int, side: int = 64) -> torch.Tensor:
    """Regions (1, S, side, side) for a prompt whose subjects stand side by side, from left to right."""
    column = torch.arange(side) * references // side
    return (column == torch.arange(references)[:, None]).float()[None, :, None].expand(-1, -1, side, -1)


class SdxlIp(Family):
    """An SDXL pipeline with an IP-Adapter, frozen but for the adapter that `add_adapter` puts on its U-Net."""

    part, targets, predicts = "unet", LORA_TARGETS, "epsilon"

    def __init__(
        self,
        pipeline: StableDiffusionXLPipeline,
        *,
        precision: str = "auto",
        weights: str = "float32",
        image_tokens: str = "concatenate",
        scale: float = 1.0,
        negative_prompt: str = "",
    ):
        self.pipeline, self.network, self.vae = pipeline, pipeline.unet, pipeline.vae
        self.unet = pipeline.unet
        for module in (self.unet, self.vae, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.image_encoder):
            if module is not None:
                module.requires_grad_(False).eval()
        # References are projected once, when they are encoded, so that what is cached per pair is 16 tokens.
        self.resampler = self.unet.encoder_hid_proj.image_projection_layers[0]
        self.unet.encoder_hid_proj = nn.Identity()
        pipeline.set_ip_adapter_scale(scale)
        self.device = self.unet.device
        self.precision = chosen_precision(precision, self.device, weights)
        if weights in QUANTIZED and self.network is not None:
            compute_in(self.network, self.precision)
        self.image_tokens, self.negative_prompt = image_tokens, negative_prompt
        self.stride = self.multiple = pipeline.vae_scale_factor
        self.noising = DDPMScheduler.from_config(pipeline.scheduler.config)
        # In the order in which they run. Every block has one cross-attention: layer i is the block and its attention.
        parts = (self.unet.down_blocks, self.unet.mid_block, self.unet.up_blocks)
        modules = (module for part in parts if part is not None for module in part.modules())
        self.blocks = [module for module in modules if isinstance(module, BasicTransformerBlock)]
        self.reference_multiple = self.multiple * 2 ** (len(self.unet.config.block_out_channels) - 1)

    @classmethod
    def from_pretrained(
        cls,
        model,
        *,
        ip_adapter: str,
        ip_weights: str,
        ip_encoder: str,
        device="cpu",
        revision=None,
        ip_revision=None,
        weights: str = "float32",
        parts: str = "all",
        **settings,
    ) -> "SdxlIp":
        """Loads a pipeline folder or hub id and, from the folder or id `ip_adapter`, weight file and image encoder.

        `parts` "network" leaves out the encoders, which `prepare` has used before; the autoencoder then stays on the
        CPU. ("encoders" are the whole here: the U-Net holds the resampler.)
        """
        encoders = parts != "network"
        absent = () if encoders else TEXT_PARTS
        precision = chosen_precision(settings.get("precision", "auto"), torch.device(device), weights)
        pipeline = load_pipeline(
            *(StableDiffusionXLPipeline, PARTS, model, revision, absent),
            held=lambda name: held(name, cls.part, weights, precision),
        )
        require_channels(pipeline.unet)
        _check_prediction(pipeline)
        with blaming("ip_adapter"):  # it casts the pipeline: before any float32 LoRA weights
            load_ip_adapter(pipeline, ip_adapter, ip_weights, ip_revision, cast=weights not in QUANTIZED)
        if encoders:  # diffusers' load_ip_adapter would take the image encoder of any revision
            with blaming("ip_encoder"):
                pipeline.image_encoder = load_whole(
                    *(CLIPVisionModelWithProjection, ip_adapter, "it"),
                    unused="visual_projection.",
                    subfolder=ip_encoder,
                    revision=ip_revision,
                    use_safetensors=True,
                    **held("image_encoder", cls.part, weights, precision),
                )
                _check_width(pipeline)
        pipeline.vae.float()
        (pipeline if encoders else pipeline.unet).to(device)
        return cls(pipeline, weights=weights, **settings)

    def token_grid(self, size: Sequence[int]) -> tuple[int, int]:
        """Scores of layers of every size are resampled to the latent grid (R7)."""
        return size[-2], size[-1]

    def attention_layers(self, which: str | list[int]) -> list[int]:
        """R7: every cross-attention layer, or indices as they are."""
        if isinstance(which, str):
            return list(range(len(self.blocks)))
        if bad := [i for i in which if not 0 <= i < len(self.blocks)]:
            last = len(self.blocks) - 1
            raise ValueError(f"masks.layers names the layers {bad}, but this model has layers 0 to {last}")
        if not which:
            raise ValueError('masks.layers is an empty list: name at least one layer, or "all"')
        return list(which)

    # --- images, prompts and references to what the U-Net sees -------------------------------------------------------

    @torch.no_grad()
    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] → latents (B, C, H/stride, W/stride): the posterior's mean.

        Outside autocast: SDXL's own autoencoder overflows half precision.
        """
        mean = self.vae.encode(pixels.to(self.device).float()).latent_dist.mode()
        return mean * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) → pixels (B, 3, H, W) in [-1, 1], float32; one by one where they are large."""
        at_once = max(1, DECODED // (latents.shape[-2] * latents.shape[-1] * self.stride**2))
        scaled = (latents.to(self.device) / self.vae.config.scaling_factor).split(at_once)
        return torch.cat([self.vae.decode(part).sample.clamp(-1, 1) for part in scaled])

    def encode_prompts(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts → token embeddings of both encoders (B, L, d) and the second's pooled embedding (B, d_pooled)."""
        text, _, pooled, _ = self.pipeline.encode_prompt(texts, device=self.device, do_classifier_free_guidance=False)
        return text, pooled

    def reference(self, photo: Image.Image, side: int, resampling: str) -> torch.Tensor:
        """A photo as CLIP takes it, whatever `side` says: scaled once, to the size of the image encoder.

        `encode_references` does the same with the larger references of training, so that both see the same detail.
        """
        return centre_square(photo, self.pipeline.image_encoder.config.image_size, resampling)

    @torch.no_grad()
    def encode_references(self, images: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """One batch of reference pixels (B, 3, h, w) in [-1, 1] per subject → one batch of image tokens (B, 16, d)."""
        size = self.pipeline.image_encoder.config.image_size
        return tuple(self._project(clip_pixels(pixels.to(self.device), size)) for pixels in images)

    @torch.no_grad()
    def condition(self, prompts, references, regions=None, classes=()) -> Conditioning:
        """As every family; with masks, several references act in `regions` or, where there are none, in stripes.

        Where `classes` say what each reference shows, S lists of B words, the conditioning has views.
        """
        conditioning = super().condition(prompts, references)
        views = zip(references, classes, strict=True) if classes else ()
        views = tuple(View(self.encode_images(pixels), *self.encode_prompts(list(words))) for pixels, words in views)
        conditioning = replace(conditioning, views=views)
        if self.image_tokens != "masks" or len(references) < 2:
            return conditioning
        regions = stripes(len(references)).expand(len(prompts), -1, -1, -1) if regions is None else regions
        return replace(conditioning, regions=regions.float().to(self.device))

    def _project(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised pixels → image tokens: the last hidden layer but one of the image encoder, resampled."""
        encoder = self.pipeline.image_encoder
        hidden = encoder(pixels.to(encoder.dtype), output_hidden_states=True).hidden_states[-2]
        return self.resampler(hidden.to(next(self.resampler.parameters()).dtype)).float()

    @torch.no_grad()
    def unconditional(self, conditioning: Conditioning) -> Conditioning:
        """The negative prompt with as many references, made of zero *pixels* (after normalisation), as published."""
        count = len(conditioning)
        text, pooled = self.encode_prompts([self.negative_prompt] * count)
        size = self.pipeline.image_encoder.config.image_size
        zero = self._project(torch.zeros(1, 3, size, size, device=self.device)).expand(count, -1, -1)
        return replace(conditioning, text=text, pooled=pooled, references=(zero,) * len(conditioning.references))

    # --- the diffusion -----------------------------------------------------------------------------------------------

    def _steps(self, t: torch.Tensor) -> torch.Tensor:
        """t in (0, 1] → the steps 0 … 999 of the noise schedule; t = 1 is the noisiest."""
        return (t * T - 1e-3).ceil().long().clamp(1, T) - 1  # 667/1000 in float32 times 1000 is a little above 667

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε, for t (B,) in (0, 1]."""
        return self.noising.add_noise(latents, noise, self._steps(t))

    def target(self, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The noise ε."""
        return noise

    def timestep_shift(self, size: Sequence[int]) -> float:
        """SDXL's training draws steps uniformly, whatever the size."""
        return 1.0

    def predict(self, noised, t, conditioning: Conditioning, taps=None, guidance: float = 1.0) -> torch.Tensor:
        """ε at x_t (B, C, H, W) and t (B,) in (0, 1], as float32 (B, C, H, W).

        `taps(layer, target_tokens, reference_tokens, grid)` is called in every transformer block with tokens of the
        target (B, P, d) and each reference's. By `taps.reference_tokens` (R7) those are its own, (B, P_r, d) from a
        pass before this one (see `_look_at_references`), or the keys of its image tokens, (B, 16, d), heads side by
        side. With another guidance than 1 the result is ε_u + guidance · (ε_c − ε_u), u being `unconditional`.
        """
        seen = None
        if taps is not None and taps.reference_tokens == "own":
            seen = self._look_at_references(taps, t, conditioning)
        with self._tapped(taps, seen, noised.shape[-2:], len(conditioning.references)):
            epsilon = self._epsilon(noised, self._steps(t), conditioning)
        if guidance == 1.0:
            return epsilon
        nothing = self.unconditional(conditioning)
        return _guided(epsilon, self._epsilon(noised, self._steps(t), nothing), guidance)

    @torch.no_grad()
    def _look_at_references(self, taps, t: torch.Tensor, conditioning: Conditioning) -> list[list[torch.Tensor]]:
        """The tokens (B, P_r, d) of each reference in every layer, as the network sees the references (R7).

        Each goes through it alone: its view, noised as the target is, with its subject's class as prompt and its own
        image tokens; those of one size as one batch. Only the samples that the taps look at.
        """
        if len(conditioning.views) != len(conditioning.references):
            raise ValueError("the conditioning has no views of its references: call `condition` with `classes`")
        conditioning, steps = conditioning[taps.samples], self._steps(t[taps.samples])
        seen: list[list[torch.Tensor]] = [[] for _ in self.blocks]
        looks = list(zip(conditioning.views, conditioning.references, strict=True))
        alike = len({view.latents.shape for view, _ in looks}) == 1
        for together in [looks] if alike else [[look] for look in looks]:
            views, tokens = zip(*together, strict=True)
            view, count = View(*map(torch.cat, zip(*views, strict=True))), len(together)

            def keep(layer: int, found: torch.Tensor, count=count) -> None:
                seen[layer] += found.chunk(count)

            with self._listening(taps.features, False, keep):
                alone = Conditioning(view.text, view.pooled, (torch.cat(tokens),))
                self._epsilon(view.latents, steps.repeat(count), alone)
        return seen

    def _epsilon(self, noised, steps, conditioning: Conditioning) -> torch.Tensor:
        dtype = self.unet.dtype
        height, width = (side * self.stride for side in noised.shape[-2:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]], device=self.device).float()
        images = torch.stack(conditioning.references, 1).to(dtype)  # (B, S, 16, d)
        if self.image_tokens == "average":
            images = images.mean(1, keepdim=True)
        masks = None if conditioning.regions is None else {"ip_adapter_masks": [conditioning.regions]}
        added = {
            "text_embeds": conditioning.pooled.to(dtype),
            "time_ids": sizes.expand(len(noised), -1),
            "image_embeds": [images],
        }
        with self.autocast(), self.attention():
            return self.unet(
                noised.to(dtype),
                steps,
                encoder_hidden_states=conditioning.text.to(dtype),
                added_cond_kwargs=added,
                cross_attention_kwargs=masks,
                return_dict=False,
            )[0].float()

    @contextmanager
    def _tapped(self, taps, seen: list[list[torch.Tensor]] | None, size: Sequence[int], references: int):
        """Calls `taps` with each layer's tokens while the U-Net runs: the target's, and those `seen` or image keys."""
        if taps is None:
            yield
        elif seen is not None:

            def compare(layer: int, tokens: torch.Tensor) -> None:
                taps(layer, tokens, seen[layer], _grid(tokens, size))

            with self._listening(taps.features, True, compare):
                yield
        else:
            if self.image_tokens == "average" and references > 1:
                raise ValueError("averaged image tokens cannot tell subjects apart: use image_tokens 'concatenate'")
            tokens, hooks = self.resampler.latents.shape[1], []
            for layer, block in enumerate(self.blocks):
                hooks += _image_key_hooks(taps, layer, block.attn2, tuple(size), references, tokens)
            with _removed_at_the_end(hooks):
                yield

    def _listening(self, features: str, target: bool, receive: Callable[[int, torch.Tensor], None]):
        """A context in which `receive(layer, tokens)` gets the tokens (B, P, d) of every transformer block (R3).

        They are the block's output; the queries of its cross-attention ("query"); or what its self-attention compares
        ("query_key"): queries of the target, keys of a reference.
        """
        part = {"block_output": None, "query": "attn2.to_q", "query_key": "attn1.to_q" if target else "attn1.to_k"}
        modules = [b if part[features] is None else b.get_submodule(part[features]) for b in self.blocks]

        def hook_of(layer: int):
            @torch.compiler.disable  # each layer's and step's hook is another: its block would be compiled anew for it
            def hook(module, inputs, output):
                receive(layer, output)

            return hook

        return _removed_at_the_end([m.register_forward_hook(hook_of(i)) for i, m in enumerate(modules)])

    # --- sampling ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def denoise(self, noise: torch.Tensor, conditioning: Conditioning, steps: int, guidance=1.0) -> torch.Tensor:
        """Noise (B, C, h, w) of unit variance → latents, by the pipeline's own scheduler."""
        scheduler = self.pipeline.scheduler
        scheduler.set_timesteps(steps, device=self.device)
        nothing = self.unconditional(conditioning) if guidance != 1.0 else None
        latents = noise * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:  # fractions of a step, with some schedulers: past `predict`'s whole ones
            seen = scheduler.scale_model_input(latents, timestep)
            epsilon = self._epsilon(seen, timestep, conditioning)
            if nothing is not None:
                epsilon = _guided(epsilon, self._epsilon(seen, timestep, nothing), guidance)
            latents = scheduler.step(epsilon, timestep, latents, return_dict=False)[0]
        return latents


def _check_prediction(pipeline: StableDiffusionXLPipeline) -> None:
    """Raises ValueError for a U-Net that was trained to predict something else than the noise."""
    if (found := pipeline.scheduler.config.get("prediction_type", "epsilon")) != "epsilon":
        raise ValueError(f"its U-Net predicts {found} by its scheduler_config.json, and the kit trains epsilon alone")


def _check_width(pipeline: StableDiffusionXLPipeline) -> None:
    """Raises ValueError for an image encoder whose patches the adapter's resampler does not take."""
    resampler, width = (
        pipeline.unet.encoder_hid_proj.image_projection_layers[0],
        pipeline.image_encoder.config.hidden_size,
    )
    if (needed := resampler.proj_in.in_features) != width:
        raise ValueError(f"it is {width} wide, and the IP-Adapter was trained with one of {needed}")


def _guided(conditional: torch.Tensor, unconditional: torch.Tensor, guidance: float) -> torch.Tensor:
    """Classifier-free guidance."""
    return unconditional + guidance * (conditional - unconditional)


@contextmanager
def _removed_at_the_end(hooks: list):
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _grid(tokens: torch.Tensor, size: Sequence[int]) -> tuple[int, int]:
    """The grid (h, w) of a layer's tokens (B, P, d), for latents of `size` (H, W)."""
    shrink = round((size[0] * size[1] / tokens.shape[1]) ** 0.5)
    return size[0] // shrink, size[1] // shrink


def _image_key_hooks(taps, layer: int, attention: nn.Module, size: tuple[int, int], references: int, tokens: int):
    """Hooks on a cross-attention's queries and on the keys of its image tokens; its grid follows from its length."""
    kept = {}

    @torch.compiler.disable  # each layer's and step's hook is another: its block would be compiled anew for it
    def query_hook(module, inputs, output):
        kept["query"], kept["keys"] = output, []

    @torch.compiler.disable
    def key_hook(module, inputs, output):
        queries = kept["query"]
        keys = output.flatten(1, 2) if output.ndim == 4 else output  # (B, S, 16, d) or (B, S · 16, d)
        kept["keys"] += keys.chunk(keys.shape[1] // tokens, 1)  # with masks, one reference a call
        if len(kept["keys"]) == references:
            taps(layer, queries, kept["keys"], _grid(queries, size))

    return [
        attention.to_q.register_forward_hook(query_hook),
        attention.processor.to_k_ip[0].register_forward_hook(key_hook),
    ]
