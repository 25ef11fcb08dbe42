"""Rows of a table whose images another system made: read, checked, kept, scored as the kit's own are.

A kept row is results/external/<kind>/<row>: the images by case (as links where the disk allows it), and where they came
from. Rows come from a table's settings or from the command (see `batch.external_row`).
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from focusdpo_lib import params, runs, stages
from focusdpo_lib.evaluation import layouts
from focusdpo_lib.evaluation.benchmark import Benchmark
from focusdpo_lib.evaluation.encoders import Encoders
from focusdpo_lib.evaluation.rows import ROWS, SOURCE, family
from focusdpo_lib.generation import IMAGES, image_name
from focusdpo_lib.params import ExternalRow, ParameterError, Sampled
from focusdpo_lib.runs import Run, atomic

SAMPLING = "sampling.json"


def check_name(row: str, taken: Sequence[str] = ()) -> None:
    """ParameterError for a row whose name is one of the kit's own, or `taken` by another row of the table."""
    shown = {ROWS.get(name, name) for name in taken}
    if row in ROWS or family(row) or row in shown:
        raise ParameterError(
            f"external.rows: '{row}' is the name of a row that this table has or may have: give it another, such as "
            f"'{row} (their images)'"
        )


def keep(results: Path, benchmark: Benchmark, given: ExternalRow) -> Path:
    """Stage external: the images of a row by case, in a run folder that says where they come from.

    Raises LayoutError that lists all that is wrong with the folder. One that is gone is not asked for again.
    """
    check_name(given.row)
    place = stages.place(results, f"external/{benchmark.kind}", given.row)
    few, settings = benchmark.first_prompts(given.sampling.prompts), _settings(given, benchmark)
    if not Path(given.folder).exists() and _holds(place, settings, few):
        return place
    size = (given.size, given.size) if isinstance(given.size, int) else given.size and tuple(given.size)
    how = given.sampling
    found = layouts.read(Path(given.folder), given.layout, benchmark, how.images_per_prompt, size, how.prompts)
    prints = {image_name(*at): runs.fingerprint(path) for at, path in found.files.items()}
    job = Run(place, settings, {"images": runs.digest(prints), "benchmark": few.hash})
    job.facts |= {"folder": str(given.folder), "sampling": _sampling(given, found)}
    with job.alone():
        if not job.complete:
            with job:
                runs.write_json(job.folder / SAMPLING, _sampling(given, found))
                for at, path in found.files.items():
                    with atomic(job.folder / IMAGES / image_name(*at)) as partial:
                        _link(path, partial)
    return job.folder


def _settings(given: ExternalRow, benchmark: Benchmark) -> dict[str, Any]:
    return {"kind": benchmark.kind, "external": given.model_dump(exclude={"folder"})}


def _holds(place: Path, settings: Mapping[str, Any], few: Benchmark) -> bool:
    """Whether a row was kept whole, by these settings and of these cases."""
    if not runs.is_complete(place):
        return False
    return runs.settings(place) == runs.plain(settings) and runs.inputs(place)["benchmark"]["hash"] == few.hash


def _link(path: Path, partial: Path) -> None:
    """The same file under another name or, where the disk does not allow that, a copy."""
    try:
        os.link(path.resolve(), partial)
    except OSError:
        shutil.copyfile(path, partial)


def _sampling(given: ExternalRow, found: layouts.Found) -> dict[str, Any]:
    """How the images were sampled: as their folder says, and over it as the settings do."""
    size = "×".join(str(side) for side in found.size)
    return {"size": size, **found.settings, **given.sampling.model_dump(exclude={"prompts"})}


def sampled(folder: Path, prompts: int | None = None) -> Sampled:
    """How a kept row's images were sampled, as far as that is known."""
    said = json.loads((Path(folder) / SAMPLING).read_text(encoding="utf-8"))
    return Sampled.model_validate({**said, "prompts": prompts})


def score(
    results: Path,
    benchmark: Benchmark,
    folder: Path,
    encoders: Encoders,
    evaluation: params.Evaluation,
    prompts: int | None = None,
    processes: int = 1,
) -> pd.DataFrame:
    """Stage scores of a kept row (its folder), under the table's protocol."""
    how = encoders, evaluation, sampled(folder, prompts), processes
    return stages.score(results, f"external-{folder.name}", benchmark, folder, *how)


def source(folder: Path) -> str:
    """Where a kept row comes from, in words: its layout, repository, commit and command."""
    given = runs.settings(folder)["external"]
    return ", ".join([f"layout {given['layout']}", *(f"{name} {given[name]}" for name in SOURCE)])
