"""Tables 1 and 2: rows with intervals, paired differences from the base, and the protocol behind them.

rows = {"photos": …, "oracle": …, "copy": …, "base": scores, "sft": [scores of seed 0, of seed 1, …], …}
result = table(rows, evaluation)         # long: a line a row and column
print(text(result)); markdown(result); html(result)
"""

import math
import textwrap
from collections.abc import Callable, Mapping

import pandas as pd

from focusdpo_lib.evaluation import statistics
from focusdpo_lib.evaluation.published import HEADING, NOTES, published
from focusdpo_lib.params import Evaluation

ROWS = {
    "photos": "real photos",
    "oracle": "oracle (real renders)",
    "copy": "copy of the reference",
    "base": "base",
    "sft": "+SFT",
    "dpo": "+DPO",
    "patchdpo": "+PatchDPO",
    "focusdpo": "+FocusDPO",
}
METRICS = {
    "dino": "DINO",
    "clip_i": "CLIP-I",
    "clip_t": "CLIP-T",
    "attribute_accuracy": "attribute accuracy",
    "leakage": "leakage rate",
}
TITLES = {"single": "Table 1: single subject", "multi": "Table 2: two subjects"}
NOT_DISTINGUISHABLE = "not distinguishable"
ABSENT = "–"


class ProtocolError(ValueError):
    """Runs that were measured differently were asked into one table; the message says which setting differs."""


def table(
    rows: Mapping[str, pd.DataFrame | list[pd.DataFrame]], settings: Evaluation, base: str = "base"
) -> pd.DataFrame:
    """Long table: row, column, value, low, high, difference, difference_low, difference_high, units, seeds.

    A row is one table of scores, or a list of them, one a training seed. The difference is from the row `base`; anchors
    and the base itself have none. Raises ProtocolError if any two tables were measured under different protocols.
    """
    runs = {name: scores if isinstance(scores, list) else [scores] for name, scores in rows.items()}
    protocol = check_protocol(runs)
    known = [name for name in ROWS if name in runs] + [name for name in runs if name not in ROWS]
    lines = []
    for metric, subjects, column in _columns(settings, protocol):
        having = [n for n in known if any((s["metric"] == metric).any() for s in runs[n])]
        tables = {n: statistics.units(runs[n], metric, settings.average, subjects) for n in having}
        for name, values in tables.items():
            generated = runs[name][0].attrs["protocol"]["generation"] is not None
            reference = tables.get(base) if generated and name != base else None
            lines.append(_line(name, column, values, reference, settings) | {"seeds": len(runs[name])})
    result = pd.DataFrame(lines)
    result.attrs |= {"protocol": protocol, "base": ROWS.get(base, base), "bootstrap": settings.bootstrap}
    return result


def check_protocol(runs: Mapping[str, list[pd.DataFrame]]) -> dict:
    """The one protocol of all runs; anchors, which generate nothing, are free of its generation part."""
    first, shared = {}, {}
    for name, scores in ((n, s) for n, group in runs.items() for s in group):
        if "protocol" not in scores.attrs:
            raise ProtocolError(f"the scores of '{name}' do not say how they were measured: score the images again")
        flat = dict(_flatten(scores.attrs["protocol"]))
        for key, value in flat.items():
            if first.setdefault(key, (name, value))[1] != value:
                raise ProtocolError(
                    f"'{first[key][0]}' and '{name}' cannot stand in one table: {key} is {first[key][1]!r} in the one "
                    f"and {value!r} in the other; measure both the same way"
                )
        shared |= {key: value for key, value in flat.items() if value is not None}
    return shared


def wide(result: pd.DataFrame) -> pd.DataFrame:
    """A row a method, a column a metric, cells "0.812 [0.790, 0.833]"."""
    cells = [f"{v:.3f} [{lo:.3f}, {hi:.3f}]" for v, lo, hi in result[["value", "low", "high"]].itertuples(index=False)]
    return _pivot(result, cells)


