"""The toybox's U-Net with an IP-Adapter-Plus: its training from nothing, and its folder."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional as F

from focusdpo_lib.backbones import Conditioning, SdxlIp
from focusdpo_lib.backbones.sdxl_ip import clip_pixels
from focusdpo_lib.params import Backbone
from focusdpo_lib.toybox.batches import VALUES, generator, slot_labels, to_pixels
from focusdpo_lib.toybox.fitting import fit
from focusdpo_lib.toybox.ip_adapter import image_matrices, new_ip_adapter, save_ip_adapter
from focusdpo_lib.toybox.pipelines import build_sdxl
from focusdpo_lib.toybox.transformer import load_latents, subject_error, training_sample

SINGLES = 900  # steps with one subject only, at the start
UNCONDITIONAL = 0.1  # share of samples without prompt and reference, for guidance


def new_backbone(
    vae: AutoencoderKL, seed: int = 0, device: str = "cpu", *, image_width: int = 128, hidden: int = 128, **sizes
) -> SdxlIp:
    """An untrained U-Net and IP-Adapter, through the loaders of the published ones.

    `image_width` and `hidden` are the widths of image encoder and resampler; `sizes` go to `build_sdxl`.
    """
    pipeline, settings = build_sdxl(vae, seed=seed, **sizes), Backbone()
    with TemporaryDirectory() as folder:
        new_ip_adapter(Path(folder), pipeline.unet, hidden, width=image_width)
        path = Path(settings.ip_weights)
        pipeline.load_ip_adapter(
            folder, subfolder=str(path.parent), weight_name=path.name, image_encoder_folder=settings.ip_encoder
        )
    return SdxlIp(pipeline.to(device), precision="bfloat16")


def save_backbone(backbone: SdxlIp, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Writes the pipeline folder, and the IP-Adapter in its subfolder `ip_adapter`; the backbone is spent by it."""
    pipeline = backbone.pipeline
    encoder, matrices = pipeline.image_encoder, image_matrices(backbone.unet)
    save_ip_adapter(Path(folder) / "ip_adapter", backbone.resampler, matrices, encoder, dtype)
    pipeline.unload_ip_adapter()
    pipeline.to("cpu", dtype).save_pretrained(folder)


def split_parameters(unet: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices that Muon moves: those of the transformer blocks, everything else for AdamW)."""
    muon, rest = [], []
    for name, parameter in unet.named_parameters():
        (muon if "transformer_blocks." in name and parameter.ndim == 2 else rest).append(parameter)
    return muon, rest


def trained_modules(backbone: SdxlIp) -> nn.ModuleDict:
    """What training moves: the pipeline's parts, and heads on the image embedding that name the five attributes.

    The published image encoder was trained before, on captions that name what is seen; the heads stand in for them.
    """
    pipeline, encoder = backbone.pipeline, backbone.pipeline.image_encoder
    width = encoder.config.projection_dim
    heads = nn.ModuleDict({name: nn.Linear(width, len(values)) for name, values in VALUES.items()})
    modules = nn.ModuleDict(
        {
            "unet": backbone.unet.to(memory_format=torch.channels_last),
            "resampler": backbone.resampler,
            "image_encoder": encoder,
            "text_encoder": pipeline.text_encoder,
            "text_encoder_2": pipeline.text_encoder_2,
            "heads": heads.to(backbone.device),
        }
    )
    return modules.requires_grad_(True)


def new_optimizers(modules: nn.ModuleDict) -> list[torch.optim.Optimizer]:
    """Muon for the U-Net's matrices, AdamW for everything else."""
    muon, rest = split_parameters(modules["unet"])
    rest += [p for name, module in modules.items() if name != "unet" for p in module.parameters()]
    return [
        torch.optim.Muon(muon, lr=2e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=8e-4, betas=(0.9, 0.95), weight_decay=0.0),
    ]


class StepLoss:
    """The loss of a step, as `fit` calls it: the error in ε, errors inside subjects weighing five times.

    One subject only for the first `SINGLES` steps, then two in every third; a share of samples is unconditional.
    """

    def __init__(
        self, backbone: SdxlIp, heads: nn.ModuleDict, latents: list[Path], shift: float, batch: int, seed: int
    ):
        """`shift` was subtracted from the latents, which were made for FLUX, and is added again: SDXL's have none."""
        self.backbone, self.heads, self.shift, self.batch, self.seed = backbone, heads, shift, batch, seed
        self.data, self.captions = load_latents(latents)

    def __call__(self, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        draw, backbone = generator(self.seed, step), self.backbone
        count = 2 if step >= SINGLES and step % 3 == 2 else 1
        at = 2 * torch.randint(len(self.captions) // 2, (self.batch,), generator=draw) + count - 1
        clean = self.data["target"][at].float().to(backbone.device) + self.shift
        noise = torch.randn(clean.shape, generator=draw).to(backbone.device)
        t = (1 - torch.rand(self.batch, generator=draw)).to(backbone.device)
        kept = torch.rand(self.batch, generator=draw) >= UNCONDITIONAL
        prompts = [self.captions[i] if keep else "" for i, keep in zip(at.tolist(), kept, strict=True)]
        with backbone.autocast(), backbone.attention():
            text, pooled = backbone.encode_prompts(prompts)
            tokens, named = self.see([training_sample(self.seed, i) for i in at.tolist()], kept, count)
        epsilon = backbone.predict(backbone.noised(clean, noise, t), t, Conditioning(text, pooled, tokens))
        error = (epsilon - noise) ** 2
        loss = subject_error(error, self.data["cover"][at].float().to(backbone.device))
        return loss + 0.1 * named, {f"mse_{count}": error.mean().item(), "named": named.item()}

    def see(self, samples: list, kept: torch.Tensor, count: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Image tokens of each subject's photos, and the cross-entropy of the attributes that the heads name."""
        encoder, device = self.backbone.pipeline.image_encoder, self.backbone.device
        photos = np.stack([photos[k] for k in range(count) for _, photos in samples])
        labels = torch.tensor([slot_labels(scene.identities[k]) for k in range(count) for scene, _ in samples])
        pixels = clip_pixels(to_pixels(photos).to(device), encoder.config.image_size)
        output = encoder(pixels * kept.repeat(count).to(device)[:, None, None, None], output_hidden_states=True)
        labels[~kept.repeat(count)] = -100
        guesses = [head(output.image_embeds) for head in self.heads.values()]
        named = [F.cross_entropy(guess, label) for guess, label in zip(guesses, labels.to(device).T, strict=True)]
        return self.backbone.resampler(output.hidden_states[-2]).chunk(count), sum(named) / len(named)


def train_sdxl_ip(
    vae: AutoencoderKL,
    latents: list[Path],
    folder: Path,
    steps: int,
    batch: int = 32,
    seed: int = 0,
    device: str = "cpu",
    *,
    sizes: dict | None = None,
    **options,
) -> tuple[SdxlIp, list[dict]]:
    """Trains U-Net, resampler, image and text encoders from nothing to predict ε; returns the backbone and the curve.

    Resumable in `folder`; `options` go to `fit`.
    """
    backbone = new_backbone(vae, seed, device, **(sizes or {}))
    modules = trained_modules(backbone)
    shift = (vae.config.shift_factor or 0.0) * vae.config.scaling_factor
    loss_at = StepLoss(backbone, modules["heads"], latents, shift, batch, seed)
    curve = fit("sdxl_ip", modules, new_optimizers(modules), loss_at, steps, folder, decay_from=0.6, **options)
    return backbone, curve
