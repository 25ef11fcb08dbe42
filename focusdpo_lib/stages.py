"""The stages of a reproduction, each from typed settings to a run folder; what the notebooks and `reproduce` call.

    pairs (dip) → adapter (training) → images (generation) → scores

Folders lie at `results/<stage>/<run>`. A stage whose run is complete returns at once; one that was interrupted goes on.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial as given
from pathlib import Path

import pandas as pd
from huggingface_hub import try_to_load_from_cache

from focusdpo_lib import backbones, cluster, params, provenance, runs, workers
from focusdpo_lib.backbones import best_device
from focusdpo_lib.dip import dataset, mask_errors, review, scoring
from focusdpo_lib.dip import photos as dip_photos
from focusdpo_lib.dip import toybox as dip_toybox
from focusdpo_lib.dip.assembly import STAGES, assembled
from focusdpo_lib.dip.card import write_card
from focusdpo_lib.dip.curation import curated, score_table
from focusdpo_lib.dip.detectors import DEFAULTS
from focusdpo_lib.dip.drafts import parts
from focusdpo_lib.dip.pairs import write_pairs
from focusdpo_lib.dip.run import run_chain
from focusdpo_lib.dip.run_sheet import run_sheet
from focusdpo_lib.evaluation import case_list, encoders
from focusdpo_lib.evaluation.benchmark import KINDS, Benchmark, BenchmarkError
from focusdpo_lib.evaluation.embeddings import EMBEDDINGS, Kept, embed, kept
from focusdpo_lib.evaluation.encoders import DinoEncoder, Encoders
from focusdpo_lib.evaluation.scores import image_files, score_images
from focusdpo_lib.generation import IMAGES, generate, image_seed
from focusdpo_lib.runs import Run, RunError, atomic, fingerprint, home, is_complete
from focusdpo_lib.toybox import attributes
from focusdpo_lib.toybox.benchmark import write_benchmark
from focusdpo_lib.training import ADAPTER, CHECKPOINT, adapter_card, regions, train
from focusdpo_lib.training.launch import FACTS, command
from focusdpo_lib.training.launch import run as run_processes
from focusdpo_lib.training.launch import work as launch_worker
from focusdpo_lib.training.memory import MemoryAdvice
from focusdpo_lib.training.pairs import Group, groups, join, load, prepare_into
from focusdpo_lib.workers import Progress, Shard

SCORES, ERRORS, RUN_SHEET = "scores.parquet", "errors.csv", "run_sheet.csv"
PREPARED_BY = (
    "entropy_window",
    "entropy_bins",
    "entropy_kernel",
    "pool",
    "reference_tokens",
)  # of masks, before any step


def load_encoders(settings: params.Evaluation, results: Path | None = None) -> Encoders:
    """The encoders of a benchmark, with the toybox's reader where the settings name one. Raises EncoderError.

    Given `results`, those of a hub are of the commits that it is pinned to, and vectors are kept in it: no run that
    scores with it encodes a photo, a prompt or an image twice.
    """
    settings = settings if results is None else pinned_encoders(settings, results)
    reader = None
    if settings.reader is not None:
        reader = attributes.load_reader(params.shipped("reader", settings.reader), best_device())
    found = encoders.load_encoders(settings, best_device(), reader)
    return found if results is None else kept(found, home(results) / EMBEDDINGS)


def pinned_encoders(settings: params.Evaluation, results: Path) -> params.Evaluation:
    """The settings with the commit of every encoder of a hub: their own, or the one that `results` is pinned to."""
    sources = {"dino_revision": settings.dino, "clip_revision": encoders.clip_repository(settings.clip)}
    if settings.region == "detected":
        sources["detector_revision"] = settings.detector
    return backbones.with_commits(settings, sources, results)


def check_training(
    results: Path,
    dip: params.Dip,
    objective: params.Objective,
    benchmark: params.Benchmark,
    samples: int,
    backbone: params.Backbone | None = None,
    generation: params.Generation | None = None,
) -> None:
    """Looks at the start for what notebook 03 needs at its end: held-out pairs, cases to sample, PatchDPO's encoder.

    And, given `backbone` and `generation`, sizes that the model draws. Raises DatasetError, BenchmarkError,
    EncoderError or ParameterError.
    """
    if not isinstance(samples, int) or samples < 1:
        raise params.ParameterError(f"samples = {samples!r} is not accepted: give how many cases to draw, at least 1")
    if backbone is not None and generation is not None:
        _check_sizes(backbone, generation)
    if dip.folder is not None:
        dataset.read_dataset(dip.folder, ["train"], check=False)
        groups(dataset.read_dataset(dip.folder, ["validation"], tolerance=dip.tolerance)["validation"])
    for kind in KINDS:
        load_benchmark(results, benchmark, kind, split="validation")
    if objective.name == "patchdpo":
        encoder = params.shipped("dino", objective.patch_encoder)
        DinoEncoder(encoder, revision=_commit(encoder, results))


def _check_sizes(backbone: params.Backbone, generation: params.Generation) -> None:
    """ParameterError for images or references of a size that the model has no whole tokens for."""
    multiple = _multiple(backbone)
    if generation.size % multiple:
        raise params.ParameterError(
            f"generation.size = {generation.size} is not accepted: {backbone.model} draws multiples of {multiple}"
        )
    for name in ("reference_size", "references_size"):
        if backbone.family == "flux_uno" and (side := getattr(generation, name)) < multiple:
            raise params.ParameterError(
                f"generation.{name} = {side} is not accepted: a token of {backbone.model} has {multiple} pixels a side"
            )


def _multiple(backbone: params.Backbone) -> int:
    """Pixels of which an image's sides are multiples, by the model's own settings; 1 where they are not here yet."""
    model, file = params.shipped(backbone.family, backbone.model), "vae/config.json"
    path = (
        Path(model) / file if Path(model).is_dir() else try_to_load_from_cache(model, file, revision=backbone.revision)
    )
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return 1  # whoever loads the model says what is missing
    config = json.loads(Path(path).read_text(encoding="utf-8"))
    stride = 2 ** (len(config["block_out_channels"]) - 1)
    return 2 * stride if backbone.family == "flux_uno" else stride


def build_pairs(results: Path, run: str, dip: params.Dip, error: params.MaskError | None = None) -> Path:
    """Stage dip: the preference pairs of the toybox world, or the folder of pairs that the settings name.

    `error`: what befalls the masks of the toybox's train pairs. Raises RunError where that folder holds none.
    """
    if error is not None and error.kind != "exact":
        return _build(results, run, {"dip": dip, "error": error}, given(mask_errors.build, dip, error))
    if dip.folder is not None:
        try:
            dataset.split_files(dip.folder, "train")
        except dataset.DatasetError as error:
            raise RunError(f"dip.folder = {dip.folder} is not accepted: {error}") from None
        return Path(dip.folder)
    return _build(results, run, {"dip": dip}, given(dip_toybox.build, dip))


def _build(results: Path, run: str, settings: Mapping[str, params.Section], build: Callable[[Path], None]) -> Path:
    job = Run(place(results, "dip", run), settings)
    with job.alone():
        if not job.complete:
            with job:
                build(job.folder)
    return job.folder


def make_drafts(
    results: Path, run: str, chain: params.Chain, sections: Mapping[str, params.Section], processes: int = 1
) -> Path:
    """Stage chain: drafts of pairs through the stages of Figure 4, in several processes; returns the run's folder.

    RUN_SHEET lies beside them in the end (see `dip.run_sheet`). `sections`: by name, the settings of what `chain` is
    made of (see `dip.assembly`).
    """
    made = assembled(chain, sections, results)
    job = Run(place(results, "chain", run), {**made.settings, "chain": chain}, made.inputs)
    with job.alone():
        if not job.complete:
            with job:
                run_chain(job.folder, made.plan, made.stages, chain.part_size, made.draft_bytes, processes)
                with atomic(job.folder / RUN_SHEET) as partial:
                    run_sheet(job.folder, STAGES).to_csv(partial)
    return job.folder


def curate(results: Path, run: str, drafts: Path, curation: params.Curation, tolerance: int = 0) -> Path:
    """Stage dip, from drafts: those that pass the limits and the review of `curation`, as pairs with a card.

    The review is that of `reviews`. `tolerance` is that of `write_dataset`. Raises DatasetError where none is left.
    """
    made = [fingerprint(path) for path in parts(drafts, scoring.NAME)]
    inputs: dict[str, Path | str] = {"drafts": runs.digest(made)}
    verdicts = None
    if curation.review != "ignore":
        verdicts = review.agreed(reviews(results, drafts))
        inputs["review"] = runs.digest(verdicts)
    job = Run(place(results, "dip", run), {"curation": curation, "tolerance": tolerance}, inputs)
    with job.alone():
        if not job.complete:
            with job:
                decisions = curated(score_table(drafts), curation, verdicts)
                write_pairs(job.folder, drafts, decisions, tolerance)
                write_card(job.folder, drafts, decisions, curation)
    return job.folder


def reviews(results: Path, drafts: Path) -> Path:
    """The folder of the reviewers' files on a run of drafts (see `dip.review`)."""
    return home(results) / "review" / Path(drafts).name


