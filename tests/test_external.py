"""A row of another system's images: kept by case with where it comes from, scored as the kit's own are."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from test_evaluation_layouts import as_cases, as_uno, listed, write_benchmark
from tiny_models import write_tiny_models

from focusdpo_lib import external, params, runs, stages
from focusdpo_lib.batch import external_row, reproduce
from focusdpo_lib.evaluation import scores
from focusdpo_lib.evaluation.benchmark import Benchmark, BenchmarkError
from focusdpo_lib.evaluation.layouts import LayoutError
from focusdpo_lib.runs import RunError

SOURCE = {"repository": "https://github.com/bytedance/UNO", "commit": "d305981", "command": "python inference.py"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_benchmark(tmp_path_factory.mktemp("data"))


@pytest.fixture
def single(folder) -> Benchmark:
    return Benchmark.load(folder, "single")


def row(images: Path, layout: str = "uno", **changes) -> params.ExternalRow:
    given = {"row": "Theirs", "folder": str(images), "layout": layout} | changes
    return params.section("external", {"rows": [given]}).rows[0]


def test_a_kept_row_says_where_it_comes_from_and_how_it_was_sampled(tmp_path, folder, single):
    images = as_uno(tmp_path / "uno", listed(folder, "single"))
    kept = external.keep(tmp_path, single, row(images, **SOURCE, sampling={"references": "listed", "lora": "own"}))
    assert kept == tmp_path / "external" / "single" / "Theirs" and runs.is_complete(kept)
    assert {p.name for p in (kept / "images").iterdir()} == {f"{n:04d}_0.png" for n in range(6)}
    assert (kept / "images" / "0004_0.png").read_bytes() == (images / "4_0.png").read_bytes()
    assert external.source(kept) == (
        "layout uno, repository https://github.com/bytedance/UNO, commit d305981, command python inference.py"
    )
    how = external.sampled(kept).model_dump(exclude={"prompts"})
    assert how == {
        **{"references": "listed", "images_per_prompt": 1, "size": "32×32", "lora": "own"},
        **{"width": 32, "height": 32, "num_steps": 25, "guidance": 4, "seed": 3407, "pe": "d"},
    }
    assert json.loads((kept / "provenance.json").read_text())["folder"] == str(images)


def test_what_the_settings_say_goes_over_what_the_folder_does(tmp_path, folder, single):
    images = as_uno(tmp_path / "uno", listed(folder, "single"))
    kept = external.keep(tmp_path, single, row(images, sampling={"guidance": 3.5}))
    how = external.sampled(kept).model_dump()
    assert (how["guidance"], how["num_steps"]) == (3.5, 25)


def test_what_nobody_knows_is_said_to_be_unknown(tmp_path, single):
    kept = external.keep(tmp_path, single, row(as_cases(tmp_path / "case", 6), "case"))
    assert external.source(kept) == "layout case, repository unknown, commit unknown, command unknown"
    assert external.sampled(kept).references == "unknown"


def test_a_kept_row_outlives_its_folder_and_is_no_other(tmp_path, folder, single):
    images = as_uno(tmp_path / "uno", listed(folder, "single"))
    kept = external.keep(tmp_path, single, row(images))
    before = {path: path.stat().st_mtime_ns for path in kept.rglob("*")}
    assert external.keep(tmp_path, single, row(images)) == kept
    shutil.rmtree(images)
    assert external.keep(tmp_path, single, row(images)) == kept
    assert {path: path.stat().st_mtime_ns for path in kept.rglob("*")} == before
    with pytest.raises(LayoutError, match="is no folder of images"):  # of another source: it must be looked at again
        external.keep(tmp_path, single, row(images, commit="0000000"))
    as_cases(images, 6).rename(tmp_path / "more")
    for n in range(6):
        (tmp_path / "more" / f"{n:04d}_0.png").rename(tmp_path / "more" / f"{5 - n}_0.jpg")
    with pytest.raises(RunError, match=r"holds a run of other parameters or inputs .*its input 'images' has changed"):
        external.keep(tmp_path, single, row(tmp_path / "more"))


@pytest.mark.parametrize("name", ["uno", "uno_theirs", "copy", "UNO"])
def test_a_row_needs_a_name_that_no_other_row_has(name):
    with pytest.raises(params.ParameterError, match="is the name of a row that this table has or may have"):
        external.check_name(name, ["uno", "uno_dpo"])
    external.check_name("UNO", ["ipap"])


def test_the_command_scores_a_folder_by_the_protocol_of_a_table_s_yaml(tmp_path, folder, models, capsys):
    """The same numbers as a plain call of the scores on the same files; paths in the YAML are the notebook's."""
    images = as_uno(tmp_path / "uno", listed(folder, "single"))
    books = tmp_path / "kit" / "notebooks"
    books.mkdir(parents=True)
    evaluation = {"references": "used", "dino": str(models / "dino"), "clip": str(models / "clip")}
    shutil.copytree(folder, tmp_path / "kit" / "data")
    values = {"results": "../results", "benchmark": {"folder": "../data"}, "evaluation": evaluation | {"reader": None}}
    (tmp_path / "04_table1.yaml").write_text(json.dumps(values))
    asked = [str(images), "--layout", "uno", "--row", "Theirs", "--params", str(tmp_path / "04_table1.yaml")]
    assert external_row.main([*asked, "--notebooks", str(books)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("nothing was scored: evaluation.references cannot be 'used' where it is unknown which")
    known = ["--references", "listed", "--commit", "d305981", "--sampling", "lora=own"]
    assert external_row.main([*asked, "--notebooks", str(books), *known]) == 0
    said = capsys.readouterr().out
    assert "layout uno, repository unknown, commit d305981, command unknown" in said
    kept = pd.read_parquet(tmp_path / "kit" / "results" / "scores" / "single" / "external-Theirs" / "scores.parquet")
    settings = params.section("evaluation", values["evaluation"])
    single, how = Benchmark.load(folder, "single"), params.Sampled(references="listed")
    named = as_named(tmp_path / "named", images)
    ours = scores.score_images(single, named, stages.load_encoders(settings), settings, how)
    pd.testing.assert_frame_equal(kept, ours, check_exact=False, rtol=1e-6)
    assert kept.attrs["protocol"]["generation"]["lora"] == "own"
    mean = ours[ours["metric"] == "dino"]["value"].mean()  # three prompts each: the mean of means
    assert f"dino                 {mean:.4f}" in said


def as_named(into: Path, images: Path) -> Path:
    into.mkdir()
    for n in range(6):
        shutil.copy(images / f"{n}_0.png", into / f"{n:04d}_0.png")
    return into


def test_the_command_says_in_a_sentence_what_is_wrong(tmp_path, folder, capsys):
    (tmp_path / "table.yaml").write_text(json.dumps({"benchmark": {"folder": str(folder)}}))
    asked = [str(tmp_path), "--layout", "case", "--row", "x", "--params", str(tmp_path / "table.yaml")]
    asked += ["--results", str(tmp_path / "results"), "--notebooks", str(tmp_path)]
    for more, said in (
        ([], "--kind is needed, which table.yaml does not tell: single or multi"),
        (["--kind", "multi"], "3 missing (0000_0 (tasse_dorée+dog: a mug and a dog in the jungle), "),
        (["--kind", "multi", "--sampling", "steps"], "--sampling steps is not accepted: write it as KEY=VALUE"),
        (["--kind", "multi", "--row", "a/b"], "names no folder of a run"),
    ):
        assert external_row.main([*asked, *more]) == 1
        assert said in capsys.readouterr().err


def test_scoring_against_unseen_photos_needs_to_know_which_were_seen(single):
    unseen = params.section("evaluation", {"references": "unused"})
    with pytest.raises(BenchmarkError, match="unknown which photos went in"):
        scores.check(single, unseen, params.Sampled())
    scores.check(single, unseen, params.Sampled(references="listed"))


def test_a_notebook_run_is_not_complete_once_the_images_of_a_row_have_changed(tmp_path):
    root = Path(__file__).parents[1]
    rows = [{"row": name, "folder": str(tmp_path / name), "layout": "case"} for name in ("there", "gone")]
    (tmp_path / "there").mkdir()
    book, file = (root / "notebooks" / "04_table1_single_subject.ipynb", root / "params" / "smoke" / "04_table1.yaml")
    found = reproduce._inputs(book, file, {"external.rows": rows})
    assert found["images of there"] == tmp_path / "there" and "images of gone" not in found
