"""The toybox world: what a mask, a caption, a split and a photo say, and that a seed decides every pixel."""

import zlib
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.path import Path as Outline
from scipy.ndimage import binary_dilation

from focusdpo_lib.toybox import world
from focusdpo_lib.toybox.settings import SETTINGS
from focusdpo_lib.toybox.world import Identity, Placement, Scene

MUG = Identity("mug", "red", "blue", "stripes", 0, "white")
HOUSE = Identity("house", "red", "blue", "dots", 0, "white")


def random_scenes(subjects, count=20, seed=0):
    rng = np.random.default_rng(seed)
    return [world.sample_scene(rng, world.sample_subjects(rng, subjects)) for _ in range(count)]


def test_the_world_is_as_rich_as_the_design_says():
    assert len(world.CLASSES) >= 12
    assert len(world.COLOURS) == 12
    assert len(world.PATTERNS) == len(world.ANGLES) == 4
    assert len(SETTINGS) >= 8


# --- Masks ---


def test_a_mask_is_the_silhouette_at_its_place():
    """A house by hand: its wall and roof as polygons, scaled by the radius about the centre."""
    placement = Placement(0.4, 0.55, 0.3)
    _, masks = world.render(Scene("grass", (HOUSE,), (placement,)))
    centres = (np.indices((64, 64))[::-1].reshape(2, -1).T + 0.5) / 64
    own = (centres - [placement.x, placement.y]) / placement.radius
    wall = Outline([(-0.74, -0.15), (0.74, -0.15), (0.74, 0.95), (-0.74, 0.95), (-0.74, -0.15)])
    roof = Outline([(-0.98, -0.05), (0, -0.95), (0.98, -0.05), (-0.98, -0.05)])
    inside = (wall.contains_points(own) | roof.contains_points(own)).reshape(64, 64)
    assert masks[0][inside].all()
    around = binary_dilation(inside, iterations=3)  # a pixel, of the pointed eaves even two, is covered in part
    assert not masks[0][~around].any()


@pytest.mark.parametrize("subjects", [1, 2])
def test_a_mask_holds_exactly_the_pixels_that_a_subject_touches(subjects):
    """Only subjects are lit by `light`: in the dark they alone change. A white rim shows the least coverage."""
    for scene in random_scenes(subjects):
        scene = replace(
            scene, identities=tuple(replace(i, base="red", accent="blue", trim="white") for i in scene.identities)
        )
        bright, masks = world.render(replace(scene, light=1.0))
        dark, _ = world.render(replace(scene, light=0.0))
        touched = (bright != dark).any(-1)
        assert not touched[~masks.any(0)].any()
        assert touched[masks.any(0)].mean() > 0.97  # the rest is covered by less than one grey level


def test_two_subjects_hardly_touch_and_every_subject_is_large_enough_for_a_token():
    for scene in random_scenes(2, 40):
        _, masks = world.render(scene)
        assert (masks[0] & masks[1]).sum() <= 6  # tilted silhouettes' edges, in one scene of a thousand
        assert (masks.sum((1, 2)) > 0.03 * 64 * 64).all()


def test_other_identities_change_pixels_inside_the_masks_only_and_no_silhouette():
    rng = np.random.default_rng(1)
    for scene in random_scenes(2):
        others = tuple(world.sample_identity(rng, "train", i.class_name) for i in scene.identities)
        image, masks = world.render(scene)
        changed, same = world.render(world.with_identities(scene, others))
        assert np.array_equal(masks, same)
        assert not (image != changed).any(-1)[~masks.any(0)].any()


def test_other_classes_cannot_take_the_place_of_a_subject():
    scene = Scene("snow", (MUG,), (Placement(0.5, 0.5, 0.3),))
    with pytest.raises(ValueError, match="keeps the silhouettes"):
        world.with_identities(scene, (HOUSE,))


@pytest.mark.parametrize("class_name", world.CLASSES)
def test_every_attribute_shows_in_every_class_in_scenes_and_in_references(class_name):
    identity = replace(MUG, class_name=class_name)
    changes = {"base": "green", "accent": "green", "pattern": "spot", "trim": "green", "angle": 90}
    for subjects in ((identity,), (replace(HOUSE, class_name="star"), identity)):
        scene = world.sample_scene(np.random.default_rng(0), subjects, "snow")
        before, _ = world.render(scene)
        for name, value in changes.items():
            after, _ = world.render(replace(scene, identities=(*subjects[:-1], replace(identity, **{name: value}))))
            assert (np.abs(before.astype(int) - after).max(-1) > 30).sum() >= 8, name
    before = world.halve(world.photo(identity, 3))
    for name, value in changes.items():
        after = world.halve(world.photo(replace(identity, **{name: value}), 3))
        assert (np.abs(before.astype(int) - after).max(-1) > 30).sum() >= 8, name


# --- Captions and splits ---


def test_a_caption_names_class_and_setting_and_nothing_else():
    rng = np.random.default_rng(0)
    for _ in range(20):
        names = tuple(str(name) for name in rng.choice(world.CLASSES, 2, replace=False))
        setting = str(rng.choice(list(SETTINGS)))
        scenes = [
            world.sample_scene(rng, tuple(world.sample_identity(rng, "train", name) for name in names), setting)
            for _ in range(2)
        ]
        assert scenes[0].identities != scenes[1].identities
        assert scenes[0].caption == scenes[1].caption == f"a {names[0]} and a {names[1]} {SETTINGS[setting][1]}"


