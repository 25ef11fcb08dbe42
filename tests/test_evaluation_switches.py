"""The switches of the protocol that no published table turns: what the prompt says, and what scores vary with."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as hf
from PIL import Image
from test_evaluation_scores import ENCODERS, ONE, PROMPTS, cosine, folder, generated, settings, values  # noqa: F401
from test_evaluation_tables import frame
from tiny_models import write_tiny_models
from tiny_perception import write_tiny_detector

from focusdpo_lib import params
from focusdpo_lib.evaluation import statistics, tables
from focusdpo_lib.evaluation.benchmark import Benchmark, BenchmarkError
from focusdpo_lib.evaluation.detector import Detector, crop, overlap
from focusdpo_lib.evaluation.encoders import EncoderError, load_encoders
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


# --- detected crops ---


class Finder:
    """Finds a word where the image has its grey: the left and right halves of an image stand for two things."""

    id = "finder"

    def boxes(self, image, words):
        halves = [(0, 0, 4, 8), (4, 0, 8, 8)]
        left = [box for box in halves if image.getpixel((box[0], 0))[0] != 255]
        return [left.pop(0) if left else None for _ in words]


def pair(tmp_path, left, right):
    image = Image.new("RGB", (8, 8), (left,) * 3)
    image.paste((right,) * 3, (4, 0, 8, 8))
    (tmp_path / "images").mkdir(exist_ok=True)
    image.save(tmp_path / "images" / "0000_0.png")
    return tmp_path / "images"


def test_each_subject_is_compared_where_it_is_found_and_one_that_is_not_scores_0(folder, tmp_path):  # noqa: F811
    benchmark, use = Benchmark.load(folder, "multi"), settings(region="detected")
    encoders = replace(ENCODERS, finder=Finder())
    both = score_images(benchmark, pair(tmp_path, 60, 90), encoders, use, ONE)
    assert values(both, "dino", subject="cat") == pytest.approx([cosine(60, 0, 60)], abs=1e-6)  # photos at 0, 60, 120
    assert values(both, "clip_i", subject="mug") == pytest.approx([cosine(0, 60)], abs=1e-6)  # photos at 90, 150
    one = score_images(benchmark, pair(tmp_path, 60, 255), encoders, use, ONE)
    assert values(one, "dino", subject="mug") == [0.0] and values(one, "dino", subject="cat")[0] > 0.6
    assert one.attrs["protocol"]["encoders"]["detector"] == "finder" and "region" in one.attrs["protocol"]["evaluation"]
    assert values(one, "clip_t") == values(
        score_images(benchmark, tmp_path / "images", ENCODERS, settings(), ONE), "clip_t"
    )


def test_two_subjects_of_one_word_are_told_apart_by_their_photos(folder, tmp_path):  # noqa: F811
    classes = folder / "dataset" / "prompts_and_classes.txt"
    classes.write_text(classes.read_text().replace("mug,mug", "mug,cat"))
    cases = folder / "cases_multi.json"
    cases.write_text(cases.read_text().replace("a cat and a mug", "a cat and a cat"))
    benchmark, use, encoders = (
        Benchmark.load(folder, "multi"),
        settings(region="detected"),
        replace(ENCODERS, finder=Finder()),
    )
    PROMPTS["a cat and a cat in a city"] = 45
    for left, right in ((10, 130), (130, 10)):  # cat's photos are at 0, 60, 120, mug's at 90, 150
        scores = score_images(benchmark, pair(tmp_path, left, right), encoders, use, ONE)
        for metric in ("dino", "clip_i"):
            assert values(scores, metric, subject="cat") == pytest.approx([cosine(10, 50, 110)], abs=1e-6)
            assert values(scores, metric, subject="mug") == pytest.approx([cosine(40, 20)], abs=1e-6)


@pytest.fixture(scope="module")
def grounding(tmp_path_factory):
    return write_tiny_detector(tmp_path_factory.mktemp("models") / "grounding")


def test_boxes_are_those_of_the_library(grounding):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 80, 3), np.uint8))
    model = hf.GroundingDinoForObjectDetection.from_pretrained(grounding).eval()
    processor = hf.GroundingDinoProcessor.from_pretrained(grounding)
    inputs = processor(images=image, text="cat.", return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    theirs = processor.post_process_grounded_object_detection(
        outputs, inputs.input_ids, threshold=0.0, text_threshold=0.0, target_sizes=[(48, 80)]
    )[0]
    best = theirs["boxes"][theirs["scores"].argmax()].tolist()
    (ours,) = Detector(str(grounding), threshold=0.0).boxes(image, ["cat"])
    assert ours == pytest.approx(best, abs=1e-3)
    highest = float(theirs["scores"].max())
    for threshold, found in ((highest - 1e-4, True), (highest + 1e-4, False)):
        detector = Detector(str(grounding), threshold=threshold)
        assert (detector.boxes(image, ["cat"]) != [None]) == found
    first, second = Detector(str(grounding), threshold=0.0).boxes(image, ["cat", "cat"])
    assert first == ours and (second is None or overlap(first, second) < 0.5)


def test_boxes_overlap_as_their_areas_do_and_a_crop_has_a_pixel():
    assert overlap((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3) and overlap((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    image = Image.new("RGB", (10, 6))
    assert crop(image, (1.2, -3, 4.7, 99)).size == (4, 6) and crop(image, (9.9, 5.9, 9.9, 5.9)).size == (1, 1)
    assert crop(image, None) is None


def test_a_detector_that_is_none_is_said_and_one_that_is_scores(grounding, folder, tmp_path):  # noqa: F811
    models = write_tiny_models(tmp_path / "models")
    use = {"dino": str(models / "dino"), "clip": str(models / "clip"), "reader": None, "region": "detected"}
    with pytest.raises(EncoderError, match=r"^evaluation.detector = .*it is a vit, and crops need a grounding-dino"):
        load_encoders(settings(**use, detector=str(models / "dino")))
    evaluation = settings(**use, detector=str(grounding), detector_threshold=0.0)
    images = tmp_path / "images"
    images.mkdir()
    for k in range(3):
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (64, 96, 3), np.uint8)).save(
            images / f"{k:04d}_0.png"
        )
    encoders = load_encoders(evaluation)
    scores = score_images(Benchmark.load(folder, "single"), images, encoders, evaluation, ONE)
    assert len(values(scores, "dino")) == 3 and encoders.ids["detector"].startswith("grounding@")
    none = replace(encoders, finder=Detector(str(grounding), threshold=1.0))
    assert values(score_images(Benchmark.load(folder, "single"), images, none, evaluation, ONE), "dino") == [0.0] * 3
