"""The toybox's DINO: a small ViT trained by self-distillation (Caron et al., 2021) on views of the same identity.

DINO proper takes two crops of one photo as views; here the views of a sample are *different pictures of one identity*
(a photo, a scene, a scene shared with another subject). What all views share is the identity and nothing else, so the
CLS token measures identity by construction. That is what DINO is used for on the real benchmark, where it does so only
roughly; a toybox DINO score is therefore a purer measure of identity than a published one.

With views alone the embedding settles for the colours, which tell most identities apart. Three things push it further.
Each identity comes with a *twin* that differs in one attribute and stands in the same pictures; DINOv2's KoLeo
regulariser (Oquab et al., 2023) pushes nearest neighbours apart, and twins can part by the attribute only; and linear
heads, thrown away afterwards, read the world's attributes off the CLS token of the views that show one subject. They
took retrieval of held-out identities from 75 to 95 %, by the colours: class and pattern still count for little
(`drop_class_name` and `drop_pattern` in the weights' card), so the reader's attribute accuracy stands beside DINO.
"""

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel

from focusdpo_lib.evaluation.encoders import IMAGENET_MEAN, IMAGENET_STD
from focusdpo_lib.toybox import world
from focusdpo_lib.toybox.batches import VALUES, autocast, generator, imperfect, slot_labels, to_pixels
from focusdpo_lib.toybox.fitting import fit

TEACHER_VIEWS = 2  # the teacher sees the photo and the scene; the student also the shared scene
TEACHER_TEMPERATURE, STUDENT_TEMPERATURE = 0.04, 0.1
CENTRE_MOMENTUM = 0.9
KOLEO_WEIGHT = 0.2
LABEL_WEIGHT = 0.5
LABEL_SCALE = 10.0  # unit CLS tokens are too short for logits
TWINS = (0.25, 0.15, 0.15, 0.3, 0.15)  # how often twins differ in each of ATTRIBUTES: most in what is hard to see


def build_dino(width: int = 128, layers: int = 4) -> ViTModel:
    """A ViT on 64×64 pixels in patches of 8; its CLS token, `last_hidden_state[:, 0]`, is the embedding."""
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        intermediate_size=4 * width,
        image_size=world.SCENE_SIZE,
        patch_size=8,
    )
    model = ViTModel(config, add_pooling_layer=False)
    model.set_attn_implementation("eager")  # four times faster than the fused kernel: bf16 on a CPU, 65 tokens
    return model


