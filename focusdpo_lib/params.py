"""Every setting of the kit, typed, in one place.

A notebook run reads one YAML file of `params/<profile>/`; its top-level keys are the variables of the notebook's
`parameters` cell. A key that is a section below (`masks`, `training`, …) is checked here: an unknown key, a wrong
type or a value out of range is an error that names the key. The defaults are the toybox profile's. METHOD's reading
of each open point of the paper (R1 … R21) is named beside its switch.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from focusdpo_lib import strict_yaml


def _says_something(text: str) -> str:
    if not text.strip():
        raise ValueError("it is empty: give a name, or leave the setting out")
    return text


Name = Annotated[str, AfterValidator(_says_something)]
Place = Annotated[Name, AfterValidator(os.path.expanduser)]  # a path, whose ~ is the user's folder, or a name instead
DREAMBENCH_DIR = "DREAMBENCH_DIR"  # of the environment: a copy of DreamBench, in place of any folder of that name
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(ge=0, le=1)]
Pixels = Annotated[int, Field(gt=0)]
SHIPPED = Path(__file__).parent / "toybox" / "weights"  # what a setting calls "toybox"


class ParameterError(ValueError):
    """A parameter that is unknown, mistyped or out of range; the message says which, where and what to do."""


def run_name(name: str) -> str:
    """The name of a run, which is one folder of its stage. Raises ParameterError where it would be another, or none."""
    if not name.strip() or name.startswith(".") or "/" in name or not name.isprintable() or len(name.encode()) > 200:
        raise ParameterError(
            f"{name[:40]!r} names no folder of a run: give a name of up to 200 letters, without slashes or line "
            "breaks, that does not begin with a dot"
        )
    return name


def distinct(values: list) -> list:
    """A list each of whose values stands once: what stands twice would count twice."""
    if len(set(values)) < len(values):
        raise ValueError(f"{next(v for i, v in enumerate(values) if v in values[:i])!r} stands twice: name each once")
    return values


RunName = Annotated[str, AfterValidator(run_name)]
Layer = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """Strict types (no number from text), no unknown keys, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


FAMILY_SETTINGS = {
    "flux_uno": ("subject_lora", "subject_revision", "position_mode", "sampling_shift"),
    "sdxl_ip": (
        *("ip_adapter", "ip_revision", "ip_weights", "ip_encoder", "ip_scale"),
        *("image_tokens", "negative_prompt"),
    ),
}


class Backbone(Section):
    family: Literal["flux_uno", "sdxl_ip"] = "flux_uno"
    model: Place = "toybox"  # a pipeline folder or hub id; "toybox" is the model shipped with the package
    revision: str | None = None
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of arithmetic; auto: as `weights`, or
    # bfloat16 wherever the device computes in it
    weights: Literal["float32", "bfloat16", "float16", "int8", "nf4"] = "float32"  # how the frozen base is held

    # flux_uno alone
    subject_lora: Place | None = None  # UNO's released LoRA file or hub id: part of the base, never switched off
    subject_revision: str | None = None
    position_mode: Literal["d", "h", "w", "o"] = "d"  # UNO's offset of the reference position ids
    sampling_shift: Literal["uno", "library"] = "uno"  # the token count that shifts a sampling run's times

    # sdxl_ip alone
    ip_adapter: Place | None = None  # folder or hub id of weights and image encoder; none: the model's own `ip_adapter`
    ip_revision: str | None = None
    ip_weights: str = "sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors"  # in it
    ip_encoder: str = "models/image_encoder"  # in it
    ip_scale: float = Field(1.0, gt=0)  # PatchDPO's protocol: 0.78 with all references, 0.65 with one
    image_tokens: Literal["concatenate", "average", "masks"] = "concatenate"  # of several references
    negative_prompt: str = ""  # of guided sampling

    @model_validator(mode="after")
    def _of_this_family(self):
        for family, names in FAMILY_SETTINGS.items():
            for name in names if family != self.family else ():
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} is a setting of {family} and means nothing to {self.family}: remove it")
        return self

    @model_validator(mode="after")
    def _computable(self):
        if self.precision == "float32" and self.weights != "float32":
            raise ValueError(f"weights in {self.weights} cannot compute in float32: leave precision at auto")
        return self


