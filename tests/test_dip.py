"""The DIP dataset: what a loser may and may not change, and what happens to a file or row that is not sound."""

import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from focusdpo_lib.dip import toybox
from focusdpo_lib.dip.dataset import (
    SPLITS,
    DatasetError,
    Pair,
    defect,
    read_dataset,
    require_reference_masks,
    write_dataset,
)
from focusdpo_lib.params import Dip
from focusdpo_lib.stages import build_pairs
from focusdpo_lib.toybox.world import CLASSES, Identity, Placement, Scene, halve, photo, render, with_identities

MUG = Identity("mug", "red", "blue", "dots", 0, "green")
CAT = Identity("cat", "white", "black", "stripes", 90, "orange")
ONE = Dip(two_subject_share=0.0)
SWAPS = Dip(two_subject_share=1.0, swap_share=1.0)
CHANGES = Dip(two_subject_share=1.0, swap_share=0.0)


def toybox_pairs(settings, split="train", count=40):
    return [toybox.make_pair(settings, split, i) for i in range(count)]


def identities(pair):
    """The identities of the winner and of the loser, from the provenance."""
    win = [Identity(**values) for values in pair.provenance["scene"]["identities"]]
    return win, [Identity(**values) for values in pair.provenance["lose_identities"]]


def tiny(**values):
    """A sound pair of 4×4 pixels, drawn by hand: the loser differs at one pixel, inside the mask."""
    win, mask = np.full((4, 4, 3), 100, np.uint8), np.zeros((4, 4), bool)
    mask[1:3, 1:3] = True
    lose = win.copy()
    lose[1, 1] = 200
    reference, shown = np.zeros((2, 2, 3), np.uint8), np.array([[True, False], [True, False]])
    sound = Pair("train-7", "a mug", win, lose, (reference,), (mask,), ("mug",), ("red",), ("blue",), "train", (shown,))
    return replace(sound, **values)


def changed(image, value, *at):
    image = image.copy()
    image[at] = value
    return image


# --- What the toybox's losers change ---


@pytest.mark.parametrize("settings", [ONE, SWAPS, CHANGES])
def test_winner_and_loser_are_equal_outside_the_masks_and_differ_in_each_disturbed_one(settings):
    for pair in toybox_pairs(settings):
        differs = (pair.win != pair.lose).any(-1)
        assert not differs[~pair.prior.any(0)].any()
        for mask, changes in zip(pair.masks, pair.disruption["changes"], strict=True):
            others = pair.prior.sum(0) > 1  # where two subjects touch, one mask's pixel may show the other's change
            assert (differs & mask & ~others).any() == bool(changes)


@pytest.mark.parametrize("strength", [1, 2, 3, 4])
def test_strength_is_the_number_of_attributes_changed_in_a_disturbed_subject(strength):
    for pair in toybox_pairs(Dip(strengths=[strength], swap_share=0.0)):
        counts = [len(changes) for changes in pair.disruption["changes"]]
        assert set(counts) <= {0, strength} and max(counts) == strength
        for win, lose in zip(*identities(pair), strict=True):
            assert win.class_name == lose.class_name and len({lose.base, lose.accent, lose.trim}) == 3


def test_every_change_that_counts_can_be_seen():
    # Undoing any one of the changes must alter at least 4 % of the subject by 16 of 255 levels or more.
    rng = np.random.default_rng(0)
    for name in CLASSES * 6:
        before = toybox.sample_subjects(rng, 1)[0]
        before = replace(before, class_name=name)
        after = toybox.change(rng, before, int(rng.integers(1, 4)), "test")
        scene = Scene("snow", (after,), (Placement(0.5, 0.55, 0.215),))
        image, masks = render(scene)
        for attribute in toybox.changes(before, after):
            undone = replace(after, **{attribute: getattr(before, attribute)})
            other, _ = render(with_identities(scene, (undone,)))
            visible = np.abs(image.astype(int) - other).max(-1) >= 16
            assert visible.sum() >= 0.04 * masks[0].sum(), (before, after, attribute)


