"""The toybox's encoders: what the reader's slots mean, how DINO's teacher moves, what CLIP is trained on, and that all
of them resume to the bit and come back from disk through the ordinary loaders."""

import copy
import math
from functools import partial

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import ViTModel

from focusdpo_lib.evaluation.encoders import DinoEncoder
from focusdpo_lib.toybox import clip, dino, reader, segmenter, world
from focusdpo_lib.toybox.batches import ABSENT, VALUES, generator, imperfect, sample_scenes, slot_labels, to_pixels
from focusdpo_lib.toybox.fitting import sound_backward

torch.set_num_threads(1)

MUG = world.Identity("mug", "red", "blue", "dots", 0, "white")
DUCK = world.Identity("duck", "yellow", "green", "stripes", 45, "black")

TRAIN = {
    "reader": partial(reader.train_reader, batch=4, pool=8, width=16),
    "dino": partial(dino.train_dino, batch=4, pool=8, prototypes=16, width=32, layers=1),
    "clip": partial(clip.train_clip, batch=12, pool=240, width=8),
    "segmenter": partial(segmenter.train_segmenter, batch=2, pool=4, channels=(8, 16)),
}


def read(identity, **changes):
    """What a perfect reader says of an identity, with some values changed."""
    return {name: getattr(identity, name) for name in world.ATTRIBUTES} | {"x": 0.5} | changes


class Killed(Exception):
    pass


