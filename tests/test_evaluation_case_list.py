"""The list of cases as a table, and images laid out as other systems' scripts read them."""

import json
import sys
from pathlib import Path

import pandas as pd
import pytest
from test_evaluation_scores import ENCODERS, folder, generated, grey  # noqa: F401 (a fixture)

from focusdpo_lib import params, stages
from focusdpo_lib.evaluation import case_list, layouts, uno_cases
from focusdpo_lib.evaluation.benchmark import Benchmark, BenchmarkError

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the DreamBench photos are not beside the repository")


def test_a_line_says_all_that_was_asked_of_an_image(folder):  # noqa: F811
    benchmark = Benchmark.load(folder, "multi")
    cases = case_list.table(benchmark, 2, lambda case, index: 7 + index, "unused")
    assert cases.iloc[1].to_dict() == {
        **{"case": "0000", "index": 1, "prompt": "a cat and a mug in a city", "seed": 8},
        **{"subjects": ["cat", "mug"], "classes": ["cat", "mug"]},
        "references": ["dataset/cat/01.png", "dataset/mug/00.png"],
        "scoring": [["dataset/cat/00.png", "dataset/cat/02.png"], ["dataset/mug/01.png"]],
    }
    single = case_list.table(Benchmark.load(folder, "single").with_all_photos())
    assert single.iloc[0]["references"] == [f"dataset/cat/{i:02d}.png" for i in range(3)]
    assert single["seed"].tolist() == [None] * 3 and "scoring" not in single


def test_both_files_hold_the_same(folder, tmp_path):  # noqa: F811
    cases = case_list.table(Benchmark.load(folder, "multi"), 2, lambda case, index: 2**62 + index, "all")
    case_list.write(tmp_path, cases)
    listed = json.loads((tmp_path / "cases.json").read_text("utf-8"))
    stored = pd.read_parquet(tmp_path / "cases.parquet")
    assert listed == cases.to_dict("records") and listed[1]["seed"] == 2**62 + 1
    assert [list(map(list, found)) for found in stored["scoring"]] == cases["scoring"].tolist()
    pd.testing.assert_frame_equal(case_list.read(tmp_path), cases)


def test_every_scoring_writes_its_list(folder, tmp_path):  # noqa: F811
    images = generated(tmp_path, _0000_0=30, _0001_0=60, _0002_0=90).parent
    evaluation = params.Evaluation(references="used", reader=None)
    stages.score(
        tmp_path, "row", Benchmark.load(folder, "single"), images, ENCODERS, evaluation, params.Generation(seed=3)
    )
    found = case_list.read(tmp_path / "scores" / "single" / "row")
    assert found["scoring"].tolist() == [[["dataset/cat/01.png"]]] * 2 + [[["dataset/mug/00.png"]]]
    assert found["seed"].notna().all() and found["seed"].nunique() == 3


@needs_data
@pytest.mark.parametrize("kind", ["single", "multi"])
def test_uno_s_form_of_its_cases_is_its_list(kind):
    listed = json.loads((DATA / "uno" / f"dreambench_{kind}ip.json").read_text())
    made = case_list.uno(case_list.table(Benchmark.load(DATA / "dreambench", kind, uno_cases.NAME)))
    assert [{key: entry[key] for key in ("prompt", "image_paths")} for entry in made] == listed
    assert made[0]["text"] == listed[0]["prompt"] and made[0]["img_path1"] == listed[0]["image_paths"][0]
    assert ("img_path2" in made[0]) == (kind == "multi")


@pytest.fixture
def run(folder, tmp_path):  # noqa: F811
    """A run of images, of which number i is a grey of i."""
    made = tmp_path / "run"
    cases = case_list.table(Benchmark.load(folder, "single"))
    case_list.write(made, cases)
    (made / "images").mkdir()
    for i in range(3):
        grey(i).save(made / "images" / f"{i:04d}_0.png")
    return made


def held(folder):  # noqa: F811
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_images_in_the_forms_of_others_are_read_back_as_the_same_cases(run, folder, tmp_path, capsys, monkeypatch):  # noqa: F811
    words = ["case_list", str(run), "--to", "patchdpo", "--into", str(tmp_path / "patchdpo")]
    monkeypatch.setattr(sys, "argv", words)
    case_list.main()
    said = capsys.readouterr().out
    assert "holds 3 images as patchdpo writes them" in said
    names = ["cat/a cat in a city.png", "cat/a cat in the snow.png", "mug/a mug in the snow.png"]
    assert held(tmp_path / "patchdpo") == names
    assert case_list.export(run, tmp_path / "uno", "uno") == 3
    assert held(tmp_path / "uno") == ["0_0.png", "1_0.png", "2_0.png", "cases.json"]
    (tmp_path / "uno" / "cases.json").unlink()
    for form in ("uno", "patchdpo"):
        found = layouts.read(tmp_path / form, form, Benchmark.load(folder, "single"))
        for (case, index), path in found.files.items():
            assert path.read_bytes() == (run / "images" / f"{case.id}_{index}.png").read_bytes()


def test_a_part_of_a_list_is_numbered_as_the_list_that_goes_with_it(run, folder, tmp_path):  # noqa: F811
    """UNO's script counts the entries of the list that it is given; ours keep their numbers in the whole one."""
    few = Benchmark.load(folder, "single").first_prompts(1)
    assert [case.id for case in few.cases] == ["0000", "0002"]
    case_list.write(run, case_list.table(few, 2))
    for name in ("0000_1.png", "0002_1.png"):
        grey(7).save(run / "images" / name)
    assert case_list.export(run, tmp_path / "uno", "uno") == 4
    listed = json.loads((tmp_path / "uno" / "cases.json").read_text())
    assert [entry["prompt"] for entry in listed] == [case.prompt for case in few.cases]  # a case once
    assert held(tmp_path / "uno") == ["0_0.png", "0_1.png", "1_0.png", "1_1.png", "cases.json"]
    assert (tmp_path / "uno" / "1_0.png").read_bytes() == (run / "images" / "0002_0.png").read_bytes()


def test_what_has_no_place_in_a_form_is_refused(run, folder, tmp_path):  # noqa: F811
    case_list.write(run, case_list.table(Benchmark.load(folder, "multi")))
    with pytest.raises(BenchmarkError, match="one image a prompt, of one subject: export these as uno"):
        case_list.export(run, tmp_path / "out", "patchdpo")
    cases = case_list.table(Benchmark.load(folder, "single")).assign(prompt="a cat of St. Ives")
    case_list.write(run, cases)
    with pytest.raises(BenchmarkError, match="no file name that PatchDPO's script reads"):
        case_list.export(run, tmp_path / "out", "patchdpo")
    case_list.write(run, case_list.table(Benchmark.load(folder, "single"), 2))
    with pytest.raises(BenchmarkError, match=r"lacks 3 of its images \(0000_1.png, "):
        case_list.export(run, tmp_path / "out", "uno")
    assert not (tmp_path / "out").exists()
    (run / "cases.json").unlink()
    with pytest.raises(BenchmarkError, match="name a run of images"):
        case_list.export(run, tmp_path / "out", "uno")
