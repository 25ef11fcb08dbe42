"""Whether the kit computes what UNO's reference implementation recorded.

    python -m focusdpo_lib.backbones.parity FOLDER …

A folder holds transformer.safetensors (diffusers' keys), uno_lora.safetensors (UNO's keys), config.json and
io.safetensors (inputs and outputs). Position ids, one prediction and the whole sampling run are computed anew with the
code that trains and samples; the largest deviation of each is printed. The exit code is 1 above 1e-5; where torch is
without MKL, as on aarch64, above 3e-5.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import diffusers.utils.logging
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file

from focusdpo_lib.backbones import BackboneError
from focusdpo_lib.backbones.conditioning import Conditioning
from focusdpo_lib.backbones.flux_uno import FluxUno, load_subject_lora
from focusdpo_lib.backbones.tokens import pack, position_ids

TOLERANCE = 1e-5
WITHOUT_MKL = 3e-5  # the recording's exp (see `main`) cannot be had: 1.7e-5 on an emulated aarch64 processor
FILES = ("config.json", "transformer.safetensors", "uno_lora.safetensors", "io.safetensors")


def load_case(folder: Path) -> tuple[FluxUno, dict[str, torch.Tensor]]:
    """The recorded model, its LoRA through the kit's own loader, and what was recorded; BackboneError if that fails."""
    if gone := [name for name in FILES if not (folder / name).is_file()]:
        raise BackboneError(f"{folder} lacks {', '.join(gone)}: name a folder like shared/fixtures/uno/case1")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        transformer = FluxTransformer2DModel(**config["flux_config"])
        transformer.load_state_dict(load_file(folder / "transformer.safetensors"))
        absent = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        pipeline = FluxPipeline(scheduler, transformer=transformer, **absent)
        load_subject_lora(pipeline, folder / "uno_lora.safetensors")
        backbone = FluxUno(pipeline, precision="float32", position_mode=config["position_mode"])
        return backbone, load_file(folder / "io.safetensors")
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BackboneError(f"the case {folder} cannot be loaded ({reason}): record it again") from error


@torch.no_grad()
def deviations(backbone: FluxUno, io: dict[str, torch.Tensor]) -> dict[str, float]:
    """The largest absolute deviation of ids, prediction, sampling times and sampled latents from the recorded ones."""
    target = io["target_latents"]
    names = sorted((n for n in io if n.startswith("ref_latents_")), key=lambda n: int(n.rpartition("_")[2]))
    references = tuple(io[name] for name in names)
    condition = Conditioning(io["text_embeds"], io["pooled_text"], references)
    grids = [backbone.token_grid(x.shape) for x in (target, *references)]
    recorded_ids = torch.cat([io["target_ids"], *(io[n.replace("latents", "ids")] for n in names)])
    guidance, steps = io["guidance"].item(), len(io["sampling_timesteps"]) - 1
    found = {
        "position ids": position_ids(grids[0], grids[1:], backbone.position_mode) - recorded_ids,
        "prediction": pack(backbone.predict(target, io["timestep"], condition, guidance=guidance))
        - io["prediction_packed"],
        "sampling times": backbone.sampling_times(target.shape, steps).cpu() - io["sampling_timesteps"],
        "sampled latents": pack(backbone.denoise(target, condition, steps, guidance)) - io["denoised_packed"],
    }
    return {name: difference.abs().max().item() for name, difference in found.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m focusdpo_lib.backbones.parity", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="+")
    # float32's exp differs between processors by a unit in the last place, which the embedding of times multiplies by
    # 1000: 1e-5 in a prediction. MKL has a path that is the same on all of them, and was the recording's; it must be
    # asked for before it computes anything.
    os.environ.setdefault("MKL_CBWR", "COMPATIBLE")
    diffusers.utils.logging.set_verbosity_error()  # the pipeline has no encoders, and says so
    tolerance = TOLERANCE if torch.backends.mkl.is_available() else WITHOUT_MKL
    every: list[float] = []
    for folder in parser.parse_args(arguments).folder:
        try:
            found = deviations(*load_case(folder))
        except BackboneError as error:
            print(error, file=sys.stderr)
            return 1
        for name, deviation in found.items():
            print(f"{folder.name}: {name:16s} {deviation:.1e}")
        every += found.values()
    within = all(deviation <= tolerance for deviation in every)  # NaN is not
    print(f"largest deviation {torch.tensor(every).max():.1e}, {'within' if within else 'ABOVE'} {tolerance:.0e}")
    return int(not within)


if __name__ == "__main__":
    sys.exit(main())
