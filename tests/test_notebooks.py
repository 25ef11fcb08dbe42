"""Notebooks 00 to 02 and 06 run top to bottom under the smoke profile, and their figures are labelled."""

import json
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from matplotlib import cbook
from matplotlib.figure import Figure
from tiny_models import write_tiny_sdxl_ip

from focusdpo_lib import batch, params, plots, runs
from focusdpo_lib.batch import Job, notebooks
from focusdpo_lib.dip import toybox
from focusdpo_lib.plots import style

ROOT = Path(__file__).parents[1]
BOOKS = {"00_start_here": "00_start_here", "01_dip": "01_dip_construction", "02_masks": "02_mask_derivation"}
BOOKS |= {"06_ablations": "06_ablations"}


@pytest.fixture(scope="module")
def ran(tmp_path_factory, tiny_flux):
    """The four notebooks, executed one after the other as `make reproduce` does it, with tiny random models."""
    into = tmp_path_factory.mktemp("results")
    tiny_ipap = write_tiny_sdxl_ip(tmp_path_factory.mktemp("models") / "sdxl_ip")
    for yaml, book in BOOKS.items():
        notebook = ROOT / "notebooks" / f"{book}.ipynb"
        known = notebooks.parameters(notebook)
        values = {"results": str(into), "backbone.model": str(tiny_flux), "ipap.backbone.model": str(tiny_ipap)}
        values = {key: value for key, value in values.items() if key.partition(".")[0] in known}
        job = Job(notebook, into / "notebooks" / yaml, ROOT / "params" / "smoke" / f"{yaml}.yaml", values)
        batch.execute(job, warm=True)
    return into


def outputs(into, name):
    cells = nbformat.read(into / "notebooks" / name / f"{name}.ipynb", 4).cells
    return [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]


@pytest.mark.parametrize("name", BOOKS)
def test_a_notebook_runs_and_says_nothing_on_the_error_stream(ran, name):
    said = [output.text for output in outputs(ran, name) if output.get("name") == "stderr"]
    assert said == []
    assert any("image/png" in output.get("data", {}) for output in outputs(ran, name))


@pytest.mark.parametrize("name", BOOKS)
def test_a_notebook_run_in_a_batch_keeps_no_widget(ran, name):
    book = nbformat.read(ran / "notebooks" / name / f"{name}.ipynb", 4)
    assert "widgets" not in book.metadata
    assert not [o for o in outputs(ran, name) if "application/vnd.jupyter.widget-view+json" in o.get("data", {})]


def test_the_notebooks_leave_complete_runs_with_their_figures_and_numbers(ran):
    assert runs.is_complete(ran / "dip" / "pairs") and runs.is_complete(ran / "masks" / "default")
    assert runs.is_complete(ran / "chain" / "drafts") and runs.is_complete(ran / "dip" / "drafts-curated")
    kept = {path.name for path in (ran / "masks" / "default").iterdir()}
    assert {"by_hand.png", "entropy.png", "timesteps_two_subjects.png", "switches.png", "coverage.png"} <= kept
    assert {"movement.png", "movement_ipap.png", "grade_uno.png", "grade_ipap.png"} <= kept
    for family in ("uno", "ipap"):
        graded = pd.read_csv(ran / "masks" / "default" / f"grade_{family}.csv")
        assert np.allclose(graded[["hit", "other", "background"]].sum(axis=1), 1, atol=2e-4)
        assert set(graded["t"]) == {0.2, 0.8} and set(graded["references"]) == {1, 2}
    drawn = {path.name for path in (ran / "ablations" / "mask_errors").glob("*.png")}
    assert drawn == {"pairs.png", "looks.png", "errors.png", "images.png"}
    coverage = pd.read_csv(ran / "masks" / "default" / "coverage.csv")
    assert set(coverage["subjects"]) == {1, 2} and coverage["coverage"].between(0, 1).all()
    assert ((coverage["coverage"] > 0.1) == (coverage["branch"] == "structure")).all()  # Eq. 9, τ = 0.1