def test_a_quarter_turn_of_dots_or_plaid_is_no_change_because_it_shows_nothing():
    rng = np.random.default_rng(0)
    for _ in range(200):
        for pattern, before in (("dots", 0), ("plaid", 45)):
            after = toybox.change(rng, replace(MUG, pattern=pattern, angle=before), 1, "test").angle
            assert after == before or (after - before) % 90 == 45
        assert toybox.change(rng, replace(MUG, pattern="spot"), 1, "test").angle == MUG.angle


def test_a_swap_exchanges_attributes_between_the_two_subjects_and_a_pattern_takes_its_angle_along():
    mug, cat = toybox.swap(np.random.default_rng(0), (MUG, CAT), 4, "test")
    assert mug == replace(CAT, class_name="mug") and cat == replace(MUG, class_name="cat")
    for pair in toybox_pairs(SWAPS):
        (a, b), (a_lose, b_lose) = identities(pair)
        swapped = toybox.changes(a, a_lose)
        assert set(swapped) == set(toybox.changes(b, b_lose)) and pair.disruption["kind"] == "swap"
        assert len(set(swapped) - {"angle"}) == pair.disruption["strength"]
        for name in swapped:
            assert getattr(a_lose, name) == getattr(b, name) and getattr(b_lose, name) == getattr(a, name)


def test_two_subjects_that_share_an_attribute_cannot_swap_all_four():
    assert toybox.swap(np.random.default_rng(0), (MUG, replace(CAT, trim="green")), 4, "test") is None


def test_the_shares_of_two_subject_and_swapped_pairs_are_those_asked_for():
    pairs = toybox_pairs(Dip(two_subject_share=0.5, swap_share=0.3), count=400)
    two = [pair for pair in pairs if len(pair.subjects) == 2]
    assert abs(len(two) - 200) < 40  # 4 standard deviations of a binomial
    assert abs(sum(pair.disruption["kind"] == "swap" for pair in two) / len(two) - 0.3) < 0.13
    one = [sum(map(bool, p.disruption["changes"])) == 1 for p in two if p.disruption["kind"] == "change"]
    assert abs(np.mean(one) - 0.5) < 0.17  # one of two subjects disturbed, or both


def test_no_split_shows_an_identity_of_a_later_one_and_winners_are_disjoint():
    for position, split in enumerate(SPLITS):
        for pair in toybox_pairs(Dip(), split, 60):
            win, lose = identities(pair)
            assert {identity.split for identity in win} == {split}
            assert all(SPLITS.index(identity.split) <= position for identity in lose)


def test_the_references_are_photos_of_the_winners_identities_and_the_prompt_names_classes_only():
    for pair in toybox_pairs(Dip(), count=10):
        win, _ = identities(pair)
        for identity, seed, reference in zip(win, pair.provenance["reference_seeds"], pair.references, strict=True):
            assert reference.shape == (32, 32, 3)
            np.testing.assert_array_equal(reference, halve(photo(identity, seed)))
            assert identity.class_name in pair.prompt


def test_the_provenance_is_enough_to_draw_the_pair_again():
    for pair in toybox_pairs(Dip(), count=10):
        fields = json.loads(json.dumps(pair.provenance))["scene"]
        fields["identities"] = tuple(Identity(**values) for values in fields["identities"])
        fields["placements"] = tuple(Placement(**values) for values in fields["placements"])
        scene = Scene(**fields)
        np.testing.assert_array_equal(render(scene)[0], pair.win)
        np.testing.assert_array_equal(render(with_identities(scene, tuple(identities(pair)[1])))[0], pair.lose)


def test_captions_tell_winner_and_loser_apart():
    assert toybox.describe(MUG) == "a red mug with blue dots and a green trim"
    assert toybox.describe(CAT) == "a white cat with horizontal black stripes and an orange trim"
    spot = replace(MUG, base="orange", pattern="spot", angle=45)
    assert toybox.describe(spot) == "an orange mug with a blue spot and a green trim"
    for pair in toybox_pairs(Dip()):
        differs = [a != b for a, b in zip(pair.captions, pair.disrupted_captions, strict=True)]
        assert differs == [bool(changes) for changes in pair.disruption["changes"]]


