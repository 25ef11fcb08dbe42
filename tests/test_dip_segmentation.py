"""Masks of every subject: rules worked out by hand, models against the library's own post-processing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as hf
from huggingface_hub.errors import GatedRepoError
from tiny_perception import write_tiny_detector, write_tiny_sam2, write_tiny_sam3

from focusdpo_lib import params
from focusdpo_lib.dip import detectors, mask_rules
from focusdpo_lib.dip.chain import Draft, Unfit
from focusdpo_lib.dip.models import StageError, batches, seed_of
from focusdpo_lib.dip.segmentation import Segmentation

RULE = {"threshold": 0.4, "same": 0.7, "rival": 0.8}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("perception")
    write_tiny_detector(folder / "detector")
    write_tiny_sam2(folder / "sam2")
    write_tiny_sam3(folder / "sam3")
    return folder


def settings(models=None, **values):
    if models is not None:
        values = {"detector": str(models / "detector"), "segmenter": str(models / "sam2")} | values
    return params.section("segmentation", values)


def noise(height=64, width=80, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def on_white(size=20, top=5, left=5, side=8):
    """A grey square on white and its mask."""
    image, mask = np.full((size, size, 3), 255, np.uint8), np.zeros((size, size), bool)
    mask[top : top + side, left : left + side] = True
    image[mask] = 90
    return image, mask


def draft(**values):
    photo, mask = on_white()
    known = {"references": (photo,), "win": photo, "masks": (mask,), "reference_masks": (mask,)}
    return replace(Draft("train-0", "a red cat", "train", ("cat",), ("cat/0",)), **known | values)


def run(drafts, models=None, **values):
    return Segmentation(settings(models, **values)).open()(drafts)


# --- which detection is whose --------------------------------------------------------------------------------------

LEFT, RIGHT, WHOLE = [0, 0, 10, 10], [20, 0, 30, 10], [0, 0, 30, 10]


def choose(boxes, scores):
    return mask_rules.choose(np.array(boxes, float), np.array(scores, float), **RULE)


def test_each_phrase_gets_the_box_that_speaks_most_for_it():
    assert choose([LEFT, RIGHT], [[0.9, 0.5], [0.1, 0.6]]) == [0, 1]
    # Both phrases are surest of the left box: the surer one has it, the other takes the right one.
    assert choose([LEFT, RIGHT], [[0.9, 0.8], [0.1, 0.6]]) == [0, 1]
    assert choose([LEFT, RIGHT], [[0.8, 0.9], [0.6, 0.1]]) == [1, 0]


def test_a_phrase_without_a_box_of_its_own_is_not_found():
    for boxes, scores in [
        ([LEFT, RIGHT], [[0.9, 0.1], [0.1, 0.39]]),  # below the threshold
        ([LEFT], [[0.9, 0.8]]),  # the only box is the other's
        ([LEFT, [0, 0, 10, 9]], [[0.9, 0.1], [0.1, 0.8]]),  # 90 of 100 pixels: the same thing twice
        (np.zeros((0, 4)), np.zeros((0, 1))),
    ]:
        with pytest.raises(Unfit, match="a subject was not found"):
            choose(boxes, scores)


def test_what_stands_inside_another_s_box_is_a_thing_of_its_own():
    assert choose([WHOLE, LEFT], [[0.9, 0.1], [0.1, 0.8]]) == [0, 1]  # a hat on a cat: a third of the union


def test_another_thing_that_scores_nearly_as_high_makes_a_subject_ambiguous():
    with pytest.raises(Unfit, match="more than once"):
        choose([LEFT, RIGHT], [[0.9], [0.73]])  # 0.8 · 0.9 = 0.72
    assert choose([LEFT, RIGHT], [[0.9], [0.71]]) == [0]
    assert choose([LEFT, RIGHT], [[0.45], [0.39]]) == [0]  # below the threshold nothing counts
    assert choose([WHOLE, LEFT], [[0.9], [0.85]]) == [0]  # a part of what was taken
    assert choose([LEFT, RIGHT], [[0.9, 0.1], [0.85, 0.5]]) == [0, 1]  # the other phrase's thing


# --- masks by colour, and their cleaning ---------------------------------------------------------------------------


def test_a_plain_background_is_what_is_like_the_edge_and_connected_to_it():
    image, mask = on_white()
    image[8:10, 8:10] = 255  # white within the subject
    image[0, 0] = (250, 255, 255)  # as a JPEG leaves it
    assert np.array_equal(mask_rules.from_background(image, tolerance=5, plain=0.9), mask)
    found = mask_rules.from_background(image, tolerance=4, plain=0.9)
    assert found[0, 0] and np.array_equal(found[1:], mask[1:])


def test_a_subject_may_touch_the_edge_of_a_plain_background():
    image, mask = on_white(top=12)  # of 76 pixels of the edge it takes 8
    assert np.array_equal(mask_rules.from_background(image, 5, plain=68 / 76), mask)
    with pytest.raises(Unfit, match="not plain"):
        mask_rules.from_background(image, 5, plain=69 / 76)
    with pytest.raises(Unfit, match="not plain"):
        mask_rules.from_background(noise(), 12, plain=0.5)


def test_holes_and_specks_below_their_share_go():
    _, mask = on_white(side=10)  # of 100 pixels
    hole, speck = mask.copy(), mask.copy()
    hole[7:9, 7:9] = False  # 4 of 96 are 0.0417
    speck[18, 0:4] = True  # 4 of 104 are 0.0385
    assert np.array_equal(mask_rules.clean(hole, holes=0.05, specks=0.05), mask)
    assert np.array_equal(mask_rules.clean(hole, holes=0.04, specks=0.05), hole)
    assert np.array_equal(mask_rules.clean(speck, holes=0.05, specks=0.04), mask)
    assert np.array_equal(mask_rules.clean(speck, holes=0.05, specks=0.03), speck)


def test_what_a_mask_leaves_free_at_the_edge_is_no_hole():
    mask = np.ones((10, 10), bool)
    mask[0, 0] = False
    assert np.array_equal(mask_rules.clean(mask, holes=0.5, specks=0.05), mask)


def test_common_pixels_go_to_the_smaller_mask():
    _, large = on_white(side=10)
    small = np.zeros_like(large)
    small[12:18, 12:18] = True  # 36 pixels, 9 of them common
    first, second = mask_rules.apart([large, small], most=0.25)
    assert np.array_equal(second, small) and np.array_equal(first, large & ~small)
    with pytest.raises(Unfit, match="two masks cover the same thing"):
        mask_rules.apart([large, small], most=0.24)


# --- the stage -----------------------------------------------------------------------------------------------------


def test_masks_by_colour_are_those_that_were_drawn():
    (made,) = run([draft(masks=(), reference_masks=())], masks="background")
    _, mask = on_white()
    assert not made.dropped and np.array_equal(made.masks[0], mask) and np.array_equal(made.reference_masks[0], mask)
    assert made.provenance["segmentation"]["masks"] == "background"


def test_the_source_s_own_masks_are_taken_and_cleaned():
    _, mask = on_white()
    torn = mask.copy()
    torn[6, 6] = False
    (made,) = run([draft(masks=(torn,))], masks="files", reference_masks="files")
    assert np.array_equal(made.masks[0], mask)


@pytest.mark.parametrize(
    ("values", "changed", "reason"),
    [
        ({"masks": "files"}, {"masks": ()}, "its source has no mask of it (winner)"),
        ({"masks": "files"}, {"masks": (np.ones((4, 4), bool),)}, "a mask is not as large as its picture (winner)"),
        ({"masks": "files"}, {"masks": (np.zeros((20, 20), bool),)}, "a mask is empty (winner)"),
        ({"masks": "files"}, {"masks": (np.ones((20, 20), bool),)}, "a mask covers nearly the whole picture (winner)"),
        ({"masks": "files", "least": 0.2}, {}, "a mask is too small (winner)"),
        ({"masks": "background"}, {"win": noise()}, "the background is not plain (winner)"),
        ({"masks": "files"}, {"references": (noise(),)}, "the background is not plain (reference)"),
        (
            {"masks": "background"},
            {"subjects": ("cat", "dog"), "references": (on_white()[0],) * 2},
            "by its background, several subjects are one (winner)",
        ),
    ],
)
def test_what_breaks_a_rule_drops_the_draft_and_no_other(values, changed, reason):
    before, broken, after = draft(id="0"), replace(draft(), **changed), draft(id="1")
    made = run([before, broken, after], **{"masks": "files"} | values | {"least": values.get("least", 0.01)})
    assert [each.id for each in made] == ["0", "train-0", "1"]
    assert (made[1].dropped_by, made[1].dropped) == ("segmentation", reason)
    if "least" not in values:
        assert not made[0].dropped and not made[2].dropped


def pair_of(names=("cat", "dog"), seed=0, size=(64, 80)):
    photos = tuple(noise(48, 48, seed + 1 + i) for i in range(len(names)))
    return draft(
        subjects=names, identities=names, win=noise(*size, seed), references=photos, masks=(), reference_masks=()
    )


ANY = {"threshold": 0.0, "same": 1.0, "rival": 1.0, "least": 0.0, "most": 1.0, "overlap": 1.0}


@pytest.mark.parametrize("source", ["sam2", "sam3"])
def test_models_give_every_subject_a_mask_of_its_picture_s_size(models, source):
    """Random weights find nothing in particular; every rule is wide open, and what may be empty is said."""
    drafts = [replace(pair_of(seed=i, size=(64, 80 - 8 * (i % 2))), id=str(i)) for i in range(3)]
    values = {"masks": source, "reference_masks": source, "segmenter": str(models / source), "batch_size": 2}
    made = run(drafts, models, **ANY | values)
    assert [each.id for each in made] == ["0", "1", "2"]
    kept = [each for each in made if not each.dropped]
    assert kept and all("empty" in each.dropped for each in made if each.dropped)
    for each in kept:
        assert [mask.shape for mask in each.masks] == [each.win.shape[:2]] * 2
        assert [mask.shape for mask in each.reference_masks] == [(48, 48)] * 2
        assert not (each.masks[0] & each.masks[1]).any() and all(mask.dtype == bool for mask in each.masks)


def test_two_subjects_of_the_same_words_are_dropped_unless_they_come_from_files(models):
    (made,) = run([pair_of(("cat", "Cat"))], models, **ANY)
    assert made.dropped == "two subjects have the same words (winner)"


def test_the_scores_of_phrases_are_the_library_s_own(models):
    """One phrase a text is what the library's post-processing scores; several share a text, and are told apart."""
    ours = detectors.GroundedSam2(settings(models))
    images = [noise(seed=1), noise(seed=2)]
    boxes, scores = ours.boxes(images, [["a red Cat."], ["dog"]])
    network = hf.GroundingDinoForObjectDetection.from_pretrained(models / "detector").eval()
    processor = hf.GroundingDinoProcessor.from_pretrained(models / "detector")
    inputs = processor(images=images, text=["a red cat.", "dog."], return_tensors="pt", padding=True)
    with torch.no_grad():
        outputs = network(**inputs)
    its = processor.post_process_grounded_object_detection(outputs, threshold=0, target_sizes=[(64, 80)] * 2)
    for i in range(2):
        np.testing.assert_allclose(boxes[i], its[i]["boxes"], atol=1e-3)
        whole = outputs.logits[i].sigmoid()
        words = {0: slice(1, 4), 1: slice(1, 2)}[i]  # without [CLS], the full stop and [SEP]
        np.testing.assert_allclose(scores[i][:, 0], whole[:, words].amax(1), atol=1e-6)


