"""Tables 1 and 2 with every row of the paper: where each number comes from, and the published one beside it.

A row is measured here, scored from another system's images, published only, or not run; in words and in colour. The
difference from a published number stands only where protocol, cases, encoders and what went in are the published ones.
"""

import html as _html
import math
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from focusdpo_lib.evaluation import captions, protocols, published, uno_cases
from focusdpo_lib.evaluation.benchmark import Benchmark
from focusdpo_lib.evaluation.rows import ANCHORS, FAMILIES, ROWS
from focusdpo_lib.evaluation.tables import ABSENT, TITLES, kind

MEASURED, SCORED, PUBLISHED, NOT_RUN = "measured here", "scored from images", "published only", "not run"
# Okabe and Ito's colours, each with its own lightness; and a square where only a letter can be coloured.
COLOURS = {MEASURED: "#0072B2", SCORED: "#D55E00", PUBLISHED: "#000000", NOT_RUN: "#767676"}
SQUARES = {MEASURED: "🟦", SCORED: "🟧", PUBLISHED: "⬛", NOT_RUN: "⬜"}
PHOTOS = 158  # of DreamBench's 30 subjects
LATEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    **{"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "–": "--", "×": r"$\times$"},
    **{"β": r"$\beta$", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"},
}


@dataclass(frozen=True)
class Whole:
    """A table of all rows (index: method; columns: state, source, and of every score here, low, high, published,
    difference) with what stands above and below it."""

    frame: pd.DataFrame
    title: str
    caption: str
    notes: tuple[str, ...]


def whole(result: pd.DataFrame, benchmark: Benchmark, sources: Mapping[str, str] | None = None) -> Whole:
    """All rows of the paper's table and all of ours, `result` of `tables.table`; `sources` of rows from images."""
    of, sources = kind(result.attrs["protocol"]), sources or {}
    paper = published.published(of)
    if of == "single":
        paper = pd.concat([pd.DataFrame([published.REAL_PHOTOS], index=[ANCHORS["photos"]]), paper])
    paper = paper.reindex(columns=list(published.METRICS))
    against = {label: reasons(result, benchmark, label) for label in dict.fromkeys(result["row"])}
    lines = {
        label: _line(result, paper, label, sources.get(label), not against.get(label, [""]))
        for label in _order(list(dict.fromkeys(result["row"])), list(paper.index))
    }
    frame = pd.DataFrame.from_dict(lines, orient="index").rename_axis("method")
    caption = captions.caption(result, of, False)
    return Whole(frame, f"{TITLES[of]}, every row of the paper", caption, _notes(of, against))


def reasons(result: pd.DataFrame, benchmark: Benchmark, label: str) -> list[str]:
    """Why a row's numbers cannot be subtracted from the published ones, in words; nothing where they can."""
    found = []
    if not protocols.is_published(result.attrs["protocol"]):
        found.append("protocol or encoders are not the published ones")
    if not is_dreambench(benchmark):
        found.append("the cases are not UNO's on all photos of DreamBench")
    if label not in ANCHORS.values():
        group = next((name for name, base in FAMILIES.items() if _family(label) == base), label)
        how = result.attrs["sampling"].get(group, captions.UNKNOWN)
        wanted = "all" if _family(label) == FAMILIES["ipap"] else "listed"  # as the paper's rows were measured
        went_in = captions.UNKNOWN if isinstance(how, str) else how.get("references", captions.UNKNOWN)
        if went_in != wanted:
            found.append(f"the references that went in are '{went_in}', not '{wanted}'")
        prepared = "" if isinstance(how, str) else str(how.get("photos", ""))
        if prepared and not (wanted == "all" and prepared.startswith(captions.BOXED)):  # as PatchDPO's were
            found.append(f"the references were {prepared}")
    return found


def is_dreambench(benchmark: Benchmark) -> bool:
    """Whether the cases are UNO's, all 750, on as many photos as DreamBench has."""
    classes = {name: subject.class_name for name, subject in benchmark.subjects.items()}
    if uno_cases.missing(classes) or sum(len(subject.photos) for subject in benchmark.subjects.values()) != PHOTOS:
        return False
    theirs = uno_cases.entries(benchmark.kind, classes, benchmark.prompts)
    ours = [(case.prompt, ["/".join(path.parts[-2:]) for path in case.references]) for case in benchmark.cases]
    return ours == [(entry["prompt"], entry["image_paths"]) for entry in theirs]


def _family(label: str) -> str:
    return label.partition("+")[0]


def _order(ours: list[str], paper: list[str]) -> list[str]:
    """Anchors, then the paper's rows in its order, then the kit's own that it does not have, then others."""
    rows = [*ANCHORS.values(), *paper, *ROWS.values(), *ours]
    return [label for label in dict.fromkeys(rows) if label in ours or label in paper]


def _line(result: pd.DataFrame, paper: pd.DataFrame, label: str, source: str | None, comparable: bool) -> dict:
    own = result[result["row"] == label].set_index("column")
    absent = NOT_RUN if label in ROWS.values() else PUBLISHED
    state = absent if own.empty else MEASURED if source is None else SCORED
    line: dict = {"state": state, "source": source or ""}
    for metric in published.METRICS:
        column = next((name for name in (metric, f"{metric} (mean)") if name in own.index), None)
        value, low, high = own.loc[column, ["value", "low", "high"]] if column else [math.nan] * 3
        printed = paper[metric].get(label, math.nan)
        difference = value - printed if comparable else math.nan
        line |= {metric: value, f"{metric} low": low, f"{metric} high": high}
        line |= {f"{metric} published": printed, f"{metric} difference": difference}
    return line


def _notes(of: str, against: Mapping[str, list[str]]) -> tuple[str, ...]:
    """Why no difference is shown, a sentence for the rows that share their reasons; then what the paper's table needs
    to be said of it."""
    rows_of: dict[str, list[str]] = {}
    for label, why in against.items():
        for reason in why:
            rows_of.setdefault(reason, []).append(label)
    reasons_of: dict[tuple[str, ...], list[str]] = {}
    for reason, rows in rows_of.items():
        reasons_of.setdefault(tuple(rows), []).append(reason)
    said = [
        f"No difference from the published numbers is shown for "
        f"{'any row' if len(rows) == len(against) else ', '.join(rows)}: {'; '.join(why)}."
        for rows, why in reasons_of.items()
    ]
    return (*said, *published.NOTES[of])


def cells(of: Whole) -> pd.DataFrame:
    """The table as it is read: state, then of every score "here [95 %]", "published", "difference" (two levels)."""
    made = {("", "state"): of.frame["state"]}
    for metric in published.METRICS:
        value, low, high = (of.frame[f"{metric}{end}"] for end in ("", " low", " high"))
        here = [f"{v:.3f} [{lo:.3f}, {hi:.3f}]" for v, lo, hi in zip(value, low, high, strict=True)]
        made[metric, "here [95 %]"] = pd.Series(here, of.frame.index).where(value.notna(), ABSENT)
        for name, form in (("published", "{:.3f}"), ("difference", "{:+.3f}")):
            made[metric, name] = (
                of.frame[f"{metric} {name}"].map(form.format).where(of.frame[f"{metric} {name}"].notna(), ABSENT)
            )
    return pd.DataFrame(made)


def markdown(of: Whole) -> str:
    """For GitHub; the state with a coloured square."""
    frame = cells(of)
    heads = ["", "state", *(f"{m} {n}" if n.startswith("here") else n for m, n in frame.columns[1:])]
    rows = [[label, f"{SQUARES[row.iloc[0]]} {row.iloc[0]}", *row.iloc[1:]] for label, row in frame.iterrows()]
    lines = [
        "| " + " | ".join(str(c).replace("|", "\\|") for c in r) + " |" for r in [heads, ["---"] * len(heads), *rows]
    ]
    from_images = [f"{label}: {source}." for label, source in of.frame["source"].items() if source]
    return "\n\n".join([f"### {of.title}", of.caption, "\n".join(lines), *from_images, *of.notes]) + "\n"


def latex(of: Whole) -> str:
    """A table for a paper; it needs the packages booktabs, graphicx and xcolor."""
    frame = cells(of).rename(index=escaped, columns=escaped).map(escaped)
    state = frame.columns[0]
    frame[state] = [f"\\textcolor[HTML]{{{COLOURS[s][1:]}}}{{{s}}}" for s in of.frame["state"]]
    body = frame.rename_axis(index=None).style.to_latex(
        hrules=True, column_format="ll" + "rrr" * len(published.METRICS), multicol_align="c"
    )
    words = " ".join(escaped(text) for text in (of.title + ".", of.caption, *of.notes))
    return (
        "% \\usepackage{booktabs, graphicx, xcolor}\n\\begin{table}\n\\centering\n\\resizebox{\\textwidth}{!}{%\n"
        f"{body.strip()}%\n}}\n\\caption{{{words}}}\n\\end{{table}}\n"
    )


def escaped(text: str) -> str:
    """A text in which LaTeX reads nothing but letters."""
    return "".join(LATEX.get(letter, letter) for letter in str(text))


def csv(of: Whole) -> str:
    """Plain numbers, a column each."""
    return of.frame.to_csv(float_format="%.6f")


def html(of: Whole) -> str:
    """For a notebook."""

    def state(column: pd.Series) -> list[str]:
        return [f"color: {COLOURS[value]}; font-weight: bold" for value in column]

    frame = cells(of)
    align = [{"selector": "th, td", "props": "text-align: left; padding: 2px 10px; white-space: nowrap"}]
    styled = frame.style.set_table_styles(align).apply(state, subset=[frame.columns[0]])
    styled = styled.format(escape="html").format_index(escape="html")
    notes = "".join(f"<p>{_html.escape(note)}</p>" for note in of.notes)
    return f"<h4>{_html.escape(of.title)}</h4><p>{_html.escape(of.caption)}</p>{styled.to_html()}{notes}"
