"""The stages of a reproduction, each from typed settings to a run folder; what the notebooks and `reproduce` call.

    pairs (dip) → adapter (training) → images (generation) → scores

Those that make pairs are in `dip_stages`; where all of them begin, in `stage_inputs`.
Folders lie at `results/<stage>/<run>`. A stage whose run is complete returns at once; one that was interrupted goes on.
"""

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial as given
from pathlib import Path

import pandas as pd

from focusdpo_lib import backbones, cluster, params, provenance, runs, workers
from focusdpo_lib.backbones import best_device
from focusdpo_lib.dip import dataset
from focusdpo_lib.dip import photos as dip_photos
from focusdpo_lib.dip_stages import RUN_SHEET, build_pairs, curate, make_drafts, reviews  # noqa: F401 handed on
from focusdpo_lib.evaluation import case_list, encoders
from focusdpo_lib.evaluation.benchmark import Benchmark
from focusdpo_lib.evaluation.embeddings import EMBEDDINGS, Kept, embed, kept
from focusdpo_lib.evaluation.encoders import DinoEncoder, Encoders
from focusdpo_lib.evaluation.scores import image_files, score_images
from focusdpo_lib.generation import IMAGES, generate, image_seed
from focusdpo_lib.runs import Run, RunError, atomic, fingerprint, home, is_complete
from focusdpo_lib.stage_inputs import (  # noqa: F401 handed on
    check_training,
    commit,
    content,
    load_benchmark,
    load_encoders,
    pinned_encoders,
    place,
    prepare_photos,
    toybox_benchmark,
)
from focusdpo_lib.training import ADAPTER, CHECKPOINT, adapter_card, regions, train
from focusdpo_lib.training.launch import FACTS, command
from focusdpo_lib.training.launch import run as run_processes
from focusdpo_lib.training.launch import work as launch_worker
from focusdpo_lib.training.memory import MemoryAdvice
from focusdpo_lib.training.pairs import Group, groups, join, load, prepare_into
from focusdpo_lib.workers import Progress, Shard

SCORES, ERRORS = "scores.parquet", "errors.csv"
PREPARED_BY = (
    "entropy_window",
    "entropy_bins",
    "entropy_kernel",
    "pool",
    "reference_tokens",
)  # of masks, before any step


def _reads(pairs: Path) -> dict[str, Path | str]:
    """The train pairs as inputs of a run: their folder and, where its rows name files, what these hold."""
    found: dict[str, Path | str] = {"pairs": Path(pairs)}
    if files := dataset.pictures_behind(pairs):
        found["pictures"] = runs.digest({name: fingerprint(p) for name, p in files.items() if os.path.isfile(p)})
    return found


def prepare_pairs(
    results: Path,
    pairs: Path,
    backbone: params.Backbone,
    masks: params.Masks,
    patch_encoder: str | None = None,
    own_process: bool = False,
    tolerance: int = 0,
    processes: int = 1,
) -> Path:
    """Stage prepared: latents, conditioning and M_d of the train pairs, computed once and named by what they are.

    Every training on the same pairs with the same backbone shares them, and none needs an encoder of its own.
    `tolerance` is that of `read_dataset`. `own_process`: this one never computes on a GPU, for it would keep a hold on
    memory that others need.
    """
    backbone = backbones.pinned(backbone, results)
    inputs: dict[str, Path | str] = {**_reads(pairs), **backbones.inputs(backbone)}
    revision = None if patch_encoder is None else commit(patch_encoder, results)
    if patch_encoder is not None:
        inputs["patch_encoder"] = content(patch_encoder, revision)
    of_masks = {name: getattr(masks, name) for name in PREPARED_BY}
    settings = {"backbone": backbone, "masks": of_masks}
    job = Run(home(results) / "prepared", settings, inputs)
    job.folder /= job.fingerprint[:16]
    with job.alone():
        if not job.complete:
            with job:
                grouped = groups(dataset.read_dataset(pairs, ["train"], tolerance=tolerance)["train"])
                encoder = (patch_encoder, revision)
                work = _Preparing(job.folder, Path(pairs), backbone, masks, *encoder, tolerance, grouped)
                workers.run(work, job.folder, processes, "pairs", "pair", apart=own_process)
                join(job.folder)
    return job.folder