def test_a_pair_depends_on_seed_split_and_index_alone(tmp_path):
    small, large = Dip(train_pairs=5, validation_pairs=1), Dip(train_pairs=9, validation_pairs=2)
    for folder, settings in (("small", small), ("again", small), ("large", large)):
        toybox.build(settings, tmp_path / folder)
    files = [tmp_path / folder / "train.parquet" for folder in ("small", "again", "large")]
    assert files[0].read_bytes() == files[1].read_bytes()
    few, many = (pq.read_table(file).to_pylist() for file in (files[0], files[2]))
    assert few == many[:5] and len(many) == 9
    assert not np.array_equal(toybox.make_pair(Dip(seed=1), "train", 0).win, toybox.make_pair(Dip(), "train", 0).win)


# --- The files ---


@pytest.fixture
def folder(tmp_path):
    toybox.build(Dip(train_pairs=6, validation_pairs=2), tmp_path)
    return tmp_path


def test_reading_gives_what_was_written(folder):
    pairs = read_dataset(folder)
    assert {split: len(rows) for split, rows in pairs.items()} == {"train": 6, "validation": 2, "test": 2}
    for split in SPLITS:
        for index, read in enumerate(pairs[split]):
            written = toybox.make_pair(Dip(), split, index)
            for name, value in vars(written).items():
                if name in ("win", "lose", "references", "masks", "reference_masks"):
                    for a, b in zip(np.atleast_1d(getattr(read, name)), np.atleast_1d(value), strict=True):
                        np.testing.assert_array_equal(a, b)
                        assert a.dtype == b.dtype
                else:
                    assert json.dumps(getattr(read, name)) == json.dumps(value), name
            assert read.prior.shape == (len(read.subjects), 64, 64) and read.prior.dtype == bool


def test_rows_are_found_across_row_groups(tmp_path):
    write_dataset(tmp_path, {"train": (tiny(id=f"train-{i}") for i in range(150))})
    rows = read_dataset(tmp_path, ["train"])["train"]
    assert pq.ParquetFile(rows.path).num_row_groups == 3
    assert [pair.id for pair in rows] == [f"train-{i}" for i in range(150)]
    assert [rows[i].id for i in (-1, 63, 64, 149)] == ["train-149", "train-63", "train-64", "train-149"]
    assert [pair.id for pair in rows[62:66]] == ["train-62", "train-63", "train-64", "train-65"]
    with pytest.raises(IndexError, match="has 150 pairs"):
        rows[150]


def test_the_parquet_loads_with_hugging_face_datasets_and_its_images_are_decoded(folder, tmp_path):
    import datasets

    loaded = datasets.load_dataset(
        "parquet", data_files={"train": str(folder / "train.parquet")}, cache_dir=str(tmp_path / "cache")
    )["train"]
    for row, pair in zip(loaded, read_dataset(folder)["train"], strict=True):
        np.testing.assert_array_equal(np.array(row["win"]), pair.win)
        assert len(row["masks"]) == len(row["references"]) == len(pair.subjects)
        np.testing.assert_array_equal(np.array(row["masks"][0]), pair.masks[0] * 255)


# --- Rows that are not sound: refused on writing and on reading, with the row's id ---


SOUND = tiny()
EMPTY = np.zeros((4, 4), bool)
DEFECTS = {
    "its prompt is empty": {"prompt": " "},
    "it names no subject": {"subjects": ()},
    r"one of its subjects has no name \(''\)": {"subjects": ("",)},
    r"one of its subjects has no name \('mug', ' '\)": {"subjects": ("mug", " ")},
    r"1 subject\(s\) \(mug\) but 0 references": {"references": ()},
    r"1 subject\(s\) \(mug\) but 2 references": {"references": SOUND.references * 2},
    r"1 subject\(s\) \(mug\) but 2 masks": {"masks": SOUND.masks * 2},
    r"1 subject\(s\) \(mug\) but 2 captions": {"captions": ("red", "blue")},
    r"1 subject\(s\) \(mug\) but 0 disrupted_captions": {"disrupted_captions": ()},
    "sizes differ: win is 4×4, lose is 4×3, mask 0 is 4×4": {"lose": SOUND.lose[:3]},
    "sizes differ: win is 4×4, lose is 4×4, mask 0 is 2×4": {"masks": (SOUND.masks[0][:, :2],)},
    "the mask of its subject 'mug' is empty": {"masks": (EMPTY,)},
    r"differ outside the masks, at 1 pixel\(s\) by up to 3 levels \(0 allowed; .*dip.tolerance\)": {
        "lose": changed(SOUND.lose, 103, 0, 0)
    },
    "win and lose show the same image": {"lose": SOUND.win},
    "it has 1 references but 2 reference_masks": {"reference_masks": SOUND.reference_masks * 2},
    "it has 1 references but 0 reference_masks": {"reference_masks": ()},
    "the reference mask of its subject 'mug' is 2×1, but the reference is 2×2": {
        "reference_masks": (SOUND.reference_masks[0][:1],)
    },
    "the reference mask of its subject 'mug' is empty": {"reference_masks": (EMPTY[:2, :2],)},
    "it says that it belongs to the split 'test'": {"split": "test"},
}


