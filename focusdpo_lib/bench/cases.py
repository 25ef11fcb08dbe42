"""What is measured: which model, at which size, with how many references, checkpointed or not, its weights held how.

The full sizes are those of FLUX.1-dev and SDXL at 512² pixels; the small ones have the same parts and run on a CPU.
"""

from dataclasses import dataclass, replace
from itertools import product

from focusdpo_lib import params


@dataclass(frozen=True)
class Sizes:
    """A model's configuration in diffusers' words, and the shapes of one sample.

    latents (C, h, w); text (tokens, width); pooled width; reference: the shape of each of 1 or 2 references; view: of
    the latents of one, where the network looks at references in a pass of their own (R7); pairs: how many a step takes
    (the paper takes one for each GPU; one does not fill a GPU with SDXL); subject_rank: of UNO's LoRA, a part of the
    base, which SDXL does without.
    """

    network: dict
    latents: tuple[int, int, int]
    text: tuple[int, int]
    pooled: int
    reference: dict[int, tuple[int, ...]]
    pairs: int
    view: tuple[int, int, int] | None = None
    subject_rank: int | None = None


@dataclass(frozen=True)
class Case:
    model: str  # "toybox" (its UNO), "toybox_ipap", "flux" or "sdxl"
    size: str  # "shipped" for the toybox; "small" or "full" with random weights
    references: int
    checkpointing: bool
    weights: str  # of the frozen base: "float32", "bfloat16", "int8" or "nf4"

    @property
    def name(self) -> str:
        checkpointed = ("checkpointing",) if self.checkpointing else ()
        return "-".join([self.model, self.size, f"{self.references}ref", *checkpointed, self.weights])

    @property
    def sizes(self) -> Sizes:
        """Of a random model; the shipped one brings its own."""
        return SIZES[self.model, self.size]

    @property
    def pairs(self) -> int:
        """How many pairs a step takes, unless one says otherwise."""
        return params.Training().batch_size if self.size == "shipped" else self.sizes.pairs


FLUX = Sizes(
    network={
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    },
    latents=(16, 64, 64),
    text=(512, 4096),
    pooled=768,
    reference={1: (16, 64, 64), 2: (16, 40, 40)},  # long side 512 pixels, or 320 for several
    pairs=1,
    subject_rank=512,
)
SMALL_FLUX = {
    "num_layers": 1,
    "num_single_layers": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
    "axes_dims_rope": (8, 12, 12),
}
SDXL = Sizes(
    network={
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),  # diffusers means the number of heads
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "use_linear_projection": True,
    },
    latents=(4, 64, 64),
    text=(77, 2048),
    pooled=1280,
    reference={1: (16, 2048), 2: (16, 2048)},  # IP-Adapter-Plus: 16 tokens, whatever the photo's size
    view=(4, 28, 28),  # of a photo of 224 pixels, as CLIP takes it
    pairs=4,
)
SMALL_SDXL = {
    "block_out_channels": (64, 64, 64),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1, 1),
    "attention_head_dim": (1, 2, 2),
    "cross_attention_dim": 64,
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 256,
}


def small(full: Sizes, network: dict, latents: tuple[int, int, int], reference: dict, view=None) -> Sizes:
    """The parts of `full` at a size for a CPU."""
    rank = full.subject_rank and 16  # an eighth of the width; a sixth in the full size
    settings = {"latents": latents, "text": (12, 64), "pooled": 64, "reference": reference, "subject_rank": rank}
    settings |= {"view": view}
    return replace(full, network=full.network | network, pairs=1, **settings)


SIZES = {
    ("flux", "full"): FLUX,
    ("flux", "small"): small(FLUX, SMALL_FLUX, (16, 16, 16), {1: (16, 16, 16), 2: (16, 10, 10)}),
    ("sdxl", "full"): SDXL,
    ("sdxl", "sampled"): replace(SDXL, latents=(4, 128, 128)),  # Table 1 has images of 1024² pixels
    ("sdxl", "small"): small(SDXL, SMALL_SDXL, (4, 16, 16), {1: (16, 64), 2: (16, 64)}, (4, 8, 8)),
}
WEIGHTS = ("bfloat16", "nf4", "int8")
# The toybox has goals on a CPU, the small sizes have none. Nine rounds gave 0.94 to 1.03 where 31 give 1.00 and 1.01.
ROUNDS = {"shipped": 31, "small": 5, "full": 5}


def cases(size: str, quantized: bool = True) -> list[Case]:
    """The toybox, then every case of `size`; the unquantized before the others, so that a run cut short has those."""
    shipped = product(("toybox", "toybox_ipap"), (1, 2))
    toybox = [Case(model, "shipped", count, False, "float32") for model, count in shipped]
    order = product(WEIGHTS if quantized else WEIGHTS[:1], ("flux", "sdxl"), (1, 2), (False, True))
    return toybox + [Case(model, size, count, checkpointing, weights) for weights, model, count, checkpointing in order]
