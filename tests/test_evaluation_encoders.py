"""Encoders load from disk as the published ones do; their preprocessing equals torchvision's and open_clip's own."""

import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision import transforms
from transformers import (
    BertConfig,
    BertModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from focusdpo_lib import params, stages
from focusdpo_lib.evaluation.encoders import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ClipEncoder,
    DinoEncoder,
    EncoderError,
    preprocess,
)
from focusdpo_lib.toybox.reader import Reader

BICUBIC = transforms.InterpolationMode.BICUBIC


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth, so that a shift by one pixel is small, and asymmetric, so that it is seen."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Tiny random models in the layout of the toybox's weights: dino/, clip/, reader/."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    ViTModel(vit(64)).save_pretrained(folder / "dino")
    ViTModel(vit(224)).save_pretrained(folder / "published_size")
    vision = {"image_size": 64, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    configuration = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    (folder / "clip").mkdir()
    (folder / "clip" / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": configuration, "preprocess_cfg": {}})
    )
    state = open_clip.model.CLIP(24, vision, text).state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "clip" / "open_clip_model.safetensors")
    Reader(width=16).save_pretrained(folder / "reader")
    return folder


def vit(size: int) -> ViTConfig:
    heads = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ViTConfig(**heads, image_size=size, patch_size=16)


# --- preprocessing ---


