"""What a reader saw against what should be there, by hand."""

import pytest

from focusdpo_lib.toybox import attributes

CAT = {"class_name": "cat", "base": "red", "accent": "blue", "pattern": "dots", "trim": "white"}
MUG = {"class_name": "mug", "base": "green", "accent": "blue", "pattern": "plaid", "trim": "black"}


def test_found_subjects_are_matched_by_class_and_then_by_attributes():
    assert attributes.match([MUG, CAT], [CAT, MUG]) == [CAT, MUG]
    two_cats = [CAT | {"base": "pink"}, CAT]
    assert attributes.match(two_cats, [CAT]) == [CAT]
    # A cat in all of the mug's attributes is still the cat: the class goes first.
    swapped = [CAT | {"base": "green", "pattern": "plaid", "trim": "black"}, MUG | {"base": "red", "trim": "white"}]
    assert attributes.match(swapped[::-1], [CAT, MUG]) == swapped
    assert attributes.match([CAT], [MUG, CAT]) == [None, CAT] and attributes.match([], [CAT]) == [None]


def test_attribute_accuracy_counts_five_attributes_and_nothing_for_a_missing_subject():
    assert attributes.attribute_accuracy([CAT, MUG], [CAT, MUG]) == [1.0, 1.0]
    assert attributes.attribute_accuracy([CAT | {"base": "pink", "trim": "red"}], [CAT, MUG]) == [0.6, 0.0]
    assert attributes.attribute_accuracy([MUG], [CAT]) == [0.2]  # the accent, blue, is the same


def test_leakage_counts_the_other_s_values_among_the_attributes_that_differ():
    # The accent is blue in both: of the four attributes three can leak, base, pattern and trim.
    assert attributes.leakage([CAT, MUG], [CAT, MUG]) == [(0, 3), (0, 3)]
    assert attributes.leakage([CAT | {"base": "green"}, MUG], [CAT, MUG]) == [(1, 3), (0, 3)]
    assert attributes.leakage([CAT | {"base": "pink"}, MUG], [CAT, MUG]) == [(0, 3), (0, 3)]  # wrong, but not the mug's
    swapped = [CAT | {"base": "green", "pattern": "plaid"}, MUG | {"trim": "white"}]
    assert attributes.leakage(swapped, [CAT, MUG]) == [(2, 3), (1, 3)]
    assert attributes.leakage([CAT | {"trim": "black"}], [CAT, MUG]) == [(1, 3), (0, 3)]  # the missing mug still counts
    with pytest.raises(ValueError, match="between two subjects, not 1"):
        attributes.leakage([CAT], [CAT])
