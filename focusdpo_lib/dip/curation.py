"""Which drafts become pairs: by thresholds on their scores, near-duplicates of earlier ones, and reviewers' verdicts.

All of it is light: it reads columns of the last stage, never a picture, in one process. So thresholds can be tried
without making a draft again, and nothing depends on how the drafts were made in parts.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from focusdpo_lib.dip import drafts
from focusdpo_lib.dip.scoring import HASH, NAME, SCORES
from focusdpo_lib.params import Curation

BLOCK = 256  # drafts that are compared with all before them at once
LIMITS = {  # by setting: score, whether it is a lower limit, and why a draft falls out
    "similarity": ("similarity", True, "a subject is unlike its reference"),
    "drop": ("drop", True, "the loser is too much like the winner"),
    "least_drop": ("least_drop", True, "a subject of the loser is too much like the winner's"),
    "context": ("context", True, "winner and loser differ around the subjects"),
    "outside": ("outside", False, "winner and loser differ around the subjects"),
    "smallest": ("smallest", True, "a subject is too small"),
    "covered": ("covered", False, "the subjects leave too little of the scene"),
    "caption": ("caption", True, "a caption does not fit its subject"),
}
DUPLICATE = "much like an earlier pair"
REJECTED, UNSEEN = "rejected in review", "not accepted in review"


def score_table(folder: Path) -> pd.DataFrame:
    """The drafts that were scored, in order, a row each: id, split, subjects, signature and every score."""
    names = ["id", "split", "subjects", "signature", "scores", "dropped"]
    rows = [row for row in drafts.rows(folder, NAME, names) if not row.pop("dropped")]
    return pd.DataFrame([row | drafts.notes(row.pop("scores")) for row in rows], columns=[*names[:4], *SCORES])


def curated(
    table: pd.DataFrame, settings: Curation, verdicts: Mapping[str, tuple[bool, str]] | None = None
) -> pd.DataFrame:
    """`table` with two columns more: `out`, why a draft is left out (empty: it stays), and `duplicate`, how much it is
    like the earlier one that is most like it, of those that stay.

    `verdicts`: by id, whether reviewers accept it, and why not. They come last: nobody reviews what is out before.
    """
    out = [_beyond(row, settings) for row in table.to_dict("records")]
    like, out = duplicates(table["signature"].tolist(), out, settings)
    if settings.review != "ignore":
        out = [
            why or _verdict(settings, (verdicts or {}).get(name)) for name, why in zip(table["id"], out, strict=True)
        ]
    return table.assign(out=out, duplicate=like)


def _beyond(scores: Mapping[str, float], settings: Curation) -> str:
    """Why a draft's scores do not do, by the first limit that they break; empty if they do."""
    for setting, (score, lower, why) in LIMITS.items():
        limit = getattr(settings, setting)
        if limit is not None and (scores[score] < limit if lower else scores[score] > limit):
            return why
    return ""


def _verdict(settings: Curation, verdict: tuple[bool, str] | None) -> str:
    if verdict is None:
        return UNSEEN if settings.review == "accepted" else ""
    return "" if verdict[0] else REJECTED


def duplicates(signatures: Sequence[bytes], out: Sequence[str], settings: Curation) -> tuple[list[float], list[str]]:
    """(likeness to the most like of the earlier drafts that stay, `out` with the near-duplicates of one of them).

    A near-duplicate has an encoder similarity and a perceptual hash beyond both limits. Of several the first stays.
    """
    if not signatures:
        return [], []
    raw = np.frombuffer(b"".join(signatures), np.uint8).reshape(len(signatures), -1)
    hashes, vectors = raw[:, :HASH].copy(), np.frombuffer(raw[:, HASH:].tobytes(), "<f2").reshape(len(raw), -1)
    vectors = vectors.astype(np.float32)
    out, like, kept = list(out), np.full(len(raw), -1.0), np.zeros(len(raw), bool)
    for start in range(0, len(raw), BLOCK):
        block = slice(start, min(start + BLOCK, len(raw)))
        similar = vectors[block] @ vectors[: block.stop].T
        bits = np.bitwise_count(hashes[block, None] ^ hashes[None, : block.stop]).sum(-1, dtype=int)
        same = (similar >= settings.duplicate) & (bits <= settings.duplicate_bits)
        for i in range(block.start, block.stop):
            before = kept[:i]
            like[i] = similar[i - start, :i][before].max(initial=-1.0)
            if not out[i] and same[i - start, :i][before].any():
                out[i] = DUPLICATE
            kept[i] = not out[i]
    return [round(float(value), 6) for value in like], out
