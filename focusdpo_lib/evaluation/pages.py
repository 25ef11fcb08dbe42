"""A table's images to look at: one HTML file that opens without a server, every case with its references and rows.

Sorted by any score of any row, or by its difference from another row, worst first; filtered by subject, kind and
prompt. Thumbnails lie in the file, as large as a budget allows; what does not fit one file goes on in the next.
"""

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from PIL import Image

from focusdpo_lib.evaluation import kinds, statistics
from focusdpo_lib.evaluation.benchmark import Benchmark, Case, open_image
from focusdpo_lib.evaluation.tables import METRICS
from focusdpo_lib.runs import write_text

BUDGET = 20_000_000  # bytes of a file
SIZES = (
    (160, 70),
    (144, 65),
    (128, 60),
    (120, 55),
    (112, 50),
    (104, 50),
    (96, 45),
    (80, 40),
    (64, 35),
)  # sides in pixels
# and qualities of thumbnails
LINE = 250  # bytes of a line and row beside its pictures, about: scores, text
SAMPLE = 48  # pictures by which a size is chosen
LESS_IS_BETTER = (METRICS["leakage"],)


@dataclass(frozen=True)
class Row:
    """One row of a table: its name, its scores (of one training seed), and where its image of a case lies."""

    label: str
    scores: pd.DataFrame
    images: Path  # <case>_<image>.png


def write(
    path: Path, title: str, caption: str, benchmark: Benchmark, rows: Sequence[Row], budget: int = BUDGET
) -> list[Path]:
    """Writes the page, and as many more (page-2.html, …) as it takes; returns them all.

    `benchmark` has the cases that were scored. Of every image, not only of every case, there is a line.
    """
    path = Path(path)
    values = {row.label: per_case(row.scores) for row in rows}
    lines = _worst_first(values)
    cases = {case.id: case for case in benchmark.cases}
    side, quality, files = _fitting(_pictures(lines, cases, rows), len(lines) * (len(rows) + 1) * LINE, budget)
    while True:
        each = math.ceil(len(lines) / files)
        parts = [lines[at : at + each] for at in range(0, len(lines), each)]
        names = [path.name, *(f"{path.stem}-{n}{path.suffix}" for n in range(2, len(parts) + 1))]
        about = title, caption, benchmark, rows, values, (side, quality)
        made = {name: _Page(*about, part, names, name).html() for name, part in zip(names, parts, strict=True)}
        if each == 1 or all(len(body.encode()) <= budget for body in made.values()):
            break
        files = len(parts) + 1
    for name, body in made.items():
        write_text(path.with_name(name), body)
    return [path.with_name(name) for name in made]


def per_case(scores: pd.DataFrame) -> pd.DataFrame:
    """A row an image (index: case and number), a column a score; of two subjects DINO also as their minimum."""
    multi = scores.groupby(["case", "index", "metric"], sort=False)["subject"].count().max() > 1
    columns = {}
    for metric in (metric for metric in METRICS if (scores["metric"] == metric).any()):
        for how in ("mean", "min") if multi and metric == "dino" else ("mean",):
            sums = statistics.per_image(scores, metric, how).set_index(["case", "index"])
            label = f"{METRICS[metric]} ({how})" if multi and metric == "dino" else METRICS[metric]
            columns[label] = sums["numerator"] / sums["denominator"]  # of no attribute that could leak: no number
    return pd.DataFrame(columns)


def _worst_first(values: Mapping[str, pd.DataFrame]) -> list[tuple[str, int]]:
    """The images that all rows have, by the first score of the last row, from the lowest."""
    last = list(values.values())[-1]
    common = set.intersection(*(set(of.index) for of in values.values()))
    return [line for line in last.sort_values(last.columns[0], kind="stable").index if line in common]


def _pictures(lines: Sequence[tuple[str, int]], cases: Mapping[str, Case], rows: Sequence[Row]) -> list[Path]:
    references = dict.fromkeys(path for case in cases.values() for path in case.references)
    return [*references, *(row.images / f"{case}_{number}.png" for case, number in lines for row in rows)]


