"""The encoders of the protocol: DINO (transformers) and CLIP (open_clip).

An encoder turns a list of images (PIL, or paths) into unit vectors (N, d) in fp32 on the CPU, and carries an `id` that
names its weights wherever they lie: results of encoders with the same id may stand in one table.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError
from torch.func import functional_call
from torch.nn import functional as F

from focusdpo_lib.evaluation.benchmark import open_image
from focusdpo_lib.params import Evaluation, shipped

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_OPEN_CLIP_PRECISION = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}

Picture = Image.Image | str | Path
ON_CPU = 16  # items of a forward at most: what a layer makes of more leaves the caches (of 64, 6 to 14 % slower)


# Whose first token is the class token, on its patches alone: DINO v1 (and the toybox's), DINOv2, DINOv3.
DINO_TYPES = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")
PUBLISHED = 224  # pixels, of which every published score is; short sides were scaled to 256 before
# Of the LayerNorms of the DINO v1 that published scores are of. The hub's copies say 1e-12, which is transformers'
# default and was never trained with. A normalised token changes by eps / (2 · its variance), relatively: scores of
# random weights (variances of 4e-4 at the input) by 1e-5 to 7e-5, those of trained ones, whose variances are larger,
# by less, so not in a table's third decimal.
PUBLISHED_EPS = 1e-6

# A damaged file may hold anything in any place, and its library may fail on that in any way.
LOADING_ERRORS = (OSError, ValueError, RuntimeError, LookupError, ArithmeticError, TypeError, AttributeError)
LOADING_ERRORS += (SafetensorError, StrictDataclassError)


class EncoderError(RuntimeError):
    """An encoder that cannot be loaded; the message says which, where and what to do."""


class AttributeReader(Protocol):
    """What sees attributes in an image, where a benchmark knows those of its subjects (the toybox's does)."""

    id: str
    size: int  # of the sides of the images that it reads, in pixels

    def __call__(self, pixels: torch.Tensor) -> list[list[dict]]:
        """Pixels (B, 3, H, W) in [-1, 1] → the attributes of every subject found, image by image."""

    def scores(self, found: list[dict], expected: dict[str, dict]) -> list[tuple[str, str, float, float]]:
        """What was found against the true attributes by subject: (metric, subject, value, weight)."""


class Finder(Protocol):
    """What finds subjects in an image by their class words (`detector.Detector`)."""

    id: str

    def boxes(self, image: Image.Image, words: Sequence[str]) -> list[tuple[float, float, float, float] | None]:
        """A box (left, top, right, bottom) a word, or None of what is not found."""


@dataclass(frozen=True)
class Encoders:
    """What a benchmark is scored with."""

    dino: "DinoEncoder"
    clip: "ClipEncoder"
    reader: AttributeReader | None = None
    finder: Finder | None = None  # where subjects are compared as they are found in an image, and not the whole of it

    @property
    def ids(self) -> dict[str, str | None]:
        found = {"dino": self.dino.id, "clip": self.clip.id, "reader": self.reader and self.reader.id}
        return found | ({"detector": self.finder.id} if self.finder else {})


def load_encoders(settings: Evaluation, device: str = "cpu", reader: AttributeReader | None = None) -> Encoders:
    """The encoders that `settings` name, with the `reader` that is handed in. Raises EncoderError."""
    dino = DinoEncoder(shipped("dino", settings.dino), device, settings.batch_size, settings.dino_revision)
    of_clip = settings.batch_size, settings.clip_precision, settings.clip_revision
    clip = ClipEncoder(shipped("clip", settings.clip), device, *of_clip)
    if settings.region == "image":
        return Encoders(dino, clip, reader)
    from focusdpo_lib.evaluation.detector import Detector

    of_finder = settings.detector, settings.detector_revision, device, settings.detector_threshold
    return Encoders(dino, clip, reader, Detector(*of_finder))


def preprocess(image: Image.Image, resize: int, crop: int, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Short side to `resize` (bicubic, anti-aliased), centre `crop`, normalised: an RGB image → (3, crop, crop).

    Written out because the libraries' own processors differ between versions, and none is the published 256 → 224.
    """
    width, height = image.size
    short = min(width, height)
    if short != resize:
        width, height = int(resize * width / short), int(resize * height / short)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - crop) / 2), round((height - crop) / 2)
    pixels = np.asarray(image.crop((left, top, left + crop, top + crop)), np.float32) / 255
    normalised = (pixels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return torch.from_numpy(normalised).permute(2, 0, 1)


class DinoEncoder:
    """The CLS token of a transformers ViT (DINO v1 as published, DINOv2, DINOv3, the toybox's): a folder or hub id.

    A `vit` of the published size is taken for DINO v1 and gets its eps; a smaller one (the toybox's) keeps the eps that
    it was trained with.
    """

    kind = "dino"

    def __init__(self, model: str, device: str = "cpu", batch_size: int = 64, revision: str | None = None):
        from transformers import AutoConfig, AutoModel  # seconds, as open_clip below

        try:
            with quietly():
                config = AutoConfig.from_pretrained(model, revision=revision)
                if (kind := config.model_type) not in DINO_TYPES:
                    raise ValueError(f"it is a {kind}, and a DINO score needs one of {', '.join(DINO_TYPES)}")
                if first := kind == "vit" and config.image_size in (PUBLISHED, [PUBLISHED] * 2, (PUBLISHED,) * 2):
                    config.layer_norm_eps = PUBLISHED_EPS
                how = {"config": config, "revision": revision, "output_loading_info": True}
                loaded, report = AutoModel.from_pretrained(model, **how, ignore_mismatched_sizes=True)
            require_whole(report)
            size, self.patch = _sides(loaded.config)
        except LOADING_ERRORS as error:
            raise EncoderError(cannot_load("dino", model, error)) from None
        self.model = loaded.eval().to(device)
        self.id = identity(model, revision or getattr(config, "_commit_hash", None))
        self.id += f" eps {PUBLISHED_EPS:g}" if first else ""
        self.device, self.batch_size = device, min(batch_size, ON_CPU) if device == "cpu" else batch_size
        # Published: 256 → 224, also for DINOv2. A model that is smaller (the toybox's) sees the whole image instead.
        self.resize, self.crop = (256, PUBLISHED) if size >= PUBLISHED else (size, size)

    def images(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """N images → unit vectors (N, d)."""
        return _of_pictures(self, pictures)

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """An RGB image → (3, H, W), as the model takes it."""
        return preprocess(image, self.resize, self.crop, IMAGENET_MEAN, IMAGENET_STD)

    @torch.inference_mode()
    def vectors(self, pixels: torch.Tensor) -> torch.Tensor:
        """N prepared images (N, 3, H, W) → vectors (N, d), not yet of unit length."""
        return self.model(pixel_values=pixels.to(self.device)).last_hidden_state[:, 0].float().cpu()

    @torch.inference_mode()
    def patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) in [-1, 1], scaled to the model's input → its patch tokens (B, P, d), row-major."""
        pixels = F.interpolate(pixels, (self.crop, self.crop), mode="bicubic", antialias=True)
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
        normalised = ((pixels + 1) / 2 - mean) / std
        tokens = self.model(pixel_values=normalised.to(self.device)).last_hidden_state
        return tokens[:, -((self.crop // self.patch) ** 2) :].float().cpu()


class ClipEncoder:
    """An open_clip model from "<name>/<pretrained tag>", "hf-hub:<id>" or a folder in open_clip's local-dir layout.

    With a `revision`, the commit of its hub repository, whose files are then read as such a folder.
    """

    kind = "clip"

    def __init__(
        self,
        model: str,
        device: str = "cpu",
        batch_size: int = 64,
        precision: str = "float32",
        revision: str | None = None,
    ):
        import open_clip

        name, tag = _open_clip_name(model)
        precision = _OPEN_CLIP_PRECISION[precision]
        try:
            source = (name, tag) if revision is None else (f"local-dir:{_snapshot(model, revision)}", None)
            clip = open_clip.create_model(*source, precision=precision, device=device, require_pretrained=True)
            self.model = clip.eval()
            self.tokenizer = open_clip.get_tokenizer(source[0] if tag is None else name)
            if torch.equal(*self.tokenizer(["dog", "mug"])):  # where its file is missing, every word is unknown
                raise ValueError("its tokenizer has no vocabulary")
        except LOADING_ERRORS as error:
            raise EncoderError(cannot_load("clip", model, error)) from None
        self.id, self.device = f"{identity(model, revision)} {precision}", device
        self.batch_size = min(batch_size, ON_CPU) if device == "cpu" else batch_size
        self.dtype = open_clip.get_input_dtype(precision) or torch.float32
        configuration = open_clip.transform.PreprocessCfg(**self.model.visual.preprocess_cfg)
        self.preprocess = open_clip.transform.image_transform_v2(configuration, is_train=False)

    def images(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """N images → unit vectors (N, d)."""
        return _of_pictures(self, pictures)

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """An RGB image → (3, H, W), as the model takes it."""
        return self.preprocess(image)

    @torch.inference_mode()
    def vectors(self, pixels: torch.Tensor) -> torch.Tensor:
        """N prepared images (N, 3, H, W) → vectors (N, d), not yet of unit length."""
        return self.model.encode_image(pixels.to(self.device, self.dtype)).float().cpu()

    @torch.inference_mode()
    def texts(self, prompts: Sequence[str]) -> torch.Tensor:
        """N prompts → unit vectors (N, d)."""
        prompts, size = list(prompts), self.batch_size
        batches = [self.tokenizer(prompts[i : i + size]).to(self.device) for i in range(0, len(prompts), size)]
        return unit("clip", torch.cat([self._of_tokens(batch).float().cpu() for batch in batches]), prompts)

    def _of_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """By OpenAI's design no token sees those behind it: what follows the last prompt's end need not be computed."""
        model = self.model
        causal = getattr(model, "attn_mask", None) is not None and getattr(model, "text_pool_type", None) == "argmax"
        if not causal or model.output_dict or self.dtype != torch.float32:
            return model.encode_text(tokens)
        length = int(tokens.argmax(-1).max()) + 1
        first = {"positional_embedding": model.positional_embedding[:length]}
        first["attn_mask"] = model.attn_mask[:length, :length]
        return functional_call(model, first, (None, tokens[:, :length]))[1]

    def cut(self, prompts: Sequence[str]) -> str | None:
        """How many prompts are longer than the model reads, in words; None where it reads them all."""
        length = self.tokenizer.context_length
        tokens = self.tokenizer([*prompts, ""], context_length=4 * length)
        longer = int((tokens[:-1, length:] != tokens[-1, -1]).any(1).sum())  # past it an empty prompt is all padding
        return f"{longer} of {len(prompts)}, after {length} tokens" if longer else None


def to_pixels(pictures: Sequence[Picture]) -> torch.Tensor:
    """N images of one size → (N, 3, H, W) in [-1, 1], as the toybox's models take them."""
    arrays = [np.asarray(open_image(p)) for p in pictures]
    if len(sizes := {array.shape[:2] for array in arrays}) > 1:
        raise ValueError(f"the images have several sizes (height, width) {sorted(sizes)}: make them all of one size")
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


@contextmanager
def quietly():
    """Without transformers' progress bar and report of missing keys: the caller looks at the report itself."""
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def ahead(batches: Iterable[Sequence], make: Callable, device: str = "cpu") -> Iterator[list]:
    """Of every batch what `make` makes of its items, which threads do while the batch before is in use.

    On a CPU it is one: decoding is little beside a model's forward there, and the cores are that one's.
    """
    pool = ThreadPoolExecutor(1 if device == "cpu" else torch.get_num_threads())
    try:
        coming: list = []
        for batch in batches:
            made, coming = coming, [pool.submit(make, item) for item in batch]
            if made:
                yield [each.result() for each in made]
        if coming:
            yield [each.result() for each in coming]
    finally:
        pool.shutdown(cancel_futures=True)


def _of_pictures(encoder: DinoEncoder | ClipEncoder, pictures: Sequence[Picture]) -> torch.Tensor:
    pictures, size = list(pictures), encoder.batch_size
    batches = [pictures[i : i + size] for i in range(0, len(pictures), size)]
    prepared = ahead(batches, lambda picture: encoder.prepare(open_image(picture)), encoder.device)
    return unit(encoder.kind, torch.cat([encoder.vectors(torch.stack(pixels)) for pixels in prepared]), pictures)


def unit(kind: str, vectors: torch.Tensor, items: Sequence) -> torch.Tensor:
    """The vectors (N, d) of N items at unit length. Raises EncoderError where one is no number: every cosine with it
    would be NaN."""
    if bad := (~vectors.isfinite().all(-1)).nonzero().flatten().tolist():
        item = items[bad[0]]
        which = f"image {bad[0] + 1} of {len(items)}" if isinstance(item, Image.Image) else f"'{item}'"
        raise EncoderError(
            f"evaluation.{kind} makes NaN or infinity of {which}: its weights hold some or overflow in 16 bits; "
            "fetch it again, or compute in float32"
        )
    return F.normalize(vectors, dim=-1)


def require_whole(report: dict) -> None:
    """Raises ValueError where weights are missing, have another shape, or are of layers that the model has not.

    Many ViTs are published without a pooler; the score is of the CLS token and never uses it, nor a classifier.
    """
    if missing := sorted(key for key in report["missing_keys"] if not key.startswith("pooler.")):
        raise ValueError(f"its weights lack {', '.join(missing[:3])}")
    if misshapen := sorted(report["mismatched_keys"], key=str):
        key, found, needed = misshapen[0]
        raise ValueError(f"its {key} has the shape {tuple(found)} where its config.json needs {tuple(needed)}")
    if spare := sorted(key for key in report["unexpected_keys"] if re.search(r"\blayers?\.\d+\.", key)):
        raise ValueError(f"its config.json has no place for {spare[0]} of its weights")


def _sides(config) -> tuple[int, int]:
    """The sides in pixels of a ViT's images and patches. Raises ValueError for one that cannot see the protocol's."""
    size, patch = (
        side[0] if isinstance(side, list | tuple) and len(set(side)) == 1 else side
        for side in (config.image_size, config.patch_size)
    )
    if not (isinstance(size, int) and isinstance(patch, int)):
        raise ValueError(f"it sees images of {size} pixels in patches of {patch}, and the protocol's are square")
    if config.num_channels != 3:
        raise ValueError(f"it sees {config.num_channels} colour channels, and images have 3")
    if config.model_type == "vit" and size > PUBLISHED:  # the others interpolate their positions
        raise ValueError(f"it sees images of {size} pixels alone, and scores are of {PUBLISHED}")
    return size, patch


def _open_clip_name(model: str) -> tuple[str, str | None]:
    if Path(model).is_dir():
        return f"local-dir:{model}", None
    if model.startswith("hf-hub:") or "/" not in model:
        return model, None
    name, tag = model.rsplit("/", 1)
    return name, tag


def clip_repository(model: str) -> str | None:
    """The hub repository that open_clip reads a model from ("hf-hub:<id>", "<name>/<tag>"), if any."""
    name, tag = _open_clip_name(model)
    if tag is None:
        return name.removeprefix("hf-hub:") if name.startswith("hf-hub:") else None
    import open_clip

    return (open_clip.get_pretrained_cfg(name, tag) or {}).get("hf_hub", "").rpartition("/")[0] or None


def _snapshot(model: str, revision: str) -> str:
    """The folder of a commit's files, fetched where they are not here."""
    if (repository := clip_repository(model)) is None:
        raise ValueError("it is no model of a hub, which alone has revisions: set clip_revision to null")
    files = ["open_clip_config.json", "open_clip_*.safetensors", "*token*.json", "vocab.json", "merges.txt"]
    return snapshot_download(repository, revision=revision, allow_patterns=files)


def identity(model: str, revision: str | None = None) -> str:
    """A hub id or tag with its commit, where that is known; a folder by the content of its files, wherever it lies."""
    folder = Path(model)
    if not folder.is_dir():
        return f"{model}@{revision[:12]}" if revision else model
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors", ".bin")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return f"{folder.name}@{digest.hexdigest()[:12]}"


def cannot_load(kind: str, model: str, error: Exception | str) -> str:
    """One sentence for an encoder that `evaluation.<kind>` names."""
    reason = (str(error).strip() or type(error).__name__).split("\n")[0][:300]
    return (
        f"evaluation.{kind} = '{model}' cannot be loaded ({reason}): "
        "name a folder with its weights, or a model that this machine can download"
    )
