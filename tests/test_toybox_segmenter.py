"""The toybox's segmenter: its targets and loss by hand, what it is trained on, and what the shipped one finds."""

import math

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from focusdpo_lib import params
from focusdpo_lib.toybox import segmenter, world
from focusdpo_lib.toybox.batches import to_pixels

torch.set_num_threads(1)

SHIPPED = params.SHIPPED / "segmenter"


def test_the_loss_is_the_cross_entropy_of_every_class_s_map():
    masks = torch.zeros(1, 2, 2, 2, dtype=torch.bool)
    masks[0, 0, 0, 0] = masks[0, 1, 1, 1] = True
    classes = torch.tensor([[4, 7]])
    nothing = torch.zeros(1, 12, 2, 2)
    assert segmenter.segmenter_loss(nothing, masks, classes).item() == pytest.approx(12 * math.log(2))
    sure = torch.full((1, 12, 2, 2), -math.log(9))  # a probability of 0.1 …
    sure[0, 4, 0, 0] = sure[0, 7, 1, 1] = math.log(9)  # … and of 0.9
    assert segmenter.segmenter_loss(sure, masks, classes).item() == pytest.approx(-12 * math.log(0.9), rel=1e-5)
    turned = segmenter.segmenter_loss(sure, masks, classes.flip(1)).item()  # four of 48 places are wrong
    assert turned == pytest.approx(-(44 * math.log(0.9) + 4 * math.log(0.1)) / 4, rel=1e-5)


def test_intersection_over_union_by_hand():
    found, true = np.zeros((4, 6, 6), bool), np.zeros((4, 6, 6), bool)
    found[0, :4, :4] = true[0, :4, :4] = True
    found[1, :4, :4] = true[1, 2:, 2:] = True  # 4 of 28 pixels
    found[2, :4, :4] = True
    assert segmenter.iou(found, true).tolist() == [1, pytest.approx(1 / 7), 0, 1]  # two empty masks are alike


@pytest.mark.parametrize("kind", segmenter.KINDS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_what_is_shown_is_the_world_s_of_one_split(kind, split, monkeypatch):
    seen = []
    draw = world.sample_subjects

    def noted(*words):
        seen.append(draw(*words))
        return seen[-1]

    monkeypatch.setattr(world, "sample_subjects", noted)
    shown = segmenter.sample_shown(kind, 5, 3, split)
    assert {identity.split for subjects in seen for identity in subjects} == {split}
    count, side = (2 if kind == "two" else 1), (32 if kind == "reference" else 64)
    assert shown.images.shape == (5, side, side, 3) and shown.masks.shape == (5, count, side, side)
    named = [[world.CLASSES[k] for k in classes] for classes in shown.classes]
    assert named == [[identity.class_name for identity in subjects] for subjects in seen]
    assert not np.array_equal(segmenter.sample_shown(kind, 5, 4, split).images, shown.images)


def test_the_mask_of_what_is_shown_is_that_of_the_word_of_its_place():
    """A scene drawn again with another subject in the second place differs from it in the second mask alone."""
    rng = np.random.default_rng(0)
    shown = segmenter.sample_shown("two", 1, 0)
    again = np.random.default_rng([0, segmenter.KINDS.index("two")])
    scene = world.sample_scene(again, world.sample_subjects(again, 2))
    first, second = scene.identities
    other = world.sample_identity(rng, class_name=second.class_name)
    image, _ = world.render(world.with_identities(scene, (first, other)))
    differs = (image != shown.images[0]).any(-1)
    assert differs.any() and not (differs & ~shown.masks[0, 1]).any()
    assert world.CLASSES[shown.classes[0, 1]] == second.class_name


@pytest.mark.parametrize("side", [32, 64, 48])
def test_every_class_has_a_map_of_the_picture_s_size_and_in_its_place(side):
    """The U-Net sees squares of two pixels, unfolded into channels: what it gives is folded back to where it was."""

    class Passes(torch.nn.Module):  # the red channel of each square's four pixels, as the map of every class
        def forward(self, squares, time):
            maps = squares[:, :4].repeat(1, 12, 1, 1)
            return type("Output", (), {"sample": maps})

    images = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    logits = segmenter.class_logits(Passes(), to_pixels(images))
    assert torch.allclose(logits, to_pixels(images)[:, :1].expand(-1, 12, -1, -1))
    model = segmenter.build_segmenter((8, 8, 16)).eval()
    assert segmenter.segment(model, images).shape == (2, 12, side, side)


def test_pictures_are_segmented_alike_however_many_go_at_once():
    model = UNet2DModel.from_pretrained(SHIPPED).eval()
    images = segmenter.sample_shown("two", 5, 2, "test").images
    together, alone = (segmenter.segment(model, images, batch) for batch in (5, 1))
    assert (together != alone).mean() < 1e-4  # a logit near zero may fall either way


def test_a_saved_segmenter_takes_half_the_room_and_loads_as_float32(tmp_path):
    model = segmenter.build_segmenter((8, 8, 16)).eval()
    segmenter.save_segmenter(model, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    count = sum(value.numel() for value in model.parameters())
    assert 2 * count < file.stat().st_size < 2.4 * count
    assert {value.dtype for value in model.parameters()} == {torch.float32}  # the model itself is as it was
    again = UNet2DModel.from_pretrained(tmp_path)
    for (name, value), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert other.dtype == torch.float32 and torch.equal(other, value.half().float()), name


def test_the_shipped_segmenter_finds_subjects_that_it_never_saw():
    numbers = segmenter.measure_segmenter(UNet2DModel.from_pretrained(SHIPPED).eval(), count=60, seed=5)
    for kind in segmenter.KINDS:
        assert numbers[f"{kind}_iou"] >= 0.9 and numbers[f"{kind}_below_half"] <= 0.05, kind
        assert numbers[f"{kind}_chance"] < numbers[f"{kind}_iou"]
    assert numbers["two_union"] < 0.6


def test_the_shipped_weights_are_small_and_name_no_folder():
    sizes = [path.stat().st_size for path in SHIPPED.glob("*.safetensors")]
    assert len(sizes) == 1 and sizes[0] <= 1.5e6
    assert "/" not in (SHIPPED / "config.json").read_text(encoding="utf-8")
