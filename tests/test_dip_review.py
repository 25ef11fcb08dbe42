"""The manual pass: verdicts survive crashes and can be taken back; agreement is that of the literature's examples."""

import json

import numpy as np
import pytest

from focusdpo_lib.dip.chain import Draft
from focusdpo_lib.dip.review import Desk, Review, agreed, agreement, cohen_kappa, fleiss_kappa, verdicts
from focusdpo_lib.dip.review_grid import OUTLINE, Grid, sheet
from focusdpo_lib.params import ParameterError
from focusdpo_lib.runs import RunError

PAIRS = [f"p{i}" for i in range(10)]


@pytest.fixture
def review(tmp_path):
    return Review(tmp_path, "ann", PAIRS, page_size=4)


def again(review):
    return Review(review.folder, review.reviewer, PAIRS, page_size=4)


def test_every_click_is_saved_at_once_and_the_pass_goes_on_where_it_was(review):
    review.decide(["p1"], False, "mask")
    assert again(review).found == {"p1": (False, "mask")}
    review.accept_rest(0)
    assert again(review).found == {"p1": (False, "mask"), **{p: (True, "") for p in ("p0", "p2", "p3")}}
    assert again(review).next_page() == 1 and again(review).open == PAIRS[4:]
    for page in (1, 2):
        review.accept_rest(page)
    assert review.next_page() is None and review.pages == 3 and review.page(2) == ["p8", "p9"]


def test_a_click_is_taken_back_whole_and_what_was_said_before_holds_again(review):
    review.decide(["p0"], False, "quality")
    review.decide(["p0"], True)
    review.accept_rest(0)
    review.undo()
    assert review.found == {"p0": (True, "")}
    review.undo()
    assert again(review).found == {"p0": (False, "quality")}
    review.undo()
    review.undo()  # there is nothing left
    assert again(review).found == {} and again(review).next_page() == 0


def test_what_a_crash_left_of_a_line_costs_that_click_alone(review):
    review.decide(["p0"], True)
    review.decide(["p1"], False, "mask")
    whole = review.path.read_bytes()
    for cut in range(1, len(whole.splitlines(keepends=True)[1])):
        review.path.write_bytes(whole[:-cut])
        assert verdicts(review.folder, "ann") == {"p0": (True, "")}
        resumed = again(review)
        resumed.decide(["p2"], True)
        assert again(review).found == {"p0": (True, ""), "p2": (True, "")}


def test_a_full_disk_is_said_and_nothing_has_changed(review, monkeypatch):
    review.decide(["p0"], True)
    before = review.path.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("focusdpo_lib.dip.review.os.fsync", full)
    with pytest.raises(RunError, match=r"^no space left to write .*ann\.jsonl: free some disk space"):
        review.decide(["p1"], True)
    assert review.path.read_bytes() == before and list(review.found) == ["p0"]


def test_a_line_that_somebody_damaged_is_named(review):
    review.decide(["p0"], True)
    review.path.write_text("{}\n" + review.path.read_text())
    with pytest.raises(RunError, match=r"line 1 of .*ann\.jsonl is no verdict: correct or delete that line"):
        again(review)


@pytest.mark.parametrize("name", ["", "../ann", ".ann", "a/b"])
def test_a_reviewer_has_a_name_that_a_file_can_have(tmp_path, name):
    with pytest.raises(ParameterError, match="names no folder of a run"):
        Review(tmp_path, name, PAIRS)


def test_the_pace_is_by_the_median_click_so_that_a_break_does_not_count(review):
    times = [0, 90, 180, 5000, 5090]  # 12 pairs a click, 90 s a click: 480 an hour
    lines = [{"pairs": [f"{t}-{i}" for i in range(12)], "verdict": "accept", "why": "", "time": t} for t in times]
    review.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert review.pace() == 12 * 3600 / 90


def test_cohen_s_kappa_of_the_textbook_table():
    """20 both yes, 15 both no, 5 and 10 the one or the other: 0.7 agreed, 0.5 by chance, so 0.4."""
    first = np.array([1] * 20 + [0] * 15 + [1] * 5 + [0] * 10, bool)
    second = np.array([1] * 20 + [0] * 15 + [0] * 5 + [1] * 10, bool)
    assert cohen_kappa(first, second) == pytest.approx((0.7 - 0.5) / (1 - 0.5))
    assert cohen_kappa(first, first) == 1
    assert np.isnan(cohen_kappa(np.ones(3, bool), np.ones(3, bool))) and np.isnan(cohen_kappa(first[:0], first[:0]))


def test_fleiss_kappa_worked_by_hand():
    """Three reviewers, votes 3-0, 2-1, 1-2, 0-3: agreement (1 + 1/3 + 1/3 + 1)/4 = 2/3; by chance 1/2."""
    votes = np.array([[1, 1, 1], [1, 1, 0], [0, 0, 1], [0, 0, 0]], bool)
    assert fleiss_kappa(votes) == pytest.approx((2 / 3 - 1 / 2) / (1 - 1 / 2))
    assert np.isnan(fleiss_kappa(np.ones((3, 4), bool)))


