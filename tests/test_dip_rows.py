"""Rows that others wrote with Hugging Face `datasets` are read where their meaning is clear, and refused by column."""

import base64
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from focusdpo_lib.dip.dataset import DatasetError, read_dataset

RNG = np.random.default_rng(0)
MASK = np.zeros((16, 16), np.uint8)
MASK[4:12, 4:12] = 255
WIN = RNG.integers(0, 255, (16, 16, 3), np.uint8)
LOSE = np.where(MASK[..., None] > 0, 255 - WIN, WIN)
PICTURES = {"win": WIN, "lose": LOSE, "mask": MASK, "reference": WIN[:8, :8], "shown": MASK[:8, :8]}


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    """The pictures of one pair, in a folder of their own."""
    (tmp_path / "pictures").mkdir()
    for name, pixels in PICTURES.items():
        PILImage.fromarray(pixels).save(tmp_path / "pictures" / f"{name}.png")
    return {name: tmp_path / "pictures" / f"{name}.png" for name in PICTURES}


def row(picture, **values):
    """A pair of one subject, its pictures as `picture` stores them."""
    return {
        **{"id": "a", "prompt": "a mug in the snow", "win": picture("win"), "lose": picture("lose")},
        **{"references": [picture("reference")], "masks": [picture("mask")], "reference_masks": [picture("shown")]},
        **{"subjects": ["mug"], "captions": ["red"], "disrupted_captions": ["blue"]},
        **{"disruption": "{}", "provenance": "{}", "split": "train"},
    } | values


def written(folder: Path, *rows, features=None):
    """The file that `datasets` makes of the rows, read by the kit."""
    Dataset.from_list(list(rows), features).to_parquet(folder / "train.parquet")
    return read_dataset(folder, ["train"])["train"]


def check(pair):
    assert (pair.win == WIN).all() and (pair.lose == LOSE).all() and (pair.references[0] == WIN[:8, :8]).all()
    assert (pair.masks[0] == (MASK > 0)).all() and (pair.reference_masks[0] == (MASK[:8, :8] > 0)).all()
    assert (pair.subjects, pair.captions) == (("mug",), ("red",))


PICTURE_COLUMNS = {
    **{"win": Image(), "lose": Image(), "references": List(Image()), "masks": List(Image())},
    "reference_masks": List(Image()),
}
TEXT_COLUMNS = {
    **{name: Value("string") for name in ("id", "prompt", "disruption", "provenance", "split")},
    **{name: List(Value("string")) for name in ("subjects", "captions", "disrupted_captions")},
}


@pytest.mark.parametrize("features", [Features(PICTURE_COLUMNS | TEXT_COLUMNS), None])
@pytest.mark.parametrize("relative", [False, True])
def test_pictures_may_be_paths(tmp_path, files, features, relative, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where `datasets` looks for them as it writes; the kit looks beside the file
    folder = tmp_path if relative else tmp_path / "elsewhere"
    folder.mkdir(exist_ok=True)

    def picture(name):
        return str(files[name].relative_to(tmp_path) if relative else files[name])

    pairs = written(folder, row(picture), features=features)
    monkeypatch.chdir("/")
    check(pairs[0])


def test_pictures_may_be_plain_bytes(tmp_path, files):
    check(written(tmp_path, row(lambda name: files[name].read_bytes()))[0])


def test_ids_may_be_numbers_and_a_list_of_one_may_be_its_entry(tmp_path, files):
    def alone(name):
        return files[name].read_bytes()

    single = {"references": alone("reference"), "masks": alone("mask"), "reference_masks": alone("shown")}
    single |= {"subjects": "mug", "captions": "red", "disrupted_captions": "blue"}
    pairs = written(tmp_path, row(alone, id=7, **single), row(alone, id=8, **single))
    assert [pair.id for pair in pairs] == ["7", "8"]
    check(pairs[0])


def test_class_labels_are_read_by_name(tmp_path, files):
    labels = {"subjects": List(ClassLabel(names=["cat", "mug"])), "split": ClassLabel(names=["test", "train"])}
    pair = row(lambda name: files[name].read_bytes(), subjects=["mug"], split="train")
    check(written(tmp_path, pair, features=Features(PICTURE_COLUMNS | TEXT_COLUMNS | labels))[0])


def test_notes_may_be_columns_of_their_own_kind(tmp_path, files):
    pair = row(lambda name: files[name].read_bytes(), provenance={"seed": 3, "by": "hand"}, disruption=None)
    found = written(tmp_path, pair)[0]
    assert found.provenance == {"seed": 3, "by": "hand"} and found.disruption == {}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"win": 3}, r"its win is a int: store the bytes of an image file, or its path"),
        ({"win": ""}, r"its win is empty"),
        ({"lose": "pictures/away.png"}, r"its lose \(.*away.png\) is missing"),
        ({"subjects": [4]}, r"its subjects is a int where a text is due"),
        ({"prompt": ["a mug", "a cup"]}, r"its prompt is a list where a text is due"),
        ({"captions": None}, r"it has 1 subject\(s\) \(mug\) but 0 captions"),
    ],
)
def test_what_is_not_clear_is_refused_by_column(tmp_path, files, values, sentence):
    pair = row(lambda name: str(files[name].relative_to(tmp_path)), **values)
    with pytest.raises(DatasetError, match=f"pair 'a' of .*: {sentence}"):
        written(tmp_path, pair)


