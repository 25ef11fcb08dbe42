"""Who is scored against what. The encoder here turns a flat grey of g into the unit vector at g degrees, so that every
expected score is the cosine of a difference of grey levels, written down by hand."""

import json
from math import cos, radians
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTModel

from focusdpo_lib import params
from focusdpo_lib.evaluation.benchmark import Benchmark, BenchmarkError, open_image
from focusdpo_lib.evaluation.encoders import DinoEncoder, Encoders
from focusdpo_lib.evaluation.scores import score_copy, score_images, score_photos
from focusdpo_lib.toybox.attributes import ToyboxReader
from focusdpo_lib.toybox.benchmark import write_benchmark

CAT = {"class_name": "cat", "base": "red", "accent": "blue", "pattern": "dots", "trim": "white"}
MUG = {"class_name": "mug", "base": "green", "accent": "blue", "pattern": "plaid", "trim": "black"}
PHOTOS = {"cat": (0, 60, 120), "mug": (90, 150)}  # grey levels
PROMPTS = {"a cat in the snow": 100, "a cat in a city": 10, "a mug in the snow": 0, "a cat and a mug in a city": 45}


def cosine(*degrees: float) -> float:
    """The mean cosine of some angles."""
    return float(np.mean([cos(radians(d)) for d in degrees]))


class Angles:
    """An encoder whose embedding of an image or a known prompt is the unit vector at an angle in degrees."""

    id, batch_size, kind, device = "angles", 64, "dino", "cpu"

    def images(self, pictures):
        return self.vectors(torch.stack([self.prepare(open_image(picture)) for picture in pictures]))

    def prepare(self, image):
        return torch.tensor([image.getpixel((0, 0))[0]])

    def vectors(self, pixels):
        return self._vectors(pixels[:, 0].tolist())

    def texts(self, prompts):
        return self._vectors([PROMPTS[p] for p in prompts])

    def cut(self, prompts):
        return None

    def _vectors(self, degrees):
        angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float32))
        return torch.stack([angle.cos(), angle.sin()], -1)


ENCODERS = Encoders(Angles(), Angles())


