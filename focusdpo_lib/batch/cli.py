"""Notebooks in batches: one notebook under several YAML files, one run each.

python -m focusdpo_lib.batch notebooks/03_training.ipynb params/toybox/03_*.yaml --into results/toybox/notebooks
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from focusdpo_lib import params, runs, strict_yaml
from focusdpo_lib.batch.engines import ENGINES, run_all
from focusdpo_lib.batch.jobs import Job
from focusdpo_lib.params import ParameterError


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """The options --over and --set, which `chosen_overrides` reads."""
    parser.add_argument(
        "--over", action="append", default=[], type=Path, metavar="FILE", help="a YAML of settings over every YAML"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="over every YAML that has it")


def add_engine(parser: argparse.ArgumentParser) -> None:
    """The option --engine."""
    where = "local: one run after the other; ray: side by side, here or on RAY_ADDRESS's cluster; slurm: by sbatch"
    parser.add_argument("--engine", default="local", choices=ENGINES, help=where)
    parser.add_argument("--dry-run", action="store_true", help="with slurm: print what would be submitted")


def engine_options(given: argparse.Namespace) -> dict[str, Any]:
    """What `run_all` is told of the engine. ParameterError for --dry-run with another engine than Slurm."""
    if given.dry_run and given.engine != "slurm":
        raise ParameterError("--dry-run is for --engine slurm")
    return {"engine": given.engine, **({"dry_run": True} if given.dry_run else {})}


def chosen_overrides(given: argparse.Namespace) -> dict[str, Any]:
    """What --over and --set put over every YAML, --set last. ParameterError for a file that is not settings."""
    overrides: dict[str, Any] = {}
    for path in given.over:
        overrides |= params.read_overrides(path)
    for text in given.set:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise ParameterError(f"--set {text} is not accepted: write it as --set KEY=VALUE")
        overrides |= params.flat_overrides(key, _value(key, value))
    return overrides


def _value(key: str, text: str) -> Any:
    try:
        return strict_yaml.load(text)
    except strict_yaml.StrictYamlError as error:
        raise ParameterError(f"--set {key}={text} is not accepted: {error}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: one notebook under several YAML files, one run each."""
    parser = argparse.ArgumentParser(prog="python -m focusdpo_lib.batch", description=__doc__.splitlines()[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("params", type=Path, nargs="+", help="YAML files; the name of each is the name of its run")
    parser.add_argument("--into", type=runs.home, required=True, help="folder of the executed notebooks")
    add_overrides(parser)
    add_engine(parser)
    given = parser.parse_args(arguments)
    try:
        overrides, how = chosen_overrides(given), engine_options(given)
    except ParameterError as error:
        print(f"nothing was run: {error}")
        return 1
    suffix = "".join(f"_{path.stem}" for path in given.over)
    suffix += "".join(f"_{key.split('.')[-1]}-{value}" for key, _, value in (t.partition("=") for t in given.set))
    suffix = re.sub(r"[^\w.+-]+", "-", suffix)  # a value may hold slashes, quotes or brackets: a name may not
    jobs = [Job(given.notebook, given.into / (p.stem + suffix), p, overrides) for p in given.params]
    return run_all(jobs, **how)
