"""The model card of a trained adapter: what it is, how to load it without the kit, and how it was made."""

from pathlib import Path

import pandas as pd

from focusdpo_lib import backbones, params, provenance
from focusdpo_lib.backbones import is_hub_id
from focusdpo_lib.evaluation.rows import OBJECTIVES
from focusdpo_lib.runs import write_text
from focusdpo_lib.training.checkpoints import LOG

LOADING = {
    "flux_uno": """import torch
from diffusers import FluxPipeline

pipeline = FluxPipeline.from_pretrained({model!r}, {revision}torch_dtype=torch.bfloat16)
{subject}pipeline.load_lora_weights("this/folder", adapter_name="policy")
{both}# A plain FluxPipeline takes no reference images: focusdpo_lib.backbones.FluxUno(pipeline) does.
""",
    "sdxl_ip": """import torch
from diffusers import StableDiffusionXLPipeline

pipeline = StableDiffusionXLPipeline.from_pretrained({model!r}, {revision}torch_dtype=torch.float16)
pipeline.load_ip_adapter({ip_adapter!r}, subfolder={subfolder!r}, weight_name={weight_name!r},
                         {ip_revision}image_encoder_folder={ip_encoder!r})
pipeline.set_ip_adapter_scale({scale})
pipeline.load_lora_weights("this/folder", adapter_name="policy")
""",
}
CARD = """---
library_name: diffusers
{front}tags:
- lora
- {objective}
- preference-optimization
- subject-driven-generation
---

# {name} adapter for {model}

A LoRA of rank {rank} (alpha {alpha}) on the {part} of {model}, trained by {name} with the FocusDPO reproduction kit on
{pairs} preference pairs. {what}

## Use

```python
{loading}```

The base's licence and limits hold for the adapter too. It was trained to follow reference photos of one or two
subjects; nothing else was looked at.

## Training

| setting | value |
|---|---|
{settings}

{result}

Made with {versions} on {device}{commit}.
"""
USED = {  # of the objective's settings
    "sft": ("flow_weight",),
    "dpo": ("beta", "reduction", "flow_weight"),
    "patchdpo": ("flow_weight",),
    "focusdpo": ("beta", "mask_power", "reduction", "flow_weight"),
}
WHAT = {
    "sft": "It lowers the error on the preferred image alone.",
    "dpo": "It prefers the winner of each pair to its loser, everywhere in the image alike (Diffusion-DPO).",
    "patchdpo": "It weights the error of each patch by the patch's quality (PatchDPO).",
    "focusdpo": "It prefers the winner of each pair to its loser where a focus mask says that the subjects' detail is.",
}


def write(
    folder: Path,
    run: Path,
    backbone: params.Backbone,
    objective: params.Objective,
    masks: params.Masks,
    training: params.Training,
    device: str,
) -> None:
    """Writes README.md into an adapter's folder, from the settings and log of its training `run` and its `device`."""
    log = pd.read_csv(run / LOG)
    family, model = backbones.family_class(backbone.family), _name(backbone.model)
    made = provenance.facts()
    shown = {**training.model_dump(exclude={"lora"}), **objective.model_dump(include=set(USED[objective.name]))}
    shown |= masks.model_dump() if objective.name == "focusdpo" else {}
    text = CARD.format(
        front=f"base_model: {backbone.model}\nbase_model_relation: adapter\n" if is_hub_id(model) else "",
        objective=objective.name,
        name=OBJECTIVES[objective.name],
        model=model,
        rank=training.lora.rank,
        alpha=f"{training.lora.alpha or training.lora.rank:g}",
        part=family.part,
        pairs=log["pair"].nunique(),
        what=WHAT[objective.name],
        loading=_loading(backbone, model),
        settings="\n".join(f"| {name} | {value} |" for name, value in shown.items()),
        result=_result(log),
        versions=", ".join(f"{name} {made['packages'][name]}" for name in ("torch", "diffusers", "peft")),
        device=device,
        commit=f", commit {made['git']['commit'][:12]}" if made["git"] else "",
    )
    write_text(folder / "README.md", text)


def _name(model: str) -> str:
    """A hub id as it is; of a folder its last part, for a card must not show the paths of a machine."""
    return model if is_hub_id(model) else Path(model).name


def _loading(backbone: params.Backbone, model: str) -> str:
    """Python that loads base and adapter with diffusers alone."""
    weights = Path(backbone.ip_weights)
    subject = backbone.subject_lora and _name(backbone.subject_lora)
    of_subject = f"revision={backbone.subject_revision!r}, " if backbone.subject_revision else ""
    return LOADING[backbone.family].format(
        model=model,
        revision=f"revision={backbone.revision!r}, " if backbone.revision else "",
        ip_revision=f"revision={backbone.ip_revision!r}, " if backbone.ip_revision else "",
        scale=backbone.ip_scale,
        subject=f'pipeline.load_lora_weights({subject!r}, {of_subject}adapter_name="subject")\n' if subject else "",
        both='pipeline.set_adapters(["subject", "policy"])\n' if subject else "",
        ip_adapter=_name(backbone.ip_adapter or f"{model}/ip_adapter"),
        subfolder=str(weights.parent),
        weight_name=weights.name,
        ip_encoder=backbone.ip_encoder,
    )


def _result(log: pd.DataFrame) -> str:
    """What the last tenth of the steps looked like."""
    late = log[log["step"] >= 0.9 * log["step"].max()]
    words = [f"mean loss {late['loss'].mean():.4g}"]
    if "accuracy" in late:
        words.append(f"implicit accuracy {late['accuracy'].mean():.2f} on the training pairs")
    return f"Over the last tenth of its {log['step'].max() + 1} steps: {', '.join(words)}."