@dataclass(frozen=True)
class _Preparing:
    folder: Path
    pairs: Path
    backbone: params.Backbone
    masks: params.Masks
    patch_encoder: str | None
    patch_revision: str | None
    tolerance: int
    grouped: Mapping[int, Group]

    def __call__(self, shard: Shard, progress: Progress) -> None:
        with MemoryAdvice(self.backbone, preparing=True):
            model = backbones.load(self.backbone, best_device(), parts="encoders")
            pairs = dataset.read_dataset(self.pairs, ["train"], check=False, tolerance=self.tolerance)["train"]
            patches = None
            if self.patch_encoder is not None:
                patches = DinoEncoder(self.patch_encoder, best_device(), revision=self.patch_revision).patches
            of = {"patches": patches, "grouped": self.grouped, "shard": shard, "progress": progress}
            prepare_into(self.folder, model, pairs, self.masks, **of)


def train_adapter(
    results: Path,
    run: str,
    pairs: Path,
    backbone: params.Backbone,
    objective: params.Objective,
    masks: params.Masks,
    training: params.Training,
    launch: params.Launch | None = None,
    tolerance: int = 0,
    processes: int = 1,
) -> Path:
    """Stage training: an adapter by one objective (Algorithm 1); returns the run's folder.

    In this process or, where `training.processes` says how many, in child processes (see `launch`). `tolerance` is that
    of `read_dataset`; `processes` prepare the pairs.
    """
    backbone = backbones.pinned(backbone, results)
    settings = {"backbone": backbone, "objective": objective, "masks": masks, "training": training}
    inputs: dict[str, Path | str] = {**_reads(pairs), **backbones.inputs(backbone)}
    encoder = params.shipped("dino", objective.patch_encoder) if objective.name == "patchdpo" else None
    if encoder is not None:
        inputs["patch_encoder"] = content(encoder, commit(encoder, results))
    if training.compile:  # kept for the runs to come, of any process
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(home(results).resolve() / "compiled"))
    if objective.name == "focusdpo" and masks.pool == "subject":
        dataset.require_reference_masks(pairs)
    job = Run(place(results, "training", run), settings, inputs)
    job.passing = (CHECKPOINT,)
    with job.alone():
        if not job.complete:
            apart = training.processes is not None and best_device() != "cpu"
            prepared = prepare_pairs(results, pairs, backbone, masks, encoder, apart, tolerance, processes)
            with job:
                _train(job, prepared, backbone, objective, masks, training, launch or params.Launch())
        (job.folder / CHECKPOINT).unlink(missing_ok=True)  # only now: a run without its marker may need it
    return job.folder


def _train(
    job: Run,
    prepared: Path,
    backbone: params.Backbone,
    objective: params.Objective,
    masks: params.Masks,
    training: params.Training,
    launch: params.Launch,
) -> None:
    """Trains into a begun run's folder, in this process or in children, and writes the adapter's card."""
    if training.processes is None:
        with MemoryAdvice(backbone, training):
            model = backbones.load(backbone, best_device(), parts="network")
            train(model, load(prepared), job.folder, objective=objective, masks=masks, training=training)
    else:
        if cluster.serves(training.processes):
            cluster.train(given(launch_worker, job.folder, prepared), training.processes, job.folder)
        else:
            run_processes(command(job.folder, prepared, training.processes, launch), job.folder)
        processes = json.loads((job.folder / FACTS).read_text(encoding="utf-8"))
        job.facts |= {"processes": processes, "device": processes[0]["device"]}
        job.facts["peak_memory_bytes"] = max(facts["peak_memory_bytes"] for facts in processes)
    where = job.facts.get("device") or provenance.device()["device"]
    adapter_card.write(job.folder / ADAPTER, job.folder, backbone, objective, masks, training, where)


