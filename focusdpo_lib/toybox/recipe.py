"""The recipe that trains every toybox model from nothing: `make toybox-weights`.

Stages, in order: the autoencoder; the encoders (reader, DINO, CLIP); the latents of a large sample of the training
world; on them, the UNO-style transformer and the U-Net with its IP-Adapter; the model card. Each is resumable in the
work folder; the products are folders that the ordinary loaders read.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import diffusers
import numpy as np
import torch
from PIL import Image
from platformdirs import user_cache_path

from focusdpo_lib import backbones, params, provenance
from focusdpo_lib.evaluation.benchmark import KINDS, Benchmark
from focusdpo_lib.generation import generate, image_name
from focusdpo_lib.runs import atomic, write_json
from focusdpo_lib.toybox import world
from focusdpo_lib.toybox.attributes import leakage, match
from focusdpo_lib.toybox.autoencoder import measure_autoencoder, train_autoencoder
from focusdpo_lib.toybox.batches import to_pixels
from focusdpo_lib.toybox.benchmark import write_benchmark
from focusdpo_lib.toybox.card import write_card
from focusdpo_lib.toybox.clip import measure_clip, save_clip, train_clip
from focusdpo_lib.toybox.dino import measure_dino, save_dino, train_dino
from focusdpo_lib.toybox.reader import Reader, measure_reader, save_reader, train_reader
from focusdpo_lib.toybox.transformer import make_latents, train_flux
from focusdpo_lib.toybox.unet import save_backbone, train_sdxl_ip

STEPS = {"autoencoder": 2600, "reader": 2000, "dino": 2000, "clip": 3000, "flux_uno": 12000, "sdxl_ip": 7000}
POOLS = {"autoencoder": 20_000, "reader": 30_000, "dino": 8_000, "clip": 30_000}  # images drawn once, trained on
LATENTS = 120_000
GUIDANCE = {"flux_uno": 1.0, "sdxl_ip": 3.0}  # of the samples that measure a generator
SHARD = 5_000


def run(out: Path, work: Path, device: str = "cpu", seed: int = 0, scale: float = 1.0, **options) -> Path:
    """Trains whatever `work` does not hold yet and writes the weights and their card to `out`.

    `scale` shortens every stage (a smoke test of the recipe takes 0.001); `options` go to `fit`.
    """
    steps = {name: max(2, round(count * scale)) for name, count in STEPS.items()}
    pools = {name: max(400, round(count * scale)) for name, count in POOLS.items()}
    curves, numbers = {}, {}

    def keep(name, curve, measured):
        curves[name], numbers[name] = curve, measured

    vae, curve = train_autoencoder(
        work, steps["autoencoder"], seed=seed, device=device, pool=pools["autoencoder"], **options
    )
    keep("autoencoder", curve, measure_autoencoder(vae))
    reader, curve = train_reader(work, steps["reader"], seed=seed, device=device, pool=pools["reader"], **options)
    keep("reader", curve, measure_reader(reader))
    save_reader(reader, out / "reader")
    dino, curve = train_dino(work, steps["dino"], seed=seed, device=device, pool=pools["dino"], **options)
    keep("dino", curve, measure_dino(dino))
    save_dino(dino, out / "dino")
    clip, curve = train_clip(work, steps["clip"], seed=seed, device=device, pool=pools["clip"], **options)
    keep("clip", curve, measure_clip(clip))
    save_clip(clip, out / "clip")

    size = min(SHARD, max(50, round(LATENTS * scale) // 50 * 50))
    shards = [work / "latents" / f"{k:02d}.safetensors" for k in range(max(1, round(LATENTS * scale / size)))]
    for k, path in enumerate(shards):
        make_latents(vae, path, k * size, size, seed=seed)
    pipeline, curve = train_flux(vae, shards, work, steps["flux_uno"], seed=seed, device=device, **options)
    with atomic(out / "flux_uno") as partial:
        pipeline.to("cpu", torch.float16).save_pretrained(partial)  # half the size; loaders give float32 again
    keep("flux_uno", curve, measure_generator("flux_uno", out, reader, work, device=device))
    backbone, curve = train_sdxl_ip(vae, shards, work, steps["sdxl_ip"], seed=seed, device=device, **options)
    with atomic(out / "sdxl_ip") as partial:
        save_backbone(backbone, partial)
    keep("sdxl_ip", curve, measure_generator("sdxl_ip", out, reader, work, device=device))
    write_json(out / "card.json", {"seed": seed, "steps": steps, "numbers": numbers, "machine": provenance.facts()})
    write_json(out / "curves.json", curves)
    write_card(out)
    return out


def measure_generator(
    family: str, out: Path, reader: Reader, work: Path, prompts: int = 8, device: str = "cpu"
) -> dict[str, float]:
    """How well samples follow references of validation identities, as the reader sees it.

    Attribute accuracy with one and with two subjects, over all attributes and each alone; with two, the leakage rate.
    """
    model, numbers = backbones.load(params.Backbone(family=family, model=str(out / family)), device), {}
    sampling = params.Generation(guidance=GUIDANCE[family])
    reader = reader.to(device).eval()
    for kind in KINDS:
        with TemporaryDirectory(dir=work) as scratch:
            benchmark = Benchmark.load(write_benchmark(Path(scratch) / "benchmark", 1, "validation"), kind)
            benchmark = benchmark.first_prompts(prompts)
            images = generate(model, benchmark, Path(scratch), sampling)
            pixels = to_pixels(np.stack([np.asarray(Image.open(images / image_name(c, 0))) for c in benchmark.cases]))
        expected = [[benchmark.subjects[name].attributes for name in case.subjects] for case in benchmark.cases]
        found = reader.read(pixels.to(device))
        pairs = [p for f, e in zip(found, expected, strict=True) for p in zip(match(f, e), e, strict=True)]
        right = {
            a: np.mean([seen is not None and seen[a] == true[a] for seen, true in pairs]) for a in world.ATTRIBUTES
        }
        numbers |= {f"{kind}_{name}": round(float(value), 4) for name, value in right.items()}
        numbers[f"{kind}_attribute_accuracy"] = round(float(np.mean(list(right.values()))), 4)
        if kind == "multi":
            counts = [pair for f, e in zip(found, expected, strict=True) for pair in leakage(f, e)]
            numbers["multi_leakage_rate"] = round(sum(c[0] for c in counts) / sum(c[1] for c in counts), 4)
    return numbers


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m focusdpo_lib.toybox.recipe", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=params.SHIPPED, help="where the weights go (default: the package)")
    parser.add_argument(
        "--work",
        type=Path,
        default=user_cache_path("focusdpo") / "toybox",
        help="checkpoints, to resume (default: %(default)s)",
    )
    parser.add_argument("--device", default=backbones.best_device())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="shortens every stage; 0.001 tries the recipe out")
    chosen = parser.parse_args(arguments)
    diffusers.utils.logging.set_verbosity_error()  # it warns that float16 does not compute on a CPU; we only save it
    print(run(chosen.out, chosen.work, chosen.device, chosen.seed, chosen.scale))


if __name__ == "__main__":
    main()
