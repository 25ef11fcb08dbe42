"""From cases to images: the same image whichever batch, shard or resume made it; references as UNO prepares them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import write_tiny_sdxl_ip
from tiny_training import load_tiny
from transformers import CLIPImageProcessorPil

from focusdpo_lib import params, stages
from focusdpo_lib.backbones import SdxlIp
from focusdpo_lib.backbones.references import centre_square, long_side
from focusdpo_lib.evaluation.benchmark import Benchmark, BenchmarkError
from focusdpo_lib.generation import generate, image_name, image_seed
from focusdpo_lib.generation import images as generation
from focusdpo_lib.runs import RunError
from focusdpo_lib.toybox.benchmark import write_benchmark
from focusdpo_lib.toybox.world import Identity, halve, photo

MUG = Identity("mug", "red", "blue", "stripes", 0, "white")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_benchmark(tmp_path_factory.mktemp("toybox") / "benchmark")


def some_cases(folder, kind="multi", count=5):
    benchmark = Benchmark.load(folder, kind).first_prompts(1)
    return replace(benchmark, cases=benchmark.cases[:count])


def settings(**values):
    return params.section("generation", {"steps": 2, "images_per_prompt": 2} | values)


def images(folder):
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(folder.iterdir())}


def assert_same_images(first, second):
    """Up to one grey level in few pixels: sums in another order may round another way."""
    assert first.keys() == second.keys()
    for name, image in first.items():
        assert np.abs(image - second[name]).max() <= 1
        assert (image != second[name]).mean() < 1e-3


@pytest.fixture(scope="module")
def whole(folder, tiny_flux, tmp_path_factory):
    return images(generate(load_tiny(tiny_flux), some_cases(folder), tmp_path_factory.mktemp("whole"), settings()))


def test_every_case_and_index_has_one_image_of_the_size_asked_for(folder, whole):
    cases = some_cases(folder).cases
    assert sorted(whole) == sorted(f"{case.id}_{k}.png" for case in cases for k in range(2))
    assert all(image.shape == (64, 64, 3) for image in whole.values())
    different = {image.tobytes() for image in whole.values()}
    assert len(different) == 10


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_batch_size_changes_no_image(backbone, folder, whole, tmp_path, batch_size):
    out = generate(backbone, some_cases(folder), tmp_path, settings(batch_size=batch_size))
    assert_same_images(images(out), whole)


def test_shards_make_the_images_of_one_process_between_them(backbone, folder, whole, tmp_path):
    """Every second batch each; and the images are those of one process with such batches, to the bit."""
    how = settings(batch_size=4)
    for i in range(2):
        before = len(list(tmp_path.glob("images/*")))
        out = generate(backbone, some_cases(folder), tmp_path, how, shard=(i, 2))
        assert len(list(out.iterdir())) - before == (6, 4)[i]
    assert_same_images(images(out), whole)
    again = images(generate(backbone, some_cases(folder), tmp_path / "one", how))
    assert all((image == again[name]).all() for name, image in images(out).items())


def test_a_batch_that_was_interrupted_is_made_again_whole(backbone, folder, tmp_path):
    """Among other images the same one would round another way."""
    how = settings(batch_size=4)
    out = generate(backbone, some_cases(folder), tmp_path, how)
    made = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / sorted(made)[1]).unlink()
    (out / sorted(made)[9]).unlink()
    sampled = []
    original = backbone.sample
    backbone.sample = lambda conditioning, seeds, *more: (
        sampled.append(len(seeds)) or original(conditioning, seeds, *more)
    )
    generate(backbone, some_cases(folder), tmp_path, how)
    assert sampled == [4, 2]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == made


def test_an_image_depends_on_subjects_prompt_and_index_alone(backbone, folder, whole, tmp_path):
    benchmark = some_cases(folder)
    few = replace(benchmark, cases=benchmark.cases[:0:-2])  # the last and the middle one
    made = images(generate(backbone, few, tmp_path, settings(images_per_prompt=1)))
    assert_same_images(made, {name: whole[name] for name in made})
    assert len(made) == 2


def test_seeds_differ_between_subjects_prompts_and_indices_and_follow_the_base_seed(folder):
    cases = Benchmark.load(folder, "multi").cases
    seeds = {image_seed(3407, case, k) for case in cases for k in range(4)}
    assert len(seeds) == 4 * len(cases)
    renumbered = replace(cases[0], id="9999")
    assert image_seed(3407, renumbered, 1) == image_seed(3407, cases[0], 1) == image_seed(3408, cases[0], 0)
    assert image_name(cases[3], 2) == "0003_2.png"


def test_the_references_are_what_the_sample_is_conditioned_on(backbone, folder, whole, tmp_path):
    benchmark = some_cases(folder)
    other = benchmark.subjects[benchmark.cases[0].subjects[0]].photos
    case = benchmark.cases[0]
    moved = next(p for p in other if p != case.references[0])
    changed = replace(benchmark, cases=(replace(case, references=(moved, case.references[1])),))
    made = images(generate(backbone, changed, tmp_path, settings(images_per_prompt=1)))
    assert (made[f"{case.id}_0.png"] != whole[f"{case.id}_0.png"]).mean() > 1e-2


def test_all_photos_of_a_subject_go_in_where_they_are_asked_for(folder, tmp_path, monkeypatch):
    """PatchDPO's setting, by the stage: the mean of the tokens of every photo, as IP-Adapter's `average` joins them."""
    model = params.Backbone(family="sdxl_ip", model=str(write_tiny_sdxl_ip(tmp_path / "model")), image_tokens="average",
                            precision="float32")  # fmt: skip
    benchmark, asked = some_cases(folder, "single", 3), []
    original = SdxlIp.condition
    monkeypatch.setattr(SdxlIp, "condition", lambda self, *a: asked.append(original(self, *a)) or asked[-1])

    def tokens(references):
        made = stages.generate_images(tmp_path, references, benchmark, model, settings(steps=1, references=references))
        return images(made / "images"), [c.references for c in asked]

    listed, one = tokens("listed")
    asked.clear()
    everything, all_of_them = tokens("all")
    photos = {case.id: len(benchmark.subjects[case.unit].photos) for case in benchmark.cases}
    assert {len(references) for references in one} == {1}
    assert {len(references) for references in all_of_them} == set(photos.values()) and min(photos.values()) > 1
    assert listed.keys() == everything.keys() and any((listed[n] != everything[n]).any() for n in listed)
    with pytest.raises(BenchmarkError, match=r"generation\.references 'all' is for cases of one subject"):
        stages.generate_images(tmp_path, "multi", some_cases(folder), model, settings(references="all"))


# --- Interruptions ---


class Killed(Exception):
    pass


def test_an_interrupted_generation_goes_on_where_it_stopped(backbone, folder, whole, tmp_path, monkeypatch):
    original, sampled = backbone.sample, []

    def sample(conditioning, seeds, *arguments):
        if len(sampled) == 2:
            raise Killed
        sampled.append(len(seeds))
        return original(conditioning, seeds, *arguments)

    monkeypatch.setattr(backbone, "sample", sample)
    with pytest.raises(Killed):
        generate(backbone, some_cases(folder), tmp_path, settings(batch_size=3))
    assert sampled == [3, 3]
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()}
    assert len(written) == 6
    monkeypatch.setattr(backbone, "sample", original)
    out = generate(backbone, some_cases(folder), tmp_path, settings(batch_size=3))
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    assert_same_images(images(out), whole)


def test_a_kill_while_an_image_is_written_leaves_no_part_of_it(backbone, folder, tmp_path, monkeypatch):
    def half(self, path, *arguments, **named):
        path.write_bytes(b"\x89PNG")
        raise Killed

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(Killed):
        generate(backbone, some_cases(folder), tmp_path, settings())
    assert list((tmp_path / "images").iterdir()) == []


def test_a_finished_generation_samples_nothing(backbone, folder, tmp_path, monkeypatch):
    benchmark = some_cases(folder, "single", 2)
    generate(backbone, benchmark, tmp_path, settings())
    monkeypatch.setattr(backbone, "sample", None)
    assert len(images(generate(backbone, benchmark, tmp_path, settings()))) == 4


def test_a_size_that_does_not_fill_the_tokens_is_refused(backbone, folder, tmp_path):
    with pytest.raises(ValueError, match="both must be multiples of 8"):
        generate(backbone, some_cases(folder), tmp_path, settings(size=60))


# --- References ---


def noise_photo(width, height):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("size", "resized", "box"),
    [
        ((600, 400), (512, 341), (0, 2, 512, 338)),  # 341.3 → 341, cut to 336
        ((400, 600), (341, 512), (2, 0, 338, 512)),
        ((750, 492), (512, 335), (0, 7, 512, 327)),  # 335.9 → 335: UNO rounds down, so 320 and not 336 rows
        ((300, 300), (512, 512), (0, 0, 512, 512)),
    ],
)
def test_references_are_scaled_to_their_long_side_and_cut_to_multiples_of_16_as_uno_does(size, resized, box):
    picture = noise_photo(*size)
    expected = np.asarray(picture.resize(resized, Image.Resampling.LANCZOS).crop(box), np.float32) / 127.5 - 1
    ours = long_side(picture, 512, 16, "lanczos")
    assert torch.equal(ours, torch.from_numpy(expected).permute(2, 0, 1))


def test_a_very_long_reference_keeps_one_multiple():
    assert long_side(noise_photo(400, 10), 64, 16, "box").shape == (3, 16, 64)


def test_a_toybox_photo_becomes_the_reference_that_training_saw():
    picture = photo(MUG, 1)
    ours = (long_side(Image.fromarray(picture), 32, 8, "box") + 1) * 127.5
    trained = torch.from_numpy(halve(picture)).permute(2, 0, 1)
    assert (ours - trained).abs().max() <= 1  # Pillow rounds rows and columns one after the other


@pytest.mark.parametrize("size", [(300, 300), (600, 400), (400, 601), (1024, 256)])
def test_a_photo_for_clip_is_scaled_as_its_own_processor_does(size):
    picture = noise_photo(*size)
    published = CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size=224, do_normalize=False)
    expected = torch.from_numpy(published(picture, return_tensors="np")["pixel_values"][0])
    assert torch.allclose((centre_square(picture, 224, "bicubic") + 1) / 2, expected, atol=1e-6)


def test_several_references_have_their_own_size(backbone, folder, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(backbone, "reference", lambda *a: seen.append(a[1]) or torch.zeros(3, 32, 32))
    for kind, count in (("single", 1), ("multi", 2)):
        generate(
            backbone, some_cases(folder, kind, 1), tmp_path / kind, settings(reference_size=48, references_size=40)
        )
        assert seen == [48 if count == 1 else 40] * count
        seen.clear()


def test_pixels_are_rounded_to_the_nearest_grey_level(tmp_path):
    levels = torch.tensor([-1.2, -1.0, 0.0, 0.5, 1.0, 1.2]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    generation.save_images(levels, [tmp_path / "levels.png"])
    assert np.asarray(Image.open(tmp_path / "levels.png"))[0, :, 0].tolist() == [0, 0, 128, 191, 255, 255]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_becomes_no_picture(tmp_path, value):
    pixels = torch.zeros(3, 3, 2, 2)
    pixels[1, 2, 0, 1] = value
    paths = [tmp_path / f"case{i}_0.png" for i in range(3)]
    with pytest.raises(RunError, match=r"^the image case1_0.png came out as NaN or infinity: a weight of the model"):
        generation.save_images(pixels, paths)
    assert not list(tmp_path.iterdir())


def test_a_model_of_no_numbers_names_its_first_image(backbone, folder, tmp_path):
    with torch.no_grad():
        backbone.transformer.proj_out.weight[:] = float("nan")
    cases = some_cases(folder)
    with pytest.raises(RunError, match=f"^the image {image_name(cases.cases[0], 0)} came out as NaN or infinity"):
        generate(backbone, cases, tmp_path, settings())
