"""The stages that make preference pairs: the toybox's, and drafts through Figure 4 with what is kept of them."""

from collections.abc import Callable, Mapping
from functools import partial as given
from pathlib import Path

from focusdpo_lib import params, runs
from focusdpo_lib.dip import dataset, mask_errors, review, scoring
from focusdpo_lib.dip import toybox as dip_toybox
from focusdpo_lib.dip.assembly import STAGES, assembled
from focusdpo_lib.dip.card import write_card
from focusdpo_lib.dip.curation import curated, score_table
from focusdpo_lib.dip.drafts import parts
from focusdpo_lib.dip.pairs import write_pairs
from focusdpo_lib.dip.run import run_chain
from focusdpo_lib.dip.run_sheet import run_sheet
from focusdpo_lib.runs import Run, RunError, atomic, fingerprint, home
from focusdpo_lib.stage_inputs import place

RUN_SHEET = "run_sheet.csv"


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