def test_each_phrase_of_a_text_is_scored_by_its_own_words(models):
    assert detectors._spans([101, 7, 8, 1012, 9, 1012, 102, 0], 1012) == [(1, 3), (4, 5)]
    ours = detectors.GroundedSam2(settings(models))
    _, (scores,) = ours.boxes([noise()], [["red cat", "dog"]])
    _, (turned,) = ours.boxes([noise()], [["dog", "red cat"]])
    assert scores.shape == (10, 2)
    # The network sees another order of words, but no phrase's words see another's: only their queries change a little.
    assert not np.allclose(scores, turned) and not np.allclose(scores[:, 0], scores[:, 1])


def test_masks_in_boxes_are_the_library_s_own_however_many_pictures_go_at_once(models):
    ours = detectors.GroundedSam2(settings(models))
    images, boxes = [noise(seed=1), noise(seed=2)], [np.array([[0, 0, 30, 30], [20, 20, 60, 60]], float)] * 2
    together = ours.masks(images, boxes)
    network, processor = hf.Sam2Model.from_pretrained(models / "sam2").eval(), ours.prepares
    for image, box, masks in zip(images, boxes, together, strict=True):
        inputs = processor(images=image, input_boxes=[box.tolist()], return_tensors="pt")
        with torch.no_grad():
            outputs = network(**inputs, multimask_output=False)
        expected = processor.post_process_masks(outputs.pred_masks, [(64, 80)])[0][:, 0]
        assert masks.shape == (2, 64, 80) and (masks == expected.numpy()).mean() > 0.999