def differences(result: pd.DataFrame) -> pd.DataFrame:
    """Paired differences from the base, in the same layout; "not distinguishable" where the interval contains 0."""
    kept = result[result["difference"].notna()]
    columns = ["difference", "difference_low", "difference_high"]
    estimates = [statistics.Estimate(*row) for row in kept[columns].itertuples(index=False)]
    return _pivot(kept, [NOT_DISTINGUISHABLE if e.contains_zero else _signed(e) for e in estimates])


def _signed(estimate: statistics.Estimate) -> str:
    """ "+0.012 [+0.008, +0.016]", with as many digits as it takes to see that the interval is free of 0."""
    digits = next((d for d in (3, 4) if all(round(value, d) for value in estimate)), 5)
    value, low, high = (f"{number:+.{digits}f}" for number in estimate)
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
    parts = [heading(TITLES[of]), paragraph(_caption(result, of)), grid(wide(result))]
    if result["difference"].notna().any():
        title = f"Paired difference from {result.attrs['base']}, same subjects (95 % interval)"
        parts += [heading(title), grid(differences(result))]
    parts += [heading(HEADING), grid(published(of).map("{:.3f}".format)), *map(paragraph, NOTES[of])]
    return "\n\n".join(parts) + "\n"


def _caption(result: pd.DataFrame, of: str) -> str:
    drawn = {"single": "subjects", "multi": "pairs of subjects"}[of]
    seeds = result[result["seeds"] > 1].drop_duplicates("row")
    averaged = "".join(
        f" {row}: mean over {n} training seeds." for row, n in zip(seeds["row"], seeds["seeds"], strict=True)
    )
    measured = ", ".join(f"{key} = {value}" for key, value in result.attrs["protocol"].items())
    return (
        f"Mean [95 % interval, bootstrap of {result.attrs['bootstrap']} draws over {result['units'].max()} {drawn}]."
        f"{averaged}{' Of the leakage rate, less is better.' if of == 'multi' else ''} Measured with {measured}."
    )


def _columns(settings: Evaluation, protocol: dict) -> list[tuple[str, str, str]]:
    """(metric, reduction over subjects, heading) of every column of the benchmark's kind."""
    if kind(protocol) == "single":
        return [(metric, "mean", label) for metric, label in METRICS.items()]
    over = ["mean", "min"] if settings.subjects == "both" else [settings.subjects]
    columns = []
    for metric, label in METRICS.items():
        if metric in ("clip_t", "leakage"):  # of the whole image, and a rate over both subjects
            columns.append((metric, "mean", label))
        else:
            columns += [(metric, how, f"{label} ({how})") for how in over]
    return columns


def kind(protocol: dict) -> str:
    """ "single" or "multi"."""
    return protocol["benchmark"].split()[0]


def _line(name: str, column: str, values: pd.DataFrame, base: pd.DataFrame | None, settings: Evaluation) -> dict:
    drawn = statistics.resamples(len(values), settings.bootstrap, settings.seed)
    unpaired = statistics.Estimate(math.nan, math.nan, math.nan)
    paired = unpaired if base is None else statistics.difference(values, base, drawn)
    return {
        "row": ROWS.get(name, name),
        "column": column,
        **statistics.estimate(values, drawn)._asdict(),
        "difference": paired.value,
        "difference_low": paired.low,
        "difference_high": paired.high,
        "units": len(values),
    }


def _flatten(values: dict, prefix: str = ""):
    """Pairs such as ("generation.steps", 20); the missing generation of an anchor gives none."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        elif (key, value) != ("generation", None):
            yield f"{prefix}{key}", value


def _pivot(result: pd.DataFrame, cells: list[str]) -> pd.DataFrame:
    frame = result.assign(cell=cells).pivot(index="row", columns="column", values="cell").fillna(ABSENT)
    frame = frame.loc[list(dict.fromkeys(result["row"])), list(dict.fromkeys(result["column"]))]
    return frame.rename_axis(index="method", columns=None)
