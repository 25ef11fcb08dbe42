"""What the chain would cost: FLUX's operations by tokens, and sums worked by hand."""

from types import SimpleNamespace

import pytest

from focusdpo_lib import params
from focusdpo_lib.batch import dip_plan
from focusdpo_lib.batch.dip_plan import Chained

UNITS = {"flux_uno": {"evaluation": {"one": 2560 * 3.0, "two": 2336 * 3.0}, "decode": 100.0}, "score": 1.0}


def settings(single, double, size=512):
    """One step a drawing, so that an evaluation of n tokens is 3·n; a question costs a millionth dollar a token."""
    asked = params.Captioning(image_tokens=50, price_read=1.0, price_written=2.0)
    drawn = SimpleNamespace(single=single, double=double, size=size, steps=1, redraw_steps=1)
    return {"synthesis": drawn, "disruption": params.Disruption(steps=1), "captioning": asked}


def test_the_quadratic_part_is_flux_s_attention():
    """Both products of an attention take 2·n²·3072 operations, in each of 57 blocks."""
    units = params.read_yaml("params/paper/operations.yaml")
    linear, quadratic = dip_plan.evaluation(units["flux_uno"])
    assert quadratic == pytest.approx(57 * 2 * 2 * 3072, rel=0.01)
    assert linear * 2560 + quadratic * 2560**2 == pytest.approx(units["flux_uno"]["evaluation"]["one"])


def test_a_pair_of_one_subject_worked_by_hand():
    table = dip_plan.costs(settings(10, 0), UNITS, Chained(10, 0, kept=1.0))
    assert table["operations"]["synthesis"] == pytest.approx(10 * (3 * 2560 + 200))  # a diptych is twice 1024 tokens
    assert table["operations"]["disruption"] == pytest.approx(10 * (3 * 1536 + 200))  # encoded and decoded
    assert table["operations"]["scoring"] == 90 and table["operations"]["captioning"] == 0
    assert table["calls"]["captioning"] == 10
    assert table["tokens"]["captioning"] == 10 * (dip_plan.QUESTION + 50 + dip_plan.ANSWER)
    assert table["dollars"]["captioning"] == pytest.approx(10 * (dip_plan.QUESTION + 50 + 2 * dip_plan.ANSWER) / 1e6)


def test_of_two_subjects_each_has_its_reference_its_caption_and_its_repainting():
    table = dip_plan.costs(settings(0, 10), UNITS, Chained(0, 10, kept=1.0))
    drawn = (3 * 1536 + 100) + 2 * (3 * 2560 + 100)
    assert table["operations"]["synthesis"] == pytest.approx(10 * (drawn + dip_plan.PERCEPTION))
    assert table["calls"]["captioning"] == 20
    assert table["operations"]["disruption"] == pytest.approx(20 * (3 * 1536 + 200))


def test_what_a_stage_drops_costs_the_later_ones_nothing():
    table = dip_plan.costs(settings(1000, 0), UNITS, Chained(1000, 0, kept=0.5))
    assert list(table["drafts"]) == [1000, 500, 250, 125, 125]


def test_the_report_says_what_it_assumes():
    chained = Chained(5000, 5000)
    units = params.read_yaml("params/paper/operations.yaml")
    text = dip_plan.report(dip_plan.costs(settings(5000, 5000), units, chained), "h200", 8, 0.4, chained)
    for words in (
        "GPU-hours on h200",
        "40% of the card's",
        "lets 80% of its drafts through",
        "not counted",
        "Nothing here",
    ):
        assert words in " ".join(text.split())
