"""The loader reads DreamBench and the toybox alike, and refuses what cannot be scored. Counts are DreamBench's own."""

import json
import re
import shutil
import unicodedata
from collections import Counter
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import pytest
from PIL import Image

from focusdpo_lib.evaluation import uno_cases
from focusdpo_lib.evaluation.benchmark import (
    ATTRIBUTES,
    Benchmark,
    BenchmarkError,
    open_image,
    read_prompts_and_classes,
)
from focusdpo_lib.toybox.benchmark import write_benchmark
from focusdpo_lib.toybox.world import Identity

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the DreamBench photos are not beside the repository")


@cache
def dreambench(kind: str) -> Benchmark:
    return Benchmark.load(DATA / "dreambench", kind, DATA / "uno" / f"dreambench_{kind}ip.json")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return write_benchmark(tmp_path_factory.mktemp("written") / "benchmark")


@pytest.fixture
def folder(written, tmp_path) -> Path:
    """A benchmark that a test may damage."""
    return Path(shutil.copytree(written, tmp_path / "benchmark"))


def edit(folder: Path, kind: str, **changes) -> None:
    path = folder / f"cases_{kind}.json"
    cases = json.loads(path.read_text())
    cases[7] |= changes
    path.write_text(json.dumps(cases))


# --- DreamBench itself ---


@needs_data
def test_dreambench_has_thirty_subjects_158_photos_and_25_prompts():
    benchmark = dreambench("single")
    photos = Counter(len(s.photos) for s in benchmark.subjects.values())
    assert photos == {6: 10, 5: 18, 4: 2} and sum(n * k for n, k in photos.items()) == 158
    assert benchmark.subjects["grey_sloth_plushie"].class_name == "stuffed animal"
    assert len(benchmark.prompts["object"]) == len(benchmark.prompts["live"]) == 25
    assert benchmark.prompts["live"][10] == "a {0} {1} wearing a red hat"
    assert len(benchmark.cases) == 750 and len(benchmark.units) == 30
    first = benchmark.cases[0]
    assert (first.prompt, first.subjects, first.references[0].name) == (
        "a backpack in the jungle",
        ("backpack",),
        "02.jpg",
    )


@needs_data
def test_dreambench_pairs_and_the_six_that_share_a_class_word():
    benchmark = dreambench("multi")
    assert len(benchmark.cases) == 750 and len(benchmark.units) == 30
    assert set(benchmark.same_class_units) == {
        *("poop_emoji+rc_car", "cat2+cat", "dog+dog2", "dog3+dog5", "dog6+dog7", "dog7+dog8")
    }
    assert sum(case.unit in benchmark.same_class_units for case in benchmark.cases) == 150


@needs_data
@pytest.mark.parametrize("kind", ["single", "multi"])
def test_uno_s_cases_built_from_the_prompts_are_its_lists(kind):
    built = Benchmark.load(DATA / "dreambench", kind, "uno")
    for mine, listed in zip(built.cases, dreambench(kind).cases, strict=True):
        assert mine == listed
    assert built.hash == dreambench(kind).hash


def test_uno_s_prompts_of_two_subjects_follow_its_rules():
    classes = {"dog7": "dog", "rc_car": "toy", "berry_bowl": "bowl", "can": "can"}
    prompts = {
        "object": ["a {0} {1} in the snow", "a {0} {1} floating on top of water", "a red {0} {1}"],
        "live": ["a {0} {1} in the snow", "a {0} {1} wearing a red hat", "a red {0} {1}"],
    }
    every = dict.fromkeys(uno_cases.PHOTO, "cup") | classes
    found = {tuple(e["image_paths"]): [] for e in uno_cases.entries("multi", every, prompts)}
    for entry in uno_cases.entries("multi", every, prompts):
        found[tuple(entry["image_paths"])].append(entry["prompt"])
    assert found["berry_bowl/02.jpg", "can/01.jpg"] == [
        "a bowl and a can in the snow",
        "a bowl and a can floating on top of water",
        "a red bowl and a red can",
    ]
    assert found["dog7/01.jpg", "rc_car/03.jpg"] == [
        "a dog and a toy in the snow",
        "a dog wearing a red hat, next to it is a toy",
        "a red dog, next to it is a toy",
    ]
    assert len(found) == 30


