"""Pairs that are there already: own photos as people have them, Subjects200K and UNO-1M in their published layouts."""

import io
import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from focusdpo_lib import params
from focusdpo_lib.dip import sources
from focusdpo_lib.dip.models import StageError
from focusdpo_lib.dip.sources import Source


def settings(folder, kind="photos", **values):
    return params.section("source", {"kind": kind, "folder": str(folder), "size": 32} | values)


def read(folder, kind="photos", **values):
    use = settings(folder, kind, **values)
    return Source(use).open()(list(sources.plan(use)))


# --- own photos ------------------------------------------------------------------------------------------------------


def coloured(width=40, height=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


LINE = {"file_name": "win.png", "prompt": "a red mug on grass", "subjects": ["mug"], "references": ["ref.png"]}


@pytest.fixture
def photos(tmp_path):
    """A winner of 40 × 32, with a mask, and a reference of 32 × 16, with one."""
    PILImage.fromarray(coloured()).save(tmp_path / "win.png")
    PILImage.fromarray(coloured(32, 16, 1)).save(tmp_path / "ref.png")
    for name, (height, width) in {"win_mask.png": (32, 40), "ref_mask.png": (16, 32)}.items():
        mask = np.zeros((height, width), np.uint8)
        mask[4:10, 8:20] = 255
        PILImage.fromarray(mask).save(tmp_path / name)
    return tmp_path


def listed(folder, *lines):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "metadata.jsonl").write_text(text + "\n", encoding="utf-8")
    return folder


def test_a_line_becomes_a_draft_with_its_pictures_and_masks(photos):
    masks = {"masks": ["win_mask.png"], "reference_masks": ["ref_mask.png"]}
    more = {"id": "one", "identities": ["red mug"], "split": "test", "licence": "CC-BY-4.0"}
    first, second = read(listed(photos, LINE | masks | more, "", LINE | {"references": "ref.png"}))
    assert (first.id, first.split, first.identities) == ("one", "test", ("red mug",)) and not first.dropped
    assert np.array_equal(first.win, coloured()[:, 4:36])  # the square in its middle
    assert np.array_equal(first.references[0][8:24], coloured(32, 16, 1))  # padded to a square …
    edge = coloured(32, 16, 1)
    edge = np.concatenate([edge[0], edge[-1], edge[1:-1, 0], edge[1:-1, -1]])
    assert np.abs(first.references[0][:8] - np.median(edge, 0)).max() <= 0.5  # … in the colour of its edge
    assert first.masks[0][4:10, 4:16].all() and first.masks[0].sum() == 6 * 12 and first.masks[0].shape == (32, 32)
    assert first.reference_masks[0].shape == (32, 32) and first.reference_masks[0].sum() == 6 * 12
    assert first.reference_masks[0][12:18, 8:20].all()
    assert first.provenance["synthesis"]["licence"] == "CC-BY-4.0"
    assert (second.id, second.identities, second.masks) == (
        "000003",
        ("ref.png",),
        (),
    ) and second.split in sources.SPLITS


def test_pictures_and_their_masks_are_scaled_alike(photos):
    masks = {"masks": ["win_mask.png"], "reference_masks": ["ref_mask.png"]}
    (draft,) = read(listed(photos, LINE | masks), size=64)
    assert draft.win.shape == (64, 64, 3) and draft.references[0].shape == (64, 64, 3)
    assert draft.masks[0].sum() == 4 * 6 * 12 and draft.masks[0][8:20, 8:32].all()
    assert draft.reference_masks[0].sum() == 4 * 6 * 12