class Dip(Section):
    folder: Place | None = (
        None  # pairs made elsewhere, in the kit's format: nothing is built, and the rest says nothing
    )
    tolerance: int = Field(0, ge=0, le=255)  # of those: grey levels by which win and lose may differ outside the masks,
    # where the dataset itself does not say more
    train_pairs: int = Field(1600, gt=0)
    validation_pairs: int = Field(160, gt=0)
    two_subject_share: float = Field(0.5, ge=0, le=1)
    strengths: list[Annotated[int, Field(ge=1, le=4)]] = Field([1, 2, 3], min_length=1)  # attributes changed of a
    # disturbed subject, drawn uniformly
    swap_share: float = Field(0.3, ge=0, le=1)  # of two-subject pairs: attributes swapped between the subjects
    seed: Seed = 0


class MaskError(Section):
    """What a segmenter would have done to the toybox's masks; see `dip.mask_errors`."""

    kind: Literal["exact", "eroded", "dilated", "shifted", "wrong"] = "exact"
    amount: float = Field(0.0, ge=0)  # pixels of the picture; of wrong the share of masks
    background: Literal["redrawn", "kept"] = "redrawn"  # what losers show where the mask lies off its subject

    @model_validator(mode="after")
    def _of_this_kind(self):
        if (self.kind == "exact") != (self.amount == 0):
            raise ValueError("an error has an amount above 0, and exact masks have none: correct kind or amount")
        if self.kind == "wrong" and self.amount > 1:
            raise ValueError("the amount of wrong is a share of the masks: give at most 1")
        return self

    @property
    def name(self) -> str:
        return "exact" if self.kind == "exact" else f"{self.kind}-{self.amount:g}"


class Chain(Section):
    """Who makes each stage of Figure 4, and how the chain runs, on which nothing depends that comes out."""

    synthesis: Literal["toybox", "source", "models"] = "toybox"  # source: pairs of reference and winner that are there
    # already; models: drawn by FLUX and UNO (the sections synthesis and backbone)
    segmentation: Literal["toybox", "models"] = "toybox"  # models: by the section of that name; so are …
    captioning: Literal["toybox", "models"] = "toybox"
    disruption: Literal["toybox", "models"] = "toybox"
    part_size: int = Field(64, gt=0)  # drafts a file: held in memory together, and lost by a process that is killed

    @model_validator(mode="after")
    def _of_one_world(self):
        drawn = [name for name in ("segmentation", "captioning", "disruption") if getattr(self, name) == "toybox"]
        if self.synthesis != "toybox" and drawn:
            raise ValueError(f"{drawn[0]} by the toybox knows the toybox's own pairs alone: set it to models")
        return self


class Scoring(Section):
    """What drafts are scored with; see `dip.scoring` for what each score is."""

    dino: Place = "toybox"  # as of Evaluation: what likeness is measured with
    clip: Place = "toybox"  # and the agreement of captions
    dino_revision: str | None = None  # as of Evaluation
    clip_revision: str | None = None
    batch_size: int = Field(64, gt=0)  # pictures an encoder takes at once


class Curation(Section):
    """Which drafts become pairs, by their scores. A limit that is none is not looked at."""

    similarity: float | None = Field(None, ge=-1, le=1)  # at least
    drop: float | None = Field(None, ge=-2, le=2)  # at least, of the subject that changed most
    least_drop: float | None = Field(None, ge=-2, le=2)  # at least, of each subject: where all of them are repainted
    context: float | None = Field(None, ge=-1, le=1)  # at least
    outside: int | None = Field(0, ge=0, le=255)  # grey levels, at most
    smallest: float | None = Field(None, ge=0, le=1)  # share of the image, at least
    covered: float | None = Field(None, ge=0, le=1)  # share of the image, at most
    caption: float | None = Field(None, ge=-1, le=1)  # at least
    duplicate: float = Field(0.98, ge=-1, le=1)  # a pair as like an earlier one, by the encoder …
    duplicate_bits: int = Field(3, ge=0, le=64)  # … and with as few other bits of 64 in its perceptual hash is left out
    review: Literal["ignore", "rejected", "accepted"] = "ignore"  # of reviewers' verdicts: none counts; what they
    # rejected is left out; only what they accepted stays, as in the paper


