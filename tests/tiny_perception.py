"""Models that look at pictures, at their smallest and with random weights, in the layout in which all are published."""

from pathlib import Path

import torch
import transformers as hf
from tokenizers.pre_tokenizers import ByteLevel

from focusdpo_lib.toybox.pipelines import build_clip_tokenizer

WORDS = ["a", "cat", "dog", "red", "robot", "mug", "toy", "backpack"]
# BERT's own numbers of the tokens that part phrases, by which Grounding DINO knows them.
SPECIAL = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}


def write_tiny_detector(folder: Path) -> Path:
    """Grounding DINO, for pictures scaled to 64 pixels."""
    torch.manual_seed(0)
    numbers = iter(number for number in range(1030) if number not in SPECIAL.values())
    vocabulary = SPECIAL | {word: next(numbers) for word in WORDS}
    vocabulary |= {f"[unused{number}]": number for number in numbers}
    tokenizer = hf.BertTokenizer(vocab=vocabulary, do_lower_case=True)
    few = {f"{part}_{size}": n for part in ("encoder", "decoder") for size, n in (("ffn_dim", 16), ("layers", 2))}
    swin = {"image_size": 64, "embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 1, 2, 2], "window_size": 4}
    bert = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = hf.GroundingDinoConfig(
        backbone_config=hf.SwinConfig(**swin, out_indices=[2, 3, 4]),
        text_config=hf.BertConfig(**bert, vocab_size=1030, max_position_embeddings=64),
        num_queries=10, encoder_attention_heads=2, decoder_attention_heads=2, d_model=32, disable_custom_kernels=True,
        **few,
    )  # fmt: skip
    hf.GroundingDinoForObjectDetection(config).save_pretrained(folder)
    sides = {"shortest_edge": 64, "longest_edge": 96}
    hf.GroundingDinoProcessor(hf.GroundingDinoImageProcessor(size=sides), tokenizer).save_pretrained(folder)
    return folder


def write_tiny_sam2(folder: Path, side: int = 64) -> Path:
    torch.manual_seed(0)
    hiera = {
        "hidden_size": 8, "image_size": [side, side], "blocks_per_stage": [1, 2, 2, 1],
        "embed_dim_per_stage": [8, 16, 32, 64], "num_attention_heads_per_stage": [1] * 4,
        "window_size_per_stage": [8, 4, 4, 4], "global_attention_blocks": [4],
        "window_positional_embedding_background_size": [2, 2],
    }  # fmt: skip
    config = hf.Sam2Config(
        vision_config=hf.Sam2VisionConfig(
            backbone_config=hf.Sam2HieraDetConfig(**hiera),
            backbone_channel_list=[64, 32, 16, 8],
            backbone_feature_sizes=[[side // n, side // n] for n in (4, 8, 16)],
            fpn_hidden_size=32,
        ),
        prompt_encoder_config={"hidden_size": 32, "image_size": side, "patch_size": 16, "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
    )
    hf.Sam2Model(config).save_pretrained(folder)
    sizes = {"size": {"height": side, "width": side}, "mask_size": {"height": side // 4, "width": side // 4}}
    hf.Sam2Processor(hf.Sam2ImageProcessor(**sizes)).save_pretrained(folder)
    return folder


def write_tiny_sam3(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer, side = build_clip_tokenizer(), 56
    tiny = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    vision = {"image_size": side, "pretrain_image_size": side, "window_size": 2, "global_attn_indexes": [1]}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 32, "projection_dim": 32, "num_hidden_layers": 1}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 1}
    config = hf.Sam3Config(
        vision_config={
            "backbone_config": {"model_type": "sam3_vit_model", "num_hidden_layers": 2, **vision, **tiny},
            "fpn_hidden_size": 32,
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        },
        text_config=text | tiny | ends,
        geometry_encoder_config={"num_layers": 1, **tiny},
        detr_encoder_config={"num_layers": 1, **tiny},
        detr_decoder_config={"num_layers": 1, "num_queries": 6, **tiny},
        mask_decoder_config={"hidden_size": 32, "num_attention_heads": 2},
    )
    hf.Sam3Model(config).save_pretrained(folder)
    hf.Sam3Processor(hf.Sam3ImageProcessor(size={"height": side, "width": side}), tokenizer).save_pretrained(folder)
    return folder


def write_tiny_captioner(folder: Path) -> Path:
    """Qwen3-VL whose tokens are bytes, with a chat template of the published kind."""
    torch.manual_seed(0)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    seeing = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = hf.Qwen2TokenizerFast(
        vocab={letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}, merges=[]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [*special, *seeing]})
    turn = "<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    turn += "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n"
    template = "{% for m in messages %}" + turn + "{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    processor = hf.Qwen3VLProcessor(
        hf.Qwen2VLImageProcessor(patch_size=16, min_pixels=32 * 32, max_pixels=64 * 64),
        tokenizer,
        hf.Qwen3VLVideoProcessor(patch_size=16),
        chat_template=template,
    )
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], "mrope_interleaved": True}
    text = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    vision = {"depth": 2, "num_heads": 2, "patch_size": 16, "out_hidden_size": 32, "num_position_embeddings": 16}
    width = {"hidden_size": 32, "intermediate_size": 32}
    ids = dict(zip(("start", "end", "image", "video"), tokenizer.convert_tokens_to_ids(seeing), strict=True))
    config = hf.Qwen3VLConfig(
        text_config=text | width | {"vocab_size": len(tokenizer), "rope_parameters": rope},
        vision_config=vision | width | {"deepstack_visual_indexes": [0]},
        image_token_id=ids["image"], video_token_id=ids["video"],
        vision_start_token_id=ids["start"], vision_end_token_id=ids["end"],
    )  # fmt: skip
    hf.Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