@pytest.mark.parametrize(("yaml", "book"), BOOKS.items())
def test_the_toybox_profile_is_what_the_parameters_cell_says(yaml, book):
    values = params.read_yaml(ROOT / "params" / "toybox" / f"{yaml}.yaml")
    cell = notebooks.parameters(ROOT / "notebooks" / f"{book}.ipynb")
    cell.pop("interactive", None)  # a slider needs a live kernel: only a batch run turns it off
    values.pop("interactive", None)
    assert json.dumps(cell, sort_keys=True) == json.dumps(values, sort_keys=True)


# --- Figures ---


PAIRS = [toybox.make_pair(params.Dip(two_subject_share=1.0), "train", i) for i in range(2)]


def gallery(**options):
    pair, map8 = PAIRS[0], np.linspace(0, 1, 64).reshape(8, 8)
    rows = [
        plots.MaskRow(f"t = {t}", pair.win, t * np.stack([map8, -map8]), np.stack([map8] * 2), map8, map8, map8, 0.5)
        for t in (0.25, 0.75)
    ]
    return plots.mask_gallery(rows, pair.prior, pair.subjects, **options)


def coverage_rows():
    return pd.DataFrame([{"t": t, "subjects": s, "coverage": t, "chance": 0.8} for t in (0.05, 0.5) for s in (1, 2)])


def wrong_masks():
    """Each pair as it is and with a mask that is all of the picture."""
    exact = [plots.ErrorRow("exact", p.win, p.lose, p.prior, p.prior.any(0)) for p in PAIRS]
    return [[row, row._replace(label="all", masks=np.ones_like(row.masks))] for row in exact]


def trials():
    """Two seeds of exact masks and of two amounts of an error, and a second training of one seed."""
    rows = [("a", "exact", 0, seed, 1.0, 2.0 + seed) for seed in (0, 1)]
    rows += [("a", "shifted", n, seed, 1 - n / 10, 5.0 * n + seed) for n in (2, 4) for seed in (0, 1)]
    rows += [("b", "exact", 0, 0, 1.0, 7.0), ("b", "shifted", 4, 0, 0.6, 9.0)]
    return pd.DataFrame(rows, columns=["training", "kind", "amount", "seed", "iou", "loss"])