class Masks(Section):
    similarity: Literal["cosine", "printed"] = "cosine"  # R1
    layers: Literal["double", "all"] | Annotated[list[Layer], Field(min_length=1), AfterValidator(distinct)] = (
        "double"  # R2
    )
    features: Literal["block_output", "query", "query_key"] = "block_output"  # R3
    pool: Literal["subject", "all"] = "subject"  # R20; all needs no reference_masks
    reference_tokens: Literal["own", "image_keys"] = "own"  # R7, of a U-Net: own are those that it has of a reference
    network: Literal["reference", "policy"] = "reference"  # R4
    multi_subject: Literal["per_subject", "union"] = "per_subject"  # R6
    entropy_window: int | None = Field(None, ge=1, le=511)  # R8: pixels, odd; none: 2 · (VAE stride) + 1
    entropy_bins: int = Field(256, ge=2, le=256)  # R8
    entropy_kernel: Literal["box", "gaussian"] = "box"  # R21
    tau: float = Field(0.1, ge=0, le=1)  # R10
    gamma: float = Field(0.3, ge=0, le=1)  # R10

    @model_validator(mode="after")
    def _odd(self):
        if self.entropy_window is not None and self.entropy_window % 2 == 0:
            raise ValueError("entropy_window must be odd, so that the window has a centre pixel")
        return self

    @model_validator(mode="after")
    def _image_keys_have_no_place(self):
        if self.reference_tokens == "image_keys" and (self.pool, self.features) != ("all", "query_key"):
            raise ValueError(
                "reference_tokens image_keys are keys of image tokens, which lie nowhere in it: set pool to all "
                "and features to query_key, or reference_tokens to own"
            )
        return self


class Objective(Section):
    name: Literal["sft", "dpo", "patchdpo", "focusdpo"] = "focusdpo"
    beta: float = Field(2000.0, gt=0)  # R13: β T ω folded into one constant
    mask_power: Literal[1, 2] = 2  # R11
    reduction: Literal["mean", "sum", "masked_mean"] = "mean"  # R13
    flow_weight: Literal["velocity", "epsilon"] = "velocity"  # R14
    patch_encoder: Place = "toybox"  # PatchDPO: the vision encoder (a DINO model) whose patches rate quality


class Lora(Section):
    rank: int = Field(32, gt=0)  # R17
    alpha: float | None = Field(None, gt=0)  # none: equal to the rank
    targets: Annotated[list[Name], Field(min_length=1), AfterValidator(distinct)] | None = (
        None  # none: the backbone's own list
    )


