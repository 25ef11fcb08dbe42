"""The stages: every run is made once, goes on where it stopped, and refuses what it is not."""

import json
import shutil
from dataclasses import replace

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_revisions import FIRST, LATER, cache  # noqa: F401 (a fixture)
from tiny_training import TRAINING

from focusdpo_lib import params, stages
from focusdpo_lib.dip.dataset import DatasetError, pictures_behind, read_dataset, write_dataset
from focusdpo_lib.dip.rows import PICTURES
from focusdpo_lib.evaluation.benchmark import Benchmark, BenchmarkError
from focusdpo_lib.evaluation.encoders import EncoderError
from focusdpo_lib.runs import RunError, is_complete
from focusdpo_lib.training import ADAPTER, CHECKPOINT, LOG
from focusdpo_lib.training.pairs import load

DIP = params.Dip(train_pairs=16, validation_pairs=1)
ONE_STEP = params.Generation(steps=1)
original = stages.train


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def pairs_run(results):
    return stages.build_pairs(results, "main", DIP)


def train(results, model, pairs_run, name="run", objective="focusdpo", **changes):
    return stages.train_adapter(
        results,
        name,
        pairs_run,
        params.Backbone(model=str(model)),
        params.section("objective", {"name": objective} | changes.pop("objective_settings", {})),
        params.Masks(),
        params.section("training", TRAINING | {"steps": 3, "checkpoint_every": 1} | changes),
    )


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_complete_run_is_not_made_again(results, tiny_flux, pairs_run):
    folder = train(results, tiny_flux, pairs_run)
    assert folder == results / "training" / "run"
    assert is_complete(folder)
    assert (folder / ADAPTER).is_dir()
    assert not (folder / CHECKPOINT).exists()
    assert pd.read_csv(folder / LOG)["step"].max() == 2
    before = times(results)
    assert train(results, tiny_flux, pairs_run) == folder
    assert stages.build_pairs(results, "main", DIP) == pairs_run
    assert times(results) == before


def test_other_settings_under_the_same_name_are_refused(results, tiny_flux, pairs_run):
    train(results, tiny_flux, pairs_run)
    with pytest.raises(RunError, match=r"training\.learning_rate is 0\.01 there, 0\.02 here"):
        train(results, tiny_flux, pairs_run, learning_rate=2e-2)