def errors_by_region(
    results: Path,
    run: str,
    pairs: Path,
    backbone: params.Backbone,
    masks: params.Masks,
    adapter: Path,
    tolerance: int = 0,
    processes: int = 1,
) -> pd.DataFrame:
    """Stage errors: mean squared error of base and training run `adapter` on the validation pairs, by image and region.

    Columns base, trained and change (see `training.regions`). `tolerance` is that of `read_dataset`.
    """
    backbone = backbones.pinned(backbone, results)
    inputs: dict[str, Path | str] = {**_reads(pairs), **backbones.inputs(backbone), "adapter": Path(adapter)}
    job = Run(place(results, "errors", run), {"backbone": backbone, "masks": masks}, inputs)
    with job.alone():
        if not job.complete:
            with job:
                work = _Measuring(job.folder, Path(pairs), backbone, masks, Path(adapter), tolerance)
                workers.run(work, job.folder, processes, "errors", "pair")
                with atomic(job.folder / ERRORS) as partial:
                    regions.table(job.folder).to_csv(partial)
    return pd.read_csv(job.folder / ERRORS, index_col=regions.KEY)


@dataclass(frozen=True)
class _Measuring:
    folder: Path
    pairs: Path
    backbone: params.Backbone
    masks: params.Masks
    adapter: Path
    tolerance: int

    def __call__(self, shard: Shard, progress: Progress) -> None:
        with MemoryAdvice(self.backbone):
            model = backbones.load(self.backbone, best_device())
            model.load_adapter(self.adapter / ADAPTER)
            read = dataset.read_dataset(self.pairs, ["validation"], check=False, tolerance=self.tolerance)
            of = {"shard": shard, "progress": progress}
            regions.measure_into(self.folder, model, read["validation"], self.masks, **of)


def other_base(adapter: Path, backbone: params.Backbone) -> str | None:
    """A sentence where a complete training run stands on another base than `backbone`; None where it is the same."""
    there = runs.inputs(adapter)
    for name, what in backbones.inputs(backbone).items():
        trained_on = there.get(name, {"what": "none", "hash": None})
        if trained_on["hash"] != fingerprint(what):
            return (
                f"{adapter} was trained on another base: its {name} is {trained_on['what']}, and backbone.{name} is "
                f"{what}, or their files differ; train it anew, or name the base that it belongs to"
            )
    return None


def generate_images(
    results: Path,
    run: str,
    benchmark: Benchmark,
    backbone: params.Backbone,
    generation: params.Generation,
    adapter: Path | None = None,
    processes: int = 1,
    photos: params.Photos | None = None,
) -> Path:
    """Stage generation: a benchmark's images by the base (no adapter) or by a training run's adapter.

    `photos` says how references are prepared; as they are, they leave no trace in the run.
    """
    backbone = backbones.pinned(backbone, results)
    benchmark = benchmark.first_prompts(generation.prompts)
    shown = benchmark.with_all_photos() if generation.references == "all" else benchmark
    inputs: dict[str, Path | str] = {**backbones.inputs(backbone), "benchmark": benchmark.hash}
    if adapter is not None:
        if not is_complete(adapter):
            raise RunError(f"the training run {adapter} is not complete: run notebook 03 with it first")
        if (other := other_base(adapter, backbone)) is not None:
            raise RunError(other)
        inputs["adapter"] = Path(adapter)
    settings = {"backbone": backbone, "generation": generation, "kind": benchmark.kind}
    seen = shown
    if photos is not None and photos.cut != "raw":
        prepared = prepare_photos(results, shown, photos)
        seen = dip_photos.shown(shown, prepared)
        settings["photos"], inputs["photos"] = runs.settings(prepared)["photos"], prepared
    job = Run(place(results, f"generation/{benchmark.kind}", run), settings, inputs)
    with job.alone():
        if not job.complete:
            with job:
                work = _Sampling(job.folder, seen, backbone, generation, adapter)
                batches = math.ceil(len(benchmark.cases) * generation.images_per_prompt / generation.batch_size)
                workers.run(work, job.folder, min(processes, batches), "images", "image")  # each loads the model
                seed = given(image_seed, generation.seed)
                case_list.write(job.folder, case_list.table(shown, generation.images_per_prompt, seed))
    return job.folder


@dataclass(frozen=True)
class _Sampling:
    folder: Path
    benchmark: Benchmark
    backbone: params.Backbone
    generation: params.Generation
    adapter: Path | None

    def __call__(self, shard: Shard, progress: Progress) -> None:
        with MemoryAdvice(self.backbone):
            model = backbones.load(self.backbone, best_device())
            if self.adapter is not None:
                model.load_adapter(Path(self.adapter) / ADAPTER)
            generate(model, self.benchmark, self.folder, self.generation, shard=shard, progress=progress)


