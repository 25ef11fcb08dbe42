"""The recipe that trains every toybox model from nothing: `make toybox-weights`.

Stages, in order: the autoencoder; the encoders (reader, DINO, CLIP) and the segmenter; the latents of a large sample of
the training world; on them, the UNO-style transformer, whose guidance is then distilled, and the U-Net with its
IP-Adapter; the model card. Each is resumable in the work folder; the products are folders that the ordinary loaders
read.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import diffusers
import numpy as np
import open_clip
import torch
from diffusers import AutoencoderKL, UNet2DModel
from PIL import Image
from platformdirs import user_cache_path
from transformers import ViTModel

from focusdpo_lib import backbones, params, provenance
from focusdpo_lib.evaluation.benchmark import KINDS, Benchmark
from focusdpo_lib.generation import generate, image_name
from focusdpo_lib.runs import atomic, write_json
from focusdpo_lib.toybox import world
from focusdpo_lib.toybox.attributes import leakage, match
from focusdpo_lib.toybox.autoencoder import measure_autoencoder, train_autoencoder
from focusdpo_lib.toybox.batches import to_pixels
from focusdpo_lib.toybox.benchmark import write_benchmark
from focusdpo_lib.toybox.card import CARD, CURVES, write_card
from focusdpo_lib.toybox.clip import measure_clip, save_clip, train_clip
from focusdpo_lib.toybox.dino import measure_dino, save_dino, train_dino
from focusdpo_lib.toybox.reader import Reader, measure_reader, save_reader, train_reader
from focusdpo_lib.toybox.segmenter import measure_segmenter, save_segmenter, train_segmenter
from focusdpo_lib.toybox.transformer import distil_guidance, make_latents, train_flux
from focusdpo_lib.toybox.unet import save_backbone, train_sdxl_ip

STEPS = {
    "autoencoder": 2600,
    "reader": 2000,
    "dino": 2000,
    "clip": 3000,
    "segmenter": 1500,
    "flux_uno": 14000,
    "flux_uno_guidance": 1200,  # its distillation
    "sdxl_ip": 7000,
}
MODELS = tuple(name for name in STEPS if name != "flux_uno_guidance")
POOLS = {
    "autoencoder": 20_000,
    "reader": 30_000,
    "dino": 8_000,
    "clip": 30_000,
    "segmenter": 6_000,
}  # images drawn once, trained on
LATENTS = 120_000
GUIDANCE = {"flux_uno": 3.0, "sdxl_ip": 3.0}  # of the samples that measure a generator
SHARD = 5_000
COMPILED = 0.1  # of the full scale: shorter runs are over before their blocks are compiled


class Kept:
    """Card and curves of a weights folder, to which each model that is trained adds its own."""

    def __init__(self, out: Path, seed: int, steps: dict[str, int]):
        self.out, self.steps = out, steps
        card, self.curves = ({}, {}) if not (out / CARD).exists() else _read(out)
        self.card = {"steps": {}, "numbers": {}} | card | {"seed": seed}

    def add(self, name: str, curve: list[dict], numbers: dict[str, float] | None = None) -> None:
        self.curves[name], self.card["steps"][name] = curve, self.steps[name]
        if numbers is not None:
            self.card["numbers"][name] = numbers

    def write(self) -> None:
        order = [name for name in STEPS if name in self.curves]
        write_json(self.out / CARD, self.card | {"machine": provenance.facts()})
        write_json(self.out / CURVES, {name: self.curves[name] for name in order})
        write_card(self.out)


def _read(out: Path) -> tuple[dict, dict]:
    return tuple(json.loads((out / name).read_text(encoding="utf-8")) for name in (CARD, CURVES))


def run(
    out: Path,
    work: Path,
    device: str = "cpu",
    seed: int = 0,
    scale: float = 1.0,
    only: Sequence[str] = MODELS,
    **options,
) -> Path:
    """Trains whatever `work` does not hold yet and writes the weights and their card to `out`.

    `only` names the models to train; the others are taken from `out`. `scale` shortens every stage (a smoke test of the
    recipe takes 0.001); `options` go to `fit`.
    """
    steps = {name: max(2, round(count * scale)) for name, count in STEPS.items()}
    pools = {name: max(400, round(count * scale)) for name, count in POOLS.items()}
    kept, how = Kept(out, seed, steps), {"seed": seed, "device": device, **options}
    if "autoencoder" in only:
        vae, curve = train_autoencoder(work, steps["autoencoder"], pool=pools["autoencoder"], **how)
        kept.add("autoencoder", curve, measure_autoencoder(vae))
    else:
        vae = AutoencoderKL.from_pretrained(out / "flux_uno", subfolder="vae", use_safetensors=True)
    alone = {
        "reader": (train_reader, measure_reader, save_reader),
        "dino": (train_dino, measure_dino, save_dino),
        "clip": (train_clip, measure_clip, save_clip),
        "segmenter": (train_segmenter, measure_segmenter, save_segmenter),
    }
    for name, (train, measure, save) in alone.items():
        if name in only:
            model, curve = train(work, steps[name], pool=pools[name], **how)
            kept.add(name, curve, measure(model))
            save(model, out / name)
    _train_generators(vae, out, work, steps, scale, only, kept, how)
    kept.write()
    return out


def _train_generators(vae, out: Path, work: Path, steps: dict, scale: float, only, kept: Kept, how: dict) -> None:
    """The latents of the training world, and on them the transformer and the U-Net."""
    if not {"flux_uno", "sdxl_ip"} & set(only):
        return
    vae.register_to_config(_name_or_path="")  # of this machine's folders, which would be saved with it
    size = min(SHARD, max(50, round(LATENTS * scale) // 50 * 50))
    shards = [work / "latents" / f"{k:02d}.safetensors" for k in range(max(1, round(LATENTS * scale / size)))]
    for k, path in enumerate(shards):
        make_latents(vae, path, k * size, size, seed=how["seed"])
    reader = Reader.from_pretrained(out / "reader", local_files_only=True)
    if "flux_uno" in only:
        compiled = {"compiled": scale >= COMPILED}
        pipeline, curve = train_flux(vae, shards, work, steps["flux_uno"], **compiled, **how)
        kept.add("flux_uno", curve)
        curve = distil_guidance(pipeline, shards, work, steps["flux_uno_guidance"], **compiled, **how)
        kept.add("flux_uno_guidance", curve)
        with atomic(out / "flux_uno") as partial:
            pipeline.to("cpu", torch.float16).save_pretrained(partial)  # half the size; loaders give float32 again
        numbers = measure_generator("flux_uno", out, reader, work, device=how["device"])
        kept.add("flux_uno", kept.curves["flux_uno"], numbers)
    if "sdxl_ip" in only:
        backbone, curve = train_sdxl_ip(vae, shards, work, steps["sdxl_ip"], **how)
        with atomic(out / "sdxl_ip") as partial:
            save_backbone(backbone, partial)
        kept.add("sdxl_ip", curve, measure_generator("sdxl_ip", out, reader, work, device=how["device"]))


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


def measure(out: Path, work: Path, device: str = "cpu", only: Sequence[str] = MODELS) -> Path:
    """Measures the models in `out` on today's held-out identities, training none, and writes their card anew."""
    card, _ = _read(out)
    reader = Reader.from_pretrained(out / "reader", local_files_only=True).to(device).eval()
    for name in only:
        if name in GUIDANCE:
            work.mkdir(parents=True, exist_ok=True)
            card["numbers"][name] = measure_generator(name, out, reader, work, device=device)
        else:
            model, by = {
                "autoencoder": (lambda: AutoencoderKL.from_pretrained(out / "flux_uno/vae"), measure_autoencoder),
                "reader": (lambda: reader, measure_reader),
                "dino": (lambda: ViTModel.from_pretrained(out / "dino", add_pooling_layer=False), measure_dino),
                "clip": (lambda: open_clip.create_model(f"local-dir:{out / 'clip'}"), measure_clip),
                "segmenter": (lambda: UNet2DModel.from_pretrained(out / "segmenter"), measure_segmenter),
            }[name]
            card["numbers"][name] = by(model().to(device).eval())
    write_json(out / CARD, card)
    write_card(out)
    return out


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
    parser.add_argument("--only", nargs="+", choices=MODELS, default=MODELS, help="the others are taken from --out")
    parser.add_argument("--scale", type=float, default=1.0, help="shortens every stage; 0.001 tries the recipe out")
    parser.add_argument("--measure", action="store_true", help="train nothing: measure what is in --out, and its card")
    chosen = parser.parse_args(arguments)
    diffusers.utils.logging.set_verbosity_error()  # it warns that float16 does not compute on a CPU; we only save it
    if chosen.measure:
        print(measure(chosen.out, chosen.work, chosen.device, chosen.only))
        return
    print(run(chosen.out, chosen.work, chosen.device, chosen.seed, chosen.scale, chosen.only))


if __name__ == "__main__":
    main()
