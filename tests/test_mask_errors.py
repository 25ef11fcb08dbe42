"""Errors of segmentation by stated amounts: the masks, the losers that follow from them, and what is measured."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from skimage import morphology
from tiny_models import write_tiny_models, write_tiny_profile

from focusdpo_lib import backbones, grade, params, runs
from focusdpo_lib.batch import mask_errors as trials
from focusdpo_lib.dip import mask_errors, toybox
from focusdpo_lib.dip.dataset import read_dataset
from focusdpo_lib.masks import Focus
from focusdpo_lib.params import Dip, MaskError, ParameterError
from focusdpo_lib.training import prepare

ROOT = Path(__file__).parents[1]
SMOKE = ROOT / "params" / "smoke"
DIP = Dip(train_pairs=24, validation_pairs=2)
KINDS = {"eroded": 2, "dilated": 4, "shifted": 8, "wrong": 1}


def wrong(kind, amount=None, **more):
    return MaskError(kind=kind, amount=KINDS[kind] if amount is None else amount, **more)


def made(error, count=24, dip=DIP):
    return [mask_errors.make_pair(dip, error, "train", i) for i in range(count)]


EXACT = [toybox.make_pair(DIP, "train", i) for i in range(24)]


def picture(*rows):
    return np.array([[letter == "#" for letter in row] for row in rows])


# --- masks ---


def test_a_mask_grows_by_a_disc_and_shrinks_by_one_as_in_scikit_image():
    mask = EXACT[0].masks[0]
    for by in (1, 2, 4):
        inner = np.pad(mask, by)  # whatever scikit-image makes of a picture's edge lies in the padding
        grown = morphology.dilation(inner, morphology.disk(by))[by:-by, by:-by]
        shrunk = morphology.erosion(np.pad(mask, by, mode="edge"), morphology.disk(by))[by:-by, by:-by]
        assert np.array_equal(mask_errors.grown(mask, by), grown)
        assert np.array_equal(mask_errors.grown(mask, -by), shrunk)


def test_the_edge_of_the_picture_is_none_of_the_mask():
    corner = picture("##..", "##..", "....")
    assert np.array_equal(mask_errors.grown(corner, -1), picture("#...", "....", "...."))
    assert mask_errors.grown(np.ones((3, 3), bool), -2).all() and not mask_errors.grown(np.zeros((3, 3), bool), 2).any()


@pytest.mark.parametrize(
    ("down", "right", "rows"),
    [(1, 0, ("....", "##..", ".#..")), (0, -1, ("#...", "#...", "....")), (0, 3, ("...#", "....", "....")),
     (9, 0, ("....",) * 3), (-9, 9, ("....",) * 3)],
)  # fmt: skip
def test_a_mask_moves_and_what_leaves_the_picture_is_lost(down, right, rows):
    assert np.array_equal(mask_errors.moved(picture("##..", ".#..", "...."), down, right), picture(*rows))


def test_a_mask_goes_whole_to_the_corner_where_it_overlaps_itself_least():
    mask = picture("###..", "##...", "###..", ".....", ".....")  # every other corner overlaps more than one pixel
    assert np.array_equal(mask_errors.cornered(mask), picture(".....", ".....", "..###", "..##.", "..###"))


def test_of_two_subjects_the_wrong_mask_is_the_other_s():
    for pair, exact in zip(made(wrong("wrong")), EXACT, strict=True):
        if len(exact.masks) == 2:
            assert np.array_equal(pair.masks[0], exact.masks[1]) and np.array_equal(pair.masks[1], exact.masks[0])
        else:
            assert pair.masks[0].sum() == exact.masks[0].sum() and not np.array_equal(pair.masks[0], exact.masks[0])
        assert all(map(np.array_equal, pair.reference_masks, exact.reference_masks))  # where nothing else is


def test_wrong_masks_are_a_share_of_all_and_those_of_a_smaller_share_among_those_of_a_larger():
    def hit(share):
        masks = [np.zeros((4, 4), bool), np.ones((4, 4), bool)]
        return [[m is not o for m, o in zip(mask_errors.mistaken(masks, wrong("wrong", share), f"{i} winner"), masks,
                                            strict=True)] for i in range(400)]  # fmt: skip

    some, half = np.array(hit(0.25)), np.array(hit(0.5))
    assert abs(some.mean() - 0.25) < 0.06 and abs(half.mean() - 0.5) < 0.07  # four standard errors of 800 draws
    assert (some <= half).all()


def test_references_are_wrong_by_the_same_share_of_their_photo():
    shifts = []
    for pair, exact in zip(made(wrong("shifted", 8)), EXACT, strict=True):
        for mask, true in zip(pair.reference_masks, exact.reference_masks, strict=True):
            (rows, columns), (true_rows, true_columns) = np.nonzero(mask), np.nonzero(true)
            ends = [rows.min() - true_rows.min(), rows.max() - true_rows.max()]
            ends += [columns.min() - true_columns.min(), columns.max() - true_columns.max()]
            shifts.append(max(map(abs, ends)))
    assert set(shifts) == {4}  # a reference is half as large as the winner


# --- losers ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("background", ["redrawn", "kept"])
def test_a_loser_follows_from_its_masks(kind, background):
    anew = 0
    for pair, exact in zip(made(wrong(kind, background=background)), EXACT, strict=True):
        inside, subject = pair.prior.any(0), exact.prior.any(0)
        assert np.array_equal(pair.win, exact.win)
        assert np.array_equal(pair.lose[~inside], exact.win[~inside])
        assert np.array_equal(pair.lose[inside & subject], exact.lose[inside & subject])
        anew += (pair.lose[inside & ~subject] != exact.win[inside & ~subject]).sum()
    assert (anew > 0) == (background == "redrawn" and kind != "eroded")  # which never leaves its subject


def test_with_exact_masks_the_pairs_are_the_toybox_s_own(tmp_path):
    mask_errors.build(DIP, MaskError(), tmp_path / "a")
    toybox.build(DIP, tmp_path / "b")
    for split in ("train", "validation"):
        for one, other in zip(*(read_dataset(tmp_path / n, [split])[split] for n in "ab"), strict=True):
            assert one.id == other.id and np.array_equal(one.lose, other.lose)
            assert all(map(np.array_equal, one.masks + one.reference_masks, other.masks + other.reference_masks))


# --- the dataset ---


def test_a_dataset_says_what_befell_it_and_leaves_out_what_says_nothing(tmp_path):
    error, dip = wrong("wrong", 0.5, background="kept"), DIP.model_copy(update={"train_pairs": 60})
    mask_errors.build(dip, error, tmp_path)
    facts = json.loads((tmp_path / mask_errors.FACTS).read_text())
    pairs = made(error, 60, dip)
    same = [pair.id for pair in pairs if np.array_equal(pair.win, pair.lose)]
    read = read_dataset(tmp_path, ["train", "validation"])  # refuses a loser that shows what the winner shows
    assert same and [pair.id for pair in read["train"]] == [pair.id for pair in pairs if pair.id not in same]
    assert (facts["pairs"], facts["same"], facts["no_token"]) == (60 - len(same), len(same), 0)
    overlaps = []
    for pair in read["train"]:
        exact = toybox.make_pair(dip, "train", int(pair.id[-5:]))
        both = zip(pair.masks, exact.masks, strict=True)
        overlaps += [(a & b).sum() / (a | b).sum() for a, b in both]
    assert facts["iou"] == pytest.approx(np.mean(overlaps)) and facts["reference_iou"] == 1
    for pair, index in zip(read["validation"], range(2), strict=True):  # measured against the truth
        assert np.array_equal(pair.prior, toybox.make_pair(dip, "validation", index).prior)


def test_a_pair_is_left_out_whose_mask_covers_half_of_no_token():
    full = np.zeros((64, 64), bool)
    full[:8, :4] = True  # half of the first token: it counts (R5)
    assert mask_errors.tokens([full])[0].nonzero().flatten().tolist() == [0]
    full[0, 0] = False
    pair = EXACT[0]
    assert mask_errors.unusable(pair) is None
    assert mask_errors.unusable(type(pair)(**vars(pair) | {"masks": (full,)})) == mask_errors.NO_TOKEN


@pytest.mark.parametrize(
    "values", [{"kind": "exact", "amount": 1}, {"kind": "eroded"}, {"kind": "wrong", "amount": 2}, {"kind": "blurred"}]
)
def test_an_error_that_is_none_is_refused(values):
    with pytest.raises(ParameterError, match="mask_error"):
        params.section("mask_error", values)


# --- where the loss looks ---


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_tiny_models(tmp_path_factory.mktemp("models"))


def test_where_the_loss_looks_is_told_by_the_true_masks(models):
    masks = params.Masks(layers="double")
    model = backbones.load(params.Backbone(model=str(models / "flux_uno"), precision="float32"), "cpu")

    def look(error):
        pairs = [pair for pair in made(error) if len(pair.masks) == 2][:6]
        [prepared] = prepare(model, pairs, masks).values()
        true = [mask_errors.tokens(EXACT[int(name[-5:])].masks) for name in prepared.ids]
        seen = grade.look(model, prepared, 0.5, masks).focus
        return grade.against_truth(model, prepared, true, [0.5], masks), seen

    exact, seen = look(MaskError())
    assert exact["hit"] == pytest.approx(seen.hit.mean().item(), abs=1e-6)  # against the masks that it was given
    assert exact["weight"] == pytest.approx(1)
    assert exact["detail"] == pytest.approx((seen.coverage <= masks.tau).float().mean().item())
    swapped, seen = look(wrong("wrong"))  # of two subjects all masks together stay, and M with them
    assert swapped["weight"] == pytest.approx(1)
    # What a training's log calls hits lies on the other subject.
    assert swapped["hit"] != pytest.approx(seen.hit.mean().item(), abs=1e-6)
    grown, _ = look(wrong("dilated"))
    assert 0 < grown["weight"] < 1 and 0 < grown["reached"] <= 1


def test_the_loss_s_looks_by_hand(monkeypatch):
    # Of four tokens the first and third are the subject's; M is 1, 0.5, 0, 0 and M' takes the first and second.
    focus, matched = torch.tensor([[[1, 0.5], [0, 0]]]), torch.tensor([[[[1, 1], [0, 0.0]]]])
    seen = Focus(matched, focus, focus, torch.tensor([0.05]), *[torch.zeros(1)] * 3)
    monkeypatch.setattr(grade, "look", lambda *_: grade.Look(None, None, seen))
    pairs = SimpleNamespace(token_grid=(2, 2))
    found = grade.against_truth(None, pairs, [torch.tensor([[1, 0, 1, 0.0]])], [0.1, 0.9], params.Masks(tau=0.1))
    assert found == pytest.approx({"hit": 0.5, "weight": 1 / 1.25, "reached": 0.5, "detail": 1})


# --- the trials ---


@pytest.fixture(scope="module")
def ran(tmp_path_factory, models):
    """Trials of exact and of wrong masks: their YAML, the results and the table."""
    folder = tmp_path_factory.mktemp("mask_errors")
    names = ("mask_errors", "03_uno_focusdpo", "03_uno_dpo")
    profile = write_tiny_profile(SMOKE, folder / "smoke", models, names)
    for name in names[1:]:
        values = yaml.safe_load((profile / f"{name}.yaml").read_text())
        values["training"].pop("processes", None)
        (profile / f"{name}.yaml").write_text(yaml.safe_dump(values))
    path = profile / "mask_errors.yaml"
    values = yaml.safe_load(path.read_text())
    values["trainings"] = {"03_uno_focusdpo": {"wrong": [1.0]}, "03_uno_dpo": {}}
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    given = ["--profile", "smoke", "--params", str(folder), "--results", str(folder / "results")]
    assert trials.main(given) == 0
    return path, folder / "results" / "smoke" / "mask_errors", pd.read_csv(trials.table_path(path))


def test_every_trial_is_trained_and_measured_and_the_base_beside_them(ran):
    _, _, table = ran
    assert table["training"].tolist() == ["base", "uno_focusdpo", "uno_dpo", "uno_focusdpo"]
    assert table["kind"].tolist()[1:] == ["exact", "exact", "wrong"]
    exact = table[table["kind"] == "exact"]
    assert (exact[["iou", "reference_iou", "weight_single", "weight_multi"]] == 1).all(axis=None)
    assert table["iou"].iloc[-1] < 0.2 and table["pairs"].iloc[-1] <= 24
    of_focus = table["training"] == "uno_focusdpo"
    assert table["log_hit"].notna().tolist() == of_focus.tolist()  # DPO looks at no masks
    for column in ("winner_subjects", "loser_subjects", "winner_background", "dino_single", "leakage_multi"):
        assert table[column][1:].notna().all()


def test_errors_are_measured_on_exact_pairs_and_images_of_test_identities(ran):
    _, results, _ = ran
    for folder in (results / "errors").iterdir():
        assert Path(runs.inputs(folder)["pairs"]["what"]).name == "exact"
    assert [path.name for path in (results / "benchmark").iterdir()] == ["test-0"]


def test_trials_go_on_with_what_is_complete(ran):
    path, results, table = ran
    markers = {path: path.stat().st_mtime_ns for path in results.rglob(runs.MARKER)}
    # Pairs, what is prepared of them and where they make the loss look, exact and wrong; three trainings and their
    # errors; and images and scores of base and trials, one and two subjects.
    assert len(markers) == 2 * 3 + 3 * 2 + 4 * 2 * 2
    assert trials.run(path, results).equals(table)
    assert markers == {path: path.stat().st_mtime_ns for path in results.rglob(runs.MARKER)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"trainings": None}, "needs 'trainings'"),
        ({"trainings": {"03_uno_dpo": {"blurred": [1]}}}, "mask_error.kind = 'blurred'"),
        ({"trainings": {"03_uno_dpo": {"eroded": 1}}}, "list the amounts"),
        ({"trainings": {"03_uno_none": {}}}, "03_uno_none.yaml does not exist"),
        ({"seeds": [-1]}, "seeds = \\[-1\\]"),
        ({"masks": {}}, "masks in .* is nothing it may hold"),
    ],
)
def test_a_file_of_trials_that_means_nothing_is_refused(change, words, tmp_path):
    for name in ("03_uno_dpo", "03_uno_focusdpo"):
        (tmp_path / f"{name}.yaml").write_text((SMOKE / f"{name}.yaml").read_text())
    values = yaml.safe_load((SMOKE / "mask_errors.yaml").read_text())
    (tmp_path / "mask_errors.yaml").write_text(yaml.safe_dump(values | change))
    with pytest.raises(ParameterError, match=words):
        trials.read(tmp_path / "mask_errors.yaml")


def test_exact_masks_come_first_then_the_first_amounts_of_all_kinds_and_one_seed_after_the_other():
    found = trials.read(ROOT / "params" / "toybox" / "mask_errors.yaml").trials
    exact = [trial.name for trial in found if trial.error.kind == "exact"]
    assert exact == [f"{name}-exact-seed{seed}" for seed in (0, 1, 2) for name in ("uno_focusdpo", "uno_dpo")]
    assert [trial.name for trial in found][:6] == exact
    rest = [(trial.seed, trial.error.kind, trial.error.amount) for trial in found[6:]]
    assert [seed for seed, *_ in rest] == sorted(seed for seed, *_ in rest)
    assert rest[:4] == [(0, "wrong", 1), (0, "dilated", 4), (0, "shifted", 4), (0, "eroded", 2)]
    assert len({trial.name for trial in found}) == len(found)
    assert len({str(trial.sections["masks"]) for trial in found}) == 1  # also of DPO, whose file has none
