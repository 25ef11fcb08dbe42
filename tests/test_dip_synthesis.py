"""References and winners that are drawn: what lists become, how a diptych is cut, and what real pipelines draw."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny_fixtures import build_tiny_flux
from tiny_perception import write_tiny_detector, write_tiny_sam2
from tiny_training import load_tiny

from focusdpo_lib import params
from focusdpo_lib.backbones import BackboneError
from focusdpo_lib.backbones.family import Family
from focusdpo_lib.dip import synthesis
from focusdpo_lib.dip.chain import Draft, Unfit
from focusdpo_lib.dip.lists import KINDS, read_lists
from focusdpo_lib.dip.models import StageError, images, seed_of
from focusdpo_lib.dip.synthesis import Synthesis, cropped, plan
from focusdpo_lib.evaluation.wording import mentions

LISTS = Path(__file__).parents[1] / "params" / "paper" / "dip" / "subjects.yaml"


def settings(**values):
    small = {"lists": str(LISTS), "single": 3, "double": 2, "size": 64, "gutter": 8, "steps": 2, "redraw_steps": 2}
    return params.section("synthesis", small | values)


# --- the plan --------------------------------------------------------------------------------------------------------


def test_the_lists_that_are_shipped_give_more_identities_than_the_paper_has_pairs():
    drafts = plan(settings(single=2000, double=500))
    assert [len(d.subjects) for d in drafts] == [1] * 2000 + [2] * 500 and len({d.id for d in drafts}) == 2500
    for draft in drafts:
        assert all(mentions(draft.prompt, subject) for subject in draft.subjects)
        assert all(word in look.split() for word, look in zip(draft.subjects, draft.identities, strict=True))
        assert len(set(draft.subjects)) == len(draft.subjects) and "{" not in draft.prompt + "".join(draft.identities)
    kinds = {
        word: kind for kind, subjects in read_lists(LISTS)["subjects"].items() for word in [s["word"] for s in subjects]
    }
    share = {kind: sum(kinds[d.subjects[0]] == kind for d in drafts[:2000]) / 2000 for kind in KINDS}
    assert all(0.29 < value < 0.38 for value in share.values())  # a third of each kind of content
    assert len({d.identities[0] for d in drafts[:2000]}) > 600


def test_no_description_is_in_two_splits():
    seen = {}
    drafts = plan(settings(single=400, double=100, splits={"train": 0.5, "validation": 0.25, "test": 0.25}))
    for draft in drafts:
        for identity in draft.identities:
            assert seen.setdefault(identity, draft.split) == draft.split
    assert set(seen.values()) == {"train", "validation", "test"}


def test_pairs_of_two_keep_the_shares_of_the_splits():
    """Of identities joined at random nearly all pairs would hang together, and be in one split."""
    drafts = plan(settings(single=0, double=2000, splits={"train": 0.6, "validation": 0.2, "test": 0.2}))
    share = {split: sum(d.split == split for d in drafts) / 2000 for split in ("train", "validation", "test")}
    assert abs(share["train"] - 0.6) < 0.05 and min(share.values()) > 0.15


def test_more_drafts_begin_with_the_same():
    few, many = plan(settings(single=5, double=0)), plan(settings(single=9, double=3))
    assert [(d.id, d.prompt, d.identities) for d in few] == [(d.id, d.prompt, d.identities) for d in many[:5]]
    assert [d.prompt for d in few] != [d.prompt for d in plan(settings(single=5, double=0, seed=1))]


def test_a_scene_for_people_is_chosen_where_there_are_people():
    scenes = read_lists(LISTS)["scenes"]
    for draft in plan(settings(single=0, double=200)):
        if {"woman", "man", "girl", "boy"} & set(draft.subjects):
            assert draft.provenance["synthesis"]["scene"] in scenes["human"]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (lambda lists: lists.pop("scenes"), "'scenes'"),
        (lambda lists: lists["subjects"].update(plant=[]), "plant is none of object, animal, human"),
        (lambda lists: lists["subjects"]["object"][0].update(looks=["red pot"]), "'red pot' does not name its teapot"),
        (lambda lists: lists["subjects"]["object"][0].update(looks=["{hue} teapot"]), "'hue'"),
        (lambda lists: lists["scenes"].update(animal=[]), "the scenes of animal are no list of texts"),
    ],
)
def test_lists_that_cannot_be_drawn_from_are_named(tmp_path, changed, says):
    lists = yaml.safe_load(LISTS.read_text())
    changed(lists)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(lists))
    with pytest.raises(StageError) as caught:
        plan(settings(lists=str(tmp_path / "mine.yaml")))
    assert says in str(caught.value) and "mine.yaml" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(StageError, match=r"nowhere\.yaml holds no lists"):
        plan(settings(lists="nowhere.yaml"))


# --- the stage, with a hand in place of the model --------------------------------------------------------------------


class Hand:
    """Draws white studio photos with a grey square, to the left of scenes whose colour is the prompt's length."""

    def __init__(self, ground=255):
        self.ground, self.asked, self.network, self.sampling_shift = ground, [], torch.nn.Module(), "uno"

    def condition(self, prompts, references):
        return prompts, references

    def reference(self, photo, side, resampling):
        return torch.from_numpy(np.array(photo.resize((side, side)))).permute(2, 0, 1).float() / 127.5 - 1

    def sample(self, conditioning, seeds, size, steps, guidance):
        prompts, references = conditioning
        self.asked += [
            (prompt, seed, size, steps, guidance, len(references), self.sampling_shift)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        pictures = np.full((len(prompts), *size, 3), self.ground, np.uint8)
        pictures[:, 20:40, 20:40] = 90
        if size[1] > size[0]:
            for picture, prompt in zip(pictures, prompts, strict=True):
                picture[:, size[1] // 2 :] = len(prompt) % 256
                picture[:, size[1] // 2 - 8 : size[1] // 2 + 8] = 0  # the seam
        return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def halves(winners, phrases):
    """Of two subjects one is left, one is right."""
    return [[(0, 0, 20, 30), (30, 10, 60, 50)] for _ in winners]


def made(hand, drafts, boxes=halves, **values):
    return synthesis.make(settings(**values), hand, boxes, {"model": "hand"}, drafts)


def test_a_diptych_is_cut_into_reference_and_winner_without_its_seam():
    hand, drafts = Hand(), plan(settings(double=0))
    for draft, (prompt, seed, size, *_) in zip(made(hand, drafts, batch_size=2), hand.asked, strict=True):
        assert size == (64, 2 * 64 + 16) and seed == seed_of(0, "synthesis", draft.id) and not draft.dropped
        (photo,) = draft.references
        assert photo.shape == draft.win.shape == (64, 64, 3)
        assert (photo[0] == 255).all() and (photo[20:40, 20:40] == 90).all() and (draft.win == len(prompt) % 256).all()
        assert draft.identities[0] in prompt and draft.provenance["synthesis"]["scene"] in prompt
        assert draft.provenance["synthesis"]["model"] == "hand"


def test_of_two_subjects_each_gets_a_reference_drawn_from_its_crop():
    hand, drafts = Hand(), plan(settings(single=1))
    after = made(hand, drafts)
    assert [d.id for d in after] == [d.id for d in drafts] and not any(d.dropped for d in after)
    assert [len(d.references) for d in after] == [1, 2, 2]
    drawn, redrawn = hand.asked[:3], hand.asked[3:]
    assert [(asked[-1], asked[-2]) for asked in drawn] == [("library", 0)] * 3  # plain FLUX, without references
    assert [(asked[-1], asked[-2], asked[3], asked[4]) for asked in redrawn] == [("uno", 1, 2, 4.0)] * 4
    assert hand.sampling_shift == "uno"
    described = [identity for draft in drafts[1:] for identity in draft.identities]
    assert all(look in asked[0] for look, asked in zip(described, redrawn, strict=True))
    assert len({asked[1] for asked in redrawn}) == 4


def test_a_subject_that_is_not_found_drops_its_draft_and_no_other():
    def only_the_first(winners, phrases):
        return [halves(winners, phrases)[0], Unfit("a subject was not found")]

    after = made(Hand(), plan(settings()), only_the_first)
    assert [d.dropped for d in after] == ["", "", "", "", "a subject was not found (winner)"]


def test_a_reference_that_is_not_on_white_drops_its_draft():
    after = made(Hand(ground=200), plan(settings()))
    assert {(d.dropped_by, d.dropped) for d in after} == {("synthesis", "a reference is not on white")}


def test_a_crop_is_the_square_about_a_box_within_the_picture():
    image = np.arange(60 * 80).reshape(60, 80)
    assert np.array_equal(cropped(image, (30, 20, 50, 30), 0.0), image[15:35, 30:50])
    assert np.array_equal(cropped(image, (30, 20, 50, 30), 0.1), image[13:37, 28:52])
    assert np.array_equal(cropped(image, (0, 0, 10, 20), 0.0), image[0:20, 0:20])  # moved into the picture
    assert np.array_equal(cropped(image, (0, 0, 80, 60), 0.5), image[:, 10:70])  # as large as it goes


def test_boxes_lie_about_their_masks_to_the_pixel():
    mask = np.zeros((2, 20, 30), bool)
    mask[0, 4:7, 9:12] = mask[1, 0, 29] = True
    use = params.Segmentation()
    assert synthesis._boxes(use, lambda *words: [mask], [0], [0]) == [[(9, 4, 12, 7), (29, 0, 30, 1)]]
    mask[1] = False
    assert isinstance(synthesis._boxes(use, lambda *words: [mask], [0], [0])[0], Unfit)


def test_pixels_become_images_and_numbers_that_are_none_are_said():
    assert images(torch.tensor([-1.0, 0.0, 2.0]).view(1, 3, 1, 1))[0].tolist() == [[[0, 128, 255]]]
    with pytest.raises(StageError, match="NaN or infinity"):
        images(torch.full((1, 3, 1, 1), float("nan")))


# --- real classes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def perception(tmp_path_factory):
    folder = tmp_path_factory.mktemp("perception")
    return {"detector": str(write_tiny_detector(folder / "one")), "segmenter": str(write_tiny_sam2(folder / "two"))}


def test_real_pipelines_draw_references_and_winners(tiny_flux, perception):
    """Random weights draw no white ground and find no cat: every limit is wide open."""
    wide = params.section("segmentation", perception | {"threshold": 0.0, "same": 1.0, "rival": 1.0})
    backbone = params.Backbone(model=str(tiny_flux), precision="float32")
    use = settings(tolerance=255, plain=0.0)
    after = Synthesis(use, backbone, wide).open()(plan(use))
    kept = [d for d in after if not d.dropped]
    assert [len(d.references) for d in kept[:3]] == [1, 1, 1] and all("empty" in d.dropped for d in after if d.dropped)
    for draft in kept:
        assert draft.win.shape == (64, 64, 3) and all(photo.shape == (64, 64, 3) for photo in draft.references)


def test_drawing_is_the_base_without_uno_and_redrawing_is_with_it(tmp_path):
    """A LoRA that changes every picture is off in the one and on in the other."""
    from diffusers import FluxPipeline
    from peft import LoraConfig, get_peft_model_state_dict

    flux = build_tiny_flux()
    flux.save_pretrained(tmp_path / "flux")
    torch.manual_seed(0)
    flux.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    state = get_peft_model_state_dict(flux.transformer)
    FluxPipeline.save_lora_weights(tmp_path / "lora", transformer_lora_layers=state)
    plain = load_tiny(tmp_path / "flux", sampling_shift="library")
    uno = load_tiny(tmp_path / "flux", subject_lora=str(tmp_path / "lora"))

    def draw(backbone: Family):
        return backbone.sample(backbone.condition(["a cat"], []), [0], (64, 64), 2, 1.0)

    with synthesis._without_subject_lora(uno):
        assert torch.allclose(draw(uno), draw(plain), atol=1e-5) and uno.sampling_shift == "library"
    assert not torch.allclose(draw(uno), draw(plain), atol=1e-2) and uno.sampling_shift == "uno"


def test_what_is_drawn_depends_on_the_draft_alone(tiny_flux):
    backbone, use = load_tiny(tiny_flux), settings(double=0, tolerance=255, plain=0.0, batch_size=2)
    drafts = plan(use)
    together = synthesis.make(use, backbone, halves, {}, drafts)
    apart = [synthesis.make(use, backbone, halves, {}, [draft])[0] for draft in drafts]
    for a, b in zip(together, apart, strict=True):
        assert np.abs(a.win.astype(int) - b.win).max() <= 1


def test_models_that_cannot_draw_are_named(tiny_flux):
    with pytest.raises(StageError, match=r"correct backbone\.family"):
        Synthesis(settings(), params.Backbone(family="sdxl_ip"), params.Segmentation()).open()
    with pytest.raises(BackboneError, match=r"the model /no/such does not exist"):
        Synthesis(settings(), params.Backbone(model="/no/such"), params.Segmentation()).open()


def test_a_draft_is_planned_without_pictures():
    assert all(isinstance(d, Draft) and d.win is None and d.references == () for d in plan(settings()))
