"""Where in an image a subject is: the box in which a Grounding DINO finds its class word."""

from collections import Counter
from collections.abc import Sequence

import torch
from PIL import Image

from focusdpo_lib.evaluation.encoders import LOADING_ERRORS, EncoderError, cannot_load, identity, quietly, require_whole

OVERLAP = 0.5  # of two boxes, intersection over union, from which on they are of one thing

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


class Detector:
    """A Grounding DINO from a folder or hub id, asked for one word at a time, so that no word sways another."""

    def __init__(self, model: str, revision: str | None = None, device: str = "cpu", threshold: float = 0.25):
        import transformers as hf

        try:
            with quietly():
                kind = hf.AutoConfig.from_pretrained(model, revision=revision).model_type
                if kind != "grounding-dino":
                    raise ValueError(f"it is a {kind}, and crops need a grounding-dino")
                how = {"revision": revision, "output_loading_info": True, "use_safetensors": True}
                loaded, report = hf.GroundingDinoForObjectDetection.from_pretrained(model, **how)
                self.processor = hf.GroundingDinoProcessor.from_pretrained(model, revision=revision)
            require_whole(report)
        except LOADING_ERRORS as error:
            raise EncoderError(cannot_load("detector", model, error)) from None
        self.model, self.device, self.threshold = loaded.eval().to(device), device, threshold
        self.id = f"{identity(model, revision)} from {threshold:g}"

    def boxes(self, image: Image.Image, words: Sequence[str]) -> list[Box | None]:
        """The best box of each word, and where a word stands twice its best two, which are not of one thing."""
        found: dict[str, list[Box]] = {word: self._of(image, word, count) for word, count in Counter(words).items()}
        return [found[word].pop(0) if found[word] else None for word in words]

    @torch.inference_mode()
    def _of(self, image: Image.Image, word: str, count: int) -> list[Box]:
        asked = " ".join(word.lower().replace(".", " ").split())
        inputs = self.processor(images=image, text=f"{asked}.", return_tensors="pt").to(self.device)
        outputs = self.model(**inputs)
        scores = outputs.logits[0].float().sigmoid().amax(-1)  # of a box: of the word's tokens the highest
        centre, size = outputs.pred_boxes[0].float().chunk(2, -1)
        scale = torch.tensor([image.width, image.height] * 2, dtype=torch.float32)
        boxes = torch.cat([centre - size / 2, centre + size / 2], -1).cpu() * scale
        kept: list[Box] = []
        for place in scores.argsort(descending=True).tolist():
            box = tuple(boxes[place].tolist())
            if scores[place] >= self.threshold and len(kept) < count and all(overlap(box, k) < OVERLAP for k in kept):
                kept.append(box)
        return kept


def overlap(one: Box, other: Box) -> float:
    """Intersection over union."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0) * max(height, 0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return shared / (areas - shared) if areas > shared else 0.0


def crop(image: Image.Image, box: Box | None) -> Image.Image | None:
    """The part of an image in a box, at least a pixel; None of no box."""
    if box is None:
        return None
    left, top = (min(max(int(edge), 0), side - 1) for edge, side in zip(box[:2], image.size, strict=True))
    right, bottom = (min(max(round(edge), 0), side) for edge, side in zip(box[2:], image.size, strict=True))
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
