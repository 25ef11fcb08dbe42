"""The toybox's chain with masks that a trained model found: what falls out, and where a loser differs."""

from dataclasses import replace

import numpy as np
import pytest
from diffusers import UNet2DModel

from focusdpo_lib import params
from focusdpo_lib.dip import toybox, toybox_stages
from focusdpo_lib.dip.assembly import assembled
from focusdpo_lib.dip.chain import Unfit
from focusdpo_lib.dip.models import StageError
from focusdpo_lib.dip.run import run_chain, stage_drafts
from focusdpo_lib.dip.segmentation import Segmentation
from focusdpo_lib.toybox import segmenter
from focusdpo_lib.toybox.world import CLASSES, halve_mask, photo_and_mask, render, with_identities

DIP = params.Dip(train_pairs=6, validation_pairs=4)
FOUND = {"masks": "toybox", "reference_masks": "toybox"}


def found(drafts, **values):
    return Segmentation(params.section("segmentation", FOUND | values)).open()(drafts)


def drawn(count=8, split="test"):
    stage = toybox_stages.ToyboxStage("synthesis", DIP)
    return stage.open()([toybox_stages.planned(DIP, split, i) for i in range(count)])


def test_what_is_found_is_nearly_what_the_world_knows():
    scores = []
    for draft in found(drawn()):
        assert not draft.dropped
        assert draft.provenance["segmentation"] == FOUND | {"toybox": {"segmenter": {"model": "toybox"}}}
        pair = toybox.draw(DIP, "test", draft.provenance["index"])
        photos = [photo_and_mask(*of)[1] for of in zip(pair.scene.identities, pair.seeds, strict=True)]
        for ours, exact in (
            (draft.masks, render(pair.scene)[1]),
            (draft.reference_masks, [halve_mask(mask) for mask in photos]),
        ):
            assert len(ours) == len(exact) == len(draft.subjects)
            scores += segmenter.iou(np.stack(ours), np.stack(exact)).tolist()
    assert np.mean(scores) >= 0.9


def test_a_word_is_asked_for_in_any_order_and_case():
    (draft,) = [draft for draft in drawn(20) if len(draft.subjects) == 2][:1]
    turned = replace(
        draft, subjects=tuple(word.upper() for word in draft.subjects[::-1]), references=draft.references[::-1]
    )
    (first,), (second,) = found([draft]), found([turned])
    assert all(map(np.array_equal, first.masks, second.masks[::-1]))
    assert all(map(np.array_equal, first.reference_masks, second.reference_masks[::-1]))


def test_what_it_cannot_find_falls_out_with_its_reason_and_nothing_else_does():
    one, two = (next(draft for draft in drawn(20) if len(draft.subjects) == n) for n in (1, 2))
    absent = next(name for name in CLASSES if name != one.subjects[0])
    broken = {
        "two subjects have the same words (winner)": replace(two, subjects=(two.subjects[0],) * 2),
        "the toybox's segmenter does not know the word (winner)": replace(one, subjects=("teapot cosy",)),
        "a mask is empty (winner)": replace(one, subjects=(absent,)),
        "the toybox's segmenter takes sides of multiples of 8 pixels (reference)": replace(
            one, references=(one.references[0][:30],)
        ),
    }
    made = found([one, *broken.values(), two])
    assert not made[0].dropped and not made[-1].dropped
    assert [draft.dropped for draft in made[1:-1]] == list(broken)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A chain of the toybox whose masks were found."""
    folder = tmp_path_factory.mktemp("chain")
    sections = {"dip": DIP, "segmentation": params.section("segmentation", FOUND)}
    made = assembled(params.section("chain", {"segmentation": "models"}), sections, folder)
    assert set(made.settings) == {"dip", "segmentation", "scoring"}
    assert made.inputs["segmentation.segmenter"] == params.SHIPPED / "segmenter"
    run_chain(folder, made.plan, made.stages, 4, made.draft_bytes)
    return folder


def test_a_loser_differs_within_the_masks_that_were_found_and_there_as_the_world_draws_it(chain):
    strayed = 0
    for draft in stage_drafts(chain, "disruption"):
        pair = toybox.draw(DIP, draft.split, draft.provenance["index"])
        exact, silhouettes = render(with_identities(pair.scene, pair.disturbed))
        inside = np.any(draft.masks, axis=0)
        assert np.array_equal(draft.lose[~inside], draft.win[~inside])
        assert np.array_equal(draft.lose[inside], exact[inside])
        strayed += ((exact != draft.lose).any(-1) & silhouettes.any(0)).sum()
    assert strayed  # some of a subject's edge was not found, and is the winner's


def test_scores_see_no_difference_outside_the_masks(chain):
    assert [draft.scores["outside"] for draft in stage_drafts(chain, "scoring")] == [0] * 14


def test_a_subject_that_was_found_elsewhere_leaves_no_loser():
    (draft,) = drawn(1)
    exact = render(toybox.draw(DIP, "test", 0).scene)[1]
    elsewhere = replace(draft, masks=tuple(np.zeros_like(mask) | ~exact.any(0) for mask in exact))
    with pytest.raises(Unfit, match="the loser shows what the winner shows"):
        toybox_stages.disrupted(elsewhere, toybox.draw(DIP, "test", 0))


def test_a_segmenter_of_one_s_own_is_an_input_and_another_model_is_refused(tmp_path):
    segmenter.save_segmenter(segmenter.build_segmenter((8, 8, 16)), tmp_path / "own")
    own = params.section("segmentation", FOUND | {"segmenter": str(tmp_path / "own")})
    made = assembled(params.section("chain", {"segmentation": "models"}), {"segmentation": own}, tmp_path)
    assert made.inputs["segmentation.segmenter"] == tmp_path / "own"
    assert Segmentation(own).open()([]) == []
    kinds = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    UNet2DModel(**kinds, block_out_channels=(16,), norm_num_groups=8).save_pretrained(tmp_path / "other")
    with pytest.raises(StageError, match=r"other is no segmenter of the toybox: correct segmentation\.segmenter"):
        Segmentation(own.model_copy(update={"segmenter": str(tmp_path / "other")})).open()
