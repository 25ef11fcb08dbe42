"""What stands above a table: the protocol's name first, then how sure the numbers are and all that they depend on."""

from collections.abc import Iterator, Mapping

import pandas as pd

from focusdpo_lib.evaluation import protocols
from focusdpo_lib.evaluation.rows import FAMILIES, ROWS

UNKNOWN = "unknown"  # a setting of sampling, or all of them, of images that came from elsewhere
PROTOCOL = "evaluation.protocol"
BOXED = "cut to their boxes on white"  # of photos before a model saw them
LEANING = "leaning to the other"  # a column; see scores

OF_LEANING = " Of leaning, 0 is what a subject's own photos have and 1 what the other's have."

Sampling = Mapping[str, Mapping[str, object] | str]  # by family, or by row where a row has none


def first_line(result: pd.DataFrame) -> str:
    """The protocol's name, and whether its encoders and photos give the published anchors."""
    name = result.attrs["protocol"].get(PROTOCOL, protocols.CUSTOM)
    return f"{protocols.said(name)} {result.attrs['calibration']}"


def caption(result: pd.DataFrame, kind: str, leaks: bool) -> str:
    """The sentences above a table of `tables.table`; `leaks`: it has a column of which less is better."""
    about = result.attrs
    seeds = result.drop_duplicates("row").groupby("seeds")["row"].agg(", ".join)
    averaged = "".join(f" Mean over {n} training seeds: {rows}." for n, rows in seeds.items() if n > 1)
    measured = ", ".join(f"{key} = {value}" for key, value in about["protocol"].items() if key != PROTOCOL)
    return (
        f"{first_line(result)} Mean [95 % interval, {_interval(result, kind)}]."
        f"{averaged}{' Of the leakage rate, less is better.' if leaks else ''}"
        f"{OF_LEANING if (result['column'] == LEANING).any() else ''} "
        f"Measured with {measured}, evaluation.average = {about['average']}."
        f"{''.join(f' {sentence}' for sentence in sampled(about['sampling']))}"
    )


def _interval(result: pd.DataFrame, kind: str) -> str:
    count, about = result["units"].max(), result.attrs
    if kind == "multi":
        return f"over {count} pairs of subjects, by a standard error that is robust to subjects that pairs share"
    return f"bootstrap of {about['bootstrap']} draws (seed {about['seed']}) over {count} subjects, as wide as Student's"


def sampled(sampling: Sampling) -> Iterator[str]:
    """How images were sampled: a sentence of what all have alike, and one for each that has something of its own."""
    known = {who: dict(how) for who, how in sampling.items() if how != UNKNOWN}
    first = next(iter(known.values()), {})
    alike = {k: v for k, v in first.items() if all(k in how and how[k] == v for how in known.values())}
    if alike:
        yield f"{_names(known)} sampled with {_settings(alike)}."
    own: dict[str, list[str]] = {}
    for who, how in known.items():
        if rest := {key: value for key, value in how.items() if key not in alike}:
            own.setdefault(_settings(rest), []).append(who)
    for settings, names in own.items():
        yield f"{_names(names)} sampled with {settings}."
    if unknown := [who for who in sampling if who not in known]:
        yield f"How the images of {_listed(unknown)} were sampled is {UNKNOWN}."


def _settings(how: Mapping[str, object]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in how.items())


def _names(who) -> str:
    return f"{_listed(who)} {'were' if len(who) > 1 else 'was'}"


def _listed(who) -> str:
    *others, last = [FAMILIES.get(name, ROWS.get(name, name)) for name in who]
    return f"{', '.join(others)} and {last}" if others else last