@pytest.mark.parametrize("name", TRAIN)
def test_a_killed_training_resumes_to_the_bit(name, tmp_path, monkeypatch):
    train = TRAIN[name]
    unbroken, _ = train(tmp_path / "unbroken", steps=6, log_every=2)
    module = {"reader": reader, "dino": dino, "clip": clip, "segmenter": segmenter}[name]
    whole_generator = module.generator

    def dies_at_step_4(*key):
        if key[-1] == 4:
            raise Killed
        return whole_generator(*key)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, "generator", dies_at_step_4)
        train(tmp_path / "broken", steps=6, log_every=2, save_every_s=0)
    resumed, curve = train(tmp_path / "broken", steps=6, log_every=2)
    assert [row["step"] for row in curve] == [2, 4, 6]
    for (key, value), other in zip(unbroken.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(value, other), key


def test_pools_depend_on_seed_and_split_alone():
    first, again, other = sample_scenes(6, 3), sample_scenes(6, 3), sample_scenes(6, 4)
    assert np.array_equal(first.images, again.images) and first.captions == again.captions
    assert not np.array_equal(first.images, other.images)


def test_slots_are_left_to_right_and_the_second_of_a_single_is_empty():
    scenes = sample_scenes(40, 0)
    assert (scenes.places[1::2, 0, 0] < scenes.places[1::2, 1, 0]).all()
    assert not scenes.places[::2, 1].any()
    assert scenes.labels[0, 1].tolist() == [VALUES["class_name"].index("none")] + [ABSENT] * 4
    names = [VALUES["class_name"][k] for k in scenes.labels[1, :, 0]]
    assert sorted(names) == sorted(scenes.captions[1].split()[1:5:3])


def test_labels_of_a_slot_are_indices_into_the_values():
    labels = slot_labels(MUG)
    assert [VALUES[name][k] for name, k in zip(world.ATTRIBUTES, labels, strict=True)] == [
        "mug", "red", "blue", "dots", "white",
    ]  # fmt: skip


def test_imperfect_images_stay_near_the_render_and_a_quarter_is_untouched():
    pixels = to_pixels(sample_scenes(200, 0).images)
    changed = imperfect(pixels, generator(0))
    untouched = (changed == pixels).flatten(1).all(1).float().mean()
    assert 0.15 < untouched < 0.35
    assert changed.abs().max() <= 1 and F.mse_loss(changed, pixels) < 0.02


def hand_made(*slots):
    """Outputs of one image whose slots say what the given dicts say."""
    outputs = {}
    for name, values in VALUES.items():
        outputs[name] = torch.zeros(1, 2, len(values))
        for slot, said in enumerate(slots):
            outputs[name][0, slot, values.index(said[name])] = 5.0
    outputs["place"] = torch.tensor([[[said["x"], 0.5, 0.2] for said in slots]])
    return outputs


def test_the_reader_reports_slots_from_left_to_right_with_their_place():
    (found,) = reader.decode(hand_made(read(DUCK, x=0.25), read(MUG, x=0.75)))
    assert found == [read(DUCK, x=0.25), read(MUG, x=0.75)]


def test_a_slot_of_class_none_is_no_subject():
    (found,) = reader.decode(hand_made(read(DUCK, class_name="none"), read(MUG)))
    assert [subject["class_name"] for subject in found] == ["mug"]


def test_an_empty_slot_trains_no_attribute_and_no_place():
    outputs = {name: torch.randn(1, 2, len(values), requires_grad=True) for name, values in VALUES.items()}
    outputs["where"] = torch.randn(1, 2, 256, requires_grad=True)
    outputs["place"] = torch.rand(1, 2, 3, requires_grad=True)
    labels = torch.tensor([[slot_labels(MUG), slot_labels(None)]])
    reader.reader_loss(outputs, labels, torch.tensor([[[0.3, 0.5, 0.2], [0, 0, 0]]])).backward()
    for name in ("base", "accent", "pattern", "trim", "where", "place"):
        assert outputs[name].grad[0, 0].any() and not outputs[name].grad[0, 1].any(), name
    assert outputs["class_name"].grad[0, 1].any()  # it learns that nothing is there


def test_a_cut_out_is_the_square_about_its_place():
    images = torch.arange(64.0).expand(2, 3, 64, 64) * torch.tensor([1, -1]).view(2, 1, 1, 1)  # a pixel is its column
    radius = 20 / 64 / reader.REACH  # the square is 40 pixels across, as the cut-out
    cuts = reader.cut_out(images, torch.tensor([[[0.5, 0.5, radius], [0.375, 0.5, radius / 2]]] * 2))
    whole, finer = torch.arange(12.0, 52.0), torch.linspace(13.75, 33.25, 40)  # half the size, twice as fine
    for cut, expected in zip(cuts, (whole, finer, -whole, -finer), strict=True):
        assert torch.allclose(cut[0, 0], expected, atol=1e-3)


def test_a_reader_in_training_looks_where_it_is_told_and_else_where_it_found():
    torch.manual_seed(0)
    model, pixels = reader.Reader(16).eval(), to_pixels(sample_scenes(2, 0).images)
    alone = model(pixels)
    told = model(pixels, torch.tensor([[[0.2, 0.2, 0.2], [0, 0, 0]]] * 2))
    assert not torch.allclose(told["trim"][:, 0], alone["trim"][:, 0])
    assert torch.allclose(told["trim"][:, 1], alone["trim"][:, 1])


def test_attention_is_drawn_to_the_subjects_column_and_row():
    place, labels = torch.tensor([[[0.2, 0.8, 0.25], [0, 0, 0]]]), torch.tensor([[slot_labels(MUG), slot_labels(None)]])
    outputs = {name: torch.zeros(1, 2, len(values)) for name, values in VALUES.items()} | {"place": place}
    losses = {}
    for row, column in ((12, 3), (3, 12)):  # of the 16 × 16 cells, (12, 3) is at x = 3.5 / 16, y = 12.5 / 16
        where = torch.zeros(1, 2, 16, 16)
        where[0, 0, row, column] = 5
        losses[row] = reader.reader_loss(outputs | {"where": where.flatten(2).log_softmax(-1)}, labels, place)
    assert losses[12] < losses[3]
    cells = reader.Locator(16).cells.view(16, 16, 2)
    assert cells[12, 3].tolist() == [3.5 / 16, 12.5 / 16]


def test_magnified_subjects_are_where_the_places_say():
    scenes = sample_scenes(60, 0)
    pixels, places = to_pixels(scenes.images), torch.from_numpy(scenes.places)
    larger, moved = reader.magnify(pixels, places, generator(0))
    assert torch.equal(moved[1::2], places[1::2]) and torch.allclose(larger[1::2], pixels[1::2], atol=1e-4)
    assert 8 < (moved[::2, 0, 2] > places[::2, 0, 2]).sum() < 22  # about half of the 30 single subjects
    x, y, radius = moved[::2, 0].unbind(-1)
    inside = torch.stack([x - radius, 1 - x - radius, y - radius, 1 - y - radius])
    assert inside.min() > -1e-6 and radius.max() < 0.47
    # what is cut out about a subject is the same before and after
    before, after = reader.cut_out(pixels, places)[::4], reader.cut_out(larger, moved)[::4]
    assert (before - after).abs().mean() < 0.05


def test_the_reader_learns_eight_images_by_heart():
    torch.manual_seed(0)
    model, scenes = reader.Reader(16), sample_scenes(8, 0)
    pixels, labels, places = to_pixels(scenes.images), torch.from_numpy(scenes.labels), torch.from_numpy(scenes.places)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(150):
        loss = reader.reader_loss(model(pixels, places), labels, places)
        optimizer.zero_grad()
        with sound_backward():
            loss.backward()
        optimizer.step()
    assert reader.share_right(model(pixels), labels).tolist() == [1.0] * 5
    found = model.read(pixels)
    assert [len(subjects) for subjects in found] == [1, 2] * 4
    assert all(left["x"] < right["x"] for left, right in found[1::2])


def test_the_reader_comes_back_from_disk(tmp_path):
    model = reader.Reader(16).eval()
    reader.save_reader(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    loaded, pixels = reader.Reader.from_pretrained(tmp_path), torch.randn(2, 3, 64, 64)
    for name, value in model(pixels).items():
        assert torch.equal(value, loaded(pixels)[name]), name


def test_distillation_is_the_cross_entropy_between_different_views():
    student, teacher, centre = torch.randn(3, 2, 5).double(), torch.randn(2, 2, 5).double(), torch.randn(5).double()
    terms = []
    for t, s in ((0, 1), (0, 2), (1, 0), (1, 2)):  # the photo's and the scene's target, each for the two other views
        for b in range(2):
            p = [math.exp((teacher[t, b, k] - centre[k]) / 0.04) for k in range(5)]
            q = [math.exp(student[s, b, k] / 0.1) for k in range(5)]
            terms.append(-sum(p[k] / sum(p) * math.log(q[k] / sum(q)) for k in range(5)))
    expected = sum(terms) / len(terms)
    assert dino.distillation_loss(student, teacher, centre).item() == pytest.approx(expected, rel=1e-9)


def test_koleo_is_minus_the_log_distance_to_the_nearest_neighbour():
    angles = torch.tensor([[0.0, 0.3, 2.0], [1.0, 2.5, 1.6]])  # on the unit circle a chord is 2 sin(angle / 2)
    cls = torch.stack([angles.cos(), angles.sin()], -1)
    gaps = [[0.3, 0.3, 1.7], [0.6, 0.9, 0.6]]
    expected = -np.mean([math.log(2 * math.sin(gap / 2) + 0.01) for row in gaps for gap in row])
    assert dino.koleo(cls).item() == pytest.approx(expected, rel=1e-5)


def test_twins_share_their_pictures_but_for_the_subject():
    pictures, labels = dino.sample_views(12, 0)
    pictures = pictures.astype(int)
    assert labels.shape == (12, 2, 5) and ((labels[:, 0] != labels[:, 1]).sum(-1) <= 1).all()
    differ = (pictures[:, 0] != pictures[:, 1]).any(-1).mean((2, 3))  # (12, 3): share of pixels
    assert (differ[:, 0] > 0).mean() > 0.8 and differ.max() < 0.85
    corners = pictures[:, :, 0, :2, :2]
    assert np.array_equal(corners[:, 0], corners[:, 1])  # the photo's backdrop is the twin's


def test_the_heads_read_labels_off_the_cls_tokens_of_every_view():
    model = dino.Projector(dino.build_dino(32, 1), 8)
    for head in model.heads:
        torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
    cls, labels = F.normalize(torch.randn(2, 3, 32), dim=-1), torch.zeros(3, 5, dtype=torch.long)
    uniform = np.mean([math.log(len(values)) for values in VALUES.values()])
    assert model.label_loss(cls, labels).item() == pytest.approx(uniform, rel=1e-5)
    model.heads[0].bias.data[0] = 50.0  # sure of label 0 of the first attribute, in both views
    without = np.mean([0.0, *(math.log(len(values)) for values in list(VALUES.values())[1:])])
    assert model.label_loss(cls, labels).item() == pytest.approx(without, rel=1e-4)


def test_dino_is_trained_on_what_the_scores_show_it(tmp_path):
    images = [Image.fromarray(world.photo(identity, 3)) for identity in (MUG, DUCK)]
    model = dino.build_dino(32, 1).eval()
    dino.save_dino(model, tmp_path)
    scored = DinoEncoder(str(tmp_path)).images(images)
    with torch.no_grad():
        trained = dino.embed(model, to_pixels(np.stack([np.asarray(image) for image in images])))
    assert torch.allclose(scored, trained, atol=1e-5)


def test_centring_follows_the_teachers_mean():
    centre = dino.Centre(2)
    centre.move(torch.tensor([[[1.0, 0.0], [3.0, 0.0]], [[1.0, 2.0], [3.0, 2.0]]]))
    assert centre.value.tolist() == pytest.approx([0.2, 0.1])
    centre.move(torch.zeros(2, 1, 2))
    assert centre.value.tolist() == pytest.approx([0.18, 0.09])


def test_the_teacher_is_a_moving_average_of_the_student():
    student = dino.Projector(dino.build_dino(32, 1), 8)
    teacher = copy.deepcopy(student)
    before = teacher.prototypes.detach().clone()
    with torch.no_grad():
        student.prototypes.add_(1.0)
    dino.move_teacher(teacher, student, 0.9)
    assert torch.allclose(teacher.prototypes, before + 0.1)
    assert dino.teacher_momentum(0, 100) == pytest.approx(0.98)
    assert dino.teacher_momentum(50, 100) == pytest.approx(0.99)
    assert dino.teacher_momentum(100, 100) == pytest.approx(1.0)


def test_a_crop_holds_the_whole_subject():
    rng = np.random.default_rng(0)
    for _ in range(50):
        place = world.sample_placements(rng, 2)[0]
        canvas = np.zeros((64, 64, 3), np.uint8)
        cx, cy, r = (int(64 * v) for v in (place.x, place.y, place.radius))
        canvas[max(cy - r, 0) : cy + r, max(cx - r, 0) : cx + r] = 255
        crop = dino.crop(canvas, dino.crop_box(place, rng))
        assert crop.shape == canvas.shape and crop.mean() >= canvas.mean() - 3  # nothing of the square is cut away


def test_changing_one_attribute_changes_nothing_else():
    rng = np.random.default_rng(0)
    for name in world.ATTRIBUTES:
        other = dino.change(MUG, name, rng)
        assert [field for field in ("class_name", "base", "accent", "pattern", "angle", "trim")
                if getattr(other, field) != getattr(MUG, field)] == [name]  # fmt: skip
        assert len({other.base, other.accent, other.trim}) == 3


def test_dino_comes_back_through_transformers(tmp_path):
    model = dino.build_dino(32, 1).eval()
    dino.save_dino(model, tmp_path)
    loaded, pixels = ViTModel.from_pretrained(tmp_path, add_pooling_layer=False).eval(), torch.randn(2, 3, 64, 64)
    assert torch.allclose(dino.embed(model, pixels), dino.embed(loaded, pixels), atol=1e-5)


def test_no_two_images_of_a_clip_batch_show_the_same_content():
    data = clip.Captioned(1200, 0)
    for step in range(5):
        pixels, captions = data.batch(48, generator(step))
        contents = {" ".join(sorted(caption.split())) for caption in captions}
        assert len(contents) == len(captions) == len(pixels) == 48
        parsed = [clip.parse(caption) for caption in captions]
        assert len({phrase for _, phrase in parsed} - {""}) == 2  # settings
        assert [sum(len(classes) == 2 for classes, _ in parsed), sum(phrase == "" for _, phrase in parsed)] == [32, 4]


def test_a_caption_falls_into_classes_and_setting():
    assert clip.parse("a mug and a duck on a beach") == (["mug", "duck"], "on a beach")
    assert clip.parse("a mug in the snow") == (["mug"], "in the snow")
    assert clip.parse("a cat") == (["cat"], "")


def test_clip_comes_back_through_open_clip(tmp_path):
    model = clip.build_clip(8).eval()
    clip.save_clip(model, tmp_path)
    loaded, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    captions = ["a mug and a duck on a beach", "a cat"]
    assert torch.equal(tokenizer(captions), clip.tokenize(captions))
    assert torch.equal(model.encode_text(tokenizer(captions)), loaded.eval().encode_text(clip.tokenize(captions)))
    scene = sample_scenes(1, 0).images
    pixels = preprocess(Image.fromarray(scene[0]))[None]
    assert torch.allclose(pixels, to_pixels(scene), atol=1e-6)  # the loader's preprocessing is the training's
    assert torch.equal(model.encode_image(pixels), loaded.encode_image(pixels))


def test_every_caption_has_its_own_tokens():
    phrases = [phrase for _, phrase in clip.SETTINGS.values()]
    captions = [f"a {name} {phrase}" for name in world.CLASSES for phrase in phrases]
    assert len({tuple(row) for row in clip.tokenize(captions).tolist()}) == len(captions)


@pytest.mark.parametrize("name", TRAIN)
def test_measurements_are_numbers_for_the_card(name, tmp_path):
    model, _ = TRAIN[name](tmp_path, steps=1)
    measure = {
        "reader": partial(reader.measure_reader, count=6),
        "dino": partial(dino.measure_dino, subjects=4, scenes=2),
        "clip": partial(clip.measure_clip, count=6),
        "segmenter": partial(segmenter.measure_segmenter, count=8),
    }[name]
    numbers = measure(model)
    assert numbers and all(isinstance(value, float) for value in numbers.values())
    assert numbers == measure(model) or any(math.isnan(value) for value in numbers.values())
