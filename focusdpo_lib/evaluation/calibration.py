"""Whether encoders and photos give the published anchors, which comes before any number that they give of a model.

DreamBench's 158 photos, each subject's against each other, have a published DINO of 0.774 and CLIP-I of 0.885. Encoders
that do not give that back, by their weights, their transforms or the photos, give no number that compares.
"""

from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd

from focusdpo_lib.evaluation import protocols, uno_cases
from focusdpo_lib.evaluation.published import REAL_PHOTOS

TOLERANCE = 0.005
METRICS = {"dino": "DINO", "clip_i": "CLIP-I"}


class Calibration(NamedTuple):
    """`passed` is None where it was not run; `said` is a sentence for the first line of a table."""

    passed: bool | None
    said: str


def calibration(photos: pd.DataFrame | None, protocol: Mapping[str, object]) -> Calibration:
    """From the scores of the anchor `photos` and the flat protocol of their table.

    Encoders other than the published ones pass where they give the anchors, as copies under another name do; where
    they do not, the anchors are not theirs and nothing was run.
    """
    if photos is None or photos.empty:
        return _not_run("there are no scores of real photos")
    of_subject = photos.drop_duplicates(["metric", "subject"])
    if set(of_subject["subject"]) != set(uno_cases.PHOTO):
        return _not_run("the photos are not those of DreamBench's 30 subjects")
    found = of_subject.groupby("metric")["value"].mean()
    values = {label: found[metric] for metric, label in METRICS.items() if metric in found}
    right = values.keys() == REAL_PHOTOS.keys() and all(
        abs(value - REAL_PHOTOS[label]) <= TOLERANCE for label, value in values.items()
    )
    both = " and ".join(f"{label} {value:.3f} (published: {REAL_PHOTOS[label]:.3f})" for label, value in values.items())
    if right:
        return Calibration(True, f"Calibration passed: real photos against each other have {both}.")
    if not protocols.has_published_encoders(protocol):
        return _not_run("the published anchors are of other encoders")
    return Calibration(
        False,
        f"CALIBRATION FAILED, so no number here compares with a published one: real photos against each other "
        f"have {both}, which may differ by {TOLERANCE}.",
    )


def _not_run(why: str) -> Calibration:
    return Calibration(None, f"Calibration: not run ({why}).")
