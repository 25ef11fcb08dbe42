"""The toybox's models at their smallest and untrained: every code path in seconds."""

from collections.abc import Iterable
from pathlib import Path

import torch
import yaml

from focusdpo_lib.runs import atomic
from focusdpo_lib.toybox.clip import build_clip, save_clip
from focusdpo_lib.toybox.dino import build_dino, save_dino
from focusdpo_lib.toybox.pipelines import build_autoencoder, build_flux
from focusdpo_lib.toybox.reader import Reader, save_reader
from focusdpo_lib.toybox.unet import new_backbone, save_backbone


def write_tiny_models(out: Path, seed: int = 0) -> Path:
    """Writes flux_uno, sdxl_ip, dino, clip and reader with random weights, as the ordinary loaders read them."""
    torch.manual_seed(seed)
    makers = {
        "flux_uno": lambda folder: build_flux(
            build_autoencoder((8, 16, 16)), heads=2, head_dim=16, double_blocks=1, single_blocks=1, text_dim=16
        ).save_pretrained(folder),
        "sdxl_ip": write_tiny_sdxl_ip,
        "dino": lambda folder: save_dino(build_dino(width=32, layers=1), folder),
        "clip": lambda folder: save_clip(build_clip(width=8), folder),
        "reader": lambda folder: save_reader(Reader(width=16), folder),
    }
    for name, make in makers.items():
        with atomic(Path(out) / name) as partial:
            make(partial)
    return Path(out)


def write_tiny_sdxl_ip(folder: Path) -> Path:
    """A U-Net with its IP-Adapter: 64×64 pixels are 16×16 latents, with attention at 8×8."""
    sizes = {"channels": (16, 32), "head_dim": 16, "blocks": 1, "text_dim": 16}
    backbone = new_backbone(build_autoencoder((8, 8, 8)), image_width=32, hidden=64, **sizes)
    save_backbone(backbone, folder, torch.float32)
    return folder


def write_tiny_profile(smoke: Path, out: Path, models: Path, names: Iterable[str]) -> Path:
    """The named YAML files of the smoke profile, with the tiny models in place of the shipped ones."""
    out.mkdir(parents=True)
    for name in names:
        values = yaml.safe_load((smoke / f"{name}.yaml").read_text())
        groups = [values, *(values.get("families") or {}).values()]
        for backbone in (group["backbone"] for group in groups if "backbone" in group):
            backbone["model"] = str(models / backbone.get("family", "flux_uno"))
        if "evaluation" in values:
            values["evaluation"] |= {kind: str(models / kind) for kind in ("dino", "clip", "reader")}
        if "patch_encoder" in values.get("objective", {}):
            values["objective"]["patch_encoder"] = str(models / "dino")
        (out / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return out