def place(results: str | Path, stage: str, run: str) -> Path:
    """The folder of a stage's run. Raises ParameterError for a name that would lead elsewhere."""
    return home(results) / stage / params.run_name(run)


def _reads(pairs: Path) -> dict[str, Path | str]:
    """The train pairs as inputs of a run: their folder and, where its rows name files, what these hold."""
    found: dict[str, Path | str] = {"pairs": Path(pairs)}
    if files := dataset.pictures_behind(pairs):
        found["pictures"] = runs.digest({name: fingerprint(p) for name, p in files.items() if os.path.isfile(p)})
    return found


def _commit(model: str, results: Path) -> str | None:
    """Of a hub model, the commit that `results` is pinned to."""
    return backbones.pin(model, results) if backbones.is_hub_id(model) else None


def _content(model: str, revision: str | None) -> Path | str:
    """A model as an input of a run: a folder by its content, a hub model by id and commit."""
    return Path(model) if Path(model).is_dir() else f"{model}@{revision}" if revision else model


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
    revision = None if patch_encoder is None else _commit(patch_encoder, results)
    if patch_encoder is not None:
        inputs["patch_encoder"] = _content(patch_encoder, revision)
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
        inputs["patch_encoder"] = _content(encoder, _commit(encoder, results))
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


def toybox_benchmark(results: Path, split: str = "test", seed: int = 0) -> Path:
    """The toybox's benchmark of 30 held-out identities, written once."""
    folder = home(results) / "benchmark" / f"{split}-{seed}"
    return folder if folder.exists() else write_benchmark(folder, seed, split)


