"""Pairs in the formats of others come back as they were, and the tools of others read them."""

import io
import json

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image

from focusdpo_lib import params
from focusdpo_lib.dip import dataset, toybox
from focusdpo_lib.dip.dataset import DatasetError, read_dataset, write_dataset
from focusdpo_lib.dip.export import HELD, export, imported

DIP = params.Dip()
COUNTS = {"train": 5, "validation": 2}


@pytest.fixture(scope="module")
def pairs():
    """Of two splits, with one and with two subjects, with scores and identities that are no ASCII."""
    made = [toybox.make_pair(DIP, split, i) for split, count in COUNTS.items() for i in range(count)]
    assert {len(pair.subjects) for pair in made} == {1, 2}
    for pair in made:
        object.__setattr__(pair, "provenance", json.loads(json.dumps(pair.provenance)))  # lists, as from a file
        object.__setattr__(pair, "scores", {"similarity": 1 / 3})
        object.__setattr__(pair, "identities", tuple(f"ünï {pair.split} {name}" for name in pair.subjects))
    return made


def same(a, b):
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return a == b


@pytest.mark.parametrize("form", HELD)
def test_what_a_format_holds_comes_back_to_the_pixel_and_in_order(tmp_path, pairs, form):
    export(pairs, tmp_path / "out", form)
    found = list(imported(tmp_path / "out", form))
    assert len(found) == len(pairs)
    for fields, pair in zip(found, pairs, strict=True):
        assert set(fields) == set(HELD[form])
        assert [name for name in fields if not same(getattr(pair, name), fields[name])] == []


def test_an_imagefolder_holds_a_whole_pair_and_makes_the_same_dataset(tmp_path, pairs):
    export(pairs, tmp_path / "out", "imagefolder")
    again = [dataset.Pair(**fields) for fields in imported(tmp_path / "out", "imagefolder")]
    for name, some in {"first": pairs, "second": again}.items():
        splits = {split: [pair for pair in some if pair.split == split] for split in COUNTS}
        write_dataset(tmp_path / name, splits)
    for split in COUNTS:
        first, second = (tmp_path / name / f"{split}.parquet" for name in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()


def test_datasets_reads_an_imagefolder(tmp_path, pairs):
    export(pairs, tmp_path / "out", "imagefolder")
    loaded = load_dataset("imagefolder", data_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert {name: len(rows) for name, rows in loaded.items()} == COUNTS
    for row, pair in zip(loaded["train"], pairs, strict=False):
        assert np.array_equal(np.asarray(row["win"]), pair.win) and row["prompt"] == pair.prompt
        assert len(row["references"]) == len(pair.references)
        assert all(np.array_equal(np.asarray(a), b) for a, b in zip(row["references"], pair.references, strict=True))


def test_uno_s_list_names_files_from_its_own_folder(tmp_path, pairs):
    export(pairs, tmp_path / "out", "uno")
    entries = json.loads((tmp_path / "out" / "train.json").read_text())
    assert [set(entry) for entry in entries] == [{"prompt", "image_paths", "image_tgt_path"}] * 5
    for entry, pair in zip(entries, pairs, strict=False):
        shown = [np.asarray(Image.open(tmp_path / "out" / name)) for name in entry["image_paths"]]
        assert same(tuple(shown), pair.references)
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / entry["image_tgt_path"])), pair.win)


def test_the_columns_of_diffusion_dpo_are_read_as_diffusers_script_does(tmp_path, pairs):
    """It opens both, and exchanges them where label_0 is false."""
    export(pairs, tmp_path / "out", "diffusion_dpo")
    rows = load_dataset("parquet", data_files=str(tmp_path / "out" / "train.parquet"), cache_dir=str(tmp_path / "c"))[
        "train"
    ]
    assert set(rows["label_0"]) == {0, 1}
    for row, pair in zip(rows, pairs, strict=False):
        first, second = (np.asarray(Image.open(io.BytesIO(row[name])).convert("RGB")) for name in ("jpg_0", "jpg_1"))
        win, lose = (first, second) if row["label_0"] else (second, first)
        assert np.array_equal(win, pair.win) and np.array_equal(lose, pair.lose) and row["caption"] == pair.prompt
        assert row["label_0"] + row["label_1"] == 1


def test_a_folder_that_is_there_and_an_unknown_format_are_refused(tmp_path, pairs):
    with pytest.raises(DatasetError, match="is there already: name another folder, or delete it"):
        export(pairs, tmp_path, "uno")
    with pytest.raises(DatasetError, match=r"'coco' is no format .*: choose from uno, diffusion_dpo, imagefolder"):
        export(pairs, tmp_path / "x", "coco")


def test_an_export_that_fails_leaves_nothing(tmp_path, pairs):
    def breaks():
        yield pairs[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(breaks(), tmp_path / "x", "imagefolder")
    assert not list(tmp_path.iterdir())


def test_a_damaged_list_is_named(tmp_path, pairs):
    export(pairs, tmp_path / "out", "imagefolder")
    path = tmp_path / "out" / "train" / "metadata.jsonl"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DatasetError, match=r"metadata\.jsonl is damaged .*: export the pairs anew"):
        list(imported(tmp_path / "out", "imagefolder"))


def test_scores_and_identities_are_columns_that_a_dataset_may_have(tmp_path, pairs):
    write_dataset(tmp_path / "with", {"train": pairs[:5]})
    read = read_dataset(tmp_path / "with", ["train"])["train"]
    assert [(p.scores, p.identities) for p in read] == [(p.scores, p.identities) for p in pairs[:5]]
    bare = [toybox.make_pair(DIP, "train", i) for i in range(2)]
    write_dataset(tmp_path / "without", {"train": bare})
    columns = load_dataset("parquet", data_files=str(tmp_path / "without/train.parquet"), cache_dir=str(tmp_path / "c"))
    assert "scores" not in columns["train"].column_names
    assert read_dataset(tmp_path / "without", ["train"])["train"][0].scores == {}


def test_columns_of_these_names_that_others_wrote_are_let_be(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_dataset(tmp_path, {"train": [toybox.make_pair(DIP, "train", 0)]})
    path = tmp_path / "train.parquet"
    table = pq.read_table(path).append_column("scores", pa.array([[0.5]])).append_column("identities", pa.array([7]))
    pq.write_table(table, path)
    pair = read_dataset(tmp_path, ["train"])["train"][0]
    assert pair.scores == {} and pair.identities == ()