class Training(Section):
    steps: int = Field(300, gt=0)
    batch_size: int = Field(12, gt=0)  # pairs a process and step
    gradient_accumulation: int = Field(1, gt=0)
    learning_rate: float = Field(1e-4, gt=0)  # R16
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(10, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    timesteps: Literal["uniform", "uno_shift", "logit_normal"] = "uniform"  # R15
    checkpoint_every: int = Field(50, gt=0)
    gradient_checkpointing: bool = False  # slower, and most of the activations' memory less
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"  # 8 bits: state in a quarter of the memory (bitsandbytes)
    compile: bool = False  # torch.compile of the repeated blocks: minutes at the start, kept for later runs
    processes: int | None = Field(None, gt=0)  # none: in this process; else as many, by `accelerate launch`
    seed: Seed = 0
    lora: Lora = Lora()


class Launch(Section):
    """Where the processes of a training run; it changes nothing that they compute."""

    machines: int = Field(1, gt=0)  # with a shared file system; focusdpo_lib.training.launch starts the others
    main_address: str | None = None  # of the first machine
    main_port: int = Field(0, ge=0)  # 0: any free one, on one machine


class Workers(Section):
    """The processes of the heavy stages (preparing pairs, sampling, encoding images); they change nothing that comes
    out, given as many threads (OMP_NUM_THREADS) to each."""

    processes: int = Field(1, gt=0)  # on GPUs one a process


class Resources(Section):
    """What one notebook run asks an engine for, all on one machine; the notebook itself is not given it."""

    gpus: int = Field(0, ge=0)
    cpus: int = Field(1, gt=0)
    memory: float | None = Field(None, gt=0)  # GB of main memory; none: it is not counted


class Slurm(Section):
    """Where a cluster's runs go, as its users know it; one for all runs of a profile."""

    partition: str | None = None
    account: str | None = None
    constraint: str | None = None
    minutes: int = Field(24 * 60, gt=0)  # that a run may take
    setup: list[str] = []  # lines before it: modules, an environment


class Splits(Section):
    """Shares of identities; none is in two splits."""

    train: Share = 0.9
    validation: Share = 0.05
    test: Share = 0.05


class Subjects200K(Section):
    collections: list[Literal["collection_1", "collection_2", "collection_3"]] = ["collection_2"]
    quality: int = Field(5, ge=0, le=5)  # that each of a row's three must have; its authors take 5
    padding: int = Field(16, ge=0)  # pixels to the left of each panel and above them
    reference: Literal["plainer", "first", "second"] = "plainer"  # the panel that is the reference: that with the
    # plainer edge, or always the same


class Uno1M(Section):
    score: float = Field(3.5, ge=0, le=4)  # at least; its authors advise 3.5, and trained on 4


class Source(Section):
    """Pairs of reference and winner that are there already, in DIP's first stage; layouts in docs/inputs.md."""

    kind: Literal["photos", "subjects200k", "uno_1m"] = "photos"
    folder: Place = "data/photos"
    size: int = Field(512, ge=16)  # pixels: side of winners and references
    limit: int | None = Field(None, gt=0)  # the first so many rows that pass; none: all
    splits: Splits = Splits()
    subjects200k: Subjects200K = Subjects200K()
    uno_1m: Uno1M = Uno1M()
    seed: Seed = 0  # of the splits


class Synthesis(Section):
    """Pairs of reference and winner drawn by FLUX and UNO, in DIP's first stage."""

    lists: Place = "../params/paper/dip/subjects.yaml"  # of subjects and scenes
    single: int = Field(5000, ge=0)  # drafts with one subject …
    double: int = Field(5000, ge=0)  # … and with two
    size: int = Field(512, ge=16)  # pixels, height and width of winners and references
    gutter: int = Field(16, ge=0)  # pixels cut away on either side of a diptych's middle
    steps: int = Field(28, gt=0)
    guidance: float = Field(3.5, ge=0)
    redraw_steps: int = Field(25, gt=0)  # of a reference that UNO draws from a crop
    redraw_guidance: float = Field(4.0, ge=0)
    margin: Share = 0.1  # about a subject's box in that crop
    tolerance: int = Field(30, ge=0, le=255)  # levels below white that a reference's ground may be …
    plain: Share = 0.7  # … along this share of its edge
    batch_size: int = Field(4, gt=0)
    splits: Splits = Splits()
    seed: Seed = 0


class Disruption(Section):
    """DIP's losers; see `dip/disruption.py`."""

    painter: Literal["flux_fill", "sdxl"] = "flux_fill"
    model: Place | None = (
        None  # folder or hub id; none: black-forest-labs/FLUX.1-Fill-dev (gated), or SDXL's inpainting
    )
    revision: str | None = None
    weights: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    strengths: list[Annotated[int, Field(ge=1, le=8)]] = Field([1, 2, 3], min_length=1)  # details changed of a
    # subject, drawn uniformly …
    denoising: list[Annotated[float, Field(gt=0, le=1)]] = Field([0.85, 0.95, 1.0], min_length=1)  # … and how far back
    # to noise it goes for 1, 2, … of them (the last for more)
    swap_share: Share = 0.3  # of pairs with several subjects: two exchange captions
    single_share: Share = 0.0  # of the others with several: one subject alone is repainted; 0 as the figure
    feather: int = Field(4, ge=0)  # pixels within the mask over which the repainted fades in
    steps: int = Field(30, gt=0)
    guidance: float = Field(30.0, ge=0)  # distilled in FLUX.1-Fill; SDXL wants about 7.5
    batch_size: int = Field(4, gt=0)
    seed: Seed = 0


class Captioning(Section):
    """Who describes subjects (see `dip/captioning.py`), and what that may cost."""

    by: Literal["server", "local"] = "server"  # a server that speaks OpenAI's protocol, or a model on this machine
    model: Place = "gpt-4o"  # as the server calls it; local: a folder or hub id (Qwen/Qwen3-VL-8B-Instruct)
    revision: str | None = None  # of a local model
    base_url: str | None = (
        None  # of a compatible server; none: OpenAI's. The key is in OPENAI_API_KEY, and nowhere else
    )
    side: int = Field(512, ge=16)  # pixels: longer side of a subject as it is shown
    details: int = Field(3, ge=1, le=8)  # that are asked for, each with another in its stead
    max_tokens: int = Field(400, gt=0)  # of an answer
    seed: Seed = 0
    parallel: int = Field(8, gt=0)  # questions asked at once
    timeout: float = Field(60.0, gt=0)  # seconds of silence after which an answer counts as lost …
    longest_answer: float = Field(300.0, gt=0)  # … or of an answer in all, however it trickles in
    retries: int = Field(6, ge=0)  # after 429, 5xx, lost answers and cut connections
    first_wait: float = Field(1.0, gt=0)  # seconds before the first of them, doubled each time …
    longest_wait: float = Field(120.0, gt=0)  # … up to this; a server that asks for more ends the run
    price_read: float = Field(2.5, ge=0)  # dollars a million tokens
    price_written: float = Field(10.0, ge=0)
    image_tokens: int = Field(1100, ge=0)  # that a picture counts at most, for the budget
    budget: float | None = Field(50.0, ge=0)  # dollars of all runs that share the answers; none: no limit

    @model_validator(mode="after")
    def _of_one_kind(self):
        if self.by == "local" and self.base_url is not None:
            raise ValueError("base_url is the address of a server: remove it, or set by to server")
        if self.base_url is not None and ("@" in self.base_url or "key=" in self.base_url):
            raise ValueError("base_url holds a secret, which would stand in every record: leave it out")
        return self

    @property
    def deciding(self) -> "Captioning":
        """What answers depend on, the rest at its default: a budget may be raised, and a server move, in mid-run."""
        names = ("by", "model", "revision", "side", "details", "max_tokens", "seed")
        return Captioning(**self.model_dump(include=set(names)))


MaskSource = Literal["sam2", "sam3", "files", "background", "toybox"]


class Segmentation(Section):
    """DIP's masks; the rules are those of `dip/segmentation.py`."""

    masks: MaskSource = "sam2"  # of the winner: boxes by Grounding DINO and masks by SAM 2, SAM 3, the source's own
    # files, one subject on a plain background by colour, or the toybox's trained segmenter
    reference_masks: MaskSource = "background"  # of the references, which lie on white
    detector: Place = "IDEA-Research/grounding-dino-base"  # with sam2: a folder or hub id
    detector_revision: str | None = None
    segmenter: Place | None = None  # none: facebook/sam2.1-hiera-large, facebook/sam3 (gated) or toybox
    segmenter_revision: str | None = None
    batch_size: int = Field(8, gt=0)  # pictures a model takes at once
    threshold: Share = 0.35  # score of a detection that counts
    same: Share = 0.7  # overlap from which on two boxes show one thing
    rival: Share = 0.8  # of the best score: another thing that scores so high makes the subject ambiguous
    tolerance: int = Field(12, ge=0, le=255)  # background: levels of 255 by which it may vary
    plain: Share = 0.8  # background: share of the picture's edge that must be of its colour
    holes: Share = 0.05  # of the mask: smaller ones are filled …
    specks: Share = 0.05  # … and smaller pieces beside it removed
    overlap: Share = 0.5  # of the smaller mask: more in common makes two subjects one
    least: Share = 0.01  # of the picture that a mask covers
    most: Share = 0.9


class Generation(Section):
    references: Literal["listed", "all"] = "listed"  # what goes in: the photo that the case list names, or all of the
    # subject's, as PatchDPO measured (one subject only)
    size: int = Field(64, gt=0)  # pixels, height and width
    reference_size: int = Field(32, ge=8)  # of flux_uno: long side of a reference, in pixels, when there is one …
    references_size: int = Field(32, ge=8)  # … and when there are several (an IP-Adapter's image encoder has its own)
    resampling: Literal["box", "bicubic", "lanczos"] = "box"  # of references
    steps: int = Field(20, gt=0)
    guidance: float = Field(
        3.0, ge=0
    )  # 1 is none; flux_uno: an input of the model; sdxl_ip: classifier-free, two passes
    images_per_prompt: int = Field(1, gt=0)
    batch_size: int = Field(32, gt=0)
    seed: Seed = 3407
    prompts: int | None = Field(None, gt=0)  # the first so many prompts of every subject; none: all


class Photos(Section):
    """How a benchmark's photos are prepared before a model sees them; scores are against the photos as they are."""

    cut: Literal["raw", "box", "cutout"] = "raw"  # box: on a white square, what lies in the box that the detector of
    # `segmentation` finds for the class word; cutout: what the masks by `segmentation.masks` keep
    segmentation: Segmentation = Segmentation()
    masks: Place | None = None  # where segmentation.masks is files: a folder of <subject>/<name of the photo>.png

    @model_validator(mode="after")
    def _files_where_they_are_read(self):
        if (self.cut == "cutout" and self.segmentation.masks == "files") != (self.masks is not None):
            raise ValueError(
                "masks is the folder of cut: cutout with segmentation.masks: files: give all three, or no masks"
            )
        return self


# What the name of a protocol sets of Evaluation's switches; evaluation/protocols.py says where each is from.
_WHOLE = {"references": "all", "subjects": "mean", "average": "subject", "clip_precision": "float32"}
_WHOLE |= {"region": "image", "clip_prompt": "class"}
PROTOCOLS: dict[str, dict[str, Any]] = {
    "uno": {**_WHOLE, "clip_text_weight": 1.0, "clip_text_clamp": True},
    "patchdpo": {**_WHOLE, "clip_text_weight": 1.0, "clip_text_clamp": False},
    "mip_adapter": {**_WHOLE, "clip_text_weight": 2.5, "clip_text_clamp": True},
    "strict": {**_WHOLE, "references": "unused", "subjects": "both", "clip_text_weight": 1.0, "clip_text_clamp": True},
}
CUSTOM = "custom"  # the protocol's name where every switch is one's own


class Evaluation(Section):
    protocol: Literal["custom", "uno", "patchdpo", "mip_adapter", "strict"] = CUSTOM  # a name sets the switches of
    # PROTOCOLS, and one given beside it must agree; custom: each switch as it is given
    references: Literal["all", "used", "unused"] = "all"  # photos a generated image is scored against
    subjects: Literal["both", "mean", "min"] = "both"  # several subjects: their mean, their minimum, or two columns
    average: Literal["subject", "image"] = "subject"  # per subject (or pair) then mean, or over all images
    dino: Place = "toybox"  # a folder or hub id of a ViT; "toybox" is the model shipped with the package
    clip: Place = "toybox"  # "<open_clip name>/<pretrained tag>", "hf-hub:<id>", or a folder that open_clip wrote
    dino_revision: str | None = None  # commits of models of a hub; none: the first run pins them, in
    clip_revision: str | None = None  # <results>/revisions
    clip_precision: Literal["float32", "float16", "bfloat16"] = "float32"
    clip_text_weight: float = Field(1.0, gt=0)
    clip_text_clamp: bool = True  # CLIP-T = weight · max(cosine, 0), or the cosine as it is
    clip_prompt: Literal["class", "token", "scene"] = "class"  # what an image is compared with: the case's prompt, that
    # with `unique_token` before each class word, or what it says beside its subjects ("in the snow")
    unique_token: str | None = None
    region: Literal["image", "detected"] = "image"  # of an image that a subject's photos are compared with: all of it,
    # or the box in which `detector` finds the class word; what it does not find scores 0
    detector: Place = "IDEA-Research/grounding-dino-base"  # a folder or hub id of a Grounding DINO
    detector_revision: str | None = None
    detector_threshold: float = Field(0.25, ge=0, le=1)  # below which a box counts as none
    reader: Place | None = "toybox"  # recovers attributes; only where the benchmark knows them
    batch_size: int = Field(64, gt=0)  # images an encoder takes at once
    bootstrap: int = Field(10000, ge=50)  # draws of an interval: fewer have no 2.5 % at either end, and 2000 leave the
    # ends uncertain by 0.0015
    seed: Seed = 0  # of the bootstrap

    @model_validator(mode="after")
    def _token_where_it_is_said(self):
        if (self.clip_prompt == "token") != bool((self.unique_token or "").strip()):
            raise ValueError("clip_prompt 'token' and a unique_token, such as 'sks', go together: give both or neither")
        return self

    @model_validator(mode="before")
    @classmethod
    def _of_its_protocol(cls, values: Any) -> Any:
        """The switches that the protocol's name sets. `subjects: both` adds a column and contradicts no mean."""
        name = values.get("protocol", CUSTOM) if isinstance(values, dict) else CUSTOM
        switches = PROTOCOLS.get(name, {}) if isinstance(name, str) else {}
        against = {
            k: v for k, v in switches.items() if values.get(k, v) != v and (k, values[k]) != ("subjects", "both")
        }
        if against:
            given = ", ".join(f"{key} = {values[key]!r} (it sets {value!r})" for key, value in against.items())
            raise ValueError(
                f"{given} contradicts protocol = {name!r}: leave the switch out, or set protocol to {CUSTOM!r}"
            )
        return {**switches, **values} if switches else values


def _dreambench(folder: str) -> str:
    """A benchmark's folder; where it is called dreambench, as `make data` calls it, the copy that is named instead."""
    copy = os.environ.get(DREAMBENCH_DIR)
    return os.path.expanduser(copy) if copy and Path(folder).name == "dreambench" else folder


class Benchmark(Section):
    folder: Annotated[Place, AfterValidator(_dreambench)] = "toybox"  # in DreamBench's layout; "toybox" is written
    # under the results, attributes known; `make data` makes data/dreambench
    single: Place | None = None  # the list of its one-subject cases, in UNO's format; uno: UNO's own, built from the
    # dataset's prompts; none: its own cases_single.json
    multi: Place | None = None  # of its two-subject cases; uno: as there; none: its own cases_multi.json


class Sampled(Section):
    """How another system sampled its images, as far as that is known: beside these two, any settings of its own."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)
    __pydantic_extra__: dict[str, str | int | float | bool]

    references: Literal["listed", "all", "unknown"] = "unknown"  # what went in, as in Generation
    images_per_prompt: int = Field(1, gt=0)
    prompts: int | None = Field(None, gt=0)  # the table's; the first so many of every subject are looked for


class ExternalRow(Section):
    """Images that another system made: a row of a table, and where it comes from."""

    row: RunName  # its name in the table
    folder: Place
    layout: Literal["uno", "patchdpo", "case"]  # of the folder; see evaluation/layouts.py
    repository: str = "unknown"
    commit: str = "unknown"
    command: str = "unknown"
    size: Pixels | Annotated[list[Pixels], Field(min_length=2, max_length=2)] | None = None  # of its images: a side, or
    # width and height; none: square, and as most of them are
    sampling: Sampled = Sampled()


class External(Section):
    """The rows of a table whose images other systems made."""

    rows: list[ExternalRow] = []

    @model_validator(mode="after")
    def _each_once(self):
        names = [given.row for given in self.rows]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{', '.join(twice)} stands in rows more than once: give each row a name of its own")
        return self


class Adapters(Section):
    """The training runs behind a family's rows, one a training seed."""

    sft: list[RunName] = []
    dpo: list[RunName] = []
    patchdpo: list[RunName] = []
    focusdpo: list[RunName] = []


class FamilyRows(Section):
    """A family's rows of a table: its base, how that is sampled, and what was trained from it."""

    backbone: Backbone = Backbone()
    generation: Generation = Generation()
    photos: Photos = Photos()
    adapters: Adapters = Adapters()


BASES = {"uno": "flux_uno", "ipap": "sdxl_ip"}  # the families as the paper's rows call them, and their backbones'


class Families(Section):
    """The model families of a table, named as its rows are; a family that is not given has no rows."""

    uno: FamilyRows | None = None
    ipap: FamilyRows | None = None

    @property
    def given(self) -> dict[str, FamilyRows]:
        return {name: rows for name in BASES if (rows := getattr(self, name)) is not None}

    @model_validator(mode="after")
    def _of_one_table(self):
        if not self.given:
            raise ValueError(f"it names no family: give at least one of {', '.join(BASES)}")
        for name, rows in self.given.items():
            if rows.backbone.family != BASES[name]:
                raise ValueError(f"{name}.backbone.family must be {BASES[name]}, not {rows.backbone.family}")
        if len({rows.generation.prompts for rows in self.given.values()}) > 1:
            raise ValueError("generation.prompts must be the same for all: one table has one list of cases")
        return self


SECTIONS: dict[str, type[Section]] = {
    "backbone": Backbone,
    "dip": Dip,
    "mask_error": MaskError,
    "chain": Chain,
    "scoring": Scoring,
    "curation": Curation,
    "masks": Masks,
    "objective": Objective,
    "training": Training,
    "launch": Launch,
    "workers": Workers,
    "resources": Resources,
    "slurm": Slurm,
    "synthesis": Synthesis,
    "source": Source,
    "segmentation": Segmentation,
    "captioning": Captioning,
    "disruption": Disruption,
    "generation": Generation,
    "evaluation": Evaluation,
    "benchmark": Benchmark,
    "photos": Photos,
    "families": Families,
    "external": External,
}


def shipped(kind: str, model: str) -> str:
    """The folder of the model that comes with the package where a setting says "toybox"; any other model as it is.

    `kind`: a backbone's family, or "dino", "clip", "reader", "segmenter".
    """
    return str(SHIPPED / kind) if model == "toybox" else model


def section(name: str, values: dict[str, Any] | None = None, where: str = "the parameters cell") -> Any:
    """The typed section `name` from a plain dict; what is not given keeps its default.

    Raises ParameterError with one sentence a problem: the key, what is wrong, where it stands and what to do.
    """
    try:
        return SECTIONS[name].model_validate(values or {})
    except ValidationError as error:
        problems = list(dict.fromkeys(_explain(name, e, where) for e in error.errors()))
        more = [f"and {len(problems) - 5} more"] if problems[5:] else []
        raise ParameterError("; ".join([*problems[:5], *more])) from None


def read_overrides(path: str | Path) -> dict[str, Any]:
    """A YAML of some settings of some sections as overrides: {"training.steps": 10, …}."""
    values = read_yaml(path)
    if flat := [name for name in values if name not in SECTIONS]:
        raise ParameterError(f"{', '.join(flat)} in {path} is no section of settings: remove it, or use --set")
    return {key: value for name, group in values.items() for key, value in flat_overrides(name, group or {}).items()}


def flat_overrides(key: str, value: Any) -> dict[str, Any]:
    """A group as overrides of what it names alone, to the last key, so that the rest of the group over which they go
    stays: {"training.lora.rank": 8, …}. Any other value as it is."""
    if not isinstance(value, dict):
        return {key: value}
    return {k: v for name, inner in value.items() for k, v in flat_overrides(f"{key}.{name}", inner).items()}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A params file as a dict of notebook variables, with every section in it checked and left as plain values."""
    path = Path(path)
    try:
        values = strict_yaml.load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise ParameterError(f"the params file {path} does not exist: correct its path") from None
    except strict_yaml.StrictYamlError as error:
        raise ParameterError(f"{path} is not accepted: {error}") from None
    except UnicodeDecodeError as error:
        raise ParameterError(f"{path} is not YAML ({error}): save it as UTF-8") from None
    if not isinstance(values, dict):
        raise ParameterError(f"{path} must hold 'key: value' lines, not a {type(values).__name__}: correct it")
    for name in SECTIONS.keys() & values.keys():
        section(name, values[name], str(path))
    return values


def _explain(name: str, error: dict, where: str) -> str:
    # Of a union ("double", "all" or a list) pydantic reports every branch; its names are no part of the key.
    key = ".".join([name, *(str(part) for part in error["loc"] if "[" not in str(part))])
    if error["type"] == "extra_forbidden":
        return f"{key} in {where} is not a setting of the kit: remove it or correct its spelling"
    hint = ""
    if isinstance(error["input"], str) and error["type"] in ("float_type", "int_type"):
        hint = " (YAML reads a number such as 1e-8 as text: write 1.0e-8)"
    message = error["msg"].removeprefix("Value error, ").replace("Input should", "it should")
    if error["type"] == "model_type":
        message = "it should be a group of 'key: value' lines"
    return f"{key}{_given(error['input'])} in {where} is not accepted: {message}{hint}"


def _given(value: Any) -> str:
    """What was given, unless it is a group of groups: too long for a sentence."""
    long = isinstance(value, dict) and any(isinstance(inner, dict) for inner in value.values())
    return "" if long else f" = {value!r}"
