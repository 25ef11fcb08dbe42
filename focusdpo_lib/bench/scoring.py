"""`python -m focusdpo_lib.bench.scoring`: what scoring a row costs, beside a script that encodes image by image.

Random weights of the published sizes (DINO ViT-S/16, CLIP ViT-B/32), pictures of noise. In one run, so that only ratios
matter: the kit's first row; a second row, whose photos and prompts are known; the first row once more; and a plain
script, which for every image encodes the photos of its subject and the prompt anew.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from focusdpo_lib.evaluation.embeddings import kept
from focusdpo_lib.evaluation.encoders import ClipEncoder, DinoEncoder, Encoders

VIT_S = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}
VISION = {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
PHOTOS, PROMPTS = 5, 25  # of a subject, as DreamBench has them


def write_models(folder: Path, dino: dict = VIT_S, vision: dict = VISION, text: dict = TEXT) -> Encoders:
    """Random DINO and CLIP of these sizes, saved and loaded as published ones are."""
    import open_clip
    from safetensors.torch import save_file
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    ViTModel(ViTConfig(**dino, image_size=224, patch_size=16)).save_pretrained(folder / "dino")
    config = {"embed_dim": 512, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    (folder / "clip").mkdir()
    whole = {"model_cfg": config, "preprocess_cfg": {}}
    (folder / "clip" / "open_clip_config.json").write_text(json.dumps(whole), encoding="utf-8")
    state = {name: value.contiguous() for name, value in open_clip.model.CLIP(**config).state_dict().items()}
    save_file(state, folder / "clip" / "open_clip_model.safetensors")
    return Encoders(DinoEncoder(str(folder / "dino")), ClipEncoder(str(folder / "clip")))


def write_pictures(folder: Path, count: int, seed: int, side: int = 512) -> list[Path]:
    folder.mkdir()
    random = np.random.default_rng(seed)
    paths = [folder / f"{k:04d}.png" for k in range(count)]
    for path in paths:
        small = random.integers(0, 256, (side // 8, side // 8, 3), np.uint8)
        Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(path)
    return paths


def row(encoders: Encoders, images: list[Path], photos: list[list[Path]], prompts: list[str]) -> torch.Tensor:
    """DINO, CLIP-I and CLIP-T (N, 3) of images of one subject after the other, as the kit computes them."""
    of_subject = [i * len(photos) // len(images) for i in range(len(images))]
    columns = []
    for encoder in (encoders.dino, encoders.clip):
        every = encoder.images([photo for of in photos for photo in of]).reshape(len(photos), len(photos[0]), -1)
        vectors = encoder.images(images)
        columns.append(torch.stack([(every[s] @ v).mean() for s, v in zip(of_subject, vectors, strict=True)]))
    texts = encoders.clip.texts(prompts)
    columns.append(torch.stack([texts[i % len(prompts)] @ v for i, v in enumerate(vectors)]))
    return torch.stack(columns, -1)


def image_by_image(
    encoders: Encoders, images: list[Path], photos: list[list[Path]], prompts: list[str]
) -> torch.Tensor:
    """The same by a plain script: everything that an image is compared with is encoded for it anew."""
    lines = []
    for i, image in enumerate(images):
        of = photos[i * len(photos) // len(images)]
        dino, clip = encoders.dino.images([image])[0], encoders.clip.images([image])[0]
        text = encoders.clip.texts([prompts[i % len(prompts)]])[0]
        both = [(encoders.dino.images(of) @ dino).mean(), (encoders.clip.images(of) @ clip).mean()]
        lines.append(torch.stack([*both, text @ clip]))
    return torch.stack(lines)


def measure(encoders: Encoders, folder: Path, subjects: int, images: int) -> tuple[dict[str, float], float]:
    """(seconds by what was done, the largest difference between a kit's and a script's score)."""
    photos = [write_pictures(folder / f"photos{s}", PHOTOS, s) for s in range(subjects)]
    rows = [write_pictures(folder / f"row{r}", images, 100 + r) for r in range(2)]
    prompts = [f"a toy in place number {k}" for k in range(PROMPTS)]
    with_folder = kept(encoders, folder / "kept")
    encoders.dino.images(photos[0][:1]), encoders.clip.images(photos[0][:1])  # the first call of a model sets up
    seconds, found = {}, {}
    tasks: dict[str, Callable[[], torch.Tensor]] = {
        "first row": lambda: row(with_folder, rows[0], photos, prompts),
        "second row": lambda: row(with_folder, rows[1], photos, prompts),
        "first row again": lambda: row(kept(encoders, folder / "kept"), rows[0], photos, prompts),
        "image by image": lambda: image_by_image(encoders, rows[0], photos, prompts),
    }
    for name, task in tasks.items():
        begun = time.perf_counter()
        found[name] = task()
        seconds[name] = time.perf_counter() - begun
    return seconds, float((found["first row"] - found["image by image"]).abs().max())


def page(seconds: dict[str, float], difference: float, images: int, photos: int) -> str:
    lines = [f"| {name} | {value:.2f} | {seconds['image by image'] / value:.1f} × |" for name, value in seconds.items()]
    return "\n".join(
        [
            f"{images} images, {photos} photos, {PROMPTS} prompts; scores differ by {difference:.1e} at most.",
            "",
            "| | seconds | as fast as image by image |",
            "|---|---|---|",
            *lines,
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=2)
    parser.add_argument("--images", type=int, default=24, help="of a row (default: %(default)s)")
    given = parser.parse_args()
    with TemporaryDirectory() as name:
        encoders = write_models(Path(name))
        seconds, difference = measure(encoders, Path(name), given.subjects, given.images)
    print(page(seconds, difference, given.images, given.subjects * PHOTOS))


if __name__ == "__main__":
    main()
