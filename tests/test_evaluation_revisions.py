"""The encoder behind a published number: its eps, and the commit that a results folder is pinned to."""

import json
import shutil

import pytest
import torch
from test_evaluation_encoders import picture, vit, weights  # noqa: F401 (a fixture)
from test_revisions import FIRST, LATER, cache  # noqa: F401 (a fixture)
from transformers import Dinov2Config, Dinov2Model, ViTModel

from focusdpo_lib import params, stages
from focusdpo_lib.evaluation.encoders import IMAGENET_MEAN, IMAGENET_STD, ClipEncoder, DinoEncoder, preprocess

OPENAI = "timm/vit_base_patch32_clip_224.openai"  # where open_clip reads "ViT-B-32-quickgelu/openai" from


# --- LayerNorm ---


def small_variance(size: int) -> ViTModel:
    """A ViT whose first tokens have variances of some 1e-7, so that an eps of 1e-6 moves them and 1e-12 does not."""
    torch.manual_seed(0)
    model = ViTModel(vit(size))
    with torch.no_grad():
        for parameter in model.embeddings.parameters():
            parameter.mul_(0.01)
    return model


def normalised(x, layer):
    """Layer normalisation, written out with the eps of the original DINO."""
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * layer.weight + layer.bias


def test_dino_v1_normalises_with_the_eps_that_it_was_trained_with(tmp_path, monkeypatch):
    small_variance(224).save_pretrained(tmp_path / "v1")
    assert json.loads((tmp_path / "v1" / "config.json").read_text())["layer_norm_eps"] == 1e-12  # as the hub's copies
    encoder, photo = DinoEncoder(str(tmp_path / "v1")), picture(300, 260)
    assert encoder.id.endswith(" eps 1e-06")
    plain = ViTModel.from_pretrained(tmp_path / "v1").eval()
    pixels = preprocess(photo, 256, 224, IMAGENET_MEAN, IMAGENET_STD)[None]
    with torch.no_grad():
        theirs = plain(pixels).last_hidden_state[:, 0]
        monkeypatch.setattr(torch.nn.LayerNorm, "forward", lambda layer, x: normalised(x, layer))
        by_hand = plain(pixels).last_hidden_state[:, 0]
    monkeypatch.undo()
    ours = encoder.images([photo])
    torch.testing.assert_close(ours, by_hand / by_hand.norm(), rtol=1e-4, atol=1e-6)
    assert (ours - theirs / theirs.norm()).abs().max() > 1e-3  # what the copy's eps would have given


def test_other_models_keep_the_eps_of_their_configuration(tmp_path):
    small_variance(64).save_pretrained(tmp_path / "toybox")  # trained by its own recipe, with that eps
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 16, "image_size": 224}
    Dinov2Model(Dinov2Config(**sizes, layer_norm_eps=1e-5)).save_pretrained(tmp_path / "v2")
    for name, eps in (("toybox", 1e-12), ("v2", 1e-5)):
        encoder = DinoEncoder(str(tmp_path / name))
        assert {m.eps for m in encoder.model.modules() if isinstance(m, torch.nn.LayerNorm)} == {eps}
        assert "eps" not in encoder.id


# --- commits ---


def test_encoders_of_a_hub_are_pinned_and_their_ids_say_the_commit(cache, tmp_path, weights):  # noqa: F811
    for seed, commit in enumerate((FIRST, LATER)):
        shutil.copytree(weights / "clip", cache.add("someone/clip", commit), dirs_exist_ok=True)
        torch.manual_seed(seed)
        ViTModel(vit(224)).save_pretrained(cache.add("someone/dino", commit))
        if commit == FIRST:
            use = params.Evaluation(dino="someone/dino", clip="hf-hub:someone/clip", reader=None)
            first = stages.load_encoders(use, tmp_path / "results")
    ids = {"dino": f"someone/dino@{FIRST[:12]} eps 1e-06", "clip": f"hf-hub:someone/clip@{FIRST[:12]} fp32"}
    assert first.ids == ids | {"reader": None}
    again, newest = (stages.load_encoders(use, tmp_path / name) for name in ("results", "others"))
    photo = picture(300, 260)
    assert again.ids == first.ids and torch.equal(again.dino.images([photo]), first.dino.images([photo]))
    assert LATER[:12] in newest.ids["dino"] and not torch.equal(newest.dino.images([photo]), first.dino.images([photo]))
    given = use.model_copy(update={"dino_revision": LATER, "clip_revision": LATER})
    assert stages.load_encoders(given, tmp_path / "results").ids == newest.ids


def test_openai_s_clip_is_read_at_a_commit_with_its_own_words(cache, tmp_path, weights):  # noqa: F811
    """As open_clip reads the tag: the repository's weights and configuration, and the tokenizer of the name."""
    folder = cache.add(OPENAI, FIRST)
    shutil.copytree(weights / "clip", folder, dirs_exist_ok=True)
    config = json.loads((folder / "open_clip_config.json").read_text())
    use = params.Evaluation(dino=str(weights / "dino"), clip="ViT-B-32-quickgelu/openai", reader=None)
    pinned = stages.pinned_encoders(use, tmp_path / "results")
    assert pinned.clip_revision == FIRST and pinned.dino_revision is None
    clip = ClipEncoder(use.clip, revision=FIRST)
    assert clip.id == f"ViT-B-32-quickgelu/openai@{FIRST[:12]} fp32"
    assert clip.tokenizer.context_length == 77 != config["model_cfg"]["text_cfg"]["context_length"]
    photo = picture(64, 64)
    assert torch.equal(clip.images([photo]), ClipEncoder(str(weights / "clip")).images([photo]))


def test_a_folder_has_no_commit(weights):  # noqa: F811
    with pytest.raises(Exception, match=r"^evaluation.clip = .* cannot be loaded \(it is no model of a hub"):
        ClipEncoder(str(weights / "clip"), revision=FIRST)
