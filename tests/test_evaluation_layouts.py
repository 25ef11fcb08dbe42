"""Folders of images as UNO's and PatchDPO's scripts and this kit write them; what is wrong with one is said at once.

The layouts are written here as those scripts do (bytedance/UNO d305981, hqhQAQ/PatchDPO 558f0c2), not by our own code.
"""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from focusdpo_lib.evaluation import layouts
from focusdpo_lib.evaluation.benchmark import Benchmark

MUG = "tasse_dorée"  # of composed letters
PROMPTS = ["a {0} {1} in the jungle", "a {0} {1} on the beach", "a red {0} {1}"]


def write_benchmark(folder: Path, newline: str = "\n") -> Path:
    """Two subjects with two photos each, three prompts: 6 cases of one subject and 3 of both, in DreamBench's form."""
    for n, name in enumerate((MUG, "dog")):
        (folder / "dataset" / name).mkdir(parents=True)
        for k in range(2):
            Image.new("RGB", (48, 48), (60 * n, 80 * k, 99)).save(folder / "dataset" / name / f"0{k}.jpg")
    listed = "prompt_list = [\n" + ",\n".join(f"'{p}'.format(unique_token, class_token)" for p in PROMPTS) + "\n]\n"
    text = f"Classes\n\nsubject_name,class\n{MUG},mug\ndog,dog\n\nPrompts\n\nObject Prompts\n\n{listed}\n"
    text += f"Live Subject Prompts\n\n{listed}"
    (folder / "dataset" / "prompts_and_classes.txt").write_bytes(text.replace("\n", newline).encode())
    single = [
        {"prompt": p.replace("{0} {1}", word), "image_paths": [f"./dreambooth/dataset/{name}/01.jpg"]}
        for name, word in ((MUG, "mug"), ("dog", "dog"))
        for p in PROMPTS
    ]
    pair = [f"./dreambooth/dataset/{name}/00.jpg" for name in (MUG, "dog")]
    multi = [{"prompt": p.replace("{0} {1}", "mug and a dog"), "image_paths": pair} for p in PROMPTS]
    for kind, cases in (("single", single), ("multi", multi)):
        (folder / f"cases_{kind}.json").write_bytes(json.dumps(cases, indent=4).replace("\n", newline).encode())
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_benchmark(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def single(folder) -> Benchmark:
    return Benchmark.load(folder, "single")


def picture(n: int, size=(32, 32), mode="RGB") -> Image.Image:
    pixels = np.random.default_rng(n).integers(0, 255, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def as_uno(into: Path, cases: list[dict], count: int = 1, **changed) -> Path:
    """{i}_{j}.png of list entry i, and beside it {i}_{j}.json: the arguments of the run, prompt and references."""
    into.mkdir(parents=True)
    arguments = {"width": 32, "height": 32, "num_steps": 25, "guidance": 4, "seed": 3407, "pe": "d"}
    for i, case in enumerate(cases):
        for j in range(count):
            picture(i * count + j).save(into / f"{i}_{j}.png")
            (into / f"{i}_{j}.json").write_text(json.dumps(arguments | case | changed, indent=4))
    return into


def listed(folder: Path, kind: str) -> list[dict]:
    return json.loads((folder / f"cases_{kind}.json").read_text("utf-8"))


def as_patchdpo(into: Path, cases: list[dict]) -> Path:
    """<subject>/<prompt>.png, and all_score.json, which its evaluation leaves there."""
    for n, case in enumerate(cases):
        inner = into / Path(case["image_paths"][0]).parent.name
        inner.mkdir(parents=True, exist_ok=True)
        picture(n).save(inner / f"{case['prompt']}.png")
    (into / "all_score.json").write_text("{}")
    return into


def as_cases(into: Path, count: int) -> Path:
    into.mkdir(parents=True)
    for n in range(count):
        picture(n).save(into / f"{n:04d}_0.png")
    return into


def pixels(found: layouts.Found) -> dict[tuple[str, int], int]:
    """Which of the pictures above stands in which place."""
    made = {picture(n).tobytes(): n for n in range(20)}
    return {(case.id, k): made[Image.open(path).tobytes()] for (case, k), path in found.files.items()}


def problem(folder: Path, layout: str, benchmark: Benchmark, **options) -> str:
    with pytest.raises(layouts.LayoutError) as error:
        layouts.read(folder, layout, benchmark, **options)
    return str(error.value)


# --- What is read ---


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_the_three_layouts_give_the_same_places(tmp_path, newline):
    data = write_benchmark(tmp_path / "data", newline)
    single, cases = Benchmark.load(data, "single"), listed(data, "single")
    made = {
        "uno": as_uno(tmp_path / "uno", cases),
        "patchdpo": as_patchdpo(tmp_path / "patchdpo", cases),
        "case": as_cases(tmp_path / "kit" / "images", 6).parent,
    }
    expected = {(f"{n:04d}", 0): n for n in range(6)}
    for layout, images in made.items():
        found = layouts.read(images, layout, single)
        assert pixels(found) == expected and found.size == (32, 32)
    assert pixels(layouts.read(made["case"] / "images", "case", single)) == expected  # the folder itself, too


def test_what_uno_s_script_says_of_sampling_is_read(tmp_path, folder, single):
    found = layouts.read(as_uno(tmp_path / "uno", listed(folder, "single")), "uno", single)
    assert found.settings == {"width": 32, "height": 32, "num_steps": 25, "guidance": 4, "seed": 3407, "pe": "d"}


def test_several_images_a_prompt_and_the_first_prompts_of_two_subjects(tmp_path, folder):
    multi = Benchmark.load(folder, "multi")
    images = as_uno(tmp_path / "uno", listed(folder, "multi"), count=2)
    assert len(layouts.read(images, "uno", multi, count=2).files) == 6
    assert pixels(layouts.read(images, "uno", multi, count=2, prompts=1)) == {("0000", 0): 0, ("0000", 1): 1}


def test_names_are_compared_as_they_are_typed(tmp_path, folder, single):
    """macOS writes é as two letters, and a CRLF list of prompts leaves a carriage return on every name."""
    images = as_patchdpo(tmp_path / "patchdpo", listed(folder, "single"))
    (images / MUG).rename(images / unicodedata.normalize("NFD", MUG))
    for path in (images / "dog").iterdir():
        path.rename(path.with_name(f"{path.stem}\r.png"))
    assert len(layouts.read(images, "patchdpo", single).files) == 6


def test_another_format_of_picture_is_read_and_turned_upright(tmp_path, folder, single):
    images = as_cases(tmp_path / "case", 6)
    wide = picture(0, (40, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    wide.save(images / "0000_0.jpg", exif=exif)
    (images / "0000_0.png").unlink()
    picture(1).save(images / "0001_0.webp", lossless=True)
    (images / "0001_0.png").unlink()
    said = problem(images, "case", single)
    assert "1 not of 32×32 pixels, as most are (0000_0.jpg is 30×40)" in said and "0001" not in said


# --- What is refused, all of it at once ---


def test_everything_wrong_is_listed_in_one_error(tmp_path, folder, single):
    images = as_uno(tmp_path / "uno", listed(folder, "single"))
    (images / "0_0.png").unlink()
    picture(1).save(images / "1_0.jpg")
    picture(9).save(images / "01_0.png")
    picture(2, (32, 31)).save(images / "2_0.png")
    picture(3, mode="L").save(images / "3_0.png")
    (images / "4_0.png").write_bytes((images / "4_0.png").read_bytes()[:200])
    picture(5).save(images / "6_0.png")
    picture(5).save(images / "final.png")
    picture(5).save(images / "5_1.png")
    (images / ".hidden_0.png").write_bytes(b"")
    said = problem(images, "uno", single)
    for part in (
        "1 missing (0000_0 (tasse_dorée: a mug in the jungle))",
        "1 doubled (0001_0 (tasse_dorée: a mug on the beach) is 01_0.png and 1_0.jpg and 1_0.png)",
        "1 not of 32×32 pixels, as most are (2_0.png is 32×31)",
        "1 not in RGB (3_0.png is L)",
        "1 unreadable (the image",
        "2 named as no case of this list ('6_0.png', 'final.png')",
        "1 beyond images_per_prompt = 1 (5_1.png)",
    ):
        assert part in said, part
    assert "hidden" not in said


def test_a_folder_made_for_another_list_is_refused_case_by_case(tmp_path, folder, single):
    cases = listed(folder, "single")
    turned = [cases[1], cases[0], *cases[2:5], cases[5] | {"image_paths": ["./x/dog/00.jpg"]}]
    said = problem(as_uno(tmp_path / "uno", turned), "uno", single)
    assert "3 made for another list of cases" in said
    assert "0_0.json says 'a mug on the beach' where the list has 'a mug in the jungle'" in said
    assert "5_0.json says dog/00.jpg where the list has dog/01.jpg" in said
    multi = as_uno(tmp_path / "multi", listed(folder, "multi"))
    assert "3 made for another list of cases" in problem(multi, "uno", single)


def test_two_references_in_the_other_order_are_another_case(tmp_path, folder):
    """Which subject a prompt names first, and whose place in the picture is whose, would be exchanged."""
    cases = listed(folder, "multi")
    turned = [cases[0] | {"image_paths": cases[0]["image_paths"][::-1]}, *cases[1:]]
    said = problem(as_uno(tmp_path / "uno", turned), "uno", Benchmark.load(folder, "multi"))
    assert f"0_0.json says dog/00.jpg and {MUG}/00.jpg where the list has {MUG}/00.jpg and dog/00.jpg" in said


def test_the_size_is_that_of_most_and_not_of_the_largest(tmp_path, single):
    images = as_cases(tmp_path / "case", 6)
    picture(0, (64, 64)).save(images / "0000_0.png")
    assert "1 not of 32×32 pixels, as most are (0000_0.png is 64×64)" in problem(images, "case", single)


def test_what_one_image_alone_says_of_its_sampling_is_another_way(tmp_path, folder, single):
    images = as_uno(tmp_path / "uno", listed(folder, "single"))
    (images / "2_0.json").write_text(json.dumps(json.loads((images / "2_0.json").read_text()) | {"ref_size": 320}))
    assert "1 sampled in another way than most (2_0.json says ref_size = 320)" in problem(images, "uno", single)


def test_images_of_two_runs_in_one_folder_are_refused(tmp_path, folder, single):
    cases = listed(folder, "single")
    images = as_uno(tmp_path / "uno", cases)
    other = json.loads((images / "4_0.json").read_text()) | {"num_steps": 50}
    (images / "4_0.json").write_text(json.dumps(other))
    assert "1 sampled in another way than most (4_0.json says num_steps = 50)" in problem(images, "uno", single)


def test_pictures_joined_with_their_references_are_refused_unless_their_size_is_given(tmp_path, single):
    """UNO's script with concat_refs: all alike, and the scores would see the middle of picture and reference."""
    images = tmp_path / "uno"
    images.mkdir()
    for n in range(6):
        picture(n, (64, 32)).save(images / f"{n}_0.png")
    said = problem(images, "uno", single)
    assert "1 not square (64×32: " in said and "leave out concat_refs" in said
    assert layouts.read(images, "uno", single, size=(64, 32)).size == (64, 32)
    assert "6 not of 32×32 pixels (0_0.png is 64×32" in problem(images, "uno", single, size=(32, 32))


def test_a_long_list_of_problems_is_cut_and_counted(tmp_path, folder):
    cases = [{"prompt": f"a dog {n}", "image_paths": ["./d/dog/00.jpg"]} for n in range(25)]
    (tmp_path / "list.json").write_text(json.dumps(cases))
    many = Benchmark.load(folder, "single", tmp_path / "list.json")
    (tmp_path / "none").mkdir()
    said = problem(tmp_path / "none", "case", many)
    assert "25 missing (" in said and "0009_0 " in said and "0010_0 " not in said and ", and 15 more)" in said


def test_patchdpo_s_layout_is_for_one_subject_and_prompts_that_tell_cases_apart(tmp_path, folder):
    images = as_patchdpo(tmp_path / "patchdpo", listed(folder, "single"))
    assert "use 'case' for two subjects" in problem(images, "patchdpo", Benchmark.load(folder, "multi"))
    twice = [{"prompt": "a dog", "image_paths": [f"./d/dog/0{n}.jpg"]} for n in range(2)]
    (tmp_path / "list.json").write_text(json.dumps(twice))
    other = Benchmark.load(folder, "single", tmp_path / "list.json")
    assert "1 cases have subject and prompt in common" in problem(images, "patchdpo", other)
    (images / "dog" / "a red dog.png").rename(images / "dog" / "a crimson dog.png")
    said = problem(images, "patchdpo", Benchmark.load(folder, "single"))
    assert "1 named as no case of this list ('dog/a crimson dog.png')" in said
    assert "1 missing (0005_0 (dog: a red dog))" in said


def test_a_folder_that_is_not_there_is_named(tmp_path, single):
    assert problem(tmp_path / "none", "uno", single).endswith("none is no folder of images: correct its path")