def grey(level: int, size: int = 8) -> Image.Image:
    return Image.new("RGB", (size, size), (level, level, level))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A benchmark of one cat and one mug; the references are cat/01 (60°) and mug/00 (90°)."""
    root = tmp_path / "benchmark"
    for name, levels in PHOTOS.items():
        (root / "dataset" / name).mkdir(parents=True)
        for i, level in enumerate(levels):
            grey(level).save(root / "dataset" / name / f"{i:02d}.png")
    (root / "dataset" / "prompts_and_classes.txt").write_text(
        "Classes\n\nsubject_name,class\ncat,cat\nmug,mug\n\nPrompts\n\nObject Prompts\n\nLive Subject Prompts\n"
    )
    cat, mug = "./dataset/cat/01.png", "./dataset/mug/00.png"
    single = [("a cat in the snow", [cat]), ("a cat in a city", [cat]), ("a mug in the snow", [mug])]
    for kind, cases in (("single", single), ("multi", [("a cat and a mug in a city", [cat, mug])])):
        entries = [{"prompt": prompt, "image_paths": paths} for prompt, paths in cases]
        (root / f"cases_{kind}.json").write_text(json.dumps(entries))
    return root


def generated(tmp_path: Path, **levels: int) -> Path:
    images = tmp_path / "images"
    images.mkdir(exist_ok=True)
    for name, level in levels.items():
        grey(level).save(images / f"{name.removeprefix('_')}.png")
    return images


def settings(**changes):
    return params.section("evaluation", changes)


def values(scores: pd.DataFrame, metric: str, **at) -> list[float]:
    rows = scores[scores["metric"] == metric]
    for column, value in at.items():
        rows = rows[rows[column] == value]
    return rows["value"].tolist()


ONE = params.section("generation")

# --- generated images ---


@pytest.mark.parametrize(("references", "degrees"), [("all", (30, 30, 90)), ("used", (30,)), ("unused", (30, 90))])
def test_an_image_is_scored_against_the_photos_that_the_switch_names(folder, tmp_path, references, degrees):
    images = generated(tmp_path, _0000_0=30, _0001_0=30, _0002_0=30)  # the photos of the cat: 0°, 60° (used), 120°
    scores = score_images(Benchmark.load(folder, "single"), images, ENCODERS, settings(references=references), ONE)
    assert values(scores, "dino", case="0000") == pytest.approx([cosine(*degrees)], abs=1e-6)
    assert values(scores, "clip_i", case="0000") == values(scores, "dino", case="0000")


@pytest.mark.parametrize("references", ["used", "unused"])
def test_where_every_photo_went_in_all_are_scored_against(folder, tmp_path, references):
    benchmark, everything = Benchmark.load(folder, "single"), params.section("generation", {"references": "all"})
    images = generated(tmp_path, _0000_0=30, _0001_0=30, _0002_0=30)
    with pytest.raises(BenchmarkError, match=f"evaluation.references cannot be '{references}' where every photo went"):
        score_images(benchmark, images, ENCODERS, settings(references=references), everything)
    assert len(score_images(benchmark, images, ENCODERS, settings(), everything))


def test_clip_t_is_the_clamped_cosine_with_the_prompt_times_the_weight(folder, tmp_path):
    images = generated(tmp_path, _0000_0=210, _0001_0=40, _0002_0=60)  # prompts at 100°, 10°, 0°
    benchmark = Benchmark.load(folder, "single")

    def clip_t(**changes):
        return values(score_images(benchmark, images, ENCODERS, settings(**changes), ONE), "clip_t")

    assert clip_t() == pytest.approx([0, cosine(30), 0.5], abs=1e-6)
    assert clip_t(clip_text_clamp=False) == pytest.approx([cosine(110), cosine(30), 0.5], abs=1e-6)
    assert clip_t(clip_text_weight=2.5) == pytest.approx([0, 2.5 * cosine(30), 1.25], abs=1e-6)


def test_two_subjects_are_each_scored_on_the_whole_image(folder, tmp_path):
    scores = score_images(Benchmark.load(folder, "multi"), generated(tmp_path, _0000_0=90), ENCODERS, settings(), ONE)
    assert values(scores, "dino", subject="cat") == pytest.approx([cosine(90, 30, 30)], abs=1e-6)
    assert values(scores, "dino", subject="mug") == pytest.approx([cosine(0, 60)], abs=1e-6)
    assert set(scores["subjects"]) == {"cat+mug"} and set(scores["weight"]) == {1.0}


def test_every_image_of_a_prompt_is_scored_and_missing_ones_are_listed(folder, tmp_path):
    two = params.section("generation", {"images_per_prompt": 2})
    images = generated(tmp_path, _0000_0=30, _0000_1=60, _0001_0=30, _0001_1=30, _0002_0=30)
    benchmark = Benchmark.load(folder, "single")
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of 6 images \(0002_1.png\): generate them first"):
        score_images(benchmark, images, ENCODERS, settings(), two)
    scores = score_images(benchmark, generated(tmp_path, _0002_1=30), ENCODERS, settings(), two)
    assert values(scores, "dino", case="0000", index=1) == pytest.approx([cosine(60, 0, 60)], abs=1e-6)
    (images / "0002_1.png").write_bytes((images / "0002_1.png").read_bytes()[:50])
    with pytest.raises(BenchmarkError, match=r"0002_1.png cannot be read"):
        score_images(benchmark, images, ENCODERS, settings(), two)


def test_scores_and_their_protocol_survive_parquet(folder, tmp_path):
    images = generated(tmp_path, _0000_0=90)
    scores = score_images(Benchmark.load(folder, "multi"), images, ENCODERS, settings(), ONE)
    scores.to_parquet(tmp_path / "scores.parquet")
    again = pd.read_parquet(tmp_path / "scores.parquet")
    pd.testing.assert_frame_equal(again, scores)
    assert again.attrs["protocol"] == scores.attrs["protocol"]
    assert again.attrs["protocol"]["generation"]["steps"] == ONE.steps


# --- anchors ---


def test_real_photos_are_compared_with_each_other_and_not_with_themselves(folder):
    scores = score_photos(Benchmark.load(folder, "single"), ENCODERS, settings())
    assert values(scores, "dino", subjects="cat") == pytest.approx([cosine(60, 60, 120)], abs=1e-6)
    assert values(scores, "clip_i", subjects="mug") == pytest.approx([cosine(60)], abs=1e-6)
    pairs = score_photos(Benchmark.load(folder, "multi"), ENCODERS, settings())
    assert values(pairs, "dino", subject="mug", subjects="cat+mug") == pytest.approx([cosine(60)], abs=1e-6)


def test_one_photo_has_no_other_to_be_compared_with(folder, tmp_path):
    (folder / "dataset" / "mug" / "01.png").unlink()
    benchmark = Benchmark.load(folder, "single")
    with pytest.raises(BenchmarkError, match="subject mug has one photo only"):
        score_photos(benchmark, ENCODERS, settings())
    images = generated(tmp_path, _0000_0=30, _0001_0=30, _0002_0=30)
    with pytest.raises(BenchmarkError, match="'unused'"):
        score_images(benchmark, images, ENCODERS, settings(references="unused"), ONE)


def test_the_copy_is_the_reference_itself(folder):
    scores = score_copy(Benchmark.load(folder, "single"), ENCODERS, settings())
    assert values(scores, "dino", case="0000") == pytest.approx([cosine(60, 0, 60)], abs=1e-6)
    used = score_copy(Benchmark.load(folder, "single"), ENCODERS, settings(references="used"))
    assert values(used, "dino") == pytest.approx([1, 1, 1], abs=1e-6)


def test_the_copy_of_two_references_shows_both_side_by_side(folder):
    shown = []

    class Kept(Angles):
        def images(self, pictures):
            shown.extend(p for p in pictures if isinstance(p, Image.Image))
            return super().images(pictures)

    score_copy(Benchmark.load(folder, "multi"), Encoders(Kept(), Angles()), settings())
    canvas = np.asarray(shown[0])[..., 0]
    assert canvas.shape == (8, 8)
    assert (canvas[2:6, :4] == 60).all() and (canvas[2:6, 4:] == 90).all()
    assert (canvas[:2] == 255).all() and (canvas[6:] == 255).all()


def test_copying_scores_one_nth_plus_the_rest_of_the_oracle(tmp_path):
    """1/n + (1 − 1/n) · oracle, exactly, when every photo is the reference once; with a real ViT on toybox photos."""
    heads = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    ViTModel(ViTConfig(**heads, image_size=64, patch_size=16)).save_pretrained(tmp_path / "dino")
    folder = write_benchmark(tmp_path / "benchmark")
    every = [
        {"prompt": f"a {path.parent.name.rstrip('23')}", "image_paths": [str(path)]}
        for path in sorted(folder.glob("dataset/*/*.png"))
    ]
    (folder / "cases_single.json").write_text(json.dumps(every))
    benchmark = Benchmark.load(folder, "single")

    class NoText(Angles):
        def texts(self, prompts):
            return torch.ones(len(prompts), 2)

    encoders = Encoders(DinoEncoder(str(tmp_path / "dino")), NoText())
    oracle = score_photos(benchmark, encoders, settings()).query("metric == 'dino'").set_index("subjects")["value"]
    copy = score_copy(benchmark, encoders, settings()).query("metric == 'dino'").groupby("subjects")["value"].mean()
    assert len(copy) == 30 and oracle.min() < 0.999
    np.testing.assert_allclose(copy, 1 / 5 + (1 - 1 / 5) * oracle.loc[copy.index], rtol=1e-5)


# --- attributes ---


def test_a_reader_adds_attribute_rows_where_the_benchmark_knows_them(folder, tmp_path):
    def reader(pixels):
        assert pixels.shape == (1, 3, 8, 8) and pixels.min() == pixels.max() == pytest.approx(90 / 127.5 - 1)
        return [[CAT | {"base": "green"}, MUG]]

    encoders = Encoders(Angles(), Angles(), ToyboxReader(SimpleNamespace(read=reader), "by hand"))
    images = generated(tmp_path, _0000_0=90)
    without = score_images(Benchmark.load(folder, "multi"), images, encoders, settings(), ONE)
    assert "leakage" not in set(without["metric"])
    attributes = {"cat": CAT | {"angle": 0}, "mug": MUG | {"angle": 45}}  # which no reader recovers
    (folder / "attributes.json").write_text(json.dumps(attributes))
    scores = score_images(Benchmark.load(folder, "multi"), images, encoders, settings(), ONE)
    assert values(scores, "attribute_accuracy") == [0.8, 1.0]
    assert values(scores, "leakage") == pytest.approx([1 / 3, 0])
    assert scores[scores["metric"] == "leakage"]["weight"].tolist() == [3, 3]
