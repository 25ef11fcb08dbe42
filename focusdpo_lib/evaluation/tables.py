"""Tables 1 and 2: rows with intervals, paired differences from each row's own base, and the protocol behind them.

rows = {"photos": …, "oracle": …, "copy": …, "uno": scores, "uno_sft": [scores of seed 0, of seed 1, …], "ipap": …}
result = table(rows, evaluation)         # long: a line a row and column
print(text(result)); markdown(result); html(result)
"""

import math
import textwrap
from collections.abc import Callable, Collection, Mapping
from typing import Any

import pandas as pd

from focusdpo_lib.evaluation import captions, statistics
from focusdpo_lib.evaluation.calibration import calibration
from focusdpo_lib.evaluation.protocols import ProtocolError
from focusdpo_lib.evaluation.published import HEADING, NOTES, published
from focusdpo_lib.evaluation.rows import FAMILIES, ROWS, family
from focusdpo_lib.params import Evaluation

METRICS = {
    "dino": "DINO",
    "clip_i": "CLIP-I",
    "clip_t": "CLIP-T",
    "attribute_accuracy": "attribute accuracy",
    "leakage": "leakage rate",
    "leaning": captions.LEANING,
}
TITLES = {"single": "Table 1: single subject", "multi": "Table 2: two subjects"}
SAME_CLASS = "same_class_units"  # of scores' attrs: pairs whose subjects share a class word
UNPAIRED = statistics.Estimate(math.nan, math.nan, math.nan)
NOT_DISTINGUISHABLE = "not distinguishable"
ABSENT = "–"


def table(
    rows: Mapping[str, pd.DataFrame | list[pd.DataFrame]],
    settings: Evaluation,
    trained: Mapping[str, Mapping[str, str]] | None = None,
) -> pd.DataFrame:
    """Long table: row, column, value, difference and from_dpo (each with low and high), units, family, seeds.

    And, where pairs of subjects share a class word, distinct and distinct_difference (with low and high): the same
    over the other pairs alone, distinct_units of them.

    A row is one table of scores, or a list of them, one a training seed. The difference is from the row of its family's
    base ("UNO" of "UNO+SFT"); anchors and bases have none. FocusDPO's rows also have that from their family's DPO,
    which is what the paper claims. `trained` says of rows how they were trained, {setting: value}. Raises ProtocolError
    if two rows were measured under different protocols; how images are sampled may differ between families, not within
    one.
    """
    runs = {name: scores if isinstance(scores, list) else [scores] for name, scores in rows.items()}
    protocol, sampling = check_protocol(runs)
    known = [name for name in ROWS if name in runs] + [name for name in runs if name not in ROWS]
    subjects_of = _subjects(runs)
    alike = {unit for group in runs.values() for scores in group for unit in scores.attrs.get(SAME_CLASS, [])}
    lines = []
    for metric, subjects, column in _columns(settings, protocol):
        having = [n for n in known if any((s["metric"] == metric).any() for s in runs[n])]
        tables = {n: statistics.units(runs[n], metric, settings.average, subjects) for n in having}
        for name, values in tables.items():
            base = None if name == family(name) else tables.get(family(name))
            dpo = tables.get(f"{family(name)}_dpo") if name == f"{family(name)}_focusdpo" else None
            others = {"difference": base, "from_dpo": dpo}
            about = {"family": FAMILIES.get(family(name), ""), "seeds": len(runs[name])}
            within = statistics.RANGES.get(metric, statistics.ANYTHING)
            about |= _distinct(values, base, alike, subjects_of, settings, within)
            lines.append(_line(name, column, values, others, subjects_of, settings, within) | about)
    result = pd.DataFrame(lines)
    result.attrs |= {"protocol": protocol, "sampling": sampling, "average": settings.average}
    result.attrs |= {"bootstrap": settings.bootstrap, "seed": settings.seed}
    result.attrs["components"] = _components(runs, _columns(settings, protocol))
    checked = calibration(runs["photos"][0] if "photos" in runs else None, protocol)
    result.attrs |= {"calibration": checked.said, "calibrated": checked.passed}
    result.attrs["trained"] = {ROWS[name]: dict(how) for name, how in (trained or {}).items()}
    return result


def check_protocol(runs: Mapping[str, list[pd.DataFrame]]) -> tuple[dict, dict[str, dict | str]]:
    """(the one protocol of all runs, flat; how images were sampled, by family or, of a row that has none, by row).

    Sampling is a matter of a family: its rows must agree in it, and no others. Anchors, which generate nothing, are
    free of it. Raises ProtocolError that says all in which two rows differ.
    """
    protocol: dict[str, Any] = {}
    sampling: dict[str, dict | str] = {}
    first: dict[str, str] = {}  # the row that the others of its group (all: "") are held against
    for name, scores in ((n, s) for n, group in runs.items() for s in group):
        if "protocol" not in scores.attrs:
            raise ProtocolError(f"the scores of '{name}' do not say how they were measured: score the images again")
        measured = dict(scores.attrs["protocol"])
        how, group = measured.pop("generation"), family(name) or name
        flat = {key: value for key, value in _flatten(measured) if value is not None}
        protocol = protocol or flat
        _agree(first.setdefault("", name), name, _differences(protocol, flat))
        if how is not None:
            known = sampling.setdefault(group, how)
            _agree(first.setdefault(group, name), name, _differences(known, how, "generation."))
    return protocol, sampling