def test_uno_s_cases_need_its_subjects(folder):
    with pytest.raises(
        BenchmarkError, match=r"lacks backpack, backpack_dog, .* of UNO's cases: fetch the whole dataset"
    ):
        Benchmark.load(folder, "single", "uno")


# --- what a benchmark is identified by ---


def test_the_hash_follows_photos_prompts_and_selection_but_not_the_place(folder, tmp_path):
    whole = Benchmark.load(folder, "single")
    folder.rename(tmp_path / "moved")
    moved = Benchmark.load(tmp_path / "moved", "single")
    assert moved.hash == whole.hash != moved.first_prompts(4).hash
    edit(tmp_path / "moved", "single", prompt="a car under a bridge")
    assert Benchmark.load(tmp_path / "moved", "single").hash != whole.hash
    photo = moved.subjects["cat"].photos[0]
    Image.new("RGB", (64, 64)).save(photo)
    assert Benchmark.load(tmp_path / "moved", "multi").photo_hash != whole.photo_hash


def test_with_all_photos_every_photo_is_a_reference_and_nothing_else_changes(folder):
    benchmark = Benchmark.load(folder, "single")
    everything = benchmark.with_all_photos()
    for case, other in zip(benchmark.cases, everything.cases, strict=True):
        assert other == replace(case, references=benchmark.subjects[case.subjects[0]].photos)
        assert set(case.references) < set(other.references)
    with pytest.raises(BenchmarkError, match="set it to 'listed'"):
        Benchmark.load(folder, "multi").with_all_photos()


def test_first_prompts_keeps_the_ids_of_the_full_list(folder):
    few = Benchmark.load(folder, "multi").first_prompts(2)
    assert len(few.cases) == 60 and [c.id for c in few.cases[:4]] == ["0000", "0001", "0010", "0011"]
    assert few.first_prompts(None).cases == few.cases


# --- what is refused ---


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "single",
            {"image_paths": []},
            r"case 7 of .*cases_single.json has 0 references where the 'single' list takes 1",
        ),
        ("multi", {"image_paths": ["x/cat/00.png"]}, "has 1 references where the 'multi' list takes 2"),
        ("single", {"prompt": "a car and a cat in the snow"}, "names 1 × car and 1 × cat .* references show 1 × car"),
        ("single", {"prompt": "a red mug in the snow"}, "names 1 × mug .* references show 1 × car"),
        ("single", {"prompt": "a photo of a red mug"}, "names 1 × mug .* references show 1 × car"),
        ("single", {"prompt": None}, "needs a text as 'prompt'"),
        ("single", {"prompt": " "}, "needs a text as 'prompt'"),
        ("single", {"image_paths": "x/cat/00.png"}, "and a list 'image_paths'"),
        ("single", {"classes": "car"}, "gives as 'classes' 'car': give one word for each"),
        ("single", {"classes": ["car", "cat"]}, "give one word for each"),
        ("single", {"image_paths": ["x/unicorn/00.png"]}, "refers to unicorn/00.png, which the dataset does not have"),
        ("single", {"image_paths": ["x/car/09.png"]}, "refers to car/09.png"),
        ("single", {"image_paths": None}, "needs a text as 'prompt' and a list 'image_paths'"),
    ],
)
def test_a_case_whose_references_do_not_match_its_prompt_is_refused(folder, kind, changes, message):
    edit(folder, kind, **changes)
    with pytest.raises(BenchmarkError, match=message):
        Benchmark.load(folder, kind)


@pytest.mark.parametrize("content", ["[]", "{}", "null", '"a"'])
def test_a_list_without_cases_is_refused(folder, content):
    (folder / "cases_single.json").write_text(content)
    with pytest.raises(BenchmarkError, match=r"cases_single.json holds no list of cases"):
        Benchmark.load(folder, "single")


@pytest.mark.parametrize("entry", ['"a car"', "3", "null", '{"prompts": ["a car"]}'])
def test_a_case_that_is_none_is_refused(folder, entry):
    (folder / "cases_single.json").write_text(f"[{entry}]")
    with pytest.raises(BenchmarkError, match=r"case 0 of .* needs a text as 'prompt'"):
        Benchmark.load(folder, "single")


