"""The model card of the toybox weights: a page of measured numbers and the training curves, made from JSON files."""

import json
from pathlib import Path

import matplotlib.pyplot as plt

from focusdpo_lib.runs import atomic, write_text

CARD, CURVES, FIGURE = "card.json", "curves.json", "curves.png"
MEANING = {
    "autoencoder": "peak signal-to-noise ratio of reconstructions of held-out images, in dB",
    "reader": "share of held-out renders on which each attribute is read right",
    "dino": "cosine similarity of CLS tokens and retrieval of held-out identities. What a changed attribute costs"
    " (`drop_*`) says what it sees: the colours, and hardly class or pattern",
    "clip": "retrieval of held-out captions",
    "segmenter": "intersection over union with the exact mask of winners with one and two subjects and of references; "
    "the share below 0.5; what the class's mean mask gives (`chance`), and both subjects as one (`two_union`)",
    "flux_uno": "samples of the validation benchmark, as the reader sees them: share of attributes right, leakage rate",
    "sdxl_ip": "the same, of the U-Net with its IP-Adapter",
}


def write_card(folder: Path) -> None:
    """Writes README.md and curves.png of a weights folder from its card.json and curves.json."""
    card, curves = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (CARD, CURVES))
    with atomic(folder / FIGURE) as partial:
        figure = curves_figure(curves)
        figure.savefig(partial, dpi=80)
        plt.close(figure)
    size = sum(p.stat().st_size for p in folder.rglob("*.safetensors")) / 1e6
    lines = [
        "# Toybox weights",
        "",
        f"Small models trained from nothing on the procedural world of `focusdpo_lib/toybox` (seed {card['seed']}), by",
        "`make toybox-weights`; licence Apache-2.0, as the code that made them. They know twelve drawn classes in ten",
        f"settings and nothing else. {size:.0f} MB of safetensors in all.",
        "",
        "No identity of the validation or test split was seen in training (`Identity.split`).",
        "",
    ]
    for name, numbers in card["numbers"].items():
        steps = [f"{card['steps'][key]} steps{of}" for key, of in _stages(name) if key in card["steps"]]
        lines += [f"## {name}", "", f"{', '.join(steps)}. {MEANING[name][0].upper()}{MEANING[name][1:]}.", ""]
        lines += [
            "| number | value |",
            "|---|---|",
            *(f"| {key} | {value:.4g} |" for key, value in numbers.items()),
            "",
        ]
    lines += ["## Training curves", "", f"![training curves]({FIGURE})", ""]
    if note := card.get("note"):
        lines += ["## Note", "", note, ""]
    write_text(folder / "README.md", "\n".join(lines))


def _stages(name: str) -> list[tuple[str, str]]:
    """The trainings of a model, and how the card calls what they are of."""
    return [(name, ""), (f"{name}_guidance", " of distilling guidance")]


def curves_figure(curves: dict[str, list[dict]]) -> plt.Figure:
    """One panel a model: the training loss over steps."""
    figure, axes = plt.subplots(1, len(curves), figsize=(3.2 * len(curves), 2.8), layout="constrained")
    for axis, (name, curve) in zip(axes, curves.items(), strict=True):
        axis.plot([p["step"] for p in curve], [p["loss"] for p in curve], color="#0072B2", linewidth=1.2)
        axis.set(title=name, xlabel="step", ylabel="loss")
    return figure