def test_the_hand_drawn_pair_is_sound(tmp_path):
    assert defect(SOUND) is None
    write_dataset(tmp_path, {"train": [SOUND]})
    assert read_dataset(tmp_path, ["train"])["train"][0].id == "train-7"


@pytest.mark.parametrize(("sentence", "values"), DEFECTS.items())
def test_an_unsound_row_is_refused_on_writing_and_on_reading(sentence, values, tmp_path, monkeypatch):
    pairs = [tiny(id="train-6"), tiny(**values)]
    with pytest.raises(DatasetError, match=f"pair 'train-7' of .*train.parquet: .*{sentence}; correct or drop it"):
        write_dataset(tmp_path, {"train": pairs})
    assert list(tmp_path.iterdir()) == []  # nothing half-written stays
    with monkeypatch.context() as unchecked:
        unchecked.setattr("focusdpo_lib.dip.dataset._check", lambda pair, path, split, seen, *rest: seen.add(pair))
        write_dataset(tmp_path, {"train": pairs})
    with pytest.raises(DatasetError, match=f"pair 'train-7' of .*train.parquet: .*{sentence}; correct or drop it"):
        read_dataset(tmp_path, ["train"])


def test_pairs_without_reference_masks_are_read_and_only_who_needs_them_misses_the_column(tmp_path):
    write_dataset(tmp_path, {"train": [tiny(reference_masks=())]})
    assert "reference_masks" not in pq.read_schema(tmp_path / "train.parquet").names
    assert read_dataset(tmp_path, ["train"])["train"][0].reference_masks == ()
    with pytest.raises(DatasetError, match=r"train.parquet lacks the column reference_masks.* set masks.pool to all"):
        require_reference_masks(tmp_path)
    with pytest.raises(DatasetError, match="it has 1 references but 0 reference_masks"):  # some with and some without
        write_dataset(tmp_path, {"train": [SOUND, tiny(id="train-8", reference_masks=())]})


def test_a_reference_mask_is_where_the_photo_differs_from_one_of_another_identity():
    for pair in toybox_pairs(Dip(), count=10):
        win, lose = identities(pair)
        seeds = pair.provenance["reference_seeds"]
        for before, after, seed, mask in zip(win, lose, seeds, pair.reference_masks, strict=True):
            if before != after:
                differs = (halve(photo(before, seed)) != halve(photo(after, seed))).any(-1)
                assert mask.shape == (32, 32) and differs.any() and not differs[~mask].any()
                assert 0.2 < mask.mean() < 0.75


def test_a_repeated_id_is_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"pair 'train-7' .*: its id occurs twice"):
        write_dataset(tmp_path, {"train": [SOUND, SOUND]})


def test_a_tolerance_admits_what_an_inpainting_model_leaves_outside_but_not_an_undisturbed_loser():
    touched = changed(SOUND.lose, 103, 0, 0)
    assert defect(tiny(lose=touched), tolerance=3) is None
    assert "by up to 3 levels (2 allowed;" in defect(tiny(lose=touched), tolerance=2)
    assert defect(tiny(lose=changed(SOUND.win, 103, 1, 1)), tolerance=3) == "win and lose show the same image"