def test_a_missing_class_label_is_refused(tmp_path, files):
    labels = {"subjects": List(ClassLabel(names=["cat", "mug"]))}
    pair = row(lambda name: files[name].read_bytes(), subjects=[-1])
    with pytest.raises(DatasetError, match="its subjects is a int where a text is due"):
        written(tmp_path, pair, features=Features(PICTURE_COLUMNS | TEXT_COLUMNS | labels))


LABEL = {"names": ["cat", "mug"], "_type": "ClassLabel"}


def noted(path, text):
    """Puts what `datasets` would note of a file's columns in it."""
    pq.write_table(pq.read_table(path).replace_schema_metadata({"huggingface": text}), path)


@pytest.mark.parametrize(
    "kind", [[LABEL], {"feature": LABEL, "_type": "Sequence"}, {"feature": LABEL, "_type": "List"}]
)
def test_lists_of_class_labels_are_read_as_every_version_of_datasets_notes_them(tmp_path, files, kind):
    written(tmp_path, row(lambda name: files[name].read_bytes()))
    table = pq.read_table(tmp_path / "train.parquet")
    at = table.schema.get_field_index("subjects")
    pq.write_table(table.set_column(at, "subjects", pa.array([[1]])), tmp_path / "train.parquet")
    noted(tmp_path / "train.parquet", json.dumps({"info": {"features": {"subjects": kind}}}))
    check(read_dataset(tmp_path, ["train"])["train"][0])


@pytest.mark.parametrize(
    "text", ["null", "[]", '{"info": null}', '{"info": {"features": []}}', '{"info": {"features": {"a": 1}}}']
)
def test_notes_of_datasets_that_say_nothing_are_passed_over(tmp_path, files, text):
    written(tmp_path, row(lambda name: files[name].read_bytes()))
    noted(tmp_path / "train.parquet", text)
    check(read_dataset(tmp_path, ["train"])["train"][0])


@pytest.mark.parametrize("text", ["{", "", b"\xff"])
def test_notes_of_datasets_that_are_broken_are_named(tmp_path, files, text):
    written(tmp_path, row(lambda name: files[name].read_bytes()))
    noted(tmp_path / "train.parquet", text)
    with pytest.raises(
        DatasetError, match=r"train.parquet describes its columns for `datasets` in what is no JSON .*drop"
    ):
        read_dataset(tmp_path, ["train"])


@pytest.mark.parametrize("column", ["win", "references"])
def test_base64_is_told_in_short(tmp_path, files, column):
    text = base64.b64encode(files["win"].read_bytes()).decode()
    assert len(text) > 1000
    with pytest.raises(DatasetError, match=rf"its {column}.* is a text of {len(text)} letters .*not base64") as caught:
        written(tmp_path, row(lambda name: files[name].read_bytes(), **{column: [text] if column != "win" else text}))
    assert len(str(caught.value)) < 400
