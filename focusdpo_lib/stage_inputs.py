"""What stages begin from: folders, encoders, benchmarks, photos; and what is looked at before hours of work."""

import json
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from focusdpo_lib import backbones, params
from focusdpo_lib.backbones import best_device
from focusdpo_lib.dip import dataset
from focusdpo_lib.dip import photos as dip_photos
from focusdpo_lib.dip.detectors import DEFAULTS
from focusdpo_lib.evaluation import encoders
from focusdpo_lib.evaluation.benchmark import KINDS, Benchmark, BenchmarkError
from focusdpo_lib.evaluation.embeddings import EMBEDDINGS, kept
from focusdpo_lib.evaluation.encoders import DinoEncoder, Encoders
from focusdpo_lib.runs import Run, home
from focusdpo_lib.toybox import attributes
from focusdpo_lib.toybox.benchmark import write_benchmark
from focusdpo_lib.training.pairs import groups


def place(results: str | Path, stage: str, run: str) -> Path:
    """The folder of a stage's run. Raises ParameterError for a name that would lead elsewhere."""
    return home(results) / stage / params.run_name(run)


def commit(model: str, results: Path) -> str | None:
    """Of a hub model, the commit that `results` is pinned to."""
    return backbones.pin(model, results) if backbones.is_hub_id(model) else None


def content(model: str, revision: str | None) -> Path | str:
    """A model as an input of a run: a folder by its content, a hub model by id and commit."""
    return Path(model) if Path(model).is_dir() else f"{model}@{revision}" if revision else model


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
        DinoEncoder(encoder, revision=commit(encoder, results))


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