def test_a_checksum_of_the_attributes_fixes_the_split_and_a_twentieth_each_is_held_out():
    bucket = zlib.crc32(b"mug/red/blue/stripes/0/white") % 20
    assert MUG.split == {0: "test", 1: "validation"}.get(bucket, "train")
    rng = np.random.default_rng(0)
    words = (world.CLASSES, [*world.COLOURS], [*world.COLOURS], ["spot", "stripes"])
    splits = [
        Identity(*(str(rng.choice(v)) for v in words), int(rng.choice(world.ANGLES)), str(rng.choice([*world.COLOURS])))
        for _ in range(4000)
    ]
    splits = [identity.split for identity in splits]
    for held_out in ("validation", "test"):
        assert 0.03 < splits.count(held_out) / 4000 < 0.07


def test_identities_that_look_alike_are_one_and_held_out_only_if_every_angle_is():
    assert Identity("mug", "red", "blue", "dots", 90, "white") == Identity("mug", "red", "blue", "dots", 0, "white")
    assert Identity("mug", "red", "blue", "plaid", 135, "white").angle == 45
    assert len({Identity("mug", "red", "blue", "stripes", angle, "white") for angle in world.ANGLES}) == 4
    rng, order, mixed = np.random.default_rng(1), ("train", "validation", "test"), 0
    for _ in range(300):
        base, accent, trim = (str(colour) for colour in rng.choice([*world.COLOURS], 3, replace=False))
        identity = Identity("mug", base, accent, str(rng.choice(["dots", "plaid"])), int(rng.choice([0, 45])), trim)
        keys = [f"mug/{base}/{accent}/{identity.pattern}/{identity.angle + turn}/{trim}".encode() for turn in (0, 90)]
        old = [{0: "test", 1: "validation"}.get(zlib.crc32(key) % 20, "train") for key in keys]
        assert identity.split == min(old, key=order.index)
        mixed += old[0] != old[1]
    assert mixed > 20


def test_no_identity_of_one_split_renders_to_the_pixels_of_another_split_s():
    rng, drawn = np.random.default_rng(2), {}
    place = (Placement(0.5, 0.5, 0.34),)
    for split in ("train", "validation", "test"):
        identities = {world.sample_identity(rng, split) for _ in range(150)}
        # With every angle a pattern is given: of dots and plaid some look the same.
        turned = {replace(i, angle=angle) for i in identities for angle in (i.angle, (i.angle + 90) % 180)}
        for identity in [i for i in turned if i.split == split]:
            pixels = world.render(Scene("wood", (identity,), place))[0].tobytes()
            assert drawn.setdefault(pixels, (identity, split)) == (identity, split)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_samples_come_from_their_split_with_three_colours(split):
    rng = np.random.default_rng(0)
    for _ in range(30):
        for identity in world.sample_subjects(rng, 2, split):
            assert identity.split == split
            assert len({identity.base, identity.accent, identity.trim}) == 3


def test_two_subjects_are_of_two_classes_and_stand_in_either_order():
    scenes = random_scenes(2, 40)
    assert all(a.class_name != b.class_name for a, b in (scene.identities for scene in scenes))
    left = [scene.placements[0].x < scene.placements[1].x for scene in scenes]
    assert 0.2 < np.mean(left) < 0.8


def test_three_subjects_are_refused():
    with pytest.raises(ValueError, match="one or two subjects, not 3"):
        world.sample_placements(np.random.default_rng(0), 3)


# --- Determinism, photos and references ---


def test_a_scene_is_the_same_every_time_and_its_seed_varies_the_setting():
    for scene in random_scenes(2, 5):
        image, masks = world.render(scene)
        again, same = world.render(scene)
        assert np.array_equal(image, again)
        assert np.array_equal(masks, same)
        other, _ = world.render(replace(scene, seed=scene.seed + 1))
        assert (image != other).any(-1)[~masks.any(0)].any()


def test_the_generator_s_state_decides_the_sample():
    assert random_scenes(2, 5, seed=3) == random_scenes(2, 5, seed=3)
    assert random_scenes(2, 5, seed=3) != random_scenes(2, 5, seed=4)


def test_photos_of_one_identity_differ_in_pose_and_are_fixed_by_their_seed():
    first, again, other = (world.photo(MUG, seed) for seed in (1, 1, 2))
    assert first.shape == (64, 64, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first[0, 0].min() > 150  # the backdrop is pale


def test_a_reference_is_a_photo_at_half_size_averaged_over_two_by_two_pixels():
    photo = world.photo(MUG, 1)
    small = world.halve(photo)
    assert small.shape == (world.REFERENCE_SIZE, world.REFERENCE_SIZE, 3)
    assert small[5, 7, 1] == round(float(photo[10:12, 14:16, 1].mean()))


def test_edges_are_anti_aliased():
    """A scene at twice the size, averaged, is nearly the scene: a hard edge would be off by half a step in colour."""
    scene = Scene("tiles", (replace(MUG, class_name="heart"),), (Placement(0.5, 0.5, 0.35, 20),))
    image, masks = world.render(scene)
    large = world.halve(world.render(scene, 128)[0])
    assert np.abs(image.astype(int) - large)[masks[0]].mean() < 8
