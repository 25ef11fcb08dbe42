"""The card of a dataset of pairs: what is in it, how it was made, and under which licences it may be used."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from focusdpo_lib.dip import drafts
from focusdpo_lib.dip.scoring import NAME as SCORED
from focusdpo_lib.dip.scoring import SCORES
from focusdpo_lib.params import Curation
from focusdpo_lib.runs import write_text

CARD = "README.md"
# Of models and sources that a stage may name, as their publishers state them; what is not here is said to be unknown.
FLUX = "FLUX.1-dev non-commercial licence"
LICENCES = {
    "black-forest-labs/FLUX.1-dev": FLUX,
    "black-forest-labs/FLUX.1-Fill-dev": FLUX,
    "bytedance-research/UNO": f"on its base's terms: {FLUX}",
    "Yuanshi/Subjects200K": f"Apache-2.0; its images are FLUX.1-dev's: {FLUX}",
    "IDEA-Research/grounding-dino-tiny": "Apache-2.0",
    "IDEA-Research/grounding-dino-base": "Apache-2.0",
    "facebook/sam2.1-hiera-large": "Apache-2.0",
    "facebook/sam3": "SAM licence",
    "diffusers/stable-diffusion-xl-1.0-inpainting-0.1": "openrail++ (CreativeML Open RAIL++-M)",
    "Qwen/Qwen3-VL-8B-Instruct": "Apache-2.0",
    "gpt-4o": "OpenAI's terms of use",
    "focusdpo_lib.dip.toybox": "Apache-2.0",
    "toybox": "Apache-2.0",
}
UNKNOWN = "not known to the kit: look it up"


def write_card(folder: Path, chain: Path, decisions: pd.DataFrame, curation: Curation) -> None:
    """Writes the card of the pairs that `decisions` keep of a chain's drafts; reads columns, no pictures."""
    kept = set(decisions["id"][decisions["out"] == ""])
    names = ["id", "split", "subjects", "identities", "provenance"]
    rows = [row for row in drafts.rows(chain, SCORED, names) if row["id"] in kept]
    write_text(folder / CARD, card(rows, decisions, curation))


def card(rows: Sequence[Mapping[str, Any]], decisions: pd.DataFrame, curation: Curation) -> str:
    """The card as Markdown, with the header that the Hugging Face hub reads."""
    used = licences(drafts.notes(row["provenance"]) for row in rows)
    limits = {name: value for name, value in curation.model_dump().items() if value is not None}
    out = decisions["out"][decisions["out"] != ""].value_counts()
    parts = [
        f"---\nlicense: {'apache-2.0' if set(used.values()) == {'Apache-2.0'} else 'other'}\n"
        "task_categories:\n- text-to-image\n---",
        "# Preference pairs (DIP) for FocusDPO",
        "Quadruplets of a prompt, a reference image of each subject, a winner, and a loser that keeps class, pose and "
        "surroundings and has other subjects; with a mask of each subject in the winner and in its reference. Made by "
        "the chain of focusdpo_lib (Figure 4 of the paper, arXiv 2509.01181).",
        _table(["split", "pairs", "one subject", "several", "identities"], _counts(rows)),
        "No identity stands in two splits.",
        "## Subjects",
        _table(["class", "shown"], sorted(Counter(s for row in rows for s in row["subjects"]).items())),
        "## Curation",
        f"{len(rows)} of {len(decisions)} drafts were kept. Settings: "
        + ", ".join(f"{name} {value}" for name, value in limits.items())
        + ".",
        _table(["left out because", "drafts"], out.items()) if len(out) else "None was left out.",
        "Scores of every pair stand in its column `scores`: " + "; ".join(f"{k}, {v}" for k, v in SCORES.items()) + ".",
        "## Licences",
        _table(["made with", "licence"], used.items()),
        "The pairs may be used as far as all of these allow.",
    ]
    return "\n\n".join(parts) + "\n"


def licences(provenances: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """By model or source that the rows' provenance names (`model`, `source`, `generator`, at any depth): its licence.

    What a row says itself (`licence`, beside the name) goes before LICENCES.
    """
    found: dict[str, str] = {}
    for provenance in provenances:
        found |= dict(_named(provenance))
    return dict(sorted(found.items()))


def _named(noted: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for key, value in noted.items():
        if isinstance(value, Mapping):
            yield from _named(value)
        elif key in ("model", "source", "generator") and isinstance(value, str):
            yield value, str(noted.get("licence") or LICENCES.get(value, UNKNOWN))


def _counts(rows: Sequence[Mapping[str, Any]]) -> list[list]:
    found = []
    for split in dict.fromkeys(row["split"] for row in rows):
        mine = [row for row in rows if row["split"] == split]
        single = sum(len(row["subjects"]) == 1 for row in mine)
        who = {identity for row in mine for identity in row["identities"]}
        found.append([split, len(mine), single, len(mine) - single, len(who)])
    return found


def _table(header: Sequence[str], rows: Iterable[Sequence]) -> str:
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows])