def odd_photo(kind: str) -> bytes:
    """A photo whose left half is red and right half white, as cameras and programs may write it."""
    pixels = np.full((32, 32, 3), 255, np.uint8)
    pixels[:, :16] = (254, 0, 0)
    picture, file = PILImage.fromarray(pixels), io.BytesIO()
    if kind == "exif":  # turned by a quarter, and a tag that says so
        exif = PILImage.Exif()
        exif[0x0112] = 6
        picture.rotate(90, expand=True).save(file, "PNG", exif=exif)
    elif kind == "cmyk":
        picture.convert("CMYK").save(file, "TIFF")
    elif kind == "sixteen":
        PILImage.fromarray(pixels[..., 1].astype(np.uint16) * 257).save(file, "PNG")
    elif kind == "transparent":
        alpha = picture.convert("RGBA")
        alpha.putalpha(PILImage.fromarray(np.where(pixels[..., 1] == 0, 255, 0).astype(np.uint8)))
        alpha.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("kind", ["exif", "cmyk", "sixteen", "transparent"])
def test_photos_are_read_as_a_viewer_shows_them(photos, kind):
    (photos / "win.png").write_bytes(odd_photo(kind))
    (draft,) = read(listed(photos, LINE))
    left, right = draft.win[16, 4].astype(int), draft.win[16, 28].astype(int)
    assert not draft.dropped and (right > 250).all() and left[1:].max() < 5
    assert left[0] > 250 or kind == "sixteen"


def test_a_photo_of_no_use_drops_its_draft_and_no_other(photos):
    (photos / "torn.png").write_bytes((photos / "win.png").read_bytes()[:200])
    grey = np.full((32, 40), 128, np.uint8)
    PILImage.fromarray(grey).save(photos / "grey.png")
    lines = [
        LINE | {"file_name": "torn.png"},
        LINE | {"file_name": "nowhere.png"},
        LINE | {"prompt": "a red cup on grass"},
        LINE | {"masks": ["grey.png"]},
        LINE | {"masks": ["ref_mask.png"]},
        LINE | {"prompt": "two Mugs on grass"},
    ]
    drafts = read(listed(photos, *lines))
    useless = "a picture that cannot be used"
    assert [draft.dropped for draft in drafts] == [
        useless, useless, "its prompt does not name its subject", useless, "a mask is not as large as its picture", "",
    ]  # fmt: skip
    assert {draft.dropped_by for draft in drafts} == {"synthesis", ""}
    assert "nowhere.png is missing" in drafts[1].provenance["synthesis"]["error"]


def refusal(folder, kind="photos", **values):
    with pytest.raises(StageError) as caught:
        sources.plan(settings(folder, kind, **values))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{no", "line 2 of"),
        ("[1]", "is no JSON object"),
        (LINE | {"prompt": ""}, "lacks prompt: add it"),
        ({"file_name": "win.png"}, "lacks prompt, subjects, references"),
        (LINE | {"mask": ["m.png"]}, "has mask, which nobody reads"),
        (LINE | {"references": ["a.png", "b.png"]}, "has 1 subject(s) but 2 references"),
        (LINE | {"subjects": [3]}, "subjects in line 2"),
        (LINE | {"prompt": 3}, "prompt in line 2"),
        (LINE | {"split": "dev"}, "split in line 2"),
    ],
)
def test_a_line_that_says_too_little_or_what_nobody_reads_ends_the_plan(photos, line, says):
    text = refusal(listed(photos, LINE, line))
    assert says in text and "metadata.jsonl" in text


def test_a_folder_without_a_list_is_named(tmp_path):
    assert "metadata.jsonl cannot be read" in refusal(tmp_path)
    assert "correct source.folder" in refusal(tmp_path / "nowhere")
    assert "no row that source's limits let through" in refusal(listed(tmp_path, ""))


def test_no_identity_is_in_two_splits(photos):
    lines = [LINE | {"id": str(n), "identities": [f"mug {n % 20}"]} for n in range(200)]
    even = {"train": 0.5, "validation": 0.25, "test": 0.25}
    drafts = list(sources.plan(settings(listed(photos, *lines), splits=even)))
    splits = {draft.identities[0]: draft.split for draft in drafts}
    assert all(splits[draft.identities[0]] == draft.split for draft in drafts) and set(splits.values()) == {*even}
    assert len(list(sources.plan(settings(photos, limit=7)))) == 7


# --- Subjects200K ----------------------------------------------------------------------------------------------------