NOTES = pd.DataFrame([pair.disruption for pair in PAIRS])
GRAY = PAIRS[0].win[..., 0]
FIGURES = {
    "image_grid": lambda: plots.image_grid([p.win for p in PAIRS], ["a", "b"], 2, ["row"], [p.prior for p in PAIRS]),
    "pipeline": lambda: plots.pipeline([("dip", "pairs", "01"), ("masks", "weight", "02")]),
    "pair_gallery": lambda: plots.pair_gallery(PAIRS),
    "disruption_counts": lambda: plots.disruption_counts(NOTES, pd.Series(["base", "trim"])),
    "score_distributions": lambda: plots.score_distributions(pd.DataFrame({"a": [1, 2.0], "b": [3, 3.0]}), {"a": 1.5}),
    "review_page": lambda: plots.review_page([np.hstack([p.win, p.lose]) for p in PAIRS], ["1 · $", "2"]),
    "mask_gallery": gallery,
    "mask_gallery, own scales": lambda: gallery(shared_scores=False),
    "error_gallery": lambda: plots.error_gallery(wrong_masks(), 0.5),
    "error_curves": lambda: plots.error_curves(trials(), {"loss": "loss"}, {"loss": 1.0}, {"a": "A", "b": "B"}),
    "token_grids": lambda: plots.token_grids({"prior": np.eye(4), "scores": np.ones((4, 4)) / 3}),
    "entropy_steps": lambda: plots.entropy_steps(PAIRS[0].win, GRAY, GRAY / 50, GRAY[::4, ::4] / 255, 9),
    "coverage_by_timestep": lambda: plots.coverage_by_timestep(coverage_rows(), 0.1),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_returned_let_go_of_and_says_what_it_shows(name, tmp_path):
    figure = FIGURES[name]()
    assert isinstance(figure, Figure) and not plt.get_fignums()
    for axis in figure.axes:
        if axis.has_data() and len(axis.get_xticks()) and not axis.images:  # a chart or a colour bar, not a picture
            assert axis.get_xlabel() or axis.get_ylabel() or axis.get_title(), f"{name} has an unlabelled axis"
    words = [text.get_text() for text in figure.findobj(plt.Text)]
    assert any(words)
    figure.savefig(tmp_path / "figure.png")


def test_a_pair_that_does_not_note_how_it_was_disturbed_is_drawn_with_what_its_loser_shows():
    theirs = replace(PAIRS[0], disruption={}, disrupted_captions=("a green mug for $5, or $6",))
    words = [text.get_text() for text in plots.pair_gallery([theirs]).findobj(plt.Text)]
    assert "“a green mug for \\$5, or\n\\$6”" in words


@pytest.mark.parametrize("words", ["a mug for $5, or $6", "$_{", "50 % of $", r"a\b $x$"])
def test_texts_of_ones_own_reach_a_figure_letter_by_letter(words):
    figure = plots.image_grid([PAIRS[0].win], [style.literal(words)])
    figure.draw_without_rendering()  # mathematics that is none raises here
    [title] = [text for text in figure.findobj(plt.Text) if text.get_text()]
    assert cbook.is_math_text(title.get_text()) is False
    assert title._preprocess_math(title.get_text()) == (words, False)


def test_charts_name_both_axes():
    for name in ("disruption_counts", "coverage_by_timestep"):
        assert all(axis.get_xlabel() and axis.get_ylabel() for axis in FIGURES[name]().axes)


def test_the_branch_shares_drawn_are_those_of_eq_9():
    bars = plots.coverage_by_timestep(coverage_rows(), tau=0.1).axes[1].patches
    assert [bar.get_height() for bar in bars] == [0, 1, 1, 0]  # M_s at t = 0.05 and 0.5, then the fused branch


def test_a_curve_of_errors_goes_from_exact_masks_through_the_mean_of_each_error_s_seeds():
    lines = FIGURES["error_curves"]().axes[0].lines
    drawn = {line.get_linestyle(): line.get_xydata().tolist() for line in lines if line.get_marker() == "s"}
    assert drawn == {"-": [[1, 2.5], [0.8, 10.5], [0.6, 20.5]], "--": [[1, 7], [0.6, 9]]}
    dots = [line.get_xydata().tolist() for line in lines if line.get_marker() == "."]
    assert sorted(map(len, dots)) == [1, 1, 2, 4]  # every trial


def test_the_mask_gallery_shares_one_colour_scale_over_all_scores_and_one_over_all_masks():
    shown = [axis.images[0] for axis in gallery().axes if axis.images and axis.images[0].get_array().ndim == 2]
    scores = {image.get_clim() for image in shown if image.get_cmap().name == plots.SCORE_MAP}
    masks = {image.get_clim() for image in shown if image.get_cmap().name == plots.WEIGHT_MAP}
    assert scores == {(-0.75, 0.75)} and masks == {(0, 1)}


def test_extreme_patches_lie_inside_the_image():
    entropy = np.ones((8, 8))
    entropy[0, 0], entropy[7, 7], entropy[3, 4], entropy[5, 2] = -9, 9, 0, 2  # the corners' patches are cut
    assert plots.extreme_patches(entropy, 3) == [(3, 4), (5, 2)]


def test_objective_colours_differ_in_lightness_or_hue_for_every_reader():
    assert list(plots.OBJECTIVE_COLOURS) == ["base", "sft", "dpo", "patchdpo", "focusdpo"]
    assert len(set(plots.OBJECTIVE_COLOURS.values())) == 5
