"""What the paper prints. These numbers are the authors'; they are shown beside ours and never mixed in."""

import pandas as pd

METRICS = ("DINO", "CLIP-I", "CLIP-T")

TABLE_1 = {  # single subject
    "DreamBooth": (0.668, 0.803, 0.305),
    "SSR-Encoder": (0.612, 0.821, 0.308),
    "RealCustom++": (0.702, 0.794, 0.318),
    "OmniGen": (0.693, 0.801, 0.315),
    "OminiControl": (0.684, 0.799, 0.312),
    "DreamO": (0.712, 0.809, 0.314),
    "IPAP": (0.692, 0.826, 0.281),
    "IPAP+SFT": (0.691, 0.828, 0.279),
    "IPAP+DPO": (0.695, 0.831, 0.276),
    "IPAP+PatchDPO": (0.727, 0.838, 0.292),
    "IPAP+FocusDPO": (0.751, 0.840, 0.303),
    "UNO": (0.760, 0.835, 0.304),
    "UNO+SFT": (0.761, 0.832, 0.299),
    "UNO+DPO": (0.764, 0.835, 0.301),
    "UNO+FocusDPO": (0.802, 0.842, 0.316),
}
TABLE_2 = {  # two subjects
    "DreamBooth": (0.430, 0.695, 0.308),
    "MS-Diffusion": (0.525, 0.726, 0.319),
    "OmniGen": (0.511, 0.722, 0.331),
    "DreamO": (0.539, 0.727, 0.313),
    "UNO": (0.542, 0.733, 0.322),
    "UNO+SFT": (0.542, 0.732, 0.321),
    "UNO+DPO": (0.545, 0.731, 0.322),
    "UNO+FocusDPO": (0.570, 0.739, 0.328),
}
REAL_PHOTOS = {"DINO": 0.774, "CLIP-I": 0.885}  # the published oracle: real photos against each other
COPY = {"DINO": 0.817, "CLIP-I": 0.907}  # derived: 1/n + (1 − 1/n) · oracle over the 30 subjects

HEADING = "Published by the paper on the real DreamBench (not measured here)"
NOTES = {
    "single": (
        "UNO+FocusDPO's DINO of 0.802 lies above the oracle (0.774, real photos against each other) and just below "
        "pasting the reference (0.817).",
        "The IPAP and PatchDPO rows were measured in PatchDPO's setting: all references in, one image a prompt. "
        "There is no UNO+PatchDPO.",
    ),
    "multi": ("The paper's text says 0.326 for the CLIP-T of UNO+FocusDPO; its table prints 0.328.",),
}


def published(kind: str) -> pd.DataFrame:
    """Table 1 ("single") or Table 2 ("multi") as printed: a row a method, columns DINO, CLIP-I, CLIP-T."""
    rows = {"single": TABLE_1, "multi": TABLE_2}[kind]
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(METRICS)).rename_axis("method")
