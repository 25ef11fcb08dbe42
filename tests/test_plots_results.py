"""The figures of results: families apart, each with its own base; one colour and mark an objective in both."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from focusdpo_lib import params, stages
from focusdpo_lib.comparison import oracle_images
from focusdpo_lib.evaluation import tables
from focusdpo_lib.evaluation.scores import COLUMNS
from focusdpo_lib.plots import OBJECTIVE_COLOURS
from focusdpo_lib.plots import results as plots_results

OBJECTIVES = ("sft", "dpo", "patchdpo", "focusdpo")
ROWS = [f"{family}{o}" for family in ("uno", "ipap") for o in ("", *(f"_{name}" for name in OBJECTIVES))]


def scores(value: float, generation: dict | None) -> pd.DataFrame:
    rows = [
        (f"{i}", 0, f"s{i}", "", metric, "s", value + 0.01 * i, 1.0) for i in range(4) for metric in ("dino", "clip_i")
    ]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table.attrs["protocol"] = {"benchmark": "single 0", "encoders": {}, "evaluation": {}, "generation": generation}
    return table


@pytest.fixture(scope="module")
def result() -> pd.DataFrame:
    """An anchor and five rows of each family: UNO's base at 0.615 in the mean, IPAP's at 0.415."""
    rows = {"copy": scores(0.9, None)}
    for n, row in enumerate(ROWS):
        rows[row] = scores(0.6 - 0.2 * (n >= 5) + 0.02 * (n % 5), {"steps": 1})
    return tables.table(rows, params.section("evaluation", {"bootstrap": 50}))


def dotted(axis) -> list[tuple[float, float, float]]:
    """(x, top, bottom) of every base's line."""
    lines = [c for c in axis.collections if str(c.get_linestyle()[0][1]) != "None" and len(c.get_paths()) == 1]
    ends = [line.get_paths()[0].vertices for line in lines]
    return [(x[0, 0], x[:, 1].min(), x[:, 1].max()) for x in ends if len(x) == 2 and x[0, 0] == x[1, 0]]


def test_every_family_has_the_line_of_its_own_base_and_no_further(result):
    axis = plots_results.intervals(result).axes[0]
    places = dict(zip([t.get_text() for t in axis.get_yticklabels()], axis.get_yticks(), strict=True))
    lines = dotted(axis)
    assert [x for x, _, _ in lines] == pytest.approx([0.615, 0.415])
    for base, (_, top, bottom) in zip(("UNO", "IPAP"), lines, strict=True):
        within = [row for row, place in places.items() if top < place < bottom]
        assert within == [row for row in places if row.startswith(base)]
    assert places["IPAP"] - places["UNO+FocusDPO"] > 1.3 * (places["UNO+FocusDPO"] - places["UNO+PatchDPO"])


def test_an_objective_has_one_colour_and_mark_in_both_families(result):
    axis = plots_results.differences(result).axes[0]
    labels = [text.get_text() for text in axis.get_yticklabels()]
    marks = {}
    for container in axis.containers:
        (y,) = container.lines[0].get_ydata()
        name = labels[int(np.argmin(np.abs(np.array(axis.get_yticks()) - y)))].partition("+")[2].lower()
        marks.setdefault(name, set()).add((container.lines[0].get_marker(), to_hex(container.lines[0].get_color())))
    assert {name: len(found) for name, found in marks.items()} == dict.fromkeys(OBJECTIVES, 1)
    assert {found.pop()[1].upper() for found in marks.values()} == {OBJECTIVE_COLOURS[name] for name in OBJECTIVES}


@pytest.mark.parametrize(("rows", "panels"), [(ROWS, ["UNO", "IPAP"]), (ROWS[:5], ["UNO"])])
def test_attribute_accuracy_has_a_panel_a_family_with_the_oracle_in_each(rows, panels):
    lines = [{"row": row, "attribute": a, "value": 0.5, "low": 0.4, "high": 0.6}
             for row in ("oracle", *rows) for a in ("base", "trim")]  # fmt: skip
    figure = plots_results.attribute_accuracy(pd.DataFrame(lines))
    assert [axis.get_title() for axis in figure.axes] == panels
    for axis in figure.axes:
        named = [text.get_text() for text in axis.get_legend().get_texts()]
        assert named[0].startswith("oracle") and len(named) == 6
        assert all(name.startswith(axis.get_title()) for name in named[1:])


def test_a_long_prompt_does_not_widen_its_column(tmp_path):
    benchmark = stages.load_benchmark(tmp_path, params.Benchmark(), "single")
    images = oracle_images(tmp_path, benchmark, 1)
    case = benchmark.cases[0]
    figure = plots_results.sample_grid(benchmark, {row: images for row in ROWS}, [case])
    figure.savefig(tmp_path / "figure.png")
    shown = [axis for axis in figure.axes if axis.get_visible()]
    widths = [axis.get_position().width for axis in shown]
    assert len(shown) == 11 and max(widths) < 1.05 * min(widths)
    gaps = np.diff([axis.get_position().x0 for axis in shown])
    assert (gaps > 1.1 * gaps.min()).nonzero()[0].tolist() == [0, 5]  # before UNO and before IPAP
    assert not plt.get_fignums()
