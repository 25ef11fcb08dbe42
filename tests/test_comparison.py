"""Tables of a benchmark whose attributes nobody knows, as DreamBench's: what only attributes tell is left out."""

import json
import shutil
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
from tiny_models import write_tiny_models, write_tiny_profile

from focusdpo_lib import batch, comparison, params, runs, stages
from focusdpo_lib.batch import Job
from focusdpo_lib.evaluation import tables
from focusdpo_lib.evaluation.encoders import EncoderError
from focusdpo_lib.toybox.benchmark import write_benchmark

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the DreamBench photos are not beside the repository")
BOOKS = {"04_table1": "04_table1_single_subject", "05_table2": "05_table2_multi_subject"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The toybox's benchmark without its attributes: all that a folder in DreamBench's layout holds."""
    return without_attributes(tmp_path_factory.mktemp("data") / "plain")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Of that one case, and one photo a subject: the other subjects have no prompts."""
    folder = without_attributes(tmp_path_factory.mktemp("data") / "small")
    for photo in folder.glob("dataset/*/*.png"):
        if photo.stem != "00":
            photo.unlink()
    cases = json.loads((folder / "cases_single.json").read_text("utf-8"))[:1]
    cases[0]["image_paths"] = [str(Path(cases[0]["image_paths"][0]).with_name("00.png"))]
    (folder / "cases_single.json").write_text(json.dumps(cases), encoding="utf-8")
    return folder


def without_attributes(into: Path) -> Path:
    (write_benchmark(into, seed=1) / "attributes.json").unlink()
    return into


def others(into: Path, folder: Path) -> Path:
    """Another system's images of every first prompt, in PatchDPO's layout: the reference itself."""
    for case in json.loads((folder / "cases_single.json").read_text("utf-8"))[::10]:
        photo = folder / case["image_paths"][0]
        (into / "others" / photo.parent.name).mkdir(parents=True)
        shutil.copy(photo, into / "others" / photo.parent.name / f"{case['prompt']}.png")
    return into / "others"


@pytest.fixture(scope="module")
def ran(tmp_path_factory, models, small, plain):
    """Both tables' notebooks, the first on the small folder and the second on the plain one, nothing trained."""
    into = tmp_path_factory.mktemp("results")
    profile = write_tiny_profile(ROOT / "params" / "smoke", into / "params", models, BOOKS)
    theirs = [{"row": "Theirs", "folder": str(others(into, small)), "layout": "patchdpo", "commit": "558f0c2"}]
    over = {
        "04_table1": {"benchmark.folder": str(small), "external.rows": theirs},
        "05_table2": {"benchmark.folder": str(plain)},
    }
    for name, book in BOOKS.items():
        path = ROOT / "notebooks" / f"{book}.ipynb"
        values = {"results": str(into), **over[name]}
        batch.execute(Job(path, into / "notebooks" / name, profile / f"{name}.yaml", values), warm=True)
    return into


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("table1", ["copy of the reference", "UNO", "IPAP", "Theirs"]),
        ("table2", ["real photos", "copy of the reference", "UNO"]),
    ],
)
def test_a_notebook_leaves_out_what_only_attributes_tell_and_says_so(ran, name, rows):
    number = {"table1": "04_table1", "table2": "05_table2"}[name]
    cells = nbformat.read(ran / "notebooks" / number / f"{number}.ipynb", 4).cells
    said = str([o for cell in cells if cell.cell_type == "code" for o in cell.outputs])
    assert "left out: this benchmark does not say which attributes its subjects have" in said
    # Of one case with one photo a subject it tells no less, but for the anchor that needs two photos.
    alone = "The anchor 'photos' is left out: there is one photo only of"
    assert (alone in said) == (name == "table1")
    assert "holds no complete training run. Run notebook 03 with 03_uno_sft.yaml" in said
    assert "no adapter to compare with the base yet" in said
    result = pd.read_csv(ran / "tables" / name / "table.csv")
    assert result["row"].drop_duplicates().tolist() == rows
    assert not [column for column in result["column"] if column.startswith(("attribute", "leakage"))]
    assert "less is better" not in (ran / "tables" / name / "table.md").read_text()
    figures = {path.stem for path in (ran / "tables" / name).glob("*.png")}
    assert figures == {"samples", "means"}
    every = pd.read_csv(ran / "tables" / name / "all_rows.csv", index_col="method")
    own = {"table1": 7, "table2": 3}[name]  # the paper's own rows
    assert (every["state"] == "not run").sum() == own + (alone in said)
    assert every.filter(like="difference").isna().all(axis=None)
    for suffix in ("md", "tex"):
        assert "published only" in (ran / "tables" / name / f"all_rows.{suffix}").read_text()
    assert (ran / "pages" / name / "page.html").stat().st_size < 20e6
    assert "0 families with a base and FocusDPO" in said


def test_a_row_of_another_system_s_images_stands_in_the_table(ran):
    """They are copies of the reference, and score what the anchor of that name does."""
    values = pd.read_csv(ran / "tables" / "table1" / "table.csv").pivot(index="column", columns="row", values="value")
    assert values["Theirs"].tolist() == pytest.approx(values["copy of the reference"].tolist(), abs=1e-6)
    said = str(nbformat.read(ran / "notebooks" / "04_table1" / "04_table1.ipynb", 4).cells)
    assert "Theirs: layout patchdpo, repository unknown, commit 558f0c2, command unknown" in said


# Which training runs may stand in a row