def test_an_interrupted_training_goes_on_from_its_checkpoint(results, tiny_flux, pairs_run, monkeypatch):
    monkeypatch.setattr(stages, "train", lambda *a, **k: original(*a, **k, stop_after=2) and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(results, tiny_flux, pairs_run, "stopped")
    monkeypatch.undo()
    folder = results / "training" / "stopped"
    assert (folder / CHECKPOINT).exists()
    assert not is_complete(folder)
    train(results, tiny_flux, pairs_run, "stopped")
    reference = train(results, tiny_flux, pairs_run)
    first, second = (load_file(f / ADAPTER / "pytorch_lora_weights.safetensors") for f in (folder, reference))
    assert all(torch.equal(second[name], weight) for name, weight in first.items())
    assert (folder / LOG).read_bytes() == (reference / LOG).read_bytes()


def test_a_dataset_without_reference_masks_is_refused_before_anything_is_computed(
    results, tiny_flux, pairs_run, tmp_path
):
    bare = {"train": [replace(pair, reference_masks=()) for pair in read_dataset(pairs_run, ["train"])["train"]]}
    write_dataset(tmp_path, bare)
    with pytest.raises(DatasetError, match=r"lacks the column reference_masks.* set masks.pool to all"):
        train(tmp_path / "results", tiny_flux, tmp_path)
    assert not (tmp_path / "results").exists()


def test_patchdpo_depends_on_its_patch_encoder(results, tiny_flux, pairs_run, vit):
    encoder = {"objective_settings": {"patch_encoder": str(vit)}}
    folder = train(results, tiny_flux, pairs_run, "patchdpo", "patchdpo", **encoder)
    assert str(vit) in (folder / "inputs.json").read_text()


def test_patchdpo_s_encoder_of_a_hub_is_of_the_commit_that_the_results_are_pinned_to(
    cache,  # noqa: F811
    tiny_flux,
    pairs_run,
    vit,
    tmp_path,
):
    shutil.copytree(vit, cache.add("someone/dino", FIRST), dirs_exist_ok=True)
    of_hub = {"objective_settings": {"patch_encoder": "someone/dino"}}
    folder = train(tmp_path, tiny_flux, pairs_run, "of_hub", "patchdpo", **of_hub)
    cache.add("someone/dino", LATER)  # of which nothing could be loaded: it is empty
    assert train(tmp_path, tiny_flux, pairs_run, "of_hub", "patchdpo", **of_hub) == folder
    train(tmp_path, tiny_flux, pairs_run, "another", "patchdpo", **of_hub)
    assert f"someone/dino@{FIRST}" in (folder / "inputs.json").read_text()


def test_a_benchmark_is_the_toybox_s_of_a_split_or_a_folder_with_lists_of_its_own(results, tmp_path):
    toybox = stages.load_benchmark(results, params.Benchmark(), "multi", split="validation")
    assert toybox.folder == results / "benchmark" / "validation-0" and len(toybox.cases) == 300
    few = tmp_path / "few.json"
    few.write_text(json.dumps(json.loads((toybox.folder / "cases_multi.json").read_text())[:2]))
    chosen = params.Benchmark(folder=str(toybox.folder), multi=str(few))
    assert stages.load_benchmark(results, chosen, "multi").cases == toybox.cases[:2]
    assert len(stages.load_benchmark(results, chosen, "single").cases) == 300  # its own list
    with pytest.raises(BenchmarkError, match="nowhere"):
        stages.load_benchmark(results, params.Benchmark(folder=str(tmp_path / "nowhere")), "single")


def test_what_the_end_of_a_training_needs_is_looked_at_before(results, pairs_run, tmp_path):
    def check(objective=None, benchmark=None, samples=2, **dip):
        objective = params.section("objective", {"name": "dpo"} | (objective or {}))
        stages.check_training(results, params.Dip(**dip), objective, params.Benchmark(**(benchmark or {})), samples)

    check()
    check(folder=str(pairs_run))
    (tmp_path / "pairs").mkdir()
    shutil.copy(pairs_run / "train.parquet", tmp_path / "pairs")
    with pytest.raises(DatasetError, match=r"validation.parquet does not exist"):
        check(folder=str(tmp_path / "pairs"))
    with pytest.raises(BenchmarkError, match=r"nowhere\.json is missing"):
        check(benchmark={"multi": str(tmp_path / "nowhere.json"), "folder": str(stages.toybox_benchmark(results))})
    with pytest.raises(EncoderError, match="cannot be loaded"):
        check(objective={"name": "patchdpo", "patch_encoder": str(tmp_path)})
    rows = pq.read_table(pairs_run / "validation.parquet").to_pylist()
    for column, value, sentence in (("prompt", " ", "its prompt is empty"), ("split", "test", "belongs to the split")):
        pq.write_table(pa.Table.from_pylist([rows[0] | {column: value}]), tmp_path / "pairs" / "validation.parquet")
        with pytest.raises(DatasetError, match=rf"validation.parquet: .*{sentence}"):
            check(folder=str(tmp_path / "pairs"))
    for samples in (0, -1, "4"):
        with pytest.raises(params.ParameterError, match=r"^samples = .* at least 1"):
            check(samples=samples)


@pytest.mark.parametrize(
    ("family", "settings", "says"),
    [
        ("flux_uno", {"size": 63}, r"generation\.size = 63 is not accepted: toybox draws multiples of 8$"),
        ("flux_uno", {"size": 60}, r"generation\.size = 60 is not accepted"),
        ("flux_uno", {"size": 64, "reference_size": 32}, None),
        ("sdxl_ip", {"size": 62}, r"generation\.size = 62 is not accepted: toybox draws multiples of 4$"),
        ("sdxl_ip", {"size": 60}, None),
    ],
)
def test_sizes_that_the_model_does_not_draw_are_refused_before_training(results, family, settings, says):
    """The toybox's autoencoders halve an image twice; a token of FLUX is two latents wide."""
    backbone, generation = params.Backbone(family=family), params.Generation(**settings)
    looks = params.Dip(), params.Objective(), params.Benchmark(), 2, backbone, generation
    if says is None:
        stages.check_training(results, *looks)
    else:
        with pytest.raises(params.ParameterError, match=says):
            stages.check_training(results, *looks)


def test_a_reference_smaller_than_a_token_is_refused_before_training(results, tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"block_out_channels": [128, 256, 512, 512]}')  # FLUX.1's: 16 pixels
    looks = params.Dip(), params.Objective(), params.Benchmark(), 2, params.Backbone(model=str(tmp_path))
    for name in ("reference_size", "references_size"):
        with pytest.raises(params.ParameterError, match=rf"generation\.{name} = 15 .*: a token of .* has 16 pixels"):
            stages.check_training(results, *looks, params.Generation(**{name: 15}))


def test_a_tilde_is_the_users_own_folder(results, tiny_flux, pairs_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(tiny_flux)
    (tmp_path / "pairs").symlink_to(pairs_run)
    pairs = stages.build_pairs("~/results", "", params.section("dip", {"folder": "~/pairs"}))
    folder = train("~/results", "~/model", pairs, objective="sft")
    assert folder == tmp_path / "results" / "training" / "run" and (folder / ADAPTER).is_dir()
    assert stages.toybox_benchmark("~/results").parent == tmp_path / "results" / "benchmark"


def test_a_disk_that_will_not_do_is_said_before_the_first_step(results, tiny_flux, pairs_run, tmp_path, monkeypatch):
    stages.prepare_pairs(results, pairs_run, params.Backbone(model=str(tiny_flux)), params.Masks())
    room = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
    with pytest.raises(RunError, match=r"^checkpoint and adapter will take 0.0 GB .*: free some disk space"):
        train(results, tiny_flux, pairs_run, "full")
    assert not (results / "training" / "full" / LOG).exists()
    benchmark = Benchmark.load(stages.toybox_benchmark(results), "single")
    with pytest.raises(RunError, match=r"^300 images of 64 pixels will take"):
        stages.generate_images(results, "full", benchmark, params.Backbone(model=str(tiny_flux)), ONE_STEP)


def test_images_come_from_the_base_or_a_complete_training_and_are_made_once(results, tiny_flux, pairs_run):
    benchmark = Benchmark.load(stages.toybox_benchmark(results), "single")
    benchmark = replace(benchmark, cases=benchmark.cases[:2])
    settings = params.Generation(steps=1)
    model = params.Backbone(model=str(tiny_flux))
    adapter = train(results, tiny_flux, pairs_run)
    folders = [
        stages.generate_images(results, "base", benchmark, model, settings),
        stages.generate_images(results, "ours", benchmark, model, settings, adapter),
    ]
    pictures = [[path.read_bytes() for path in sorted((folder / "images").iterdir())] for folder in folders]
    assert len(pictures[0]) == 2
    assert pictures[0] != pictures[1]
    before = times(results)
    stages.generate_images(results, "ours", benchmark, model, settings, adapter)
    assert times(results) == before
    with pytest.raises(RunError, match="is not complete: run notebook 03 with it first"):
        stages.generate_images(results, "none", benchmark, model, settings, results / "training" / "missing")


def test_an_adapter_is_not_sampled_on_another_base(results, tiny_flux, pairs_run, tmp_path):
    adapter = train(results, tiny_flux, pairs_run)
    benchmark = Benchmark.load(stages.toybox_benchmark(results), "single")
    benchmark = replace(benchmark, cases=benchmark.cases[:1])
    moved = shutil.copytree(tiny_flux, tmp_path / "moved")
    stages.generate_images(results, "moved", benchmark, params.Backbone(model=str(moved)), ONE_STEP, adapter)
    weights = moved / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)  # in place, at the same size
    subject = {"model": str(tiny_flux), "subject_lora": "some/lora"}
    for other in (params.Backbone(model=str(moved)), params.Backbone(**subject)):
        with pytest.raises(RunError, match=r"was trained on another base: its (model|subject_lora) is"):
            stages.generate_images(results, "other", benchmark, other, ONE_STEP, adapter)


def test_pairs_rewritten_in_place_are_prepared_anew(results, tiny_flux, pairs_run, tmp_path):
    pairs = shutil.copytree(pairs_run, tmp_path / "pairs")
    model = params.Backbone(model=str(tiny_flux))
    before = stages.prepare_pairs(results, pairs, model, params.Masks())
    found = read_dataset(pairs, ["train"])["train"]
    write_dataset(pairs, {"train": [replace(found[0], prompt="a purple elephant")]})
    after = stages.prepare_pairs(results, pairs, model, params.Masks())
    assert after != before and sum(map(len, load(after).values())) == 1


def by_name(pairs_run, folder):
    """Two pairs whose rows name files in place of holding pictures: relative to theirs, and absolute."""
    rows = pq.read_table(pairs_run / "train.parquet").slice(0, 2).to_pylist()
    for number, row in enumerate(rows):
        for column in PICTURES:
            several = row[column] if isinstance(row[column], list) else [row[column]]
            files = [folder / f"{number}-{column}-{i}.png" for i in range(len(several))]
            for file, picture in zip(files, several, strict=True):
                file.write_bytes(picture["bytes"])
            names = [str(file) if number else file.name for file in files]
            row[column] = names if isinstance(row[column], list) else names[0]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")


@pytest.mark.parametrize("number", [0, 1])
def test_pictures_that_rows_only_name_belong_to_the_pairs(results, tiny_flux, pairs_run, tmp_path, number):
    by_name(pairs_run, tmp_path)
    assert len(pictures_behind(tmp_path)) == len(list(tmp_path.glob("*.png")))
    assert pictures_behind(pairs_run) == {}
    model = params.Backbone(model=str(tiny_flux))
    before = stages.prepare_pairs(results, tmp_path, model, params.Masks())
    assert stages.prepare_pairs(results, tmp_path, model, params.Masks()) == before
    trained = train(results, tiny_flux, tmp_path, f"named-{number}", objective="dpo", batch_size=1, steps=1)
    reference = tmp_path / f"{number}-references-0.png"
    reference.write_bytes((tmp_path / f"{1 - number}-references-0.png").read_bytes())
    after = stages.prepare_pairs(results, tmp_path, model, params.Masks())
    assert after != before
    with pytest.raises(RunError, match="its input 'pictures' has changed"):
        train(results, tiny_flux, tmp_path, trained.name, objective="dpo", batch_size=1, steps=1)


@pytest.mark.parametrize("lost", ["train.parquet", "test.parquet"])
def test_pairs_that_lost_a_file_are_made_again(tmp_path, lost):
    few = params.Dip(train_pairs=2, validation_pairs=1)
    folder = stages.build_pairs(tmp_path, "pairs", few)
    before = {path.name: path.read_bytes() for path in folder.glob("*.parquet")}
    (folder / lost).unlink()
    stages.build_pairs(tmp_path, "pairs", few)
    assert {path.name: path.read_bytes() for path in folder.glob("*.parquet")} == before


def test_an_adapter_or_an_image_that_was_lost_is_made_again(results, tiny_flux, pairs_run):
    benchmark = Benchmark.load(stages.toybox_benchmark(results), "single")
    benchmark = replace(benchmark, cases=benchmark.cases[:2])
    model, adapter = params.Backbone(model=str(tiny_flux)), train(results, tiny_flux, pairs_run, "lost", steps=1)
    weights = adapter / ADAPTER / "pytorch_lora_weights.safetensors"
    images = stages.generate_images(results, "lost", benchmark, model, ONE_STEP, adapter)
    picture = images / "images" / "0001_0.png"
    before = weights.read_bytes(), picture.read_bytes()
    weights.unlink()
    with pytest.raises(RunError, match="lost is not complete: run notebook 03"):
        stages.generate_images(results, "lost", benchmark, model, ONE_STEP, adapter)
    train(results, tiny_flux, pairs_run, "lost", steps=1)
    picture.unlink()
    stages.generate_images(results, "lost", benchmark, model, ONE_STEP, adapter)
    assert before == (weights.read_bytes(), picture.read_bytes())


@pytest.mark.parametrize("lost", ["cases_single.json", "dataset/prompts_and_classes.txt", "dataset/cat/00.png"])
def test_a_toybox_benchmark_that_lost_a_file_says_what_to_delete(results, tmp_path, lost):
    written = stages.toybox_benchmark(results)
    folder = shutil.copytree(written, tmp_path / written.relative_to(results))
    for path in folder.glob("dataset/cat/*.png") if lost.endswith(".png") else [folder / lost]:
        path.unlink()
    with pytest.raises(BenchmarkError, match=f"the toybox's own: delete {folder}, and it is written anew"):
        stages.load_benchmark(tmp_path, params.Benchmark(), "single")


def test_prepared_pairs_are_shared_by_what_they_are(results, tiny_flux, pairs_run):
    """The same pairs, backbone and entropy give one folder; any other gives another; a second call computes nothing."""
    model = params.Backbone(model=str(tiny_flux))
    folder = stages.prepare_pairs(results, pairs_run, model, params.Masks())
    before = times(folder)
    assert stages.prepare_pairs(results, pairs_run, model, params.Masks(tau=0.2, layers="all")) == folder
    assert times(folder) == before
    others = [
        stages.prepare_pairs(results, pairs_run, model, params.Masks(entropy_bins=16)),
        stages.prepare_pairs(results, pairs_run, model.model_copy(update={"precision": "float32"}), params.Masks()),
        stages.prepare_pairs(results, stages.build_pairs(results, "other", DIP.model_copy(update={"seed": 1})), model,
                             params.Masks()),
    ]  # fmt: skip
    assert len({folder, *others}) == 4