@pytest.mark.parametrize("size", [(512, 512), (300, 421), (421, 300), (256, 256), (97, 180)])
def test_dino_preprocessing_is_torchvision_s_resize_256_crop_224(size):
    reference = transforms.Compose(
        [
            transforms.Resize(256, BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    image = picture(*size)
    torch.testing.assert_close(preprocess(image, 256, 224, IMAGENET_MEAN, IMAGENET_STD), reference(image))


def test_clip_preprocessing_of_open_clip_is_openai_s():
    """The published CLIP-I and CLIP-T: bicubic to 224, centre crop, OpenAI's mean and std."""
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    own = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(), is_train=False)
    image = picture(421, 300)
    torch.testing.assert_close(preprocess(image, 224, 224, mean, std), own(image))


# --- DINO ---


def test_dino_is_the_cls_token_of_the_whole_small_image_as_a_unit_vector(weights):
    encoder, images = DinoEncoder(str(weights / "dino")), [picture(64, 64, seed) for seed in range(5)]
    pixels = torch.stack([transforms.functional.to_tensor(image) for image in images])
    pixels = transforms.functional.normalize(pixels, IMAGENET_MEAN, IMAGENET_STD)
    with torch.no_grad():
        cls = ViTModel.from_pretrained(weights / "dino")(pixels).last_hidden_state[:, 0].double()
    embeddings = encoder.images(images)
    assert embeddings.shape == (5, 24) and embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.double(), cls / cls.norm(dim=-1, keepdim=True), rtol=1e-5, atol=1e-6)


def test_a_model_of_the_published_size_gets_the_published_crop(weights):
    encoder = DinoEncoder(str(weights / "published_size"))
    assert (encoder.resize, encoder.crop) == (256, 224)
    edges = np.asarray(picture(256, 256)).copy()
    edges[:16], edges[-16:], edges[:, :16], edges[:, -16:] = 0, 0, 0, 0  # the frame that the crop leaves out
    torch.testing.assert_close(encoder.images([Image.fromarray(edges)]), encoder.images([picture(256, 256)]))


# --- CLIP ---


def test_clip_from_a_local_folder_equals_open_clip_called_directly(weights):
    encoder = ClipEncoder(str(weights / "clip"))
    model, own = open_clip.create_model_from_pretrained(f"local-dir:{weights / 'clip'}")
    prompts, images = ["a cat in the snow", "a mug in a city"], [picture(64, 64, 1), picture(64, 64, 2)]
    with torch.no_grad():
        image = model.encode_image(torch.stack([own(i) for i in images]), normalize=True)
        text = model.encode_text(open_clip.get_tokenizer(f"local-dir:{weights / 'clip'}")(prompts), normalize=True)
    torch.testing.assert_close(encoder.images(images), image)
    torch.testing.assert_close(encoder.texts(prompts), text)


def test_clip_precision_changes_the_numbers_slightly_and_the_id(weights):
    full, half = (ClipEncoder(str(weights / "clip"), precision=p) for p in ("float32", "bfloat16"))
    a, b = full.images([picture(64, 64)]), half.images([picture(64, 64)])
    assert b.dtype == torch.float32 and 0 < (a - b).abs().max() < 0.05
    assert full.id != half.id


# --- both ---


def test_batches_do_not_change_embeddings_and_paths_equal_pictures(weights, tmp_path):
    images = [picture(64, 64, seed) for seed in range(5)]
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    for build in (DinoEncoder, ClipEncoder):
        folder = str(weights / ("dino" if build is DinoEncoder else "clip"))
        whole = build(folder, batch_size=8).images(images)
        torch.testing.assert_close(build(folder, batch_size=2).images(paths), whole, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(whole.norm(dim=-1), 1, rtol=1e-6)


def test_ids_follow_the_weights_and_not_the_place(weights, tmp_path):
    model = ViTModel.from_pretrained(weights / "dino")
    model.save_pretrained(tmp_path / "dino")
    assert DinoEncoder(str(tmp_path / "dino")).id == DinoEncoder(str(weights / "dino")).id
    with torch.no_grad():
        model.embeddings.cls_token += 1
    model.save_pretrained(tmp_path / "dino")
    assert DinoEncoder(str(tmp_path / "dino")).id != DinoEncoder(str(weights / "dino")).id


def test_toybox_names_the_shipped_folder_and_the_reader_reads(weights, monkeypatch):
    monkeypatch.setattr(params, "SHIPPED", weights)
    encoders = stages.load_encoders(params.section("evaluation"))
    assert {name: value.split("@")[0] for name, value in encoders.ids.items()} == {
        **{"dino": "dino", "clip": "clip", "reader": "reader"}
    }
    found = encoders.reader(torch.zeros(2, 3, 64, 64))
    assert len(found) == 2 and all(len(subjects) <= 2 for subjects in found)
    assert stages.load_encoders(params.section("evaluation", {"reader": None})).ids["reader"] is None


@pytest.mark.parametrize(
    "part", ["dino/model.safetensors", "clip/open_clip_model.safetensors", "reader/model.safetensors"]
)
def test_a_missing_weight_file_is_one_sentence_that_names_the_setting(weights, tmp_path, monkeypatch, part):
    for name in ("dino", "clip", "reader"):
        (tmp_path / name).mkdir()
        for file in (weights / name).iterdir():
            if f"{name}/{file.name}" != part:
                (tmp_path / name / file.name).write_bytes(file.read_bytes())
    kind = part.split("/")[0]
    monkeypatch.setattr(params, "SHIPPED", tmp_path)
    with pytest.raises(
        EncoderError, match=f"^evaluation.{kind} = '.*{kind}' cannot be loaded .*: name a folder"
    ) as error:
        stages.load_encoders(params.section("evaluation"))
    assert "\n" not in str(error.value)


def test_weights_that_lack_a_layer_are_refused_and_a_missing_pooler_is_not(weights, tmp_path):
    for name in ("whole", "cut"):
        ViTModel(vit(64), add_pooling_layer=False).save_pretrained(tmp_path / name)
    DinoEncoder(str(tmp_path / "whole"))
    state = load_file(tmp_path / "cut" / "model.safetensors")
    gone = next(key for key in state if "layer.1." in key or "layers.1." in key)
    save_file({k: v for k, v in state.items() if k != gone}, tmp_path / "cut" / "model.safetensors", {"format": "pt"})
    with pytest.raises(EncoderError, match=r"its weights lack .*1"):
        DinoEncoder(str(tmp_path / "cut"))


@pytest.mark.parametrize("layers", [1, 0])
def test_weights_of_more_layers_than_the_configuration_has_are_refused(weights, tmp_path, layers):
    """Its CLS token would be another model's. What has no layer, as a classifier's head, is no part of the score."""
    shutil.copytree(weights / "dino", tmp_path, dirs_exist_ok=True)
    state = load_file(tmp_path / "model.safetensors")
    save_file(state | {"classifier.weight": torch.zeros(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    DinoEncoder(str(tmp_path))
    configure(tmp_path, num_hidden_layers=layers)
    with pytest.raises(EncoderError, match=rf"its config.json has no place for layers?\.{layers}\."):
        DinoEncoder(str(tmp_path))


def configure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_size": 48},
            r"its embeddings.cls_token has the shape \(1, 1, 24\) where its config.json needs \(1, 1, 48",
        ),
        ({"image_size": 96}, r"has the shape \(1, 17, 24\) where its config.json needs \(1, 37, 24\)"),
        ({"image_size": "64"}, "image_size"),
        ({"hidden_act": "none"}, "none"),
        ({"patch_size": 0}, "by zero"),
    ],
)
def test_a_configuration_that_does_not_fit_the_weights_is_one_sentence(weights, tmp_path, changes, message):
    shutil.copytree(weights / "dino", tmp_path, dirs_exist_ok=True)
    configure(tmp_path, **changes)
    with pytest.raises(EncoderError, match=f"^evaluation.dino = .* cannot be loaded .*{message}") as caught:
        DinoEncoder(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["dino", "clip"])
@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0{}"])
def test_a_damaged_weight_file_is_one_sentence(weights, tmp_path, kind, content):
    shutil.copytree(weights / kind, tmp_path, dirs_exist_ok=True)
    next(tmp_path.glob("*.safetensors")).write_bytes(content)
    with pytest.raises(
        EncoderError, match=rf"^evaluation.{kind} = .* cannot be loaded \(Error while deserializing header"
    ):
        (DinoEncoder if kind == "dino" else ClipEncoder)(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 384}, r"it sees images of 384 pixels alone, and scores are of 224"),
        ({"image_size": 256}, r"it sees images of 256 pixels alone, and scores are of 224"),
        ({"image_size": (64, 32)}, r"it sees images of \[64, 32\] pixels in patches of 16, and the protocol's are squ"),
        ({"num_channels": 1}, "it sees 1 colour channels, and images have 3"),
    ],
)
def test_a_vit_that_cannot_see_the_protocol_s_images_is_refused_on_loading(tmp_path, changes, message):
    ViTModel(ViTConfig(**vit(64).to_diff_dict() | changes)).save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match=message):
        DinoEncoder(str(tmp_path))


