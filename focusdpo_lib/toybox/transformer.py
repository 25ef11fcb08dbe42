"""The toybox's UNO-style transformer: the latents it learns from, its training, and the distillation of guidance."""

import json
import math
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from focusdpo_lib.backbones import Conditioning, FluxUno
from focusdpo_lib.runs import atomic
from focusdpo_lib.toybox import world
from focusdpo_lib.toybox.batches import generator, slot_labels, to_pixels
from focusdpo_lib.toybox.fitting import fit
from focusdpo_lib.toybox.naming import MiddleTokens, Naming
from focusdpo_lib.toybox.pipelines import build_flux

# Times of training and sampling lie nearer to noise, as FLUX's do: class and shape are decided there. (Sampling alone,
# after 1900 steps with and without: 0.42 of classes right against 0.25.)
SHIFT = 2.5
# 6.0 M parameters. Guidance is an input, as FLUX.1-dev has it.
SIZES = {
    "heads": 6,
    "head_dim": 32,
    "double_blocks": 3,
    "single_blocks": 3,
    "guidance_embeds": True,
    "shift": SHIFT,
}
SINGLES = 1200  # a fixed number, so that a longer run starts as a shorter one does
UNCONDITIONAL = 0.1  # share of samples without prompt and reference, for guidance
NAMING = 0.2  # weight of the cross-entropy of what the middle tokens name
GUIDED = (1.0, 5.0)  # the scales that distillation draws from


def training_sample(seed: int, index: int) -> tuple[world.Scene, list[np.ndarray]]:
    """Sample `index` of the training world: its scene and a photo of each subject; odd indices show two subjects."""
    rng = np.random.default_rng([seed, index])
    subjects = world.sample_subjects(rng, 1 + index % 2)
    scene = world.sample_scene(rng, subjects)
    return scene, [world.halve(world.photo(s, int(rng.integers(2**31)))) for s in subjects]


def make_latents(vae: AutoencoderKL, path: Path, first: int, count: int, seed: int = 0, batch: int = 50) -> None:
    """Encodes samples first … first + count − 1 of the training world and writes them as one safetensors file.

    target (N, 8, 16, 16) and references (N, 2, 8, 8, 8) in float16, scaled as the pipeline scales them; cover
    (N, 2, 16, 16), the share of each latent cell that a subject covers; labels (N, 2, 5) as `slot_labels` gives them;
    captions in the header. Even samples show one subject (their second reference and cover are zero), odd ones two.
    """
    if path.exists():
        return
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    captions, columns = [], {"target": [], "references": [], "cover": [], "labels": []}

    def encode(images):
        with torch.no_grad(), torch.autocast(vae.device.type, torch.bfloat16):
            pixels = to_pixels(np.stack(images)).to(vae.device, memory_format=torch.channels_last)
            return ((vae.encode(pixels).latent_dist.mode().float() - shift) * scale).half().cpu().contiguous()

    for start in range(first, first + count, batch):
        scenes, photos, covers, labels = [], [], [], []
        for i in range(start, start + batch):
            scene, references = training_sample(seed, i)
            image, masks = world.render(scene)
            scenes.append(image)
            covers.append(np.concatenate([masks, np.zeros_like(masks)])[:2])
            labels.append([slot_labels(identity) for identity in (*scene.identities, None)][:2])
            captions.append(scene.caption)
            photos += (references * 2)[:2]
        references = encode(photos).unflatten(0, (batch, 2))
        references[::2, 1] = 0
        cells = torch.from_numpy(np.stack(covers)).float()
        columns["target"].append(encode(scenes))
        columns["references"].append(references)
        columns["cover"].append(F.avg_pool2d(cells, 4).half())
        columns["labels"].append(torch.tensor(labels))
    with atomic(path) as partial_path:
        save_file(
            {name: torch.cat(parts) for name, parts in columns.items()},
            partial_path,
            metadata={"captions": json.dumps(captions)},
        )


