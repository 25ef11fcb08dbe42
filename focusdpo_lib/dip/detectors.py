"""What finds subjects by their phrases: Grounding DINO with SAM 2, SAM 3, or the toybox's segmenter."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from focusdpo_lib import params
from focusdpo_lib.dip.chain import Unfit
from focusdpo_lib.dip.models import StageError, batches, facts, load_model, load_network
from focusdpo_lib.toybox.segmenter import CONNECTED, SIDES, segment
from focusdpo_lib.toybox.world import CLASSES

# The boxes of the phrases, from boxes (N, 4) and scores (N, phrases); raises Unfit.
Choice = Callable[[np.ndarray, np.ndarray], list[int]]
DEFAULTS = {"sam2": "facebook/sam2.1-hiera-large", "sam3": "facebook/sam3", "toybox": "toybox"}


def load_detector(settings: params.Segmentation, source: str) -> "GroundedSam2 | Sam3 | ToyboxSegmenter":
    """The detector of a mask source, one of DEFAULTS. Raises StageError where a model of it cannot be loaded."""
    return {"sam2": GroundedSam2, "sam3": Sam3, "toybox": ToyboxSegmenter}[source](settings)


class GroundedSam2:
    """Boxes by Grounding DINO, all phrases of a picture in one question; in each chosen box a mask by SAM 2."""

    def __init__(self, settings: params.Segmentation):
        import transformers as hf

        detector, revision = settings.detector, settings.detector_revision
        kinds = (hf.GroundingDinoForObjectDetection, hf.GroundingDinoProcessor)
        self.detector, self.reads = load_model(*kinds, detector, revision, "segmentation.detector")
        source, setting = settings.segmenter or DEFAULTS["sam2"], "segmentation.segmenter"
        kinds = (hf.Sam2Model, hf.Sam2Processor)
        self.segmenter, self.prepares = load_model(*kinds, source, settings.segmenter_revision, setting)
        self.models = {"detector": facts(detector, revision)}
        self.models |= {"segmenter": facts(source, settings.segmenter_revision)}
        self.batch_size = settings.batch_size

    def segment(
        self, images: Sequence[np.ndarray], phrases: Sequence[Sequence[str]], choose: Choice
    ) -> list[np.ndarray | Unfit]:
        """Masks (S, H, W) bool of the phrases in each image (H, W, 3), or why there are none."""
        found: list[np.ndarray | Unfit] = [Unfit()] * len(images)
        chosen: dict[int, np.ndarray] = {}
        for group in batches([image.shape for image in images], self.batch_size):  # of one size: nothing is padded
            boxes, scores = self.boxes([images[i] for i in group], [phrases[i] for i in group])
            for i, its_boxes, its_scores in zip(group, boxes, scores, strict=True):
                try:
                    chosen[i] = its_boxes[choose(its_boxes, its_scores)]
                except Unfit as reason:
                    found[i] = reason
        numbers = list(chosen)
        for group in batches([(images[i].shape, len(chosen[i])) for i in numbers], self.batch_size):
            group = [numbers[at] for at in group]
            for i, masks in zip(group, self.masks([images[i] for i in group], [chosen[i] for i in group]), strict=True):
                found[i] = masks
        return found

    @torch.no_grad()
    def boxes(self, images: Sequence[np.ndarray], phrases: Sequence[Sequence[str]]) -> tuple[list, list]:
        """Of images of one size: boxes (N, 4) in pixels, and the score (N, phrases) of each phrase in each.

        A phrase's score is the highest of its words', as the library counts; a full stop parts phrases from each other.
        """
        texts = [". ".join(" ".join(phrase.lower().replace(".", " ").split()) for phrase in said) for said in phrases]
        inputs = self.reads(images=list(images), text=[f"{text}." for text in texts], padding=True, return_tensors="pt")
        outputs = self.detector(**inputs.to(self.detector.device))
        centre, size = outputs.pred_boxes.float().chunk(2, -1)
        height, width = images[0].shape[:2]
        scale = centre.new_tensor([width, height, width, height])
        boxes = torch.cat([centre - size / 2, centre + size / 2], -1) * scale
        words = outputs.logits.float().sigmoid()
        stop = self.reads.tokenizer.convert_tokens_to_ids(".")
        scores = [
            torch.stack([word[:, first:last].amax(1) for first, last in _spans(ids.tolist(), stop)], 1)
            for word, ids in zip(words, inputs.input_ids, strict=True)
        ]
        return [each.cpu().numpy() for each in boxes], [each.cpu().numpy() for each in scores]

    @torch.no_grad()
    def masks(self, images: Sequence[np.ndarray], boxes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The masks (K, H, W) bool in the K boxes (K, 4) of each image."""
        asked = [[box.tolist() for box in its] for its in boxes]
        inputs = self.prepares(images=list(images), input_boxes=asked, return_tensors="pt").to(self.segmenter.device)
        sizes = inputs.pop("original_sizes")
        outputs = self.segmenter(**inputs, multimask_output=False)
        masks = self.prepares.post_process_masks(outputs.pred_masks.float().cpu(), sizes.cpu())
        return [each[:, 0].bool().numpy() for each in masks]