def _fitting(pictures: Sequence[Path], rest: int, budget: int) -> tuple[int, int, int]:
    """(side, quality, files): the largest thumbnails with which everything fits one file, or the smallest in several.

    By the mean of a sample, with a tenth of the budget to spare.
    """
    sample = [open_image(path) for path in pictures[:: -(-len(pictures) // SAMPLE)]]
    for side, quality in SIZES:
        each = sum(len(_encoded(image, side, quality)) for image in sample) / len(sample)
        needed = rest + len(pictures) * each
        if needed < 0.9 * budget:
            return side, quality, 1
    return side, quality, math.ceil(needed / (0.9 * budget))


def _encoded(image: Image.Image, side: int, quality: int) -> str:
    """A picture as a data URI of WebP, its longer side at most `side`; never enlarged."""
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    small.save(data, "WEBP", quality=quality, method=4)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()


@dataclass(frozen=True)
class _Page:
    title: str
    caption: str
    benchmark: Benchmark
    rows: Sequence[Row]
    values: Mapping[str, pd.DataFrame]
    thumbnail: tuple[int, int]
    lines: Sequence[tuple[str, int]]
    names: Sequence[str]  # of all files
    name: str

    def html(self) -> str:
        cases = {case.id: case for case in self.benchmark.cases}
        kind_of = kinds.of_cases(self.benchmark)
        references = {p: f"r{n}" for n, p in enumerate(dict.fromkeys(p for c in cases.values() for p in c.references))}
        used = {path for case, _ in self.lines for path in cases[case].references}
        styles = "".join(
            f".{name}{{background-image:url({_encoded(open_image(path), *self.thumbnail)})}}\n"
            for path, name in references.items()
            if path in used
        )
        body = [self._line(n, line, cases[line[0]], references, kind_of) for n, line in enumerate(self.lines)]
        heads = "".join(f'<th scope="col">{_text(row.label)}</th>' for row in self.rows)
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(self.title)}</title>\n'
            f"<style>:root{{--side:{min(self.thumbnail[0], 160)}px}}{STYLE}\n{styles}</style></head><body>\n"
            f"<h1>{_text(self.title)}</h1><p>{_text(self.caption)}</p>{self._others()}\n{self._controls(kind_of)}\n"
            f'<table><thead><tr><th scope="col">case</th><th scope="col">references</th>{heads}</tr></thead>\n'
            f"<tbody>{''.join(body)}</tbody></table>\n"
            f'<script type="application/json" id="data">{self._data()}</script>\n<script>{SCRIPT}</script>\n'
            "</body></html>\n"
        )

    def _others(self) -> str:
        if len(self.names) == 1:
            return ""
        links = (
            f"<b>{n}</b>" if name == self.name else f'<a href="{_text(name)}">{n}</a>'
            for n, name in enumerate(self.names, 1)
        )
        return f"<nav>The cases of this table lie in {len(self.names)} files, worst first: {' '.join(links)}</nav>"

    def _controls(self, kind_of: pd.DataFrame) -> str:
        labels = [row.label for row in self.rows]
        subjects = sorted({name for case in self.benchmark.cases for name in case.subjects})
        found = "".join(
            f"<label>{_text(f'kind of {column}')} {_select(column, ['all', *dict.fromkeys(kind_of[column])])}</label> "
            for column in kind_of
        )
        return (
            f'<form id="controls"><label>sort by {_select("score", list(self.values[labels[-1]].columns))}</label> '
            f"<label>of {_select('row', labels, labels[-1])}</label> <label>minus {_select('minus', ['–', *labels])}"
            f"</label> <label>{_select('order', ['worst first', 'best first', 'as listed'])}</label><br>"
            f"<label>subject {_select('subject', ['all', *subjects])}</label> {found}"
            '<label>prompt contains <input name="contains" type="search"></label> <output></output></form>'
        )

    def _line(self, n: int, line: tuple[str, int], case: Case, references: Mapping[Path, str], kind_of) -> str:
        number = f", image {line[1] + 1}" if line[1] else ""
        asked = "".join(f' data-{column}="{_text(kind_of.loc[case.id, column])}"' for column in kind_of)
        shown = "".join(
            f'<div class="t {references[path]}" role="img" aria-label="{_text(name)}"></div>{_text(name)}'
            for path, name in zip(case.references, case.subjects, strict=True)
        )
        of = {row.label: self.values[row.label].loc[line] for row in self.rows}
        first = self.values[self.rows[-1].label].columns[0]
        ranked = sorted(of, key=lambda label: of[label][first])
        marks = {ranked[0]: "worst", ranked[-1]: "best"} if len(ranked) > 1 else {}
        cells = "".join(self._cell(row, line, of[row.label], marks.get(row.label)) for row in self.rows)
        return (
            f'<tr data-n="{n}" data-in="{_text("|".join(case.subjects))}"{asked}><th scope="row">{_text(case.id)}'
            f"{_text(number)}<br><q>{_text(case.prompt)}</q></th><td>{shown}</td>{cells}</tr>\n"
        )

    def _cell(self, row: Row, line: tuple[str, int], of: pd.Series, mark: str | None) -> str:
        picture = _encoded(open_image(row.images / f"{line[0]}_{line[1]}.png"), *self.thumbnail)
        said = "<br>".join(f"{_text(name)} {_number(value)}" for name, value in of.items())
        flag = f' class="{mark}"><i>{mark}</i' if mark else ""
        return f'<td{flag}><img alt="" src="{picture}">{said}</td>'

    def _data(self) -> str:
        """What the script sorts by: {row: {score: [a number a line]}}, and of which scores less is better."""
        values = {
            row.label: {
                name: [None if math.isnan(v) else round(v, 4) for v in column.loc[list(self.lines)]]
                for name, column in self.values[row.label].items()
            }
            for row in self.rows
        }
        known = {"values": values, "less": list(LESS_IS_BETTER)}
        return json.dumps(known).replace("<", "\\u003c")  # no tag can end the script


def _select(name: str, options: Sequence[str], chosen: str | None = None) -> str:
    made = "".join(f"<option{' selected' if option == chosen else ''}>{_text(option)}</option>" for option in options)
    return f'<select name="{_text(name)}">{made}</select>'


def _text(words: str) -> str:
    return html.escape(str(words), quote=True)


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


# Okabe and Ito's blue and vermilion, and a word beside each.
STYLE = """
body{font:14px/1.4 system-ui,sans-serif;margin:1.5em;color:#111;background:#fff}
p{max-width:70em}form{position:sticky;top:0;background:#fff;padding:.6em 0;border-bottom:1px solid #999;z-index:2}
select,input{font:inherit;margin:.15em .4em .15em 0}table{border-collapse:collapse;margin-top:.5em}
th,td{text-align:left;vertical-align:top;padding:.4em .6em;border-bottom:1px solid #ddd;font-weight:normal}
thead th{font-weight:bold}tbody th{max-width:14em}td{position:relative;font-size:12px;white-space:nowrap}
img,.t{display:block;width:var(--side);height:var(--side);object-fit:contain;background:#eee center/contain no-repeat}
td i{position:absolute;font-style:normal;font-size:11px;padding:0 .4em;color:#fff}
.best img{outline:3px solid #0072B2;outline-offset:-3px}.best i{background:#0072B2}
.worst img{outline:3px dashed #D55E00;outline-offset:-3px}.worst i{background:#A84300}
""".strip()

SCRIPT = """
const {values, less} = JSON.parse(document.getElementById("data").textContent);
const form = document.getElementById("controls"), body = document.querySelector("tbody");
const lines = [...body.rows];
function show() {
  const f = form.elements, score = f.score.value, of = values[f.row.value][score];
  const from = f.minus.value in values ? values[f.minus.value][score] : null;
  const sign = (f.order.value === "best first" ? -1 : 1) * (less.includes(score) ? -1 : 1);
  const at = line => Number(line.dataset.n);
  const value = line => {
    const v = of[at(line)], w = from ? from[at(line)] : 0;
    return v === null || w === null ? null : sign * (v - w);
  };
  const listed = line => line.querySelector("th").textContent;
  const keyed = lines.map(line => [value(line), line]);
  keyed.sort(f.order.value === "as listed" ? (a, b) => listed(a[1]) < listed(b[1]) ? -1 : 1
    : (a, b) => (a[0] === null) - (b[0] === null) || a[0] - b[0] || at(a[1]) - at(b[1]));
  let count = 0;
  for (const [, line] of keyed) {
    const kinds = [...form.querySelectorAll("select")].filter(s => s.name in line.dataset);
    line.hidden = !(
      (f.subject.value === "all" || line.dataset.in.split("|").includes(f.subject.value)) &&
      kinds.every(s => s.value === "all" || line.dataset[s.name] === s.value) &&
      line.querySelector("q").textContent.toLowerCase().includes(f.contains.value.toLowerCase()));
    count += !line.hidden;
    body.append(line);
  }
  form.querySelector("output").textContent = `${count} of ${lines.length} images`;
}
form.addEventListener("input", show);
form.addEventListener("submit", event => event.preventDefault());
show();
""".strip()