@pytest.mark.parametrize(
    ("prompt", "values"),
    [
        ("THE car, at night", {}),
        ("my very old, rusty and well-loved car under a bridge", {}),
        ("two cars in the snow", {}),
        ("a car parked beside a cat mural", {}),  # scenery
        ("a photo of a car with a cat on it", {}),
        ("a little automobile in the snow", {"classes": ["automobile"]}),
    ],
)
def test_prompts_in_words_of_one_s_own_are_taken(folder, prompt, values, recwarn):
    edit(folder, "single", prompt=prompt, image_paths=["x/car/00.png"], **values)
    assert Benchmark.load(folder, "single").cases[7].prompt == prompt and not recwarn.list


@pytest.mark.parametrize("prompt", ["a vehicle in the snow", "snow", "a cat looking at a car"])
def test_where_it_cannot_tell_it_says_so_once_and_goes_on(folder, prompt):
    cases = json.loads((folder / "cases_single.json").read_text())
    for number, case in enumerate(cases[:2]):
        case |= {"prompt": prompt, "image_paths": [f"x/car/0{number}.png"]}
    (folder / "cases_single.json").write_text(json.dumps(cases))
    with pytest.warns(
        UserWarning, match=r"case 0 names .*\(1 more cases are like it\).*list these as 'classes'"
    ) as said:
        assert len(Benchmark.load(folder, "single").cases) == len(cases)
    assert len(said) == 1


def test_names_are_compared_as_they_are_typed_and_files_are_utf_8_whatever_marks_them(folder):
    composed, decomposed = (unicodedata.normalize(form, "Tür+Öl") for form in ("NFC", "NFD"))
    (folder / "dataset" / "cat").rename(folder / "dataset" / decomposed)
    classes = folder / "dataset" / "prompts_and_classes.txt"
    text = "\ufeff" + re.sub(r"^cat,", f"{composed},", classes.read_text("utf-8"), count=1, flags=re.MULTILINE)
    classes.write_text(text, encoding="utf-8")
    entry = {"prompt": "a cat", "image_paths": [f"x/{composed}/00.png"]}
    (folder / "list.json").write_text("\ufeff" + json.dumps([entry], ensure_ascii=False), encoding="utf-8")
    benchmark = Benchmark.load(folder, "single", folder / "list.json")
    assert benchmark.units == [composed] and benchmark.subjects_of == {composed: (composed,)}
    assert benchmark.same_class_units == [] and benchmark.cases[0].references[0].is_file()


def test_a_file_in_another_encoding_is_named(folder):
    (folder / "cases_single.json").write_bytes('["Tür"]'.encode("utf-16"))
    with pytest.raises(BenchmarkError, match=r"cases_single.json is no UTF-8 text .*: save it as UTF-8"):
        Benchmark.load(folder, "single")


def test_what_lies_beside_the_photos_and_is_none_is_named(folder):
    (folder / "dataset" / "cat" / "06.heic").touch()
    with pytest.warns(UserWarning, match=r"dataset holds what counts as no photo: cat/06.heic"):
        Benchmark.load(folder, "single")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_images_of_every_mode_are_opened_as_rgb(tmp_path, mode):
    Image.new("RGB", (4, 4), (102, 102, 102)).convert(mode).save(tmp_path / "image.png")
    image = open_image(tmp_path / "image.png")
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (102, 102, 102)


def test_a_corrupt_photo_is_named(folder):
    photo = folder / "dataset" / "cat" / "03.png"
    photo.write_bytes(photo.read_bytes()[:400])  # the header is whole, the pixels are not
    with pytest.raises(BenchmarkError, match=r"cat/03.png cannot be read .*: delete it"):
        Benchmark.load(folder, "single")


def test_missing_parts_are_named(folder, tmp_path):
    with pytest.raises(BenchmarkError, match=r"prompts_and_classes.txt is missing"):
        Benchmark.load(tmp_path / "nowhere", "single")
    with pytest.raises(BenchmarkError, match=r"nowhere.json is missing"):
        Benchmark.load(folder, "single", tmp_path / "nowhere.json")
    with pytest.raises(BenchmarkError, match="kind 'triple' is unknown"):
        Benchmark.load(folder, "triple")
    for photo in (folder / "dataset" / "cat").iterdir():
        photo.unlink()
    with pytest.raises(BenchmarkError, match="holds no photo of the subject 'cat'"):
        Benchmark.load(folder, "single")


def test_a_file_in_another_syntax_is_refused(tmp_path):
    path = tmp_path / "prompts_and_classes.txt"
    path.write_text("cat: cat\n")
    with pytest.raises(BenchmarkError, match="not in DreamBench's syntax"):
        read_prompts_and_classes(path)