def test_sides_may_be_written_as_pairs(weights, tmp_path):
    shutil.copytree(weights / "dino", tmp_path, dirs_exist_ok=True)
    configure(tmp_path, image_size=[64, 64], patch_size=[16, 16])
    ours, theirs, photo = DinoEncoder(str(tmp_path)), DinoEncoder(str(weights / "dino")), picture(80, 70)
    assert torch.equal(ours.images([photo]), theirs.images([photo]))
    assert ours.patches(torch.zeros(1, 3, 64, 64)).shape == (1, 16, 24)


def test_what_is_no_number_is_no_vector(weights, tmp_path):
    """Of the image or the words that are to blame, and of those alone."""
    shutil.copytree(weights / "clip", tmp_path, dirs_exist_ok=True)
    dino, clip = DinoEncoder(str(weights / "dino")), ClipEncoder(str(tmp_path), batch_size=2)
    word = clip.tokenizer(["mug"])[0, 1]
    with torch.no_grad():
        clip.model.token_embedding.weight[word] = float("nan")
        dino.model.embeddings.cls_token[:] = float("inf")
    assert clip.texts(["a dog", "a cat"]).isfinite().all()
    with pytest.raises(EncoderError, match=r"^evaluation.clip makes NaN or infinity of 'a mug': its weights hold some"):
        clip.texts(["a dog", "a cat", "a mug"])
    with pytest.raises(EncoderError, match=r"^evaluation.dino makes NaN or infinity of image 1 of 2: its weights"):
        dino.images([picture(64, 64)] * 2)


@pytest.mark.parametrize("damage", ["tokenizer.json away", "words away"])
def test_a_clip_whose_tokenizer_knows_no_word_is_refused(tmp_path, damage):
    """transformers makes a tokenizer without a vocabulary then, and every prompt has the same vector."""
    folder = shutil.copytree(params.shipped("clip", "toybox"), tmp_path / "clip")
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    file.unlink()
    if damage == "words away":
        special = {word: number for word, number in content["model"]["vocab"].items() if word.startswith("<|")}
        content["model"] |= {"vocab": special, "merges": []}
        file.write_text(json.dumps(content))
    with pytest.raises(EncoderError, match=r"^evaluation.clip = .*its tokenizer has no vocabulary"):
        ClipEncoder(str(folder))


