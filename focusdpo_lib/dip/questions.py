"""What is asked of a captioner about one subject, and what its answer must hold.

One structured answer serves every disruption: a caption, and details that stand in it word by word, each with another
in its stead. The disrupted caption of strength k exchanges k of them, so class and pose stay as they were.
"""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from focusdpo_lib.dip.chain import Unfit
from focusdpo_lib.evaluation.wording import mentions

MARGIN = 0.05  # of a region's longer side, white, around what is cut out


class Detail(BaseModel):
    """A detail of a subject: what kind, the words of the caption that say it, and the words for another."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    attribute: str
    words: str
    instead: str


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    caption: str
    details: list[Detail]


SCHEMA = {"name": "description", "strict": True, "schema": Answer.model_json_schema()}


def question(subject: str, details: int) -> str:
    """The prompt that goes with the picture of a subject."""
    return (
        f"The picture shows one subject, a {subject}, cut out of a photo and put on white. Answer with JSON of two "
        f'keys. "caption": one noun phrase of at most 40 words that names the {subject} by the word "{subject}" and '
        "says what makes it this one and no other: colours, materials, patterns, parts, marks. Say nothing of its "
        f'pose, of its surroundings or of the white ground. "details": a list of {details} details of the caption, '
        'the most visible first, each with the keys "attribute" (such as colour, material, pattern, marking), "words" '
        f'(the very words of the caption that say it, without the word "{subject}"; no two details share a word) and '
        '"instead" (words that fit in their place and say something clearly different of the same attribute, so that '
        f"it would be another {subject} of the same shape in the same pose)."
    )


def region(image: np.ndarray, mask: np.ndarray, side: int) -> bytes:
    """PNG of what a mask (H, W) covers of an image (H, W, 3), on white, its longer side at most `side` pixels."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    cut = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    shown = np.where(mask[cut][..., None], image[cut], 255).astype(np.uint8)
    around = round(MARGIN * max(shown.shape[:2]))
    picture = Image.fromarray(np.pad(shown, ((around, around), (around, around), (0, 0)), constant_values=255))
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def understood(text: str, subject: str) -> Answer:
    """The answer that a captioner's text holds, whatever stands around its JSON. Raises Unfit where it is of no use."""
    try:
        answer = Answer.model_validate_json(text[text.find("{") : text.rfind("}") + 1])
    except ValidationError:
        raise Unfit("the captioner's answer cannot be read") from None
    if not mentions(answer.caption, subject):
        raise Unfit("a caption does not name its subject")
    details = [detail for detail in answer.details if _fits(answer.caption, detail)]
    if not details or not mentions(edited(answer.caption, details), subject):
        raise Unfit("a caption has no detail that can be changed")
    return Answer(caption=answer.caption, details=details)


def _fits(caption: str, detail: Detail) -> bool:
    return caption.count(detail.words) == 1 and bool(detail.instead.strip()) and detail.words != detail.instead


def edited(caption: str, details: Sequence[Detail]) -> str:
    """The caption with these details exchanged, each for what stands instead; of two that overlap the first counts."""
    places: list[tuple[int, int, str]] = []
    for detail in details:
        start = caption.index(detail.words)
        end = start + len(detail.words)
        if all(end <= first or last <= start for first, last, _ in places):
            places.append((start, end, detail.instead))
    for start, end, instead in sorted(places, reverse=True):
        caption = caption[:start] + instead + caption[end:]
    return caption