# --- Lists that say two things at once ---


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('[{"prompt": "a cat", "image_paths": ["x/cat/00.png"], "prompt": "a dog"}]', "the key 'prompt' stands twice"),
        ('[{"prompt": "a cat", "image_paths": [], "image_paths": ["x/cat/00.png"]}]', "'image_paths' stands twice"),
        ("[" * 100_000, "recursion"),
        ('[{"a":' * 50_000, "recursion"),
    ],
)
def test_a_list_that_json_would_read_in_silence_or_not_at_all_is_refused(folder, content, says):
    (folder / "cases_single.json").write_text(content)
    with pytest.raises(BenchmarkError, match=rf"cases_single.json is not valid JSON \(.*{says}.*\): fetch"):
        Benchmark.load(folder, "single")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("cat,cat\ncat,dog", r"gives the class of cat twice \(cat, dog\): keep one line"),
        ("cat,cat\ncat,cat", r"gives the class of cat twice \(cat, cat\)"),
        ("cat,cat,1", r"has the line 'cat,cat,1' among its classes: write it as '<subject>,<class>'"),
        ("cat;cat", "has the line 'cat;cat'"),
        ("cat, ", "has the line 'cat,'"),
        (",cat", "has the line ',cat'"),
    ],
)
def test_a_line_of_the_classes_that_is_unclear_is_refused(folder, line, says):
    path = folder / "dataset" / "prompts_and_classes.txt"
    path.write_text(re.sub("^cat,cat$", line, path.read_text(), count=1, flags=re.MULTILINE))
    with pytest.raises(BenchmarkError, match=says):
        read_prompts_and_classes(path)


@pytest.mark.parametrize(("header", "shown"), [("", "car,car"), ("subject,class,live\n", "subject,class,live")])
def test_classes_without_their_header_are_refused(folder, header, shown):
    """Whatever stood first was taken for it, and that subject was gone."""
    path = folder / "dataset" / "prompts_and_classes.txt"
    path.write_text(path.read_text().replace("subject_name,class\n", header))
    with pytest.raises(BenchmarkError, match=rf"begins its classes with '{shown}': put the line 'subject_name,class'"):
        read_prompts_and_classes(path)


@pytest.mark.parametrize("prompt", [r"'a {0} {1} \x in snow'", r'"a {0} \N{nothing}"', r"'a \u12 {0}'"])
def test_a_prompt_that_is_no_text_is_named(folder, prompt):
    path = folder / "dataset" / "prompts_and_classes.txt"
    path.write_text(path.read_text().replace("prompt_list = [\n", f"prompt_list = [\n{prompt}.format(u, c),\n", 1))
    with pytest.raises(
        BenchmarkError, match=r"prompts_and_classes.txt holds the prompt .*, which is no text .*: correct"
    ):
        read_prompts_and_classes(path)


def plain(folder: Path, subjects: dict[str, str], *cases: tuple[str, ...]) -> Path:
    """A benchmark of these subjects and their classes, with a photo each, and of cases (prompt, subject, …)."""
    for name in subjects:
        (folder / "dataset" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(folder / "dataset" / name / "0.png")
    classes = "".join(f"{name},{class_name}\n" for name, class_name in subjects.items())
    text = f"Classes\n\nsubject_name,class\n{classes}\nPrompts\n\nObject Prompts\n\nLive Subject Prompts\n"
    (folder / "dataset" / "prompts_and_classes.txt").write_text(text)
    entries = [{"prompt": prompt, "image_paths": [f"x/{name}/0.png" for name in names]} for prompt, *names in cases]
    kind = {1: "single", 2: "multi"}[len(cases[0]) - 1]
    (folder / f"cases_{kind}.json").write_text(json.dumps(entries))
    return folder


@pytest.mark.parametrize("pairs", [[("a+b", "c"), ("a", "b+c")], [("c", "a+b"), ("c+a", "b")]])
def test_two_pairs_of_one_name_are_refused(tmp_path, pairs):
    subjects = {name: kind for pair in pairs for name, kind in zip(pair, ("dog", "cat"), strict=True)}
    folder = plain(tmp_path, subjects, *(("a dog and a cat", *pair) for pair in pairs))
    unit = re.escape("+".join(pairs[0]))
    with pytest.raises(BenchmarkError, match=rf"pairs \(.*\) and \(.*\), which both are called '{unit}': rename"):
        Benchmark.load(folder, "multi")


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_a_case_that_stands_twice_is_refused(folder, kind):
    path = folder / f"cases_{kind}.json"
    cases = json.loads(path.read_text())
    path.write_text(json.dumps([*cases[:5], cases[2]]))
    with pytest.raises(
        BenchmarkError, match=rf"case 5 of .*cases_{kind}.json repeats case 2: leave one of the two out"
    ):
        Benchmark.load(folder, kind)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda found: [found], "gives no attributes by subject: write"),
        (lambda found: found | {"cat": "red"}, "gives no attributes by subject: write"),
        (lambda found: found | {"cat": {"base": "red"}}, "lacks or should not have accent, angle, class_name, pattern"),
        (
            lambda found: found | {"cat": found["cat"] | {"colour": "red"}},
            "lacks or should not have colour of cat: give",
        ),
        (lambda found: found | {"cat": found["cat"] | {"angle": "45"}}, "gives of cat as angle '45'"),
        (lambda found: found | {"cat": found["cat"] | {"base": None}}, "gives of cat as base None"),
    ],
)
def test_attributes_that_nothing_could_be_scored_by_are_refused(folder, change, says):
    path = folder / "attributes.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(BenchmarkError, match=rf"attributes.json {says}"):
        Benchmark.load(folder, "single")