COLUMNS = Features(
    {
        "image": Image(),
        "collection": Value("string"),
        "quality_assessment": {
            name: Value("int64") for name in ("compositeStructure", "objectConsistency", "imageQuality")
        },
        "description": {
            **{name: Value("string") for name in ("item", "description_0", "description_1", "category")},
            "description_valid": Value("bool"),
        },
    }
)
SCENES = ("The lounge chair stands in a studio.", "The lounge chair stands in a library.")


def composite(seed=0, side=32, padding=16, width=None):
    """A plain panel with a grey square and a busy one, with black between, and both panels."""
    plain, busy = np.full((side, side, 3), 250, np.uint8), coloured(side, side, seed)
    plain[8:20, 8:20] = 90
    whole = np.zeros((side + padding, width or 2 * (side + padding), 3), np.uint8)
    whole[padding:, padding : padding + side] = plain
    if width is None:
        whole[padding:, 2 * padding + side :] = busy
    return PILImage.fromarray(whole), plain, busy


def row(image=None, quality=(5, 5, 5), collection="collection_2", item="Lounge Chair", scenes=SCENES):
    names = COLUMNS["quality_assessment"]
    return {
        "image": image or composite()[0],
        "collection": collection,
        "quality_assessment": None if quality is None else dict(zip(names, quality, strict=True)),
        "description": {
            "item": item, "description_0": scenes[0], "description_1": scenes[1], "category": "Furniture",
            "description_valid": True,
        },
    }  # fmt: skip


def published(folder, *rows):
    (folder / "data").mkdir()
    half = (len(rows) + 1) // 2
    for number, some in enumerate((rows[:half], rows[half:])):
        if some:
            path = folder / "data" / f"train-0000{number}-of-00002.parquet"
            Dataset.from_list(list(some), features=COLUMNS).to_parquet(path, batch_size=1)
    return folder


def test_the_panels_of_subjects200k_are_cut_as_they_were_put_together(tmp_path):
    image, plain, busy = composite(3)
    (draft,) = read(published(tmp_path, row(image)), "subjects200k")
    assert np.array_equal(draft.references[0], plain) and np.array_equal(draft.win, busy)
    assert (draft.prompt, draft.subjects, draft.identities) == (
        SCENES[1],
        ("Lounge Chair",),
        ("collection_2/lounge chair",),
    )
    assert draft.provenance["synthesis"]["source"] == "Yuanshi/Subjects200K"


def test_the_plainer_panel_is_the_reference_wherever_it_stands(tmp_path):
    image, plain, busy = composite(3)
    turned = np.asarray(image).copy()
    turned[16:, 16:48], turned[16:, 64:] = busy, plain
    folder = published(tmp_path, row(PILImage.fromarray(turned)))
    (draft,) = read(folder, "subjects200k")
    assert np.array_equal(draft.references[0], plain) and draft.prompt == SCENES[0]
    (draft,) = read(folder, "subjects200k", subjects200k={"reference": "first"})
    assert np.array_equal(draft.references[0], busy) and draft.prompt == SCENES[1]


def test_rows_of_subjects200k_that_are_not_good_enough_are_passed_over(tmp_path):
    rows = [
        row(quality=(5, 4, 5)), row(quality=None), row(quality=(5, None, 5)), row(collection="collection_1"),
        row(item=""), row(composite(1)[0]), row(composite(2)[0]), row(quality=(4, 4, 4)),
    ]  # fmt: skip
    folder = published(tmp_path, *rows)
    assert [draft.id for draft in sources.plan(settings(folder, "subjects200k"))] == [
        "train-00001-of-00002-000001", "train-00001-of-00002-000002",
    ]  # fmt: skip
    wide = {"collections": ["collection_1", "collection_2"], "quality": 4}
    assert len(list(sources.plan(settings(folder, "subjects200k", subjects200k=wide)))) == 5
    busy = [composite(seed)[2] for seed in (1, 2)]
    assert [np.array_equal(d.win, b) for d, b in zip(read(folder, "subjects200k"), busy, strict=True)] == [True, True]


