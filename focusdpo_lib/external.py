"""Rows of a table whose images another system made: read, checked, kept, scored as the kit's own are.

python -m focusdpo_lib.evaluation.external FOLDER --layout uno --row OminiControl --params params/paper/04_table1.yaml

keeps results/external/<kind>/<row>: the images by case (as links where the disk allows it), and where they came from.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

import pandas as pd

from focusdpo_lib import params, runs, stages
from focusdpo_lib.evaluation import layouts, scores, statistics
from focusdpo_lib.evaluation.benchmark import KINDS, Benchmark
from focusdpo_lib.evaluation.encoders import Encoders
from focusdpo_lib.evaluation.rows import ROWS, family
from focusdpo_lib.generation import IMAGES, image_name
from focusdpo_lib.params import ExternalRow, ParameterError, Sampled
from focusdpo_lib.runs import Run, atomic

SAMPLING = "sampling.json"
SOURCE = ("repository", "commit", "command")
FAULTS = (ValueError, RuntimeError)  # of settings, folders, benchmarks, encoders and runs, each in a sentence


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


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m focusdpo_lib.evaluation.external", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, help="of the images")
    parser.add_argument("--layout", required=True, choices=layouts.LAYOUTS, help="as which the system wrote them")
    parser.add_argument("--row", required=True, help="the row's name in the table")
    parser.add_argument("--params", required=True, type=Path, help="a YAML of notebook 04 or 05: results, benchmark, …")
    parser.add_argument("--kind", choices=KINDS, help="of cases; none: single for a YAML named 04…, multi for 05…")
    parser.add_argument("--results", type=Path, help="folder of results; none: that of the YAML")
    parser.add_argument("--notebooks", type=Path, default=Path("notebooks"), help="from where the YAML's paths go")
    for name in SOURCE:
        parser.add_argument(f"--{name}", default="unknown", help="where the images come from")
    parser.add_argument("--size", type=int, nargs="+", help="of the images: a side, or width and height")
    parser.add_argument("--references", default="unknown", choices=["listed", "all", "unknown"], help="that went in")
    parser.add_argument("--images-per-prompt", type=int, default=1)
    parser.add_argument("--prompts", type=int, help="the first so many of every subject; none: all")
    parser.add_argument("--sampling", nargs="*", default=[], metavar="KEY=VALUE", help="what else is known: steps=25 …")
    return parser.parse_args(arguments)


def _row(given: argparse.Namespace) -> ExternalRow:
    """The row that the command line describes. Raises ParameterError as a YAML would."""
    sampling: dict[str, Any] = {"references": given.references, "images_per_prompt": given.images_per_prompt}
    for text in given.sampling:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise ParameterError(f"--sampling {text} is not accepted: write it as KEY=VALUE")
        sampling[key] = value
    size = given.size and (given.size[0] if len(given.size) == 1 else given.size)
    row = {name: getattr(given, name) for name in ("row", "layout", *SOURCE)}
    row |= {"folder": str(given.folder), "size": size, "sampling": sampling | {"prompts": given.prompts}}
    return params.section("external", {"rows": [row]}, "the command line").rows[0]


def _kind(given: argparse.Namespace) -> str:
    by_name = {"04": "single", "05": "multi"}.get(given.params.name[:2])
    if not (given.kind or by_name):
        raise ParameterError(f"--kind is needed, which {given.params.name} does not tell: single or multi")
    return given.kind or by_name


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: keeps and scores one row, and prints its means; 1 and a sentence where that is not possible."""
    given = _arguments(arguments)
    try:
        values, row, kind = params.read_yaml(given.params), _row(given), _kind(given)
        row = row.model_copy(update={"folder": os.path.abspath(row.folder)})
        results = given.results and given.results.absolute()
        with chdir(given.notebooks):  # where a notebook reads the YAML's paths from
            results = Path(results or values.get("results") or "../results/toybox").resolve()
            folder, table, average = _scored(results, row, kind, values, str(given.params))
    except FAULTS as error:
        print(f"nothing was scored: {error}", file=sys.stderr)
        return 1
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    print(f"{row.row}: {source(folder)}\nkept in {shown}\n")
    for metric in table["metric"].unique():
        units = statistics.units([table], metric, average)
        print(f"{metric:20} {units['numerator'].sum() / units['denominator'].sum():.4f}")
    return 0


def _scored(
    results: Path, row: ExternalRow, kind: str, values: Mapping[str, Any], where: str
) -> tuple[Path, pd.DataFrame, str]:
    """The kept row, its scores by the YAML's benchmark and evaluation, and over what a mean is."""
    evaluation = params.section("evaluation", values.get("evaluation"), where)
    benchmark = stages.load_benchmark(results, params.section("benchmark", values.get("benchmark"), where), kind)
    scores.check(benchmark, evaluation, row.sampling)
    folder = keep(results, benchmark, row)
    encoders = stages.load_encoders(evaluation, results)
    return folder, score(results, benchmark, folder, encoders, evaluation, row.sampling.prompts), evaluation.average


if __name__ == "__main__":
    sys.exit(main())
