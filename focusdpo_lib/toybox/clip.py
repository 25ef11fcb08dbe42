"""The toybox's CLIP: an open_clip model of tiny configuration, trained on the world's (image, caption) pairs.

Captions name class and setting only, so CLIP-I measures these more than identity, as on the real benchmark.
"""

from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip.push_to_hf_hub import save_for_hf
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from focusdpo_lib.toybox import world
from focusdpo_lib.toybox.batches import autocast, generator, imperfect, sample_scenes, to_pixels
from focusdpo_lib.toybox.fitting import fit
from focusdpo_lib.toybox.pipelines import TEXT_LENGTH, build_clip_tokenizer
from focusdpo_lib.toybox.settings import SETTINGS


def clip_config(width: int = 16) -> dict:
    """open_clip's `model_cfg`: CLIP's ResNet on 64×64 pixels, and a text tower on the toybox's vocabulary.

    At this size a ResNet learns silhouettes from fewer images than a ViT, and costs half as much an image.
    """
    tokenizer = build_clip_tokenizer()
    return {
        "embed_dim": 128,
        "vision_cfg": {"image_size": world.SCENE_SIZE, "layers": [1, 1, 1, 1], "width": width, "head_width": 64},
        "text_cfg": {
            "context_length": TEXT_LENGTH, "vocab_size": len(tokenizer), "width": 64, "heads": 2, "layers": 2,
            "pool_type": "eos", "eos_id": tokenizer.eos_token_id,
            "hf_tokenizer_name": "toybox",  # any name: under `local-dir:` open_clip takes the files beside the config
        },
    }  # fmt: skip


def build_clip(width: int = 16) -> open_clip.CLIP:
    """The untrained model; images are normalised to [-1, 1]."""
    model = open_clip.CLIP(**clip_config(width))
    model.visual.image_mean = model.visual.image_std = (0.5, 0.5, 0.5)
    return model


def tokenize(captions: list[str]) -> torch.Tensor:
    """Token ids (B, TEXT_LENGTH), as `open_clip.get_tokenizer` gives them for the saved folder."""
    tokenizer = build_clip_tokenizer()
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def save_clip(model: open_clip.CLIP, folder: Path) -> None:
    """Config, tokenizer and weights as `open_clip.create_model_and_transforms(f"local-dir:{folder}")` reads them."""
    config = clip_config(2 * model.visual.conv1.out_channels)
    save_for_hf(model, build_clip_tokenizer(), config, folder, safe_serialization=True)