def test_sam_3_is_asked_each_phrase_by_itself(models):
    wide = settings(models, segmenter=str(models / "sam3"), batch_size=2, threshold=0.0)
    ours, asked = detectors.Sam3(wide), []

    def first_of_each(boxes, scores):
        asked.append(scores)
        return [int(scores[:, phrase].argmax()) for phrase in range(scores.shape[1])]

    found = ours.segment([noise(seed=1), noise(40, 40, seed=2)], [["cat", "dog"], ["robot"]], first_of_each)
    assert [masks.shape for masks in found] == [(2, 64, 80), (1, 40, 40)]
    assert [scores.shape for scores in asked] == [(12, 2), (6, 1)]
    assert ((asked[0] > 0).sum(1) == 1).all()  # an instance speaks for one phrase
    (alone,) = ours.instances([noise(seed=1)], ["dog"])
    np.testing.assert_allclose(asked[0][6:, 1], alone["scores"], atol=1e-5)
    assert (found[0][1] == alone["masks"][alone["scores"].argmax()].astype(bool)).mean() > 0.999


def test_sam_3_that_finds_nothing_drops_the_draft(models):
    values = {"masks": "sam3", "segmenter": str(models / "sam3"), "threshold": 1.0}
    (made,) = run([pair_of()], models, **values)
    assert made.dropped == "a subject was not found (winner)"