@pytest.mark.parametrize("levels", [1, 6])
def test_a_dataset_says_with_which_tolerance_it_was_written(tmp_path, levels):
    pair = tiny(lose=changed(SOUND.lose, 100 + levels, 0, 0))
    write_dataset(tmp_path, {"train": [pair]}, tolerance=levels)
    assert [p.id for p in read_dataset(tmp_path, ["train"])["train"]] == [pair.id]
    forget(tmp_path / "train.parquet")  # as other software would have written it
    with pytest.raises(DatasetError, match=f"by up to {levels} levels"):
        read_dataset(tmp_path, ["train"], tolerance=levels - 1)
    assert [p.id for p in read_dataset(tmp_path, ["train"], tolerance=levels)["train"]] == [pair.id]


def forget(path):
    """Rewrites a parquet file without what the kit notes of it."""
    table = pq.read_table(path)
    noted = {key: value for key, value in table.schema.metadata.items() if key != b"focusdpo_tolerance"}
    pq.write_table(table.replace_schema_metadata(noted), path)


# --- Splits in several files ---


@pytest.mark.parametrize(
    "name", ["train-{:05d}-of-00003", "data/train-{:05d}-of-00003", "train-{:05d}-of-00003-a09b74b3"]
)
def test_shards_are_read_as_one_split_in_their_order(tmp_path, name):
    for number in (2, 0, 1):
        write_dataset(tmp_path / "made", {"train": (tiny(id=f"{number}-{i}") for i in range(2))}, tolerance=number)
        shard = tmp_path / f"{name.format(number)}.parquet"
        shard.parent.mkdir(exist_ok=True)
        (tmp_path / "made" / "train.parquet").rename(shard)
    split = read_dataset(tmp_path, ["train"])["train"]
    assert [pair.id for pair in split] == ["0-0", "0-1", "1-0", "1-1", "2-0", "2-1"]
    assert (split[-1].id, split[2].id, split.tolerance) == ("2-1", "1-0", 2)
    require_reference_masks(tmp_path)
    assert build_pairs(tmp_path, "pairs", Dip(folder=str(tmp_path))) == tmp_path
    rewrite(shard, "prompt", lambda text: "", row=0)
    with pytest.raises(DatasetError, match=f"pair '1-0' of {shard}: its prompt is empty"):
        read_dataset(tmp_path, ["train"])
    shard.unlink()
    with pytest.raises(DatasetError, match=r"shards of the train split in .* \(there are 0 of 3, 2 of 3\): fetch"):
        read_dataset(tmp_path, ["train"])


@pytest.mark.parametrize("other", ["train-00000-of-00001", "data/train-00000-of-00001"])
def test_a_split_that_lies_twice_in_a_folder_is_refused(tmp_path, other):
    write_dataset(tmp_path, {"train": [SOUND]})
    (tmp_path / "data").mkdir()
    shutil.copy(tmp_path / "train.parquet", tmp_path / f"{other}.parquet")
    with pytest.raises(DatasetError, match=f"lies twice in .*train.parquet and .*{other}.parquet: keep the one"):
        read_dataset(tmp_path, ["train"])


@pytest.mark.parametrize("splits", [False, True])
def test_what_save_to_disk_wrote_is_named(tmp_path, splits):
    import datasets

    made = datasets.Dataset.from_dict({"id": ["a"]})
    (datasets.DatasetDict({"train": made}) if splits else made).save_to_disk(tmp_path)
    with pytest.raises(DatasetError, match=r"holds what save_to_disk wrote, in Arrow files: write .* as train.parquet"):
        read_dataset(tmp_path, ["train"])


@pytest.mark.parametrize("noted", [b"four", b"-5", b"", b"1.5", b"\xff"])
def test_a_tolerance_that_is_no_number_of_levels_is_named(tmp_path, noted):
    write_dataset(tmp_path, {"train": [SOUND]})
    table = pq.read_table(tmp_path / "train.parquet")
    pq.write_table(table.replace_schema_metadata({"focusdpo_tolerance": noted}), tmp_path / "train.parquet")
    with pytest.raises(DatasetError, match=r"train.parquet says in its metadata that focusdpo_tolerance is .*: write"):
        read_dataset(tmp_path, ["train"])


