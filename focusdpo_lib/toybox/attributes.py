"""What a reader saw in an image against what should be there: attribute accuracy and leakage between two subjects.

An identity is a dict of attributes (class_name, base, accent, pattern, trim). The functions are pure; what reads an
image is the reader, which `load_reader` makes one of a benchmark's encoders.
"""

from contextlib import redirect_stdout
from itertools import permutations

import torch
from safetensors import SafetensorError

from focusdpo_lib.evaluation.encoders import EncoderError, cannot_load, identity
from focusdpo_lib.toybox.world import ATTRIBUTES, SCENE_SIZE

CAN_LEAK = tuple(name for name in ATTRIBUTES if name != "class_name")


def match(found: list[dict], expected: list[dict]) -> list[dict | None]:
    """For every expected subject the found one that is taken for it, or None where too few were found.

    Of all one-to-one assignments the one with most classes right, then most attributes right, then in reading order.
    """
    padded = [*found, *[None] * (len(expected) - len(found))]

    def quality(assignment):
        pairs = [(seen, true) for seen, true in zip(assignment, expected, strict=True) if seen is not None]
        classes = sum(seen["class_name"] == true["class_name"] for seen, true in pairs)
        return len(pairs), classes, sum(len(_right(seen, true)) for seen, true in pairs)

    return list(max(permutations(padded, len(expected)), key=quality))  # max keeps the first of equals


def attribute_accuracy(found: list[dict], expected: list[dict]) -> list[float]:
    """For every expected subject the share of its attributes that was read right; 0 for a subject that is missing."""
    matched = match(found, expected)
    return [len(_right(s, t)) / len(ATTRIBUTES) if s else 0.0 for s, t in zip(matched, expected, strict=True)]


def leakage(found: list[dict], expected: list[dict]) -> list[tuple[int, int]]:
    """For each of two subjects (attributes that leaked, attributes that could have).

    An attribute can leak where the two identities differ in it; it has leaked where the subject shows not its own value
    but the other's. A missing subject shows nothing and so leaks nothing, but stays in the denominator: the denominator
    depends on the case alone, so that every run is divided by the same number.
    """
    if len(expected) != 2:
        raise ValueError(f"leakage is defined between two subjects, not {len(expected)}")
    counts = []
    for seen, own, other in zip(match(found, expected), expected, reversed(expected), strict=True):
        differing = [a for a in CAN_LEAK if own[a] != other[a]]
        counts.append((sum(seen is not None and seen[a] == other[a] for a in differing), len(differing)))
    return counts


def _right(seen: dict, true: dict) -> list[str]:
    return [name for name in ATTRIBUTES if seen[name] == true[name]]


class ToyboxReader:
    """The reader as the protocol takes it (`evaluation.encoders.AttributeReader`); `id` names its weights."""

    size = SCENE_SIZE

    def __init__(self, model, id: str) -> None:
        self.model, self.id = model, id

    def __call__(self, pixels: torch.Tensor) -> list[list[dict]]:
        return self.model.read(pixels)

    def scores(self, found: list[dict], expected: dict[str, dict]) -> list[tuple[str, str, float, float]]:
        """(metric, subject, value, weight): each subject's attribute accuracy and, of two subjects, the leakage."""
        true = list(expected.values())
        accuracy = attribute_accuracy(found, true)
        rows = [("attribute_accuracy", name, value, 1.0) for name, value in zip(expected, accuracy, strict=True)]
        if len(true) == 2:
            counts = zip(expected, leakage(found, true), strict=True)
            rows += [("leakage", name, leaked / of, float(of)) for name, (leaked, of) in counts if of]
        return rows


def load_reader(folder: str, device: str = "cpu") -> ToyboxReader:
    """The reader in a folder that `save_reader` wrote. Raises EncoderError."""
    from focusdpo_lib.toybox.reader import Reader  # with torchvision's models: half a second

    try:
        with redirect_stdout(None):  # the hub's mixin prints that it loads
            model = Reader.from_pretrained(folder, local_files_only=True, strict=True).eval().to(device)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise EncoderError(cannot_load("reader", folder, error)) from None
    return ToyboxReader(model, identity(folder))