def test_only_models_whose_first_token_is_the_class_token_score(tmp_path):
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    seen = {"image_size": 224, "patch_size": 16}
    others = [
        SiglipVisionModel(SiglipVisionConfig(**sizes, **seen)),  # pools by attention: no class token
        ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])),  # no tokens at all
        BertModel(BertConfig(vocab_size=8, **sizes)),  # sees no image
    ]
    for model in others:
        folder = tmp_path / model.config.model_type
        model.save_pretrained(folder)
        with pytest.raises(EncoderError, match=f"^evaluation.dino = .*it is a {model.config.model_type}, and a DINO"):
            DinoEncoder(str(folder))
    for model in (
        Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, **seen, num_register_tokens=3)),
        DINOv3ViTModel(DINOv3ViTConfig(**sizes, **seen, num_register_tokens=3)),
    ):
        model.save_pretrained(tmp_path / model.config.model_type)
        dino, pixels = DinoEncoder(str(tmp_path / model.config.model_type)), torch.zeros(1, 3, 224, 224)
        tokens = dino.model(pixel_values=pixels).last_hidden_state
        assert tokens.shape[1] == 1 + 3 + 14 * 14 and dino.patches(pixels).shape == (1, 14 * 14, 24)
        photo = picture(300, 260)
        assert (dino.images([photo]) @ dino.images([photo]).T).item() == pytest.approx(1, abs=1e-6)


def test_prompts_longer_than_clip_reads_are_counted(weights):
    """Its 16 tokens are a beginning, an end and 14 words; what comes behind does not move the embedding."""
    clip = ClipEncoder(str(weights / "clip"))
    fits, longer = " ".join(["dog"] * 14), " ".join(["dog"] * 14 + ["cat"])
    assert clip.cut([fits, "a dog"]) is None
    assert clip.cut([fits, longer, longer + " hat", "a dog"]) == "2 of 4, after 16 tokens"
    assert torch.equal(*clip.texts([fits, longer]))


@pytest.mark.parametrize("text", [{}, {"no_causal_mask": True}, {"pool_type": "last"}])
def test_words_are_computed_up_to_the_last_prompt_s_end_where_that_changes_nothing(weights, tmp_path, text):
    """Against open_clip's own of all 16 tokens; a model that looks ahead, or at its last token, computes them all."""
    shutil.copytree(weights / "clip", tmp_path, dirs_exist_ok=True)
    file = tmp_path / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"]["text_cfg"] |= text
    file.write_text(json.dumps(config))
    clip, prompts, lengths = ClipEncoder(str(tmp_path)), ["a dog", "a red cat in the snow", "dog " * 20], []
    clip.model.transformer.register_forward_hook(lambda model, given, out: lengths.append(out.shape[1]))
    for some, length in ((prompts[:2], 8), (prompts, 16)):
        with torch.no_grad():
            expected = clip.model.encode_text(clip.tokenizer(some))
        lengths.clear()
        found = clip.texts(some)
        assert lengths == [16 if text else length]
        torch.testing.assert_close(found, expected / expected.norm(dim=-1, keepdim=True), rtol=0, atol=1e-6)


def test_a_folder_of_another_model_is_no_reader_and_no_clip(weights, tmp_path):
    """The hub's own loader would leave every weight that the file does not have as it was drawn, without a word."""
    with pytest.raises(EncoderError, match=r"^evaluation.reader = .* cannot be loaded"):
        stages.load_encoders(params.Evaluation(reader=str(weights / "dino")))
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 4}, "preprocess_cfg": {}}')
    with pytest.raises(EncoderError, match=r"^evaluation.clip = .* cannot be loaded \('text_cfg'\)"):
        ClipEncoder(str(tmp_path))
    with pytest.raises(EncoderError) as caught:
        ClipEncoder("Nope/openai")  # open_clip lists every name that it knows
    assert len(str(caught.value)) < 500