def embed(model: ViTModel, pixels: torch.Tensor) -> torch.Tensor:
    """Unit CLS tokens (B, width) of images (B, 3, 64, 64) in [-1, 1], normalised as the published DINO takes them."""
    mean, std = (torch.tensor(x, device=pixels.device).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    tokens = model(pixel_values=((pixels + 1) / 2 - mean) / std).last_hidden_state
    return F.normalize(tokens[:, 0].float(), dim=-1)


class Projector(nn.Module):
    """A ViT, its prototypes and heads: images (B, 3, 64, 64) → unit CLS tokens (B, width), cosines (B, prototypes).

    DINO has an MLP before the prototypes. Without it the CLS token itself must agree between views, and it is the CLS
    token that the score compares.
    """

    def __init__(self, vit: ViTModel, prototypes: int):
        super().__init__()
        self.vit = vit
        self.prototypes = nn.Parameter(torch.randn(prototypes, vit.config.hidden_size))
        self.heads = nn.ModuleList(nn.Linear(vit.config.hidden_size, len(values)) for values in VALUES.values())

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cls = embed(self.vit, pixels)
        with torch.autocast(pixels.device.type, enabled=False):  # temperatures of 0.04 need full precision
            return cls, cls @ F.normalize(self.prototypes, dim=-1).T

    def label_loss(self, cls: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of the attributes read off CLS tokens (V, B, width); labels (B, 5) hold for every view."""
        with torch.autocast(cls.device.type, enabled=False):
            logits = [head(LABEL_SCALE * cls) for head in self.heads]
        truth = labels.expand(len(cls), -1, -1)
        return torch.stack(
            [F.cross_entropy(z.flatten(0, 1), truth[..., k].flatten()) for k, z in enumerate(logits)]
        ).mean()


def distillation_loss(student: torch.Tensor, teacher: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Cross-entropy H(teacher, student) averaged over all pairs of different views of a sample.

    student (V_s, B, K) and teacher (V_t, B, K) logits, the first V_t student views being the teacher's; centre (K,).
    The teacher's logits are centred and sharpened: softmax((teacher − centre) / 0.04).
    """
    targets = ((teacher - centre) / TEACHER_TEMPERATURE).softmax(-1)
    log_probabilities = (student / STUDENT_TEMPERATURE).log_softmax(-1)
    terms = [
        -(target * log_probabilities[s]).sum(-1).mean()
        for t, target in enumerate(targets)
        for s in range(len(student))
        if s != t
    ]
    return torch.stack(terms).mean()


def koleo(cls: torch.Tensor) -> torch.Tensor:
    """−log of the distance from each unit CLS token to the nearest other of its view, averaged; cls (V, B, width)."""
    with torch.no_grad(), torch.autocast(cls.device.type, enabled=False):
        nearest = (cls @ cls.transpose(1, 2) - 2 * torch.eye(cls.shape[1], device=cls.device)).argmax(-1)
    neighbours = cls.gather(1, nearest[..., None].expand_as(cls))
    return -((cls - neighbours).norm(dim=-1) + 0.01).log().mean()  # 0.01 bounds the push between equal tokens


class Centre(nn.Module):
    """A running mean of the teacher's logits (K,); taking it off keeps one prototype from winning everything."""

    def __init__(self, prototypes: int):
        super().__init__()
        self.register_buffer("value", torch.zeros(prototypes))

    def move(self, logits: torch.Tensor) -> None:
        """value ← 0.9 · value + 0.1 · mean of logits (V, B, K)."""
        self.value.lerp_(logits.mean((0, 1)), 1 - CENTRE_MOMENTUM)


def teacher_momentum(step: int, steps: int, start: float = 0.98) -> float:
    """Rises from `start` to 1 along half a cosine."""
    return 1 - (1 - start) * (math.cos(math.pi * step / steps) + 1) / 2


@torch.no_grad()
def move_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher ← momentum · teacher + (1 − momentum) · student, in place."""
    for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
        slow.lerp_(fast, 1 - momentum)


def sample_views(count: int, seed: int, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """Three pictures of `count` identities and of their twins: photo, scene, shared scene; and the twins' attributes.

    (N, 2, 3, 64, 64, 3) uint8, and labels (N, 2, 5) int64 as `slot_labels` gives them. The twin differs in one
    attribute and stands in the same pictures. Half of the scenes are crops about the subject, as DINO's views are; the
    shared scene shows another subject too.
    """
    rng = np.random.default_rng(seed)
    views = np.empty((count, 2, 3, world.SCENE_SIZE, world.SCENE_SIZE, 3), np.uint8)
    labels = np.empty((count, 2, len(VALUES)), np.int64)
    for i in range(count):
        identity, other = world.sample_subjects(rng, 2, split)
        twin = change(identity, str(rng.choice(world.ATTRIBUTES, p=TWINS)), rng, split)
        labels[i] = slot_labels(identity), slot_labels(twin)
        pose = int(rng.integers(2**31))
        views[i, :, 0] = world.photo(identity, pose), world.photo(twin, pose)
        for view, subjects in ((1, (identity,)), (2, (identity, other))):
            scene = world.sample_scene(rng, subjects)
            side = crop_box(scene.placements[0], rng) if rng.uniform() < 0.5 else None
            for k, shown in enumerate((identity, twin)):
                image = world.render(replace(scene, identities=(shown, *subjects[1:])))[0]
                views[i, k, view] = image if side is None else crop(image, side)
    return views, labels


def crop_box(place: world.Placement, rng: np.random.Generator) -> tuple[float, float, float]:
    """x, y and side (fractions of the width) of a random square that holds the subject whole, if the image allows."""
    side = min(1.0, rng.uniform(2.3 * place.radius, 1))
    corner = []
    for centre in (place.x, place.y):
        low, high = centre + 1.1 * place.radius - side, centre - 1.1 * place.radius
        corner.append(float(np.clip(rng.uniform(low, high), 0, 1 - side)))
    return *corner, side


def crop(image: np.ndarray, square: tuple[float, float, float]) -> np.ndarray:
    """The square (x, y, side) of an image (H, H, 3), scaled to the image's size."""
    x, y, side = (len(image) * value for value in square)
    picture = Image.fromarray(image).resize(image.shape[:2], Image.Resampling.BILINEAR, box=(x, y, x + side, y + side))
    return np.asarray(picture)


def train_dino(
    folder: Path, steps: int = 1500, batch: int = 64, seed: int = 0, device: str = "cpu", *, pool: int = 8000,
    prototypes: int = 2048, width: int = 128, layers: int = 4, **options,
) -> tuple[ViTModel, list[dict]]:  # fmt: skip
    """Self-distillation on `pool` pairs of twins; gives the teacher's ViT. Resumable; `options` go to `fit`."""
    torch.manual_seed(seed)
    student = Projector(build_dino(width, layers), prototypes).to(device)
    teacher = copy.deepcopy(student).requires_grad_(False)
    centre = Centre(prototypes).to(device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.04)
    pictures, labels = sample_views(pool, seed)

    def loss_at(step):
        draw = generator(seed, step)
        at = torch.randint(pool, (batch // 2,), generator=draw).numpy()
        views = pictures[at].reshape(-1, *pictures.shape[2:]).swapaxes(0, 1)  # (3, batch, 64, 64, 3), twins adjacent
        views = to_pixels(views.reshape(-1, *views.shape[2:]))
        with autocast(device):
            with torch.no_grad():
                _, targets = teacher(imperfect(views[: TEACHER_VIEWS * batch], draw).to(device))
            cls, logits = student(imperfect(views, draw).to(device))
        cls, targets, logits = (value.unflatten(0, (-1, batch)) for value in (cls, targets, logits))
        apart = koleo(cls)
        named = student.label_loss(cls[:TEACHER_VIEWS], torch.from_numpy(labels[at]).flatten(0, 1).to(device))
        loss = distillation_loss(logits, targets, centre.value) + KOLEO_WEIGHT * apart + LABEL_WEIGHT * named
        right = (targets[0] - centre.value).argmax(-1) == (targets[1] - centre.value).argmax(-1)
        centre.move(targets)
        return loss, {"koleo": apart.item(), "labels": named.item(), "agree": right.float().mean().item()}

    def after_step(step):
        move_teacher(teacher, student, teacher_momentum(step, steps))

    modules = nn.ModuleDict({"student": student, "teacher": teacher, "centre": centre})
    curve = fit("dino", modules, [optimizer], loss_at, steps, folder, after_step=after_step, **options)
    return teacher.vit.eval(), curve


def save_dino(model: ViTModel, folder: Path) -> None:
    """A plain transformers folder: `ViTModel.from_pretrained(folder, add_pooling_layer=False)`."""
    model.save_pretrained(folder)


@torch.no_grad()
def measure_dino(model: ViTModel, subjects: int = 30, scenes: int = 8, seed: int = 1, split: str = "test") -> dict:
    """How well CLS cosines tell identities apart, on held-out identities, clean renders.

    "same" and "different": mean cosine of a single-subject scene with photos of its own and of other identities.
    "retrieval": share of scenes whose nearest photo among those of `subjects` identities is their own; "_two": of
    two-subject scenes, share whose two nearest are their own. "drop_*": how much changing one attribute of the
    scene's subject lowers its cosine with the unchanged photo, on average.
    """
    rng = np.random.default_rng(seed)
    identities = [world.sample_identity(rng, split) for _ in range(subjects)]

    def cls(images):
        return embed(model, to_pixels(np.stack(images)).to(model.device)).cpu()

    photos = cls([world.photo(identity, k) for k, identity in enumerate(identities)])
    drawn = [(k, world.sample_scene(rng, (identities[k],))) for k in range(subjects) for _ in range(scenes)]
    own = torch.tensor([k for k, _ in drawn])
    cosines = cls([world.render(scene)[0] for _, scene in drawn]) @ photos.T
    mine = cosines[torch.arange(len(own)), own]
    numbers = {
        "same": mine.mean().item(),
        "different": ((cosines.sum() - mine.sum()) / (cosines.numel() - len(own))).item(),
        "retrieval": (cosines.argmax(1) == own).float().mean().item(),
    }
    for name in ("base", "accent", "pattern", "trim", "class_name"):
        changed = [replace(scene, identities=(change(identities[k], name, rng),)) for k, scene in drawn]
        altered = (cls([world.render(scene)[0] for scene in changed]) * photos[own]).sum(-1)
        numbers[f"drop_{name}"] = (mine - altered).mean().item()
        numbers[f"lower_{name}"] = (mine > altered).float().mean().item()
    pairs = [(i, j) for i, j in rng.integers(subjects, size=(16 * subjects, 2)) if i != j]
    cosines = (
        cls([world.render(world.sample_scene(rng, (identities[i], identities[j])))[0] for i, j in pairs]) @ photos.T
    )
    nearest = cosines.topk(2).indices.sort().values
    numbers["retrieval_two"] = (nearest == torch.tensor(pairs).sort().values).all(1).float().mean().item()
    return {name: round(value, 4) for name, value in numbers.items()}


def change(identity: world.Identity, name: str, rng: np.random.Generator, split: str | None = None) -> world.Identity:
    """The identity with one attribute replaced by another value; a colour by one that the identity does not have.

    Where `split` is given and no such change stays in it, the identity itself.
    """
    choices = {"pattern": world.PATTERNS, "class_name": world.CLASSES}.get(name, tuple(world.COLOURS))
    taken = {identity.class_name, identity.pattern, identity.base, identity.accent, identity.trim}
    for value in rng.permutation([value for value in choices if value not in taken]):
        other = replace(identity, **{name: str(value)})
        if split in (None, other.split):
            return other
    return identity