def _spans(ids: list[int], stop: int) -> list[tuple[int, int]]:
    """Where the words of each phrase stand among a text's tokens: from the one after [CLS] or a stop to the next."""
    stops = [at for at, token in enumerate(ids) if token == stop]
    return list(zip([1, *(at + 1 for at in stops[:-1])], stops, strict=True))


class Sam3:
    """SAM 3, which takes the phrase itself and gives every instance of it with its mask."""

    def __init__(self, settings: params.Segmentation):
        import transformers as hf

        source, setting = settings.segmenter or DEFAULTS["sam3"], "segmentation.segmenter"
        self.network, self.processor = load_model(
            hf.Sam3Model, hf.Sam3Processor, source, settings.segmenter_revision, setting
        )
        self.models = {"segmenter": facts(source, settings.segmenter_revision)}
        self.batch_size, self.threshold = settings.batch_size, settings.threshold

    def segment(
        self, images: Sequence[np.ndarray], phrases: Sequence[Sequence[str]], choose: Choice
    ) -> list[np.ndarray | Unfit]:
        """As `GroundedSam2.segment`; a phrase's instances speak for it alone."""
        asked = [(i, phrase) for i, said in enumerate(phrases) for phrase in said]
        instances = []
        for start in range(0, len(asked), self.batch_size):
            some = asked[start : start + self.batch_size]
            instances += self.instances([images[i] for i, _ in some], [phrase for _, phrase in some])
        found: list[np.ndarray | Unfit] = []
        for said in phrases:
            its, instances = instances[: len(said)], instances[len(said) :]
            boxes, masks = (np.concatenate([each[name] for each in its]) for name in ("boxes", "masks"))
            scores = np.zeros((len(boxes), len(said)), np.float32)
            start = 0
            for phrase, each in enumerate(its):
                scores[start : start + len(each["scores"]), phrase] = each["scores"]
                start += len(each["scores"])
            try:
                found.append(masks[choose(boxes, scores)].astype(bool))
            except Unfit as reason:
                found.append(reason)
        return found

    @torch.no_grad()
    def instances(self, images: Sequence[np.ndarray], phrases: Sequence[str]) -> list[dict[str, np.ndarray]]:
        """Of one phrase an image, its instances above the threshold: scores (N,), boxes (N, 4), masks (N, H, W)."""
        inputs = self.processor(images=list(images), text=list(phrases), return_tensors="pt").to(self.network.device)
        inputs.pop("original_sizes")
        sizes = [image.shape[:2] for image in images]
        outputs = self.network(**inputs)
        found = self.processor.post_process_instance_segmentation(outputs, threshold=self.threshold, target_sizes=sizes)
        return [{name: value.float().cpu().numpy() for name, value in each.items()} for each in found]


class ToyboxSegmenter:
    """The segmenter of the toybox's recipe, which knows the toybox's class words alone."""

    def __init__(self, settings: params.Segmentation):
        from diffusers import UNet2DModel

        source, setting = settings.segmenter or DEFAULTS["toybox"], "segmentation.segmenter"
        self.network = load_network(UNet2DModel, params.shipped("segmenter", source), None, setting)
        if not CONNECTED.items() <= dict(self.network.config).items():
            raise StageError(f"{source} is no segmenter of the toybox: correct {setting}")
        self.models = {"segmenter": facts(source, None)}
        self.batch_size = settings.batch_size

    def segment(
        self, images: Sequence[np.ndarray], phrases: Sequence[Sequence[str]], choose: Choice
    ) -> list[np.ndarray | Unfit]:
        """As `GroundedSam2.segment`; a class has one mask a picture, so there is nothing to choose."""
        found: list[np.ndarray | Unfit] = [self._unfit(*each) for each in zip(images, phrases, strict=True)]
        fit = [i for i, reason in enumerate(found) if reason is None]
        for group in batches([images[i].shape for i in fit], self.batch_size):
            some = [fit[at] for at in group]
            for i, maps in zip(some, segment(self.network, np.stack([images[i] for i in some])), strict=True):
                found[i] = maps[[CLASSES.index(word.lower()) for word in phrases[i]]]
        return found

    @staticmethod
    def _unfit(image: np.ndarray, words: Sequence[str]) -> Unfit | None:
        if any(word.lower() not in CLASSES for word in words):
            return Unfit("the toybox's segmenter does not know the word")
        if any(side % SIDES for side in image.shape[:2]):
            return Unfit(f"the toybox's segmenter takes sides of multiples of {SIDES} pixels")
        return None