def test_the_attributes_are_those_of_an_identity():
    assert {field.name: field.type for field in fields(Identity)} == ATTRIBUTES


@pytest.mark.parametrize("names", [["wolf"], ["wolf", "ünï"]])
def test_folders_that_the_list_does_not_name_are_said(folder, names):
    for name in [*names, ".cache"]:
        (folder / "dataset" / name).mkdir()
    with pytest.warns(UserWarning, match=f"dataset holds folders that .* does not name: {', '.join(names)}$"):
        Benchmark.load(folder, "single")


@pytest.mark.parametrize("suffix", ["heic", "cr2"])
def test_a_subject_with_photos_that_cannot_be_read_says_so(folder, suffix):
    for photo in (folder / "dataset" / "cat").iterdir():
        photo.rename(photo.with_suffix(f".{suffix}"))
    with pytest.raises(BenchmarkError, match=rf"no photo of the subject 'cat': save .*00.{suffix}, .* as JPEG or PNG"):
        Benchmark.load(folder, "single")


# --- What is wrong is said at once ---


def test_a_case_list_that_disagrees_with_the_photos_is_refused_case_by_case(folder):
    path = folder / "cases_single.json"
    cases = json.loads(path.read_text())
    cases[3]["image_paths"] = ["./dataset/unicorn/00.png"]
    cases[8]["image_paths"] = [cases[8]["image_paths"][0][:-6] + "77.png"]
    cases[11]["prompt"] = ""
    for case in cases[20:40]:
        case["image_paths"] *= 2
    path.write_text(json.dumps(cases))
    with pytest.raises(BenchmarkError) as error:
        Benchmark.load(folder, "single")
    said = str(error.value)
    assert "case 3 of" in said and "refers to unicorn/00.png, which the dataset does not have" in said
    assert "case 8 of" in said and "77.png, which the dataset does not have" in said and "case 11 of" in said
    assert "case 26 of" in said and "case 27 of" not in said and said.endswith("and 13 more like these")


def test_photos_that_are_missing_or_damaged_are_all_named(folder):
    first, second, third = sorted(p for p in (folder / "dataset").iterdir() if p.is_dir())[:3]
    for photo in [*first.iterdir(), *third.iterdir()]:
        photo.unlink()
    with pytest.raises(BenchmarkError) as error:
        Benchmark.load(folder, "single")
    assert f"no photo of the subject '{first.name}'" in str(error.value)
    assert f"no photo of the subject '{third.name}'" in str(error.value)
    shutil.copytree(second, first, dirs_exist_ok=True)
    shutil.copytree(second, third, dirs_exist_ok=True)
    for photo in (first / "00.png", third / "01.png"):
        photo.write_bytes(photo.read_bytes()[:100])
    with pytest.raises(BenchmarkError) as error:
        Benchmark.load(folder, "single")
    assert f"{first.name}/00.png" in str(error.value) and f"{third.name}/01.png" in str(error.value)