def _agree(one: str, other: str, differences: list[str]) -> None:
    if differences:
        raise ProtocolError(
            f"'{one}' and '{other}' cannot stand in one table: {'; '.join(differences)}; measure both the same way"
        )


def _differences(one: Mapping[str, Any] | str, other: Mapping[str, Any] | str, prefix: str = "") -> list[str]:
    """In what two sets of settings differ, a clause each; either may be "unknown" as a whole."""
    if isinstance(one, str) or isinstance(other, str):
        return [] if one == other else [f"{prefix[:-1]} is {one!r} in the one and {other!r} in the other"]
    return [
        f"{prefix}{key} is {one.get(key)!r} in the one and {other.get(key)!r} in the other"
        for key in dict.fromkeys([*one, *other])
        if one.get(key) != other.get(key)
    ]


def wide(result: pd.DataFrame, of: str = "value") -> pd.DataFrame:
    """A row a method, a column a metric, cells "0.812 [0.790, 0.833]". `of` "distinct": without pairs of one class."""
    ends = ["low", "high"] if of == "value" else [f"{of}_low", f"{of}_high"]
    cells = [f"{v:.3f} [{lo:.3f}, {hi:.3f}]" for v, lo, hi in result[[of, *ends]].itertuples(index=False)]
    return _pivot(result, cells)


def differences(result: pd.DataFrame, of: str = "difference") -> pd.DataFrame:
    """Paired differences from each row's own base in that layout; "not distinguishable" where the interval holds 0.

    With "from_dpo" those of FocusDPO from DPO, with "distinct_difference" without pairs of one class.
    """
    kept = result[result[of].notna()]
    columns = [of, f"{of}_low", f"{of}_high"]
    estimates = [statistics.Estimate(*row) for row in kept[columns].itertuples(index=False)]
    return _pivot(kept, [NOT_DISTINGUISHABLE if e.contains_zero else _signed(e) for e in estimates])


def _signed(estimate: statistics.Estimate) -> str:
    """ "+0.012 [+0.008, +0.016]", with as many digits as it takes to see that the interval is free of 0."""
    form = next((f"+.{d}f" for d in (3, 4, 5) if all(round(value, d) for value in estimate)), "+.0e")
    value, low, high = (format(number, form) for number in estimate)
    return f"{value} [{low}, {high}]"


def text(result: pd.DataFrame) -> str:
    """For a terminal."""

    def grid(frame: pd.DataFrame) -> str:
        return frame.rename_axis(None).to_string(line_width=120)

    return _document(result, grid, "{}".format, lambda words: textwrap.fill(words, 120))


def markdown(result: pd.DataFrame) -> str:
    """For GitHub."""

    def grid(frame: pd.DataFrame) -> str:
        body = frame.map(str).reset_index().to_numpy().tolist()
        lines = [["", *map(str, frame.columns)], ["---"] * (frame.shape[1] + 1), *body]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    return _document(result, grid, "### {}".format, str)


def html(result: pd.DataFrame) -> str:
    """For a notebook: `IPython.display.HTML(tables.html(result))`."""

    def grid(frame: pd.DataFrame) -> str:
        align = [{"selector": "th, td", "props": "text-align: left; padding: 2px 10px; white-space: nowrap"}]
        faint = frame.map(lambda cell: "color: #888" if cell == NOT_DISTINGUISHABLE else "")
        return frame.style.set_table_styles(align).apply(lambda _: faint, axis=None).format(precision=3).to_html()

    return _document(result, grid, "<h4>{}</h4>".format, "<p>{}</p>".format)


def _document(result: pd.DataFrame, grid: Callable, heading: Callable, paragraph: Callable) -> str:
    """Our table, its differences, and under a heading of its own what the paper published."""
    of = kind(result.attrs["protocol"])
    parts = [
        heading(TITLES[of]),
        paragraph(captions.caption(result, of, (result["column"] == METRICS["leakage"]).any())),
        grid(wide(result)),
    ]
    if result["difference"].notna().any():
        title = f"Paired difference from {_bases(result)}, same subjects (95 % interval)"
        parts += [heading(title), grid(differences(result))]
    if result["from_dpo"].notna().any():
        title = "Paired difference of FocusDPO from DPO, same subjects (95 % interval)"
        parts += [heading(title), grid(differences(result, "from_dpo"))]
    if "distinct" in result:
        parts += _without_pairs_alike(result, grid, heading, paragraph)
    if components := result.attrs["components"]:
        parts += [
            heading("What a score varies with (share of its variance)"),
            grid(pd.DataFrame(components).T.fillna(ABSENT)),
        ]
    if trained := result.attrs["trained"]:
        parts += [heading("How the rows were trained"), grid(pd.DataFrame(trained).T.fillna(ABSENT))]
    parts += [heading(HEADING), grid(published(of).map("{:.3f}".format)), *map(paragraph, NOTES[of])]
    return "\n\n".join(parts) + "\n"