def trained(results, name, seed=0, by="dpo", model="base", pairs="pairs", **training):
    """A complete training run of which only its records are there: all that a table looks at before it samples."""
    sections = {
        "backbone": params.Backbone(model=str(results / model)),
        "objective": params.Objective(name=by),
        "masks": params.Masks(),
        "training": params.section("training", {"seed": seed} | training),
    }
    for folder in (results / model, results / pairs):
        runs.write_text(folder / "content", folder.name[:4])  # "base2" holds what "base" holds
    inputs = {"pairs": results / pairs, "model": results / model}
    with runs.Run(results / "training" / name, sections, inputs):
        pass
    return name


def adapters(results, names, by="dpo"):
    families = {"uno": {"backbone": {"model": str(results / "base")}, "adapters": {by: names}}}
    return comparison.adapters(results, params.section("families", families).given)


def test_the_seeds_of_one_training_are_a_row_wherever_its_base_lies(tmp_path):
    names = [trained(tmp_path, "a", 0), trained(tmp_path, "b", 1, model="base2"), trained(tmp_path, "c", 7)]
    found, missing = adapters(tmp_path, [*names, "none"])
    assert [folder.name for folder in found["uno_dpo"]] == ["a", "b", "c"] and len(missing) == 1


@pytest.mark.parametrize(("by", "row"), [("sft", "dpo"), ("dpo", "focusdpo"), ("focusdpo", "patchdpo")])
def test_a_run_by_another_objective_is_no_row(tmp_path, by, row):
    sentence = rf"x was trained by {by} and cannot be a row of {row} .*: name it under adapters\.{by}$"
    with pytest.raises(params.ParameterError, match=sentence):
        adapters(tmp_path, [trained(tmp_path, "x", by=by)], row)


@pytest.mark.parametrize("again", ["a", "copy"])
def test_a_seed_stands_once_in_a_row(tmp_path, again):
    trained(tmp_path, "a", 3)
    shutil.copytree(tmp_path / "training" / "a", tmp_path / "training" / "copy")
    with pytest.raises(
        params.ParameterError, match=rf"a and {again} are both of the training seed 3: name each .* once"
    ):
        adapters(tmp_path, ["a", again])


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"steps": 301}, r"training\.steps is 300 there, 301 here"),
        ({"lora": {"rank": 8}}, r"training\.lora\.rank is 32 there, 8 here"),
        ({"pairs": "more pairs"}, "its input 'pairs' has changed"),
    ],
)
def test_runs_of_different_settings_are_no_seeds_of_one_row(tmp_path, other, said):
    names = [trained(tmp_path, "a", 0), trained(tmp_path, "b", 1), trained(tmp_path, "c", 2, **other)]
    with pytest.raises(params.ParameterError, match=rf"UNO\+DPO: a \(there\) and c \(here\) differ .* \({said}\)"):
        adapters(tmp_path, names)


@pytest.mark.parametrize("settings", [{"dip": {}}, {"backbone": {}}])
def test_a_run_of_another_stage_is_no_training(tmp_path, settings):
    with runs.Run(tmp_path / "training" / "pairs", settings):
        pass
    with pytest.raises(params.ParameterError, match="pairs is no training run: name one that notebook 03 made"):
        adapters(tmp_path, ["pairs"])


def test_images_that_the_reader_cannot_take_are_refused_before_they_are_made(tmp_path):
    benchmark = stages.load_benchmark(tmp_path, params.Benchmark(), "single")
    families = params.section("families", {"uno": {"generation": {"size": 128}}}).given
    with pytest.raises(EncoderError, match=r"size = 128 of uno is not accepted .* takes 64 pixels: set it to that, or"):
        comparison.load_encoders(benchmark, params.section("evaluation"), families)
    without = params.section("evaluation", {"reader": None})
    assert comparison.load_encoders(benchmark, without, families).reader is None
    reader = stages.load_encoders(params.section("evaluation")).reader
    with pytest.raises(EncoderError, match=r"64×64 pixels, not of 48×64: make them with generation.size 64"):
        reader(torch.zeros(1, 3, 48, 64))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Results on DreamBench, whose photos are embedded once."""
    return tmp_path_factory.mktemp("real")


@needs_data
@pytest.mark.parametrize(("kind", "columns"), [("single", 3), ("multi", 5)])
def test_real_dreambench_goes_the_same_way(kind, columns, models, real):
    """The dataset's photos and UNO's list of cases; one prompt of a few subjects, on tiny models."""
    lists = {kind: str(DATA / "uno" / f"dreambench_{kind}ip.json")}
    source = params.Benchmark(folder=str(DATA / "dreambench"), **lists)
    benchmark = stages.load_benchmark(real, source, kind).first_prompts(1)
    assert not benchmark.has_attributes
    rows = {"backbone": {"model": str(models / "flux_uno")}, "generation": {"steps": 1, "prompts": 1}}
    families = params.section("families", {"uno": rows}).given
    evaluation = params.section(
        "evaluation", {"bootstrap": 50} | {k: str(models / k) for k in ("dino", "clip", "reader")}
    )
    images = comparison.make_images(real, benchmark, families, {})
    assert list(images) == ["uno"]
    scores = comparison.score_rows(real, benchmark, images, stages.load_encoders(evaluation), evaluation, families)
    result = tables.table(scores, evaluation)
    assert result["row"].drop_duplicates().tolist() == ["real photos", "copy of the reference", "UNO"]
    assert result["column"].nunique() == columns  # DINO, CLIP-I (two subjects: mean and minimum of each), CLIP-T
