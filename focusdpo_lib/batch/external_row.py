"""The command that keeps a folder of another system's images as a row (`external.keep`) and scores it.

python -m focusdpo_lib.evaluation.external FOLDER --layout uno --row OminiControl --params params/paper/04_table1.yaml
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

from focusdpo_lib import params
from focusdpo_lib.evaluation.benchmark import KINDS
from focusdpo_lib.evaluation.layouts import LAYOUTS
from focusdpo_lib.evaluation.rows import SOURCE
from focusdpo_lib.params import ExternalRow, ParameterError

FAULTS = (ValueError, RuntimeError)  # of settings, folders, benchmarks, encoders and runs, each in a sentence


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m focusdpo_lib.evaluation.external", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, help="of the images")
    parser.add_argument("--layout", required=True, choices=LAYOUTS, help="as which the system wrote them")
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
            folder, source, means = _scored(results, row, kind, values, str(given.params))
    except FAULTS as error:
        print(f"nothing was scored: {error}", file=sys.stderr)
        return 1
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    print(f"{row.row}: {source}\nkept in {shown}\n\n{means}")
    return 0


def _scored(results: Path, row: ExternalRow, kind: str, values: Mapping[str, Any], where: str) -> tuple[Path, str, str]:
    """The kept row, where it comes from, and its means by the YAML's benchmark and evaluation."""
    from focusdpo_lib import external, stages  # torch: not for --help or a wrong word
    from focusdpo_lib.evaluation import scores, statistics

    evaluation = params.section("evaluation", values.get("evaluation"), where)
    benchmark = stages.load_benchmark(results, params.section("benchmark", values.get("benchmark"), where), kind)
    scores.check(benchmark, evaluation, row.sampling)
    folder = external.keep(results, benchmark, row)
    encoders = stages.load_encoders(evaluation, results)
    table = external.score(results, benchmark, folder, encoders, evaluation, row.sampling.prompts)
    lines = []
    for metric in table["metric"].unique():
        sums = statistics.units([table], metric, evaluation.average).sum()
        lines.append(f"{metric:20} {sums['numerator'] / sums['denominator']:.4f}")
    return folder, external.source(folder), "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