def test_an_item_that_its_description_calls_otherwise_is_named_by_its_last_word_or_dropped(tmp_path):
    scenes = ("The chair in a studio.", "A chair in a library.")
    folder = published(tmp_path, row(item="Eames Lounge Chair", scenes=scenes), row(item="Vase", scenes=scenes))
    first, second = read(folder, "subjects200k")
    assert first.subjects == ("Chair",) and second.dropped == "its prompt does not name its subject"


def test_a_picture_that_is_no_pair_of_panels_is_dropped(tmp_path):
    (draft,) = read(published(tmp_path, row(composite(width=90)[0])), "subjects200k")
    assert draft.dropped == "its picture is no pair of panels"


def test_files_that_are_none_of_subjects200k_are_named(tmp_path):
    pq.write_table(Dataset.from_dict({"a": [1]}).data.table, tmp_path / "x.parquet")
    assert "x.parquet is no file of Subjects200K" in refusal(tmp_path, "subjects200k")


# --- UNO-1M ----------------------------------------------------------------------------------------------------------


def uno_row(number=0, score=4.0, subject=("mug",), judgment="same"):
    return {
        "img_path1": f"split1/{number}_a.png",
        "img_path2": f"split1/{number}_b.png",
        "caption": {
            "img_path1": "a mug on white", "img_path2": "a mug on grass",
            "subject": list(subject), "judgment": judgment,
        },
        "vlm_filter_cot": {"score_part": {"Shape": score}, "score_final": score},
    }  # fmt: skip


@pytest.fixture
def uno(tmp_path):
    for place in ("labels", "images/split1"):
        (tmp_path / place).mkdir(parents=True)
    for seed, name in enumerate(("0_a", "0_b")):
        PILImage.fromarray(coloured(48, 64, seed)).save(tmp_path / "images" / "split1" / f"{name}.png")
    return tmp_path


def test_pairs_of_uno_1m_that_score_high_enough_are_read(uno):
    rows = [
        uno_row(), uno_row(1, score=3.4), uno_row(2, judgment="no"), uno_row(3, subject=("mug", "cat")),
        uno_row(4, score=131184.67),  # a few rows hold what is no score
        uno_row(5, score=3.5),
    ]  # fmt: skip
    (uno / "labels" / "split1.json").write_text(json.dumps(rows))
    first, second = read(uno, "uno_1m")
    assert (first.id, first.prompt, first.identities) == ("split1-000000", "a mug on grass", ("split1/0_a.png",))
    assert first.win.shape == (32, 32, 3) and first.references[0].shape == (32, 32, 3) and not first.dropped
    assert (second.id, second.dropped) == ("split1-000005", "a picture that cannot be used")  # not unpacked yet
    assert len(list(sources.plan(settings(uno, "uno_1m", uno_1m={"score": 4.0})))) == 1


def test_lists_of_uno_1m_come_in_the_order_of_their_numbers(uno):
    for number in (10, 2):
        (uno / "labels" / f"split{number}.json").write_text(json.dumps([uno_row()]))
    assert [draft.id for draft in sources.plan(settings(uno, "uno_1m"))] == ["split2-000000", "split10-000000"]


@pytest.mark.parametrize("text", ["{no", '{"a": 1}', "[1]", '[{"img_path1": "a"}]'])
def test_a_list_that_is_none_of_uno_1m_is_named(uno, text):
    (uno / "labels" / "split1.json").write_text(text)
    assert "split1.json is no list of UNO-1M" in refusal(uno, "uno_1m")


def test_what_a_source_reads_depends_on_the_draft_alone(tmp_path):
    """A part may begin anywhere, and holds drafts of several files."""
    folder = published(tmp_path, *(row(composite(seed)[0]) for seed in range(6)))
    use = settings(folder, "subjects200k")
    planned = list(sources.plan(use))
    together = Source(use).open()(planned)
    apart = [Source(use).open()([draft])[0] for draft in reversed(planned)]
    assert [np.array_equal(a.win, b.win) for a, b in zip(together, reversed(apart), strict=True)] == [True] * 6
    assert replace(together[0], win=None, references=()).provenance == replace(apart[-1], win=None).provenance
