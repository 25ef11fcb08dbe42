"""How far a switch moves one image's scores: worked out by hand on vectors of two numbers."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from test_evaluation_layouts import write_benchmark

from focusdpo_lib import params
from focusdpo_lib.evaluation import turns
from focusdpo_lib.evaluation.benchmark import Benchmark
from focusdpo_lib.evaluation.encoders import Encoders

# The image is (1, 0), of each subject photo 00 is the same and photo 01 at a cosine of 0.6; the dog's 00 is at 0.2.
VECTORS = {"image": (1.0, 0.0), "00": (1.0, 0.0), "01": (0.6, 0.8), "dog/00": (0.2, 0.96**0.5)}


class Known:
    """An encoder that knows its pictures by name; of prompts it says a cosine of −0.5 with the image."""

    id = "known"

    def __init__(self, shift: float = 0.0):
        self.shift = shift

    def images(self, pictures) -> torch.Tensor:
        names = [Path(p).stem if "_" not in Path(p).stem else "image" for p in pictures]
        within = [f"{Path(p).parent.name}/{name}" for p, name in zip(pictures, names, strict=True)]
        return torch.tensor([VECTORS.get(w, VECTORS[n]) for w, n in zip(within, names, strict=True)])

    def texts(self, prompts) -> torch.Tensor:
        return torch.tensor([(-0.5 + self.shift, 0.75**0.5) for _ in prompts])

    def cut(self, prompts) -> None:
        return None


def load(settings: params.Evaluation) -> Encoders:
    return Encoders(Known(), Known(0.75 if settings.clip_precision == "bfloat16" else 0.0))


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = write_benchmark(tmp_path / "data")
    (folder / "images").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "images" / "0000_0.png")
    return folder


def turned(folder: Path, kind: str, **changes):
    benchmark = Benchmark.load(folder, kind)
    settings = params.section("evaluation", changes)
    table = turns.turned(benchmark, benchmark.cases[0], folder / "images", settings, params.Generation(), load)
    return table.set_index(["switch", "turned to"])


def test_one_subject_s_scores_by_hand(folder):
    found = turned(folder, "single")  # its reference is photo 01
    assert found.loc[("as set", ""), ["DINO", "CLIP-T"]].tolist() == pytest.approx([0.8, 0.0])
    moved = found["DINO moved"]
    assert moved[("references", "used")] == pytest.approx(-0.2) and moved[("references", "unused")] == pytest.approx(
        0.2
    )
    assert found["CLIP-T moved"][("clip_text_clamp", "False")] == pytest.approx(-0.5)
    assert found["CLIP-T moved"][("clip_text_weight", "2.5")] == 0  # 2.5 × 0
    assert found["CLIP-T moved"][("clip_precision", "bfloat16")] == pytest.approx(0.25)  # its own encoder: −0.5 + 0.75
    assert "subjects" not in {switch for switch, _ in found.index}


def test_two_subjects_have_a_minimum_and_a_named_protocol_may_be_turned(folder):
    found = turned(folder, "multi", protocol="uno")
    # Mug: (1 + 0.6) / 2 = 0.8; dog: (0.2 + 0.6) / 2 = 0.4.
    assert found.loc[("as set", ""), "DINO"] == pytest.approx(0.6)
    assert found.loc[("subjects", "min"), "DINO"] == pytest.approx(0.4)
    assert found.loc[("references", "used"), "DINO"] == pytest.approx(0.6)  # 00 of each: (1 + 0.2) / 2
    assert ("references", "unused") in found.index


def test_a_turn_that_a_case_does_not_allow_is_left_out(folder):
    (folder / "dataset" / "dog" / "01.jpg").unlink()
    found = turned(folder, "multi")
    assert ("references", "unused") not in found.index and ("references", "used") in found.index
