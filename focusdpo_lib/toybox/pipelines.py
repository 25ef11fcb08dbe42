"""The toybox backbones, built from configuration alone: diffusers' and transformers' own classes, untrained.

Saved with `save_pretrained`, they load through the same `from_pretrained` as the published models.
"""

from copy import deepcopy

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from focusdpo_lib.toybox import world
from focusdpo_lib.toybox.settings import SETTINGS

TEXT_LENGTH = 12  # tokens: the longest caption has nine words of one token each; CLIP adds a start and an end


def vocabulary() -> list[str]:
    """Every word a toybox caption can hold, in a fixed order."""
    words = {"a", "an", "and", "the", *world.CLASSES}
    for _, phrase in SETTINGS.values():
        words.update(phrase.split())
    return sorted(words)


def build_clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with one token a word: byte-pair merges that join each word from the left, letter by letter."""
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    merges = {}
    for word in sorted(vocabulary(), key=len, reverse=True):  # so that "cat" is whole before "at" can split it
        letters = [*word[:-1], word[-1] + "</w>"]
        for piece in letters:
            vocab.setdefault(piece, len(vocab))
        left = letters[0]
        for right in letters[1:]:
            merges[(left, right)] = None
            left += right
            vocab.setdefault(left, len(vocab))
    return CLIPTokenizer(vocab=vocab, merges=list(merges), model_max_length=TEXT_LENGTH)


def build_t5_tokenizer() -> T5Tokenizer:
    """T5's tokenizer with one token a word."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -20.0)]
    pieces += [(f"▁{word}", -1.0) for word in vocabulary()]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TEXT_LENGTH)


def build_autoencoder(channels: tuple[int, ...] = (24, 48, 96)) -> AutoencoderKL:
    """Stride 4, 8 latent channels: 64×64 pixels → 16×16 latents, 8×8 tokens after FLUX's 2×2 packing."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=world.SCENE_SIZE,
        shift_factor=0.0,
        scaling_factor=1.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def clip_text_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    """A text encoder of two layers for the toybox's captions."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_flux(
    vae: AutoencoderKL | None = None,
    *,
    heads: int = 8,
    head_dim: int = 32,
    double_blocks: int = 2,
    single_blocks: int = 4,
    text_dim: int = 64,
    guidance_embeds: bool = False,
    shift: float = 1.0,
    seed: int = 0,
) -> FluxPipeline:
    """A whole FLUX pipeline of toy size with random weights; `guidance_embeds` as in FLUX.1-dev or, off, -schnell.

    `shift` moves sampling times towards noise, as FLUX.1-dev's are.
    """
    torch.manual_seed(seed)
    vae = vae or build_autoencoder()
    clip_tokenizer, t5_tokenizer = build_clip_tokenizer(), build_t5_tokenizer()
    clip = CLIPTextModel(clip_text_config(clip_tokenizer, text_dim))
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer), d_model=text_dim, d_kv=text_dim // 2, d_ff=2 * text_dim, num_layers=2,
            num_heads=2, dropout_rate=0.0,
        )
    )  # fmt: skip
    axis = 3 * head_dim // 16 * 2  # rotary channels, all even: a quarter for the index, the rest halved between y and x
    transformer = FluxTransformer2DModel(
        in_channels=4 * vae.config.latent_channels,
        num_layers=double_blocks,
        num_single_layers=single_blocks,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=text_dim,
        pooled_projection_dim=text_dim,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(head_dim - 2 * axis, axis, axis),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    return FluxPipeline(scheduler, vae, clip, clip_tokenizer, t5, t5_tokenizer, transformer)


def build_sdxl(
    vae: AutoencoderKL | None = None,
    *,
    channels: tuple[int, int] = (64, 160),
    head_dim: int = 32,
    blocks: int = 2,
    text_dim: int = 64,
    seed: int = 0,
    **parts,
) -> StableDiffusionXLPipeline:
    """A whole SDXL pipeline of toy size with random weights: attention at half the latents' side, as SDXL begins.

    `blocks` transformer blocks stand in every attention; `parts` replace components of the pipeline. SDXL's latents
    have no shift, so an autoencoder's own is dropped.
    """
    torch.manual_seed(seed)
    vae = deepcopy(vae or build_autoencoder())
    vae.register_to_config(shift_factor=None)
    tokenizer = build_clip_tokenizer()
    text = clip_text_config(tokenizer, text_dim)
    time_dim = 16
    unet = UNet2DConditionModel(
        sample_size=world.SCENE_SIZE // 4,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, blocks),
        attention_head_dim=tuple(width // head_dim for width in channels),  # diffusers means the number of heads
        use_linear_projection=True,
        cross_attention_dim=2 * text_dim,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_dim,
        projection_class_embeddings_input_dim=text_dim + 6 * time_dim,
        norm_num_groups=16,
    )
    components = {
        "vae": vae,
        "text_encoder": CLIPTextModel(text),
        "text_encoder_2": CLIPTextModelWithProjection(text),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "unet": unet,
        "scheduler": EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
    }
    return StableDiffusionXLPipeline(**components | parts, add_watermarker=False)
