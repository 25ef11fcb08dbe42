"""What the stages of the paper's scale are made of, and the matrix operations of each: counted once, for `batch.plan`.

    python -m focusdpo_lib.bench.units params/paper/operations.yaml

Counted at full size on tensors without contents (see `count`), without gradient checkpointing. Takes a quarter of an
hour, most of it for FLUX.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from focusdpo_lib import params, runs
from focusdpo_lib.bench import count, models
from focusdpo_lib.bench.cases import SIZES, Case, Sizes
from focusdpo_lib.bench.measure import operations
from focusdpo_lib.bench.steps import OBJECTIVES, winners_forward
from focusdpo_lib.training import draws

FAMILIES = {"flux_uno": "flux", "sdxl_ip": "sdxl"}
NUMBERS = ("one", "two")  # references
SAMPLED = {"flux_uno": "full", "sdxl_ip": "sampled"}  # FLUX samples at the size at which it trains
HEAD = "# Matrix operations and bytes, counted by `python -m focusdpo_lib.bench.units`; what batch.plan multiplies.\n"
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}


def units(scratch: Path) -> dict[str, Any]:
    """By family: a pair's step by references and objective, an evaluation of the network for an image by references,
    a pair's preparation and an image's decoding; the peak bytes of a step; the bytes of a prepared pair; and
    `score`, of an image."""
    of = encoders()
    found: dict[str, Any] = {family: _family(family, of, scratch) for family in FAMILIES}
    return found | {"score": of["score"]}


def _family(family: str, of: dict[str, Any], scratch: Path) -> dict[str, Any]:
    model, found = FAMILIES[family], {"step": {}, "evaluation": {}, "prepare": {}}
    for references, number in enumerate(NUMBERS, 1):
        case = Case(model, "full", references, False, "bfloat16")
        counted = count.counted(case, case.pairs, scratch)
        steps = counted["steps"]
        found["step"][number] = {name: steps[name]["operations"] / case.pairs for name in OBJECTIVES}
        sampled = Case(model, SAMPLED[family], references, False, "bfloat16")
        found["evaluation"][number] = forward(sampled, scratch)
        found["prepare"][number] = of[family]["text"] + (2 + references) * of[family]["encode"]
        found["prepare"][number] += 0 if family == "flux_uno" else 2 * references * of["image"]  # guided: twice
        found.setdefault("peak_bytes", max(steps[name]["peak_bytes"] for name in OBJECTIVES))
        found["prepared_bytes"] = _prepared_bytes(case.sizes)
    return found | {"decode": of[family]["decode"]}


def forward(case: Case, scratch: Path) -> float:
    """Operations of the network for one image."""
    backbone = models.built(case, count.NOWHERE, scratch)
    backbone.add_adapter(params.Training().lora.rank)
    pairs = models.load_pairs(case, backbone, 1)
    draw = draws({case.references: pairs}, params.Training(batch_size=1))(0)
    with count.without_contents(), count.as_on_a_gpu():
        backbone = count.given_memory(backbone, case.weights)
        return float(operations(winners_forward(backbone, pairs, draw, masked=False)))


def _prepared_bytes(sizes: Sizes) -> int:
    """Of a pair with two references: text in bfloat16, latents, references, views and M_d in float32."""
    cells = 2 * _product(sizes.latents) + _product(sizes.latents[1:]) + 2 * _product(sizes.reference[2])
    views = 2 * (2 * _product(sizes.view) + 2 * _product(sizes.text)) if sizes.view else 0
    return 4 * cells + 2 * _product(sizes.text) + 2 * views


def _product(numbers: Sequence[int]) -> int:
    return int(torch.tensor(numbers).prod())


def encoders() -> dict[str, Any]:
    """Operations of the published encoders: a family's text (both prompts), an image of 512² pixels in and of its
    sampled size out; `image`, of IP-Adapter's ViT-H; `score`, DINO ViT-S/16 and CLIP ViT-B/32 of one image."""
    from diffusers import AutoencoderKL
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPVisionConfig,
        CLIPVisionModel,
        T5Config,
        T5EncoderModel,
        ViTConfig,
        ViTModel,
    )

    ids = torch.zeros(1, 512, dtype=torch.long, device="meta")
    with torch.device("meta"), torch.no_grad():
        t5 = T5EncoderModel(
            T5Config(d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, feed_forward_proj="gated-gelu")
        )
        clip_l = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
        big_g = CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20)
        sizes = {"num_hidden_layers": 32, "num_attention_heads": 16, "patch_size": 14, "image_size": 224}
        vit_h = CLIPVisionModel(CLIPVisionConfig(hidden_size=1280, intermediate_size=5120, **sizes))
        vit_b = CLIPVisionModel(CLIPVisionConfig(patch_size=32))
        vit_s = ViTModel(ViTConfig(hidden_size=384, intermediate_size=1536, num_attention_heads=6, patch_size=16))
        vae = AutoencoderKL(latent_channels=16, **VAE)
        sdxl_vae, photo = AutoencoderKL(latent_channels=4, **VAE), torch.empty(1, 3, 224, 224)
        text = {"flux_uno": [(t5, ids), (clip_l, ids[:, :77])], "sdxl_ip": [(clip_l, ids[:, :77])]}
        text["sdxl_ip"].append((CLIPTextModel(big_g), ids[:, :77]))
        image = torch.empty(1, 3, 512, 512)
        found = {
            family: {
                "text": float(sum(operations(lambda m=model, i=words: m(i)) for model, words in parts)),
                "encode": float(operations(lambda v=v: v.encode(image))),
                "decode": float(operations(lambda v=v, z=z: v.decode(torch.empty(1, *z)))),
            }
            for (family, parts), v, z in zip(
                text.items(), (vae, sdxl_vae), ((16, 64, 64), SIZES["sdxl", "sampled"].latents), strict=True
            )
        }
        score = operations(lambda: vit_s(photo)) + operations(lambda: vit_b(photo))
        return found | {"image": float(operations(lambda: vit_h(photo))), "score": float(score)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m focusdpo_lib.bench.units", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="where the YAML goes")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        text = yaml.safe_dump(units(Path(scratch)), sort_keys=False)
    runs.write_text(given.file, HEAD + text)


if __name__ == "__main__":
    main()
