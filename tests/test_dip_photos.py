"""A benchmark's photos before a model sees them; and what is shown as it is leaves no trace in a run."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_evaluation_scores import ENCODERS, folder  # noqa: F401 (a fixture)
from tiny_perception import write_tiny_detector, write_tiny_sam2

from focusdpo_lib import comparison, params, runs, stages
from focusdpo_lib.batch import reproduce
from focusdpo_lib.dip import photos
from focusdpo_lib.evaluation import tables
from focusdpo_lib.evaluation.benchmark import Benchmark, BenchmarkError
from focusdpo_lib.evaluation.detector import Detector

BACKGROUND = {"cut": "cutout", "segmentation": {"masks": "background"}}


def of(**changes) -> params.Photos:
    return params.section("photos", changes)


def draw(path, left, top, right, bottom, colour=(200, 30, 30), size=(40, 30)):
    """A rectangle on grey, as a photo."""
    image = Image.new("RGB", size, (90, 90, 90))
    image.paste(colour, (left, top, right, bottom))
    image.save(path)


@pytest.fixture
def benchmark(folder):  # noqa: F811
    """cat/01 and mug/00 go in: the one wider than high, the other higher than wide."""
    draw(folder / "dataset" / "cat" / "01.png", 10, 5, 30, 15)
    draw(folder / "dataset" / "mug" / "00.png", 20, 4, 24, 28)
    return Benchmark.load(folder, "single")


def read(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_what_is_masked_lies_in_the_middle_of_a_white_square():
    image, mask = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3), np.zeros((4, 6), bool)
    mask[1, 1:5] = mask[2, 2] = True
    found = np.asarray(photos.on_white(image, mask))
    expected = np.full((4, 4, 3), 255, np.uint8)  # two rows of four: one row of white above and below
    expected[1], expected[2, 1] = image[1, 1:5], image[2, 2]
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("by", ["background", "files"])
def test_photos_are_cut_out_by_their_background_or_by_files(benchmark, tmp_path, by):
    masks = {}
    if by == "files":
        for name, box in (("cat/01", (10, 5, 30, 15)), ("mug/00", (20, 4, 24, 28))):
            (tmp_path / "masks" / name).parent.mkdir(parents=True)
            mask = Image.new("L", (40, 30))
            mask.paste(255, box)
            mask.save(tmp_path / "masks" / f"{name}.png")
        masks = {"masks": str(tmp_path / "masks")}
    made = tmp_path / "made"
    photos.write(made, benchmark, of(cut="cutout", segmentation={"masks": by}, **masks))
    cat, mug = (read(made / name) for name in ("cat/01.png", "mug/00.png"))
    assert cat.shape == (20, 20, 3) and mug.shape == (24, 24, 3)
    assert (cat[5:15] == (200, 30, 30)).all() and (cat[:5] == 255).all() and (cat[15:] == 255).all()
    assert (mug[:, 10:14] == (200, 30, 30)).all() and (mug[:, :10] == 255).all()
    assert sorted(p.name for p in made.rglob("*.png")) == ["00.png", "01.png"]  # those alone that go in
    shown = photos.shown(benchmark, made)
    assert [case.references for case in shown.cases] == [(made / "cat/01.png",)] * 2 + [(made / "mug/00.png",)]
    assert shown.subjects == benchmark.subjects  # what scores are against


def test_every_photo_in_which_no_subject_is_found_is_listed(benchmark, folder, tmp_path):  # noqa: F811
    for name in ("cat/01", "mug/00"):
        Image.new("RGB", (20, 20), (90, 90, 90)).save(folder / "dataset" / f"{name}.png")
    with pytest.raises(BenchmarkError, match=r"for cat/01.png \(a mask is empty\), mug/00.png \(a mask is empty\): ch"):
        photos.write(tmp_path / "made", benchmark, of(**BACKGROUND))
    (tmp_path / "none").mkdir()
    files = of(cut="cutout", segmentation={"masks": "files"}, masks=str(tmp_path / "none"))
    with pytest.raises(BenchmarkError, match=r"cat/01.png \(the image .*none/cat/01.png is missing.*, mug/00.png"):
        photos.write(tmp_path / "made", benchmark, files)


def test_a_box_is_the_detector_s(benchmark, tmp_path):
    model = str(write_tiny_detector(tmp_path / "detector"))
    photos.write(tmp_path / "made", benchmark, of(cut="box", segmentation={"detector": model, "threshold": 0.0}))
    original = Image.open(benchmark.cases[0].references[0])
    (box,) = Detector(model, threshold=0.0).boxes(original, ["cat"])
    left, top, right, bottom = max(int(box[0]), 0), max(int(box[1]), 0), round(box[2]), round(box[3])
    part = np.asarray(original)[top:bottom, left:right]
    found = read(tmp_path / "made" / "cat" / "01.png")
    side = max(part.shape[:2])
    y, x = ((side - edge) // 2 for edge in part.shape[:2])
    assert found.shape == (side, side, 3) and part.size
    assert np.array_equal(found[y : y + part.shape[0], x : x + part.shape[1]], part)


def test_a_cutout_by_sam_keeps_what_its_mask_does(benchmark, tmp_path):
    models = {"detector": str(write_tiny_detector(tmp_path / "one")), "segmenter": str(write_tiny_sam2(tmp_path / "2"))}
    loose = {"threshold": 0.0, "least": 0.0, "most": 1.0, "holes": 0.0, "specks": 0.0}
    try:
        photos.write(tmp_path / "made", benchmark, of(cut="cutout", segmentation={**models, **loose}))
    except BenchmarkError as error:  # random weights may mask nothing
        assert "a mask is empty" in str(error)
    strict = of(cut="cutout", segmentation={**models, "threshold": 1.0})
    with pytest.raises(BenchmarkError, match=r"cat/01.png \(its subject was not found\), mug/00.png \(its subject"):
        photos.write(tmp_path / "never", benchmark, strict)


@pytest.mark.parametrize("given", [{"masks": "m"}, {"cut": "cutout", "segmentation": {"masks": "files"}}])
def test_files_and_their_folder_go_together(given):
    with pytest.raises(params.ParameterError, match="masks is the folder of cut: cutout with"):
        of(**given)


# --- stages ---

# Of results/toybox/generation/single/uno, made before there was such a setting: its inputs, and its fingerprint.
MODEL, CASES = "1d5a7b9becbe01f41ad3d3889f5bb566781d24d18fa83f8001625bdf7e03221d", "df9cd4ec53c892f7"
RECORDED = "1c39a8483f47887fa3b6405a088aa8a5428bd4a09a2b2a1fa7944b776a35a074"


def drawing(seen):
    """In place of the workers: a grey image a case, and what the model would be shown."""

    def run(work, where, processes, what, unit):
        for case in work.benchmark.cases:
            seen.append(case.references)
            (where / "images").mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), (30, 30, 30)).save(where / "images" / f"{case.id}_0.png")

    return run


def test_photos_as_they_are_leave_no_trace_in_a_run(benchmark, tmp_path, monkeypatch):
    fingerprint, seen = runs.fingerprint, []
    monkeypatch.setattr(runs, "fingerprint", lambda value: value if isinstance(value, str) else MODEL)
    monkeypatch.setattr(Benchmark, "hash", CASES)
    monkeypatch.setattr(stages.workers, "run", drawing(seen))
    how = benchmark, params.Backbone(), params.Generation()
    for number, given in enumerate((None, params.Photos(), params.FamilyRows().photos)):
        made = stages.generate_images(tmp_path, f"raw{number}", *how, photos=given)
        assert json.loads((made / "complete.json").read_text())["fingerprint"] == RECORDED
        assert seen[-3:] == [case.references for case in benchmark.cases]
    monkeypatch.setattr(runs, "fingerprint", fingerprint)


def test_a_row_s_photos_are_prepared_once_and_its_table_says_how(benchmark, tmp_path, monkeypatch):
    """A family's images with cut photos may not stand beside its own with whole ones, but beside another family's."""
    seen = []
    monkeypatch.setattr(stages.workers, "run", drawing(seen))
    rows = params.section("families", {"uno": {}, "ipap": {"backbone": {"family": "sdxl_ip"}, "photos": BACKGROUND}})
    made = comparison.make_images(tmp_path, benchmark, rows.given, {})
    assert [case.references for case in benchmark.cases] == seen[:3]
    (prepared,) = (tmp_path / "photos").iterdir()
    assert seen[3:] == [(prepared / "cat/01.png",)] * 2 + [(prepared / "mug/00.png",)]
    assert "photos" not in runs.settings(made["uno"][0]) and "photos" not in runs.inputs(made["uno"][0])
    listed = json.loads((made["ipap"][0] / "cases.json").read_text())
    assert listed[0]["references"] == ["dataset/cat/01.png"]  # what the list names, in whatever way it was shown
    scores = {}
    for family, (images,) in made.items():
        how = benchmark, images, ENCODERS, params.Evaluation(bootstrap=50), params.Generation()
        scores[family] = stages.score(tmp_path, family, *how)
    said = tables.table(scores, params.Evaluation(bootstrap=50)).attrs["sampling"]
    assert said["ipap"]["photos"] == "cut out, on white (by colour)" and "photos" not in said["uno"]
    with pytest.raises(tables.ProtocolError, match=r"generation\.photos is None in the one and 'cut out, on white"):
        tables.table({"uno": scores["uno"], "uno_dpo": scores["ipap"]}, params.Evaluation(bootstrap=50))


@pytest.mark.parametrize(
    ("cut", "words"), [("box", "cut to their boxes on white (by IDEA-"), ("cutout", "cut out, on")]
)
def test_the_words_of_a_caption(cut, words):
    assert photos.said(of(cut=cut)).startswith(words)


def test_a_notebook_run_is_not_complete_once_the_masks_of_its_photos_have_changed():
    root, over = Path(__file__).parents[1], {"families.ipap.photos.segmentation.masks": "files"}
    book, file = root / "notebooks" / "04_table1_single_subject.ipynb", root / "params" / "smoke" / "04_table1.yaml"
    over |= {"families.ipap.photos.cut": "cutout", "families.ipap.photos.masks": "../masks"}
    found = reproduce._inputs(book, file, over)
    assert found["masks of ipap"] == root / "notebooks" / ".." / "masks" and "masks of uno" not in found
