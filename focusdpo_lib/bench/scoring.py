"""What scoring a row costs, beside scripts that keep nothing; where its time goes; and whether memory grows.

    python -m focusdpo_lib.bench.scoring         # five minutes on two cores

Random weights of the published sizes (DINO ViT-S/16, CLIP ViT-B/32), pictures of noise at 512 × 512. In one run, so
that ratios matter: the kit's first row; a second row, whose photos and prompts are known; the first row once more; a
script that encodes in batches and everything anew for every row, as UNO's functions do; and one that encodes for every
image the photos of its subject and the prompt anew. Memory is that of a process of its own for each number of images,
by models that are small, so that the pictures are what it holds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from focusdpo_lib import provenance
from focusdpo_lib.bench.report import default_folder, table
from focusdpo_lib.evaluation import embeddings
from focusdpo_lib.evaluation.benchmark import open_image
from focusdpo_lib.evaluation.embeddings import embed, kept
from focusdpo_lib.evaluation.encoders import ClipEncoder, DinoEncoder, Encoders
from focusdpo_lib.runs import write_json, write_text

RESULTS, PAGE = "scoring.json", "SCORING.md"
VIT_S = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}
VISION = {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
# Of the same inputs, and nearly no work.
SMALL = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL_VISION = {"image_size": 224, "layers": 1, "width": 32, "head_width": 16, "patch_size": 32}
SMALL_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
PHOTOS, PROMPTS = 5, 25  # of a subject, as DreamBench has them
ANEW = "in batches, anew for every row"
DRAWN = 50  # pictures that are drawn; more are the same ones as other files


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
    """So many PNG files, no two of the same bytes."""
    folder.mkdir()
    random = np.random.default_rng(seed)
    paths = [folder / f"{k:04d}.png" for k in range(count)]
    for k, path in enumerate(paths):
        if k < DRAWN:
            small = random.integers(0, 256, (side // 8, side // 8, 3), np.uint8)
            Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(path)
        else:  # what stands behind its end no reader of a PNG looks at
            path.write_bytes(paths[k % DRAWN].read_bytes() + str(k).encode())
    return paths


def compared(dino: list, clip: list, texts: torch.Tensor, subjects: list[int]) -> torch.Tensor:
    """DINO, CLIP-I and CLIP-T (N, 3) from (vectors of the images, those of every subject's photos), and of prompts."""
    columns = [
        torch.stack([(photos[s] @ v).mean() for s, v in zip(subjects, images, strict=True)])
        for images, photos in (dino, clip)
    ]
    columns.append(torch.stack([texts[i % len(texts)] @ v for i, v in enumerate(clip[0])]))
    return torch.stack(columns, -1)


def subjects_of(images: list[Path], photos: list[list[Path]]) -> list[int]:
    """Of images of one subject after the other."""
    return [i * len(photos) // len(images) for i in range(len(images))]


def row(encoders: Encoders, images: list[Path], photos: list[list[Path]], prompts: list[str]) -> torch.Tensor:
    """The scores of images as the kit computes them: by encoders that keep vectors."""
    by, files = (encoders.dino, encoders.clip), [*chain(*photos), *images]
    embed([(encoder, encoder.batches(encoder.missing(files))) for encoder in by])
    vectors = [(encoder.images(images), [encoder.images(of) for of in photos]) for encoder in by]
    return compared(*vectors, encoders.clip.texts(prompts), subjects_of(images, photos))


@torch.inference_mode()
def plain(encoder: DinoEncoder | ClipEncoder, files: list[Path]) -> torch.Tensor:
    """Unit vectors of files, 64 at a time: open all, then compute."""
    found = []
    for at in range(0, len(files), 64):
        pixels = torch.stack([encoder.prepare(open_image(file)) for file in files[at : at + 64]])
        if encoder.kind == "dino":
            found.append(encoder.model(pixel_values=pixels).last_hidden_state[:, 0])
        else:
            found.append(encoder.model.encode_image(pixels))
    return F.normalize(torch.cat(found), dim=-1)


@torch.inference_mode()
def plain_texts(encoder: ClipEncoder, prompts: list[str]) -> torch.Tensor:
    return F.normalize(encoder.model.encode_text(encoder.tokenizer(prompts)), dim=-1)


def batched(encoders: Encoders, images: list[Path], photos: list[list[Path]], prompts: list[str]) -> torch.Tensor:
    """The same by a script that encodes in batches, and all of it for every row."""
    vectors = []
    for encoder in (encoders.dino, encoders.clip):
        every = plain(encoder, [*chain(*photos)]).reshape(len(photos), len(photos[0]), -1)
        vectors.append((plain(encoder, images), every))
    return compared(*vectors, plain_texts(encoders.clip, prompts), subjects_of(images, photos))


def image_by_image(
    encoders: Encoders, images: list[Path], photos: list[list[Path]], prompts: list[str]
) -> torch.Tensor:
    """The same by a script that for every image encodes everything that it is compared with."""
    lines = []
    for i, (image, s) in enumerate(zip(images, subjects_of(images, photos), strict=True)):
        vectors = [(plain(e, [image]), [plain(e, photos[s])]) for e in (encoders.dino, encoders.clip)]
        lines.append(compared(*vectors, plain_texts(encoders.clip, [prompts[i % len(prompts)]]), [0]))
    return torch.cat(lines)


def measure(encoders: Encoders, folder: Path, subjects: int, images: int, rounds: int = 1) -> dict:
    """Median seconds by what was done, the largest difference between scores, and what the kit's first row does."""
    photos = [write_pictures(folder / f"photos{s}", PHOTOS, s) for s in range(subjects)]
    rows = [write_pictures(folder / f"row{r}", images, 100 + r) for r in range(2)]
    prompts = [f"a toy in place number {k}" for k in range(PROMPTS)]
    plain(encoders.dino, photos[0][:1]), plain(encoders.clip, photos[0][:1])  # the first call of a model sets up
    seconds: dict[str, list[float]] = {}
    shares, difference = [], 0.0
    for number in range(rounds):
        place, found, of = folder / f"kept{number}", {}, (photos, prompts)
        tasks: dict[str, Callable[[], torch.Tensor]] = {
            "first row": partial(row, kept(encoders, place), rows[0], *of),
            "second row": partial(row, kept(encoders, place), rows[1], *of),
            "first row again": partial(row, kept(encoders, place), rows[0], *of),
            ANEW: partial(batched, encoders, rows[0], *of),
            "image by image": partial(image_by_image, encoders, rows[0], *of),
        }
        for name, task in tasks.items():
            begun = time.perf_counter()
            if name == "first row":
                found[name], parts = watched(encoders, task)
            else:
                found[name] = task()
            seconds.setdefault(name, []).append(time.perf_counter() - begun)
        shares.append(parts)
        difference = max(difference, *(float((found["first row"] - found[n]).abs().max()) for n in list(tasks)[2:]))
    return {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "parts": {name: statistics.median(parts[name] for parts in shares) for name in shares[0]},
        "difference": difference,
        "images": images,
        "photos": subjects * PHOTOS,
    }


def watched(encoders: Encoders, task: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """What a task of the kit returns, and seconds: of forwards as they pass, of pictures a thread's processor time."""
    found = {"decoding": 0.0, "preprocessing": 0.0, "forwards": 0.0}

    def timed(name: str, of: Callable, clock: Callable[[], float]) -> Callable:
        def call(*given):
            begun = clock()
            made = of(*given)
            found[name] += clock() - begun
            return made

        return call

    with (
        patch.object(embeddings, "open_image", timed("decoding", open_image, time.thread_time)),
        patch.object(encoders.dino, "prepare", timed("preprocessing", encoders.dino.prepare, time.thread_time)),
        patch.object(encoders.clip, "prepare", timed("preprocessing", encoders.clip.prepare, time.thread_time)),
        patch.object(encoders.dino, "vectors", timed("forwards", encoders.dino.vectors, time.perf_counter)),
        patch.object(encoders.clip, "vectors", timed("forwards", encoders.clip.vectors, time.perf_counter)),
        patch.object(encoders.clip, "texts", timed("forwards", encoders.clip.texts, time.perf_counter)),
    ):
        return task(), found


def work(images: int, folder: Path) -> dict[str, int]:
    """One process: a row of so many images by small models, and the process's peak memory."""
    encoders = kept(write_models(folder, SMALL, SMALL_VISION, SMALL_TEXT), folder / "kept")
    row(encoders, write_pictures(folder / "row", images, 0), [write_pictures(folder / "photos", PHOTOS, 1)], ["a toy"])
    return {"images": images, "peak_bytes": provenance.peak_memory()}


def measured_memory(images: int) -> dict[str, int]:
    """`work` in a process of its own."""
    with TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "focusdpo_lib.bench.scoring", "--worker", str(images), folder]
        said = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    return json.loads(said.splitlines()[-1])


def page(found: dict) -> str:
    """What was found, as Markdown."""
    machine, seconds, parts = found["machine"], found["seconds"], found["parts"]
    commit = machine["git"]["commit"][:12] if machine["git"] else "unknown"
    slow, first = seconds["image by image"], seconds["first row"]
    anew = seconds[ANEW]
    both, share = first + seconds["second row"], parts["forwards"] / first
    goals = [
        ["as fast as image by image, first row", "≥ 3", f"{slow / first:.2f}", slow >= 3 * first],
        ["share of the encoders' forwards, first row", "≥ 90 %", f"{share:.1%}", share >= 0.9],
        ["seconds of a first row / of batches anew", "< 1", f"{first / anew:.2f}", first < anew],
        ["of two rows", "< 1", f"{both / (2 * anew):.2f}", both < 2 * anew],
        ["scores differ by", "≤ 1e-6", f"{found['difference']:.1e}", found["difference"] <= 1e-6],
    ]
    if memory := found["memory"]:
        grown = memory[-1]["peak_bytes"] / memory[0]["peak_bytes"]
        times = f"{memory[-1]['images'] / memory[0]['images']:g}"
        goals.append([f"memory of {times} times as many images", "≤ 1.05", f"{grown:.2f}", grown <= 1.05])
    lines = [
        f"# What scoring a row costs: {machine['device']}",
        f"Commit {commit}, torch {machine['packages']['torch']}, {found['threads']} threads; written by `python -m "
        f"focusdpo_lib.bench.scoring`. {found['images']} images and {found['photos']} photos of 512 × 512, {PROMPTS} "
        "prompts; DINO ViT-S/16 and CLIP ViT-B/32 in float32, random weights. Medians of turns in one process.",
        table(["goal", "limit", "found", ""], [[*goal, "met" if met else "missed"] for *goal, met in goals]),
        table(
            ["", "seconds", "as fast as image by image"],
            [[name, f"{value:.2f}", f"{slow / value:.1f} ×"] for name, value in seconds.items()],
        ),
        "Of the first row. Pictures are opened and prepared by a thread, beside forwards of those before them:",
        table(
            ["", "seconds", "of the row's"],
            [[name, f"{value:.2f}", f"{value / first:.1%}"] for name, value in parts.items()],
        ),
    ]
    if memory:
        lines += [
            "Peak memory of a process that scores so many images, by small models:",
            table(["images", "MB"], [[str(of["images"]), f"{of['peak_bytes'] / 1e6:.0f}"] for of in memory]),
        ]
    return "\n\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    top = argparse.ArgumentParser(prog="python -m focusdpo_lib.bench.scoring", description=__doc__.split("\n\n")[0])
    top.add_argument("--subjects", type=int, default=2)
    top.add_argument("--images", type=int, default=50, help="of a row (default: %(default)s)")
    top.add_argument("--rounds", type=int, default=2, help="turns that are timed")
    top.add_argument("--memory", type=int, nargs="*", default=[750, 3000], help="numbers of images, the largest last")
    top.add_argument("--out", type=Path, help="folder of the results (default: results/bench/<device>)")
    top.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    chosen = top.parse_args(arguments)
    if chosen.worker:
        print(json.dumps(work(int(chosen.worker[0]), Path(chosen.worker[1]))))
        return
    out = chosen.out or default_folder()
    memory = [measured_memory(count) for count in chosen.memory]  # first: a child's account begins with its parent's
    with TemporaryDirectory() as name:
        found = measure(write_models(Path(name)), Path(name), chosen.subjects, chosen.images, chosen.rounds)
    found |= {"memory": memory, "threads": torch.get_num_threads()}
    found["machine"] = provenance.facts()
    write_json(out / RESULTS, found)
    write_text(out / PAGE, page(found))
    print(page(found))


if __name__ == "__main__":
    main()