def test_fleiss_kappa_of_two_is_scott_s_pi():
    """Scott's π has the mean of both shares in place of each: of 0.5 and 0.6 here."""
    first, second = np.array([1, 1, 1, 1, 1, 0, 0, 0, 0, 0], bool), np.array([1, 1, 1, 1, 0, 1, 1, 0, 0, 0], bool)
    chance = 0.55**2 + 0.45**2
    assert fleiss_kappa(np.stack([first, second], 1)) == pytest.approx((0.7 - chance) / (1 - chance))


def test_several_reviewers_agree_by_more_than_half(tmp_path):
    ann, bob, eve = (Review(tmp_path, name, PAIRS) for name in ("ann", "bob", "eve"))
    ann.decide(["p0", "p1"], True)
    bob.decide(["p0"], True)
    bob.decide(["p1", "p2"], False, "mask")
    assert agreed(tmp_path) == {"p0": (True, ""), "p1": (False, "mask"), "p2": (False, "mask")}  # a tie is no half
    assert agreement(tmp_path).to_dict("records") == [
        {"reviewers": "ann, bob", "pairs": 2, "agree": 0.5, "kappa": pytest.approx(0)}  # by chance 1 · 0.5
    ]
    eve.decide(["p1"], True)
    assert agreed(tmp_path)["p1"] == (True, "")
    table = agreement(tmp_path)
    assert list(table["reviewers"]) == ["ann, bob", "ann, eve", "bob, eve", "ann, bob, eve"]
    assert list(table["pairs"]) == [2, 1, 1, 1] and np.isnan(table["kappa"][1])


# --- Keys and the grid ---


def test_keys_decide_a_page_without_a_mouse(review):
    desk = Desk(review)
    for key in "m2":  # a mask is bad
        desk.press(key)
    assert review.found == {"p1": (False, "mask")}
    desk.press(" ")
    assert desk.page == 1 and review.found["p0"] == review.found["p3"] == (True, "")
    desk.press("q")
    desk.press("4")
    desk.press("4")  # after all
    assert review.found["p7"] == (True, "")
    desk.press("u")
    assert review.found["p7"] == (False, "quality")
    for _ in range(2):
        desk.press("u")
    assert desk.page == 0 and review.found == {"p1": (False, "mask")}  # where something changed
    for key in "n?9x ":
        desk.press(key)
    assert desk.page == 0 and sorted(review.found) == ["p1", "p4", "p5", "p6", "p7"]  # page 1 is still open


def test_a_desk_opens_where_the_pass_stopped_and_stays_within_the_pages(review):
    for page in (0, 1):
        review.accept_rest(page)
    desk = Desk(review)
    assert desk.page == 2 and desk.shown == ["p8", "p9"]
    desk.press("3")  # there is no third
    assert "p8" not in review.found
    for key in "nnb":
        desk.press(key)
    assert desk.page == 1
    review.accept_rest(2)
    assert Desk(review).page == 2
    with pytest.raises(RunError, match=r"a page of 13 pairs has more than there are keys \(12\)"):
        Desk(Review(review.folder, "bob", PAIRS, 13))


def drawn(pairs):
    rng = np.random.default_rng(0)
    mask = np.zeros((64, 64), bool)
    mask[20:40, 20:40] = True
    pictures = rng.integers(0, 255, (3, 64, 64, 3), np.uint8)
    made = {"win": pictures[0], "lose": pictures[1], "references": (pictures[2],), "masks": (mask,)}
    return [Draft(name, "a <mug>", "train", ("mug",), ("m",), **made, scores={"similarity": 0.5}) for name in pairs]


def test_the_grid_shows_a_page_and_takes_keys_and_clicks(review):
    grid = Grid(review, drawn)
    assert [cell.button.description for cell in grid.cells] == [f"{key} · open" for key in "1234"]
    assert "a &lt;mug> · similarity 0.50" in grid.cells[0].text.value and "page 1 of 3" in grid.said.value
    grid.keys.value = "m"
    grid.keys.value = "m2"  # a field keeps what is in it
    assert grid.cells[1].button.description == "2 · rejected: mask" and grid.why.value == "mask"
    grid.cells[2].button.click()
    assert review.found == {"p1": (False, "mask"), "p2": (False, "mask")}
    grid.why.value = "other"
    grid.cells[3].button.click()
    assert review.found["p3"] == (False, "other")
    grid.keys.value = "m2  "  # two keys that came together
    assert grid.desk.page == 2 and len(review.found) == 8
    assert [cell.box.layout.display for cell in grid.cells] == ["flex", "flex", "none", "none"]
    grid.keys.value = ""  # emptied by hand: no key
    assert len(review.found) == 8


def test_a_sheet_shows_references_winner_and_loser_with_the_winner_s_outline():
    draft = drawn(["a"])[0]
    picture = np.asarray(sheet(draft, 64))
    assert picture.shape == (64, 3 * 64 + 8, 3)
    assert (picture[:, :64] == draft.references[0]).all() and (picture[:, 136:] == draft.lose).all()
    winner = picture[:, 68:132]
    assert (winner[20, 20:40] == OUTLINE[0]).all() and (winner[21:39, 21:39] == draft.win[21:39, 21:39]).all()
    assert (winner[:20] == draft.win[:20]).all()