class Captioned:
    """A pool of captioned images that gives batches in which no two images share their content, all in two settings.

    Contrastive learning takes every other caption of a batch for a wrong one, and of 3000 random pairs many have the
    same caption. Batches with one image for each (classes, setting) need no change of open_clip's loss, and every
    negative in them is a true one. Two settings a batch, as settings are easy and would else make every negative easy.
    """

    def __init__(self, count: int, seed: int, split: str = "train"):
        scenes = sample_scenes(count, seed, split)
        rng = np.random.default_rng([seed, count])
        subjects = [world.sample_identity(rng, split) for _ in range(count // 10)]
        photos = np.stack([world.photo(identity, int(rng.integers(2**31))) for identity in subjects])
        self.images = np.concatenate([scenes.images, photos])
        self.captions = [*scenes.captions, *(f"a {identity.class_name}" for identity in subjects)]
        self.groups: dict[tuple[str, int], dict[frozenset, list[int]]] = {}  # (phrase, subjects) → classes → indices
        for i, caption in enumerate(self.captions):
            classes, phrase = parse(caption)  # "a mug and a duck" shows what "a duck and a mug" does
            self.groups.setdefault((phrase, len(classes)), {}).setdefault(frozenset(classes), []).append(i)

    def batch(self, size: int, draw: torch.Generator) -> tuple[torch.Tensor, list[str]]:
        """About `size` images, captions: 8 % photos, and in each of two settings 12 % single subjects and pairs."""
        phrases = [phrase for _, phrase in SETTINGS.values()]
        two = [phrases[k] for k in torch.randperm(len(phrases), generator=draw)[:2].tolist()]
        shares = {("", 1): size // 12}
        for phrase in two:
            shares |= {(phrase, 1): size // 8, (phrase, 2): (size - size // 12) // 2 - size // 8}
        chosen = []
        for key, number in shares.items():
            members = list(self.groups[key].values())
            for at in torch.randperm(len(members), generator=draw)[:number].tolist():
                chosen.append(members[at][int(torch.randint(len(members[at]), (), generator=draw))])
        return to_pixels(self.images[chosen]), [self.captions[i] for i in chosen]


def parse(caption: str) -> tuple[list[str], str]:
    """A caption's classes and its phrase for the setting, "" if it has none."""
    words = caption.split()
    count = 2 if words[2:3] == ["and"] else 1
    return words[1 : 3 * count : 3], " ".join(words[3 * count - 1 :])


def train_clip(
    folder: Path, steps: int = 3000, batch: int = 96, seed: int = 0, device: str = "cpu", *, pool: int = 30000,
    width: int = 16, **options,
) -> tuple[open_clip.CLIP, list[dict]]:  # fmt: skip
    """open_clip's ClipLoss on images made imperfect; resumable in `folder`. `options` go to `fit`."""
    torch.manual_seed(seed)
    model = build_clip(width).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.1)
    data, criterion = Captioned(pool, seed), open_clip.ClipLoss()
    tokens = dict(zip(data.captions, tokenize(data.captions), strict=True))

    def loss_at(step):
        draw = generator(seed, step)
        pixels, captions = data.batch(batch, draw)
        text = torch.stack([tokens[caption] for caption in captions])
        with autocast(device), sdpa_kernel(SDPBackend.MATH):  # the flash kernel's backward is slow in bf16 on CPUs
            image, caption, scale = model(imperfect(pixels, draw).to(device), text.to(device))
        image, caption = image.float(), caption.float()
        right = (image @ caption.T).argmax(1).cpu() == torch.arange(len(image))
        return criterion(image, caption, scale), {"right": right.float().mean().item()}

    def after_step(_):
        model.logit_scale.data.clamp_(0, 4.6052)  # a temperature of at least 0.01, as in Radford et al. (2021)

    modules = nn.ModuleDict({"model": model})
    curve = fit("clip", modules, [optimizer], loss_at, steps, folder, after_step=after_step, **options)
    return model.eval(), curve


@torch.no_grad()
def measure_clip(model: open_clip.CLIP, count: int = 1200, seed: int = 1, split: str = "test") -> dict[str, float]:
    """On held-out renders: zero-shot accuracy among the captions of all classes × settings (one subject) and of all
    pairs in the right setting (two), and what the CLIP-I and CLIP-T of a scene are for right and wrong subjects."""
    device = model.logit_scale.device
    scenes = sample_scenes(count, seed, split)
    images = torch.cat(
        [model.encode_image(p.to(device), normalize=True).cpu() for p in to_pixels(scenes.images).split(256)]
    )

    def text(captions):
        return model.encode_text(tokenize(captions).to(device), normalize=True).cpu()

    singles = [(name, phrase) for name in world.CLASSES for _, phrase in SETTINGS.values()]
    truth = torch.tensor([singles.index(tuple(c.removeprefix("a ").split(" ", 1))) for c in scenes.captions[::2]])
    cosines = images[::2] @ text([f"a {name} {phrase}" for name, phrase in singles]).T
    answer, places = cosines.argmax(1), len(SETTINGS)
    numbers = {
        "one_caption": (answer == truth).float().mean(),
        "one_class": (answer // places == truth // places).float().mean(),
        "one_setting": (answer % places == truth % places).float().mean(),
        "clip_t_right": cosines[torch.arange(len(truth)), truth].mean(),
        "clip_t_wrong": cosines.mean(),
    }
    rng = np.random.default_rng(seed)
    photos = [world.photo(world.sample_identity(rng, split, name), k) for k in range(5) for name in world.CLASSES]
    photos = model.encode_image(to_pixels(np.stack(photos)).to(device), normalize=True).cpu()
    alike = (truth // places)[:, None] == torch.arange(len(photos)) % len(world.CLASSES)
    cosines = images[::2] @ photos.T
    numbers |= {"clip_i_same_class": cosines[alike].mean(), "clip_i_other_class": cosines[~alike].mean()}
    numbers["two_caption"] = _pair_accuracy(images[1::2], scenes.captions[1::2], text)
    return {name: round(float(value), 4) for name, value in numbers.items()}


def _pair_accuracy(images: torch.Tensor, captions: tuple[str, ...], text) -> float:
    """Share of two-subject images whose own caption wins among those of all pairs of classes in the same setting."""
    names = world.CLASSES
    pairs = [f"a {a} and a {b}" for k, a in enumerate(names) for b in names[k + 1 :]]
    banks = {phrase: text([f"{pair} {phrase}" for pair in pairs]) for _, phrase in SETTINGS.values()}
    right = 0
    for image, caption in zip(images, captions, strict=True):
        classes, phrase = parse(caption)
        answer = pairs[int((banks[phrase] @ image).argmax())]
        right += answer == "a {} and a {}".format(*sorted(classes, key=names.index))
    return right / len(images)