def load_latents(paths: list[Path]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors and captions of `make_latents` files, joined in order."""
    columns, captions = [], []
    for path in paths:
        with safe_open(path, "pt") as file:
            captions += json.loads(file.metadata()["captions"])
        columns.append(load_file(path))
    return {name: torch.cat([c[name] for c in columns]) for name in columns[0]}, captions


def split_parameters(transformer: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices that Muon moves: attention and MLP weights of the blocks, everything else for AdamW)."""
    muon, rest = [], []
    for name, parameter in transformer.named_parameters():
        inside = "blocks." in name and parameter.ndim == 2 and ".linear." not in name
        (muon if inside else rest).append(parameter)
    return muon, rest


def draw_times(count: int, source: torch.Generator) -> torch.Tensor:
    """Logit-normal times, one in each of `count` equally likely intervals, moved towards noise by `SHIFT`."""
    share = (torch.arange(count) + torch.rand(count, generator=source)) / count
    return torch.sigmoid(1.2 * torch.special.ndtri(share.clamp(1e-4, 1 - 1e-4)) + math.log(SHIFT))


class Batches:
    """What a step learns from: `batch` samples of one or of two subjects, noise and times, by seed and step alone.

    One subject only for the first `SINGLES` steps, then one and two in turn, so that a batch has one count of
    references. A sample that is not kept has no prompt and zeros for references: the unconditional case.
    """

    def __init__(self, backbone: FluxUno, latents: list[Path], batch: int, seed: int):
        self.backbone, self.batch, self.seed = backbone, batch, seed
        self.data, self.captions = load_latents(latents)

    def draw(self, step: int, singles: int = SINGLES, dropped: float = UNCONDITIONAL) -> dict[str, torch.Tensor]:
        """Columns of a batch: at (rows), clean, noise, t, kept, cover and labels; count of references is cover's."""
        draw, device = generator(self.seed, step), self.backbone.device
        count = 1 if step < singles else 1 + step % 2
        at = 2 * torch.randint(len(self.captions) // 2, (self.batch,), generator=draw) + count - 1
        clean = self.data["target"][at].float()
        noise = torch.randn(clean.shape, generator=draw)
        t = draw_times(self.batch, draw)
        kept = torch.rand(self.batch, generator=draw) >= dropped
        cover = self.data["cover"][at, :count].float()
        drawn = {"clean": clean, "noise": noise, "t": t, "kept": kept, "cover": cover}
        drawn["labels"] = self.data["labels"][at, :count].long()
        return {"at": at, **{name: column.to(device) for name, column in drawn.items()}}

    def conditioning(self, drawn: dict[str, torch.Tensor], kept: torch.Tensor) -> Conditioning:
        """Prompts and references of the samples that are kept, the unconditional case of the others."""
        rows = zip(drawn["at"].tolist(), kept.tolist(), strict=True)
        with self.backbone.autocast():
            text, pooled = self.backbone.encode_prompts([self.captions[i] if keep else "" for i, keep in rows])
        references = self.data["references"][drawn["at"], : drawn["cover"].shape[1]].float().to(kept.device)
        references = references * kept.view(-1, 1, 1, 1, 1)
        return Conditioning(text, pooled, references.unbind(1))


def subject_error(error: torch.Tensor, cover: torch.Tensor) -> torch.Tensor:
    """Mean of squared errors (B, C, h, w), those inside subjects (cover (B, S, h, w)) weighing five times."""
    inside = cover.sum(1, keepdim=True)
    return (error * (1 + 4 * inside)).mean() / (1 + 4 * inside.mean())


def new_optimizers(modules: nn.ModuleDict, scale: float = 1.0) -> list[torch.optim.Optimizer]:
    """Muon for the transformer's matrices, AdamW for everything else; `scale` multiplies both rates."""
    muon, rest = split_parameters(modules["transformer"])
    rest += [p for name, module in modules.items() if name != "transformer" for p in module.parameters()]
    return [
        torch.optim.Muon(muon, lr=2e-3 * scale, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=1e-3 * scale, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train_flux(
    vae: AutoencoderKL,
    latents: list[Path],
    folder: Path,
    steps: int,
    batch: int = 32,
    seed: int = 0,
    device: str = "cpu",
    *,
    sizes: dict | None = None,
    compiled: bool = False,
    **options,
) -> tuple[FluxPipeline, list[dict]]:
    """Trains transformer and text encoders from nothing on the velocity target; returns the pipeline and the curve.

    The tokens between double and single blocks also learn to name what they show (`Naming`). `compiled` takes two
    minutes at the start and a third off every step. Resumable in `folder`; `options` go to `fit`.
    """
    pipeline = build_flux(vae, seed=seed, **(sizes or SIZES)).to(device)
    backbone = FluxUno(pipeline, precision="bfloat16")
    transformer = pipeline.transformer
    naming = Naming(transformer.inner_dim).to(device)
    encoders = {"clip": pipeline.text_encoder, "t5": pipeline.text_encoder_2}
    modules = nn.ModuleDict({"transformer": transformer, **encoders, "naming": naming}).requires_grad_(True)
    if compiled:
        transformer.compile_repeated_blocks()
    batches = Batches(backbone, latents, batch, seed)

    def loss_at(step):
        drawn, middle = batches.draw(step), MiddleTokens(len(transformer.transformer_blocks) - 1)
        clean, noise, t, kept, cover = (drawn[name] for name in ("clean", "noise", "t", "kept", "cover"))
        conditioning = batches.conditioning(drawn, kept)
        velocity = backbone.predict(backbone.noised(clean, noise, t), t, conditioning, taps=middle)
        error = (velocity - backbone.target(clean, noise, t)) ** 2
        named, facts = naming(middle, cover, drawn["labels"], kept)
        return subject_error(error, cover) + NAMING * named, {f"mse_{cover.shape[1]}": error.mean().item()} | facts

    curve = fit("flux_uno", modules, new_optimizers(modules), loss_at, steps, folder, decay_from=0.6, **options)
    return pipeline, curve


def distil_guidance(
    pipeline: FluxPipeline,
    latents: list[Path],
    folder: Path,
    steps: int,
    batch: int = 32,
    seed: int = 0,
    device: str = "cpu",
    *,
    compiled: bool = False,
    **options,
) -> list[dict]:
    """Teaches the transformer to predict what classifier-free guidance makes of its own two predictions.

    That is how FLUX.1-dev came by its `guidance` input (Meng et al. 2023): at scale w the target is u + w (c − u), with
    the frozen model's conditional c and unconditional u; at w = 1, of every fourth sample, that is c itself. The
    pipeline's transformer is changed in place; returns the curve.
    """
    backbone = FluxUno(pipeline.to(device), precision="bfloat16")
    teacher = deepcopy(backbone.transformer)
    student = nn.ModuleDict({"transformer": backbone.transformer}).requires_grad_(True)
    if compiled:
        backbone.transformer.compile_repeated_blocks()
        teacher.compile_repeated_blocks()
    batches = Batches(backbone, latents, batch, seed + 1)

    def of_teacher(noised, t, conditioning):
        backbone.transformer = teacher
        with torch.no_grad():
            predicted = backbone.predict(noised, t, conditioning)
        backbone.transformer = student["transformer"]
        return predicted

    def loss_at(step):
        drawn = batches.draw(step, singles=0, dropped=0.0)
        noised, t, kept = backbone.noised(drawn["clean"], drawn["noise"], drawn["t"]), drawn["t"], drawn["kept"]
        with torch.no_grad():
            conditioning, nothing = batches.conditioning(drawn, kept), batches.conditioning(drawn, ~kept)
        conditional, unconditional = of_teacher(noised, t, conditioning), of_teacher(noised, t, nothing)
        low, high = GUIDED
        scale = low + (high - low) * torch.rand(batch, generator=generator(seed, step, 1)).to(t.device)
        scale[::4] = 1.0
        target = unconditional + scale.view(-1, 1, 1, 1) * (conditional - unconditional)
        error = (backbone.predict(noised, t, conditioning, guidance=scale) - target) ** 2
        return subject_error(error, drawn["cover"]), {f"mse_{len(conditioning.references)}": error.mean().item()}

    optimizers = new_optimizers(student, scale=0.25)
    return fit("flux_uno_guidance", student, optimizers, loss_at, steps, folder, decay_from=0.3, **options)