def _without_pairs_alike(result: pd.DataFrame, grid: Callable, heading: Callable, paragraph: Callable) -> list[str]:
    """The table once more, and its differences, over the pairs whose subjects bear different names."""
    left, every = int(result["distinct_units"].max()), int(result["units"].max())
    why = f"The subjects of {every - left} of the {every} pairs share a class word, so that their prompts cannot tell "
    parts = [heading(f"Without pairs that share a class word ({left} of {every})"), paragraph(f"{why}which is which.")]
    parts.append(grid(wide(result, "distinct")))
    if result["distinct_difference"].notna().any():
        parts += [
            paragraph(f"Paired difference from {_bases(result)}:"),
            grid(differences(result, "distinct_difference")),
        ]
    return parts


def _bases(result: pd.DataFrame) -> str:
    """ "UNO", or "the row's own base, UNO or IPAP"."""
    bases = list(dict.fromkeys(result.loc[result["difference"].notna(), "family"]))
    return bases[0] if len(bases) == 1 else f"the row's own base, {' or '.join(bases)}"


def _columns(settings: Evaluation, protocol: dict) -> list[tuple[str, str, str]]:
    """(metric, reduction over subjects, heading) of every column of the benchmark's kind."""
    if kind(protocol) == "single":
        return [(metric, "mean", label) for metric, label in METRICS.items()]
    over = ["mean", "min"] if settings.subjects == "both" else [settings.subjects]
    columns = []
    for metric, label in METRICS.items():
        if metric in ("clip_t", *statistics.RATES):  # of the whole image, and a rate over both subjects
            columns.append((metric, "mean", label))
        else:
            columns += [(metric, how, f"{label} ({how})") for how in over]
    return columns


def kind(protocol: dict) -> str:
    """ "single" or "multi"."""
    return protocol["benchmark"].split()[0]


def _components(runs: Mapping[str, list[pd.DataFrame]], columns: list[tuple[str, str, str]]) -> dict[str, dict]:
    """What the scores of each row's first run vary with, in words, where a prompt has several images."""
    found: dict[str, dict] = {}
    for name, (scores, *_) in runs.items():
        for metric, subjects, column in columns if scores["index"].any() else ():
            has = metric not in statistics.RATES and (scores["metric"] == metric).any()
            if shares := statistics.components(scores, metric, subjects) if has else None:
                said = ", ".join(f"{of} {share:.0%}" for of, share in shares.items())
                found.setdefault(ROWS.get(name, name), {})[column] = said
    return found


def _subjects(runs: Mapping[str, list[pd.DataFrame]]) -> dict[str, list[str]]:
    """The subjects of every unit, as its scores name them."""
    pairs = pd.concat([s[["subjects", "subject"]] for group in runs.values() for s in group]).drop_duplicates()
    named = pairs[pairs["subject"] != ""]
    return named.groupby("subjects", sort=False)["subject"].agg(list).to_dict()


def _line(
    name: str,
    column: str,
    values: pd.DataFrame,
    others: Mapping[str, pd.DataFrame | None],
    subjects: Mapping[str, list[str]],
    settings: Evaluation,
    within: tuple[float, float],
) -> dict:
    """A row's value in a column, and its paired differences from `others`, by name."""
    by = statistics.uncertainty(values, subjects, settings)
    line = {"row": ROWS.get(name, name), "column": column, **statistics.estimate(values, by, within)._asdict()}
    for of, other in others.items():
        paired = UNPAIRED if other is None else statistics.difference(values, other, by)
        line |= {of: paired.value, f"{of}_low": paired.low, f"{of}_high": paired.high}
    return line | {"units": len(values)}


def _distinct(
    values: pd.DataFrame,
    base: pd.DataFrame | None,
    alike: Collection[str],
    subjects: Mapping[str, list[str]],
    settings: Evaluation,
    within: tuple[float, float],
) -> dict:
    """A row's value, and its difference from its base, over the units that are not `alike`; nothing where none is."""
    kept, of_base = (None if of is None else of[~of.index.isin(alike)] for of in (values, base))
    if len(kept) in (0, len(values)):
        return {}
    line = _line("", "", kept, {"distinct_difference": of_base}, subjects, settings, within)
    found = {"distinct": line["value"], "distinct_low": line["low"], "distinct_high": line["high"]}
    return found | {k: v for k, v in line.items() if k.startswith("distinct")} | {"distinct_units": len(kept)}


def _flatten(values: dict, prefix: str = ""):
    """Pairs such as ("evaluation.references", "all")."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _pivot(result: pd.DataFrame, cells: list[str]) -> pd.DataFrame:
    frame = result.assign(cell=cells).pivot(index="row", columns="column", values="cell").fillna(ABSENT)
    frame = frame.loc[list(dict.fromkeys(result["row"])), list(dict.fromkeys(result["column"]))]
    return frame.rename_axis(index="method", columns=None)
