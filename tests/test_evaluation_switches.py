"""The switches of the protocol that no published table turns: what the prompt says, and what scores vary with."""

import numpy as np
import pandas as pd
import pytest
from test_evaluation_scores import ENCODERS, ONE, PROMPTS, cosine, folder, generated, settings, values  # noqa: F401
from test_evaluation_tables import frame

from focusdpo_lib import params
from focusdpo_lib.evaluation import statistics, tables
from focusdpo_lib.evaluation.benchmark import Benchmark, BenchmarkError
from focusdpo_lib.evaluation.scores import check, score_images, text_of
from focusdpo_lib.evaluation.wording import with_token, without_subjects

# --- prompts ---


@pytest.mark.parametrize(
    ("prompt", "classes", "token", "scene"),
    [
        ("a backpack in the jungle", ["backpack"], "a sks backpack in the jungle", "in the jungle"),
        ("a red backpack", ["backpack"], "a red sks backpack", "red"),
        ("a cube shaped stuffed animal", ["stuffed animal"], "a cube shaped sks stuffed animal", "cube shaped"),
        ("a dog wearing a red hat", ["dog"], "a sks dog wearing a red hat", "wearing a red hat"),
        ("a bowl and a can in the snow", ["bowl", "can"], "a sks bowl and a sks can in the snow", "in the snow"),
        ("a red bowl and a red can", ["bowl", "can"], "a red sks bowl and a red sks can", "red"),
        ("a dog and a dog on the beach", ["dog", "dog"], "a sks dog and a sks dog on the beach", "on the beach"),
        ("a red dog, next to it is a toy", ["dog", "toy"], "a red sks dog, next to it is a sks toy", "red"),
        ("Two glasses on a table", ["glasses"], "Two sks glasses on a table", "Two on a table"),
        ("a cat", ["cat"], "a sks cat", ""),
    ],
)
def test_a_prompt_with_a_token_and_without_its_subjects(prompt, classes, token, scene):
    assert with_token(prompt, classes, "sks") == token
    assert without_subjects(prompt, classes) == scene


def test_clip_t_is_of_the_prompt_that_is_named(folder, tmp_path, monkeypatch):  # noqa: F811
    images, benchmark = generated(tmp_path, _0000_0=30, _0001_0=30, _0002_0=30), Benchmark.load(folder, "single")
    monkeypatch.setitem(PROMPTS, "in the snow", 30)
    monkeypatch.setitem(PROMPTS, "in a city", 90)
    monkeypatch.setitem(PROMPTS, "a sks cat in the snow", 75)
    monkeypatch.setitem(PROMPTS, "a sks cat in a city", 30)
    monkeypatch.setitem(PROMPTS, "a sks mug in the snow", 0)

    def clip_t(**changes):
        return values(score_images(benchmark, images, ENCODERS, settings(**changes), ONE), "clip_t")

    assert clip_t(clip_prompt="scene") == pytest.approx([1, cosine(60), 1], abs=1e-6)
    assert clip_t(clip_prompt="token", unique_token="sks") == pytest.approx([cosine(45), 1, cosine(30)], abs=1e-6)


def test_a_prompt_of_which_nothing_is_left_is_said_before_anything_is_made(folder):  # noqa: F811
    path = folder / "cases_single.json"
    path.write_text(path.read_text().replace("a mug in the snow", "a mug"))
    with pytest.raises(BenchmarkError, match=r"case 0002 \('a mug'\) says nothing but its subject"):
        check(Benchmark.load(folder, "single"), settings(clip_prompt="scene"), ONE)


@pytest.mark.parametrize(
    "given", [{"clip_prompt": "token"}, {"unique_token": "sks"}, {"clip_prompt": "token", "unique_token": " "}]
)
def test_a_token_and_its_use_go_together(given):
    with pytest.raises(params.ParameterError, match="go together: give both or neither"):
        params.section("evaluation", given)


def test_every_prompt_of_dreambench_says_something_beside_its_subject(folder):  # noqa: F811
    benchmark = Benchmark.load(folder, "multi")
    assert text_of(benchmark, benchmark.cases[0], settings(clip_prompt="scene")) == "in a city"


# --- variance ---


def several(spread_subject, spread_prompt, spread_image, subjects=40, prompts=20, images=4, seed=0) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    rows, index = [], []
    for s in range(subjects):
        of_subject = spread_subject * random.normal()
        for p in range(prompts):
            of_prompt = of_subject + spread_prompt * random.normal()
            rows += [
                (f"s{s}", f"{s}-{p}", "dino", f"s{s}", of_prompt + spread_image * random.normal())
                for _ in range(images)
            ]
            index += range(images)
    scores = frame(rows)
    scores["index"] = index
    return scores


def test_the_parts_of_the_variance_are_those_that_were_put_in():
    found = statistics.components(several(3.0, 2.0, 1.0), "dino")
    assert found == pytest.approx({"subjects": 9 / 14, "prompts": 4 / 14, "images": 1 / 14}, abs=0.06)
    alone = statistics.components(several(0.0, 0.0, 1.0), "dino")
    assert alone["images"] > 0.95


def test_the_parts_by_hand():
    """Two subjects of two prompts of two images: mean squares 0.5, 4 and 50, so 0.5, 1.75 and 11.5."""
    by_case = {("a", 0): (0.5, 1.5), ("a", 1): (2.5, 3.5), ("b", 0): (5.5, 6.5), ("b", 1): (7.5, 8.5)}
    scores = frame([(s, f"{s}{p}", "dino", s, v) for (s, p), both in by_case.items() for v in both])
    scores["index"] = [0, 1] * 4
    assert statistics.components(scores, "dino") == pytest.approx(
        {"subjects": 11.5 / 13.75, "prompts": 1.75 / 13.75, "images": 0.5 / 13.75}
    )


def test_a_table_says_what_scores_vary_with_where_a_prompt_has_several_images():
    rows = {"uno": several(3.0, 2.0, 1.0), "copy": frame([(f"s{i}", str(i), "dino", "s", 0.5) for i in range(40)])}
    page = tables.markdown(tables.table(rows, params.Evaluation(bootstrap=50)))
    said = page.split("What a score varies with (share of its variance)")[1].split("###")[0]
    assert "| UNO | subjects 6" in said and "copy" not in said
    single = several(3.0, 2.0, 1.0, images=1)
    assert "varies with" not in tables.markdown(tables.table({"uno": single}, params.Evaluation(bootstrap=50)))