def load_benchmark(results: Path, settings: params.Benchmark, kind: str, split: str = "test") -> Benchmark:
    """The cases of a kind that the settings name: the toybox's of a split, or those of a folder, which has no splits.

    Raises BenchmarkError for a folder that is missing or not in DreamBench's layout.
    """
    if settings.folder == "toybox":
        folder = toybox_benchmark(results, split)
        try:
            return Benchmark.load(folder, kind)
        except BenchmarkError as error:
            raise BenchmarkError(f"{error} (it is the toybox's own: delete {folder}, and it is written anew)") from None
    return Benchmark.load(settings.folder, kind, {"single": settings.single, "multi": settings.multi}[kind])


def prepare_photos(results: Path, benchmark: Benchmark, photos: params.Photos) -> Path:
    """Stage photos: the references of a benchmark's cases as `photos` say, made once and named by what they are.

    Raises BenchmarkError that lists all in which no subject is found.
    """
    by = photos.segmentation
    uses = {"box": ("detector",), "cutout": ("detector", "segmenter") if by.masks == "sam2" else ()}[photos.cut]
    pinned = {
        f"{name}_revision": commit
        for name in uses
        if backbones.is_hub_id(source := getattr(by, name) or DEFAULTS["sam2"])
        and getattr(by, f"{name}_revision") is None
        and (commit := backbones.pin(source, results))
    }
    photos = photos.model_copy(update={"segmentation": by.model_copy(update=pinned)})
    inputs: dict[str, Path | str] = {"benchmark": benchmark.hash}
    inputs |= {name: Path(where) for name in uses if (where := getattr(by, name)) and Path(where).is_dir()}
    inputs |= {"masks": Path(photos.masks)} if photos.masks else {}
    job = Run(home(results) / "photos", {"photos": photos}, inputs)
    job.folder /= job.fingerprint[:16]
    with job.alone():
        if not job.complete:
            with job:
                dip_photos.write(job.folder, benchmark, photos)
    return job.folder


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