@pytest.mark.parametrize("check", [True, False])
def test_a_pair_is_looked_over_once_each_time_it_is_read(tmp_path, monkeypatch, check):
    write_dataset(tmp_path, {"train": [tiny(id=f"{i}") for i in range(3)]})
    seen = []
    monkeypatch.setattr("focusdpo_lib.dip.dataset.defect", lambda pair, tolerance: seen.append(pair.id))
    split = read_dataset(tmp_path, ["train"], check=check)["train"]
    assert split[1].id == "1" and seen == (["0", "1", "2", "1"] if check else ["1"])


def rewrite(path, column, value, row=1):
    """Puts another value into one cell of a parquet file."""
    table = pq.read_table(path)
    cells = table[column].to_pylist()
    cells[row] = value(cells[row])
    at = table.schema.get_field_index(column)
    pq.write_table(table.set_column(at, table.schema.field(at), pa.array(cells, table.schema.field(at).type)), path)


def cut(image):
    return {**image, "bytes": image["bytes"][: len(image["bytes"]) // 2]}


def grey(masks):
    png = io.BytesIO()
    Image.new("L", (64, 64), 128).save(png, "PNG")
    return [{"bytes": png.getvalue(), "path": None}, *masks[1:]]


@pytest.mark.parametrize(
    ("column", "value", "sentence"),
    [
        ("win", cut, "its win cannot be read"),
        ("lose", lambda image: {**image, "bytes": b"no image"}, "its lose cannot be read: it is damaged or no"),
        ("lose", lambda image: None, "its lose is empty: store the bytes of an image file, or its path"),
        ("references", lambda images: [cut(images[0]), *images[1:]], r"its references\[0\] cannot be read"),
        ("masks", lambda images: [*images[:-1], cut(images[-1])], r"its masks\[\d\] cannot be read"),
        ("masks", grey, r"its masks\[0\] holds values other than 0 and 255"),
        ("provenance", lambda text: "{half", "its provenance is not JSON"),
        ("prompt", lambda text: None, "its prompt is empty"),
    ],
)
def test_a_damaged_cell_is_named(column, value, sentence, folder):
    rewrite(folder / "train.parquet", column, value)
    with pytest.raises(DatasetError, match=f"pair 'train-00001' of .*train.parquet: {sentence}"):
        read_dataset(folder)
    rows = read_dataset(folder, check=False)["train"]  # unchecked, the other rows can be used
    assert rows[0].id == "train-00000"
    with pytest.raises(DatasetError, match=sentence):
        rows[1]


def test_a_missing_column_a_missing_file_and_an_empty_split_are_named(folder):
    path = folder / "train.parquet"
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["lose", "masks"]), path)
    with pytest.raises(DatasetError, match=r"train.parquet lacks the column\(s\) lose, masks: build it again"):
        read_dataset(folder)
    pq.write_table(table.slice(0, 0), path)
    with pytest.raises(DatasetError, match=r"train.parquet holds no pair"):
        read_dataset(folder)
    path.unlink()
    with pytest.raises(DatasetError, match=r"train.parquet does not exist: build the dataset first"):
        read_dataset(folder)
    with pytest.raises(DatasetError, match=r"the train split for .* has no pair"):
        write_dataset(folder, {"train": []})


@pytest.mark.parametrize("keep", [0, 1, 1000])
def test_a_half_written_file_is_never_taken_for_a_whole_one(keep, folder):
    path = folder / "test.parquet"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DatasetError, match=r"test.parquet is not a whole parquet file: delete it"):
        read_dataset(folder)


def test_a_file_damaged_in_its_middle_is_refused(folder):
    path = folder / "train.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # one bit
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=r"train.parquet is damaged .*delete it and build the dataset again"):
        read_dataset(folder)


def test_a_build_that_is_interrupted_leaves_the_whole_splits_and_no_part_of_one(tmp_path):
    def interrupted():
        yield tiny(id="validation-0", split="validation")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, {"train": [SOUND], "validation": interrupted()})
    assert [path.name for path in tmp_path.iterdir()] == ["train.parquet"]
    assert len(read_dataset(tmp_path, ["train"])["train"]) == 1