def score(
    results: Path,
    run: str,
    benchmark: Benchmark,
    images: Path,
    encoders: Encoders,
    evaluation: params.Evaluation,
    generation: params.Generation | params.Sampled,
    processes: int = 1,
) -> pd.DataFrame:
    """Stage scores: per-image scores of a generation run, or of a kept row of another system's images, as parquet.

    Several processes encode the images, and the photos where no row before it has.
    """
    benchmark, evaluation = benchmark.first_prompts(generation.prompts), pinned_encoders(evaluation, results)
    settings = {"evaluation": evaluation, "kind": benchmark.kind}
    inputs = {"images": Path(images), "benchmark": benchmark.hash, **{k: str(v) for k, v in encoders.ids.items()}}
    job = Run(place(results, f"scores/{benchmark.kind}", run), settings, inputs)
    with job.alone():
        if not job.complete:
            with job:
                encoders = kept(encoders, home(results) / EMBEDDINGS, job.folder / EMBEDDINGS)
                photos = [photo for subject in benchmark.subjects.values() for photo in subject.photos]
                files = image_files(benchmark, Path(images) / IMAGES, generation).values()
                work = _Encoding.of(encoders, (*photos, *files), evaluation)
                if processes > 1:
                    workers.run(work, job.folder, processes, "vectors", "vector")
                else:
                    with workers.Bar("vectors", "vector") as bar:
                        work.by(encoders, workers.WHOLE, bar)
                scores = score_images(benchmark, Path(images) / IMAGES, encoders, evaluation, generation)
                if (shown := _photos_of(images)) is not None and scores.attrs["protocol"]["generation"]:
                    scores.attrs["protocol"]["generation"]["photos"] = dip_photos.said(shown)
                with atomic(job.folder / SCORES) as partial:
                    scores.to_parquet(partial)
                own = isinstance(generation, params.Generation)
                seed = given(image_seed, generation.seed) if own else None
                how = generation.images_per_prompt, seed, evaluation.references
                case_list.write(job.folder, case_list.table(benchmark, *how))
                shutil.rmtree(job.folder / EMBEDDINGS, ignore_errors=True)
    return pd.read_parquet(job.folder / SCORES)


def _photos_of(images: Path) -> params.Photos | None:
    """How the photos were prepared that a generation run was shown; None where they were not, or it is no such run."""
    made = runs.settings(images) if runs.is_run(images) else {}
    return params.section("photos", made["photos"], str(Path(images) / runs.PARAMS)) if "photos" in made else None


@dataclass(frozen=True)
class _Encoding:
    """The pictures of which an encoder's folder lacks vectors, by encoder."""

    folders: Mapping[str, Path]
    pictures: Mapping[str, tuple[Path, ...]]
    evaluation: params.Evaluation

    @classmethod
    def of(cls, encoders: Encoders, files: Sequence[Path], evaluation: params.Evaluation) -> "_Encoding":
        by = cls._named(encoders)
        lacking = {name: tuple(encoder.missing(files)) for name, encoder in by.items()}
        return cls({name: encoder.folder for name, encoder in by.items()}, lacking, evaluation)

    def __call__(self, shard: Shard, progress: Progress) -> None:
        if not any(self.pictures.values()):
            return
        found = encoders.load_encoders(self.evaluation, best_device())
        found = replace(found, dino=Kept(found.dino, self.folders["dino"]), clip=Kept(found.clip, self.folders["clip"]))
        self.by(found, shard, progress)

    def by(self, all_kept: Encoders, shard: Shard, progress: Progress) -> None:
        """Encodes a shard by encoders that keep their vectors."""
        todo = [
            (encoder, encoder.batches(self.pictures[name], shard)) for name, encoder in self._named(all_kept).items()
        ]
        progress.expects(sum(len(batch) for _, batches in todo for batch in batches))
        embed(todo, progress)

    @staticmethod
    def _named(encoders: Encoders) -> dict[str, Kept]:
        return {"dino": encoders.dino, "clip": encoders.clip}
