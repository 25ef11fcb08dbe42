"""The rows of Tables 1 and 2, as the paper names them."""

ANCHORS = {"photos": "real photos", "oracle": "oracle (real renders)", "copy": "copy of the reference"}
FAMILIES = {"uno": "UNO", "ipap": "IPAP"}  # a base's row; what was trained from it stands below it
SOURCE = ("repository", "commit", "command")  # where the images of another system's row come from
OBJECTIVES = {"sft": "SFT", "dpo": "DPO", "patchdpo": "PatchDPO", "focusdpo": "FocusDPO"}
ROWS = ANCHORS | {  # as the paper names them: "uno" is UNO, "uno_sft" is UNO+SFT
    key: label
    for family, base in FAMILIES.items()
    for key, label in [(family, base), *((f"{family}_{o}", f"{base}+{name}") for o, name in OBJECTIVES.items())]
}


def family(row: str) -> str:
    """The family of a row by its key: "uno" of "uno" and "uno_sft"; "" of a row that has no base, as an anchor."""
    name = row.partition("_")[0]
    return name if name in FAMILIES else ""