# --- models that cannot be loaded ----------------------------------------------------------------------------------


def refusal(**values):
    with pytest.raises(StageError) as caught:
        Segmentation(settings(**values)).open()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_model_that_is_not_there_is_named_with_its_setting(models, tmp_path):
    assert refusal(detector="nowhere/at/all") == (
        "the model nowhere/at/all does not exist: correct segmentation.detector"
    )
    assert "correct segmentation.detector" in refusal(detector=str(tmp_path))
    text = refusal(detector=str(models / "detector"), segmenter=str(models / "detector"))
    assert "the weights of a Sam2Model" in text and "correct segmentation.segmenter" in text


def test_a_hub_out_of_reach_and_a_licence_not_accepted_are_said(monkeypatch, models):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "the hub is out of reach): go online once" in refusal(detector="some/model")

    def gated(*words, **more):
        raise OSError("You are trying to access a gated repo.") from GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr(hf.Sam3Model, "from_pretrained", gated)
    assert "(it is gated): accept its licence" in refusal(masks="sam3")


# --- batches and seeds ---------------------------------------------------------------------------------------------


def test_batches_hold_equal_keys_and_every_index_once():
    assert list(batches(["a", "b", "a", "a", "b"], 2)) == [[0, 2], [3], [1, 4]]
    assert list(batches([], 2)) == []


def test_a_seed_is_of_the_draft_and_of_nothing_else():
    assert seed_of(0, "train-1", "disruption") == seed_of(0, "train-1", "disruption")
    drawn = {seed_of(s, i, w) for s in (0, 1) for i in ("train-1", "train-2", "1") for w in ("a", "b", "train-1")}
    assert len(drawn) == 18 and all(0 <= seed < 2**63 for seed in drawn)
