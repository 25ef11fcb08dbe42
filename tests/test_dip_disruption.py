"""Losers: what changes by which strength, that nothing changes outside the masks, and how real pipelines paint."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FluxFillPipeline, StableDiffusionXLInpaintPipeline
from PIL import Image
from tiny_inpainting import write_tiny_fill, write_tiny_sdxl_inpainting

from focusdpo_lib import params
from focusdpo_lib.dip import disruption, painters
from focusdpo_lib.dip.chain import Draft
from focusdpo_lib.dip.disruption import Disruption, faded, pasted, plan
from focusdpo_lib.dip.models import StageError, seed_of
from focusdpo_lib.dip.pair import Pair, defect
from focusdpo_lib.evaluation.wording import exchanged

DETAILS = {
    "cat": [("colour", "red", "blue"), ("pattern", "white dots", "black stripes"), ("mark", "one ear", "no ear")],
    "dog": [("colour", "brown", "grey")],
}
CAPTIONS = {"cat": "a red cat with white dots and one ear", "dog": "a brown dog"}


def draft(number=0, subjects=("cat",), size=(40, 44)):
    rng = np.random.default_rng(number)
    masks = []
    for place in range(len(subjects)):
        mask = np.zeros(size, bool)
        mask[5:25, 20 * place + 2 : 20 * place + 18] = True
        masks.append(mask)
    details = [[{"attribute": a, "words": w, "instead": i} for a, w, i in DETAILS[subject]] for subject in subjects]
    return Draft(
        f"train-{number}",
        " and ".join(subjects),
        "train",
        subjects,
        subjects,
        win=rng.integers(0, 256, (*size, 3), dtype=np.uint8),
        masks=tuple(masks),
        captions=tuple(CAPTIONS[subject] for subject in subjects),
        disruption={"details": details},
    )


def settings(**values):
    return params.section("disruption", {"weights": "float32", "steps": 2, "guidance": 2.0} | values)


class Paint:
    """Paints all of an image in one colour a prompt, and notes what it was asked."""

    def __init__(self):
        self.asked, self.model = [], {"model": "paint"}

    def paint(self, images, masks, prompts, seeds, denoising):
        self.asked += [(prompt, seed, denoising, len(images)) for prompt, seed in zip(prompts, seeds, strict=True)]
        return [np.full_like(image, 255 - len(prompt)) for image, prompt in zip(images, prompts, strict=True)]


def planned(subjects=("cat",), count=400, **values):
    return [plan(settings(**values), draft(number, subjects)) for number in range(count)]


# --- what changes ----------------------------------------------------------------------------------------------------


def test_strength_is_the_number_of_details_that_change():
    for each in planned(strengths=[1, 2, 3]):
        (changed,) = each.disruption["changes"]
        assert len(changed) == each.disruption["strength"] and each.disruption["repainted"] == [0]
        words = CAPTIONS["cat"]
        for before, after in changed.values():
            words = words.replace(before, after)
        assert each.disrupted_captions == (words,) and words != CAPTIONS["cat"]


def test_every_strength_and_every_detail_is_drawn_alike():
    drafts = planned(strengths=[1, 2], count=600)
    strengths = Counter(each.disruption["strength"] for each in drafts)
    assert 250 < strengths[1] < 350  # 300 ± 4 standard deviations
    first = Counter(name for d in drafts if d.disruption["strength"] == 1 for name in d.disruption["changes"][0])
    assert set(first) == {"colour", "pattern", "mark"} and min(first.values()) > strengths[1] / 3 - 33


def test_a_subject_with_fewer_details_changes_as_many_as_it_has():
    for each in planned(("dog",), strengths=[3], count=5):
        assert each.disruption["changes"] == [{"colour": ["brown", "grey"]}]


def test_every_subject_is_repainted_as_the_figure_draws_it_or_a_share_of_pairs_keeps_one():
    everyone = planned(("cat", "dog"), swap_share=0.0)
    assert all(each.disruption["repainted"] == [0, 1] for each in everyone)
    shares = Counter(tuple(d.disruption["repainted"]) for d in planned(("cat", "dog"), swap_share=0, single_share=0.5))
    assert set(shares) == {(0,), (1,), (0, 1)} and 160 < shares[0, 1] < 240
    kept = next(d for d in planned(("cat", "dog"), swap_share=0, single_share=1.0) if d.disruption["repainted"] == [0])
    assert kept.disrupted_captions[1] == CAPTIONS["dog"] and kept.disruption["changes"][1] == {}
    assert all(each.disruption["repainted"] == [0] for each in planned(single_share=1.0, count=20))


def test_two_subjects_exchange_captions_and_keep_their_class():
    drafts = planned(("cat", "dog"), swap_share=0.3)
    swaps = [each for each in drafts if each.disruption["kind"] == "swap"]
    assert 80 < len(swaps) < 160  # 120 of 400
    assert {each.disrupted_captions for each in swaps} == {("a brown cat", "a red dog with white dots and one ear")}
    assert all(each.disruption["repainted"] == [0, 1] for each in swaps)
    assert not any(each.disruption["kind"] == "swap" for each in planned(swap_share=1.0, count=20))


def test_captions_that_say_the_same_are_not_exchanged():
    alike = replace(draft(subjects=("cat", "dog")), captions=("a red cat", "a red dog"))
    alike = replace(alike, disruption={"details": [[{"attribute": "c", "words": "red", "instead": "blue"}]] * 2})
    assert plan(settings(swap_share=1.0), alike).disruption["kind"] == "change"
    unnamed = replace(draft(subjects=("cat", "dog")), captions=(CAPTIONS["cat"], "a brown hound"))
    unnamed = replace(unnamed, disruption={"details": [unnamed.disruption["details"][0], []]})
    assert plan(settings(swap_share=1.0), unnamed).disruption["kind"] == "change"


@pytest.mark.parametrize(
    ("text", "word", "other", "expected"),
    [
        ("a red mug with dots", "mug", "owl", "a red owl with dots"),
        ("A mug and an owl", "mug", "owl", "An owl and an owl"),
        ("an owl", "owl", "mug", "a mug"),
        ("two boxes", "box", "mug", "two mugs"),
        ("a teddy bear in pink", "teddy bear", "cat", "a cat in pink"),
        ("a mugger", "mug", "owl", None),
    ],
)
def test_a_class_word_takes_the_place_of_another(text, word, other, expected):
    assert exchanged(text, word, other) == expected


def test_what_is_drawn_is_of_the_draft_alone():
    first = [plan(settings(), draft(number, ("cat", "dog"))).disruption for number in range(20)]
    again = [plan(settings(), draft(number, ("cat", "dog"))).disruption for number in reversed(range(20))]
    assert first == again[::-1] and len({str(each) for each in first}) > 3
    assert first != [plan(settings(seed=1), draft(number, ("cat", "dog"))).disruption for number in range(20)]


# --- where it changes ------------------------------------------------------------------------------------------------


def test_what_is_painted_fades_in_within_the_mask():
    mask = np.zeros((1, 12), bool)
    mask[0, 3:] = True
    mask = np.repeat(mask, 12, 0)
    np.testing.assert_allclose(faded(mask, 3)[6], [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1])
    np.testing.assert_allclose(faded(mask, 0), mask)
    thin = np.zeros((5, 9), bool)
    thin[:, 3:6] = True  # nowhere deeper than 2
    np.testing.assert_allclose(faded(thin, 9)[2], [0, 0, 0, 0.5, 1, 0.5, 0, 0, 0])
    assert (faded(np.ones((4, 4), bool), 3) == 1).all()


def test_outside_its_mask_an_image_stays_to_the_bit():
    image, painted = (np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8) for i in (0, 1))
    mask = np.zeros((20, 20), bool)
    mask[4:16, 4:16] = True
    mixed = pasted(image, painted, mask, feather=2)
    assert np.array_equal(mixed[~mask], image[~mask]) and np.array_equal(mixed[6:14, 6:14], painted[6:14, 6:14])
    half = pasted(image, painted, mask, feather=1)[4, 10].astype(float)
    assert np.abs(half - (image[4, 10] / 2 + painted[4, 10] / 2)).max() <= 0.5


def made(drafts, painter=None, **values):
    return disruption.make(settings(**values), painter or Paint(), drafts)


def test_each_subject_is_painted_from_its_caption_in_its_own_mask():
    painter, before = Paint(), draft(subjects=("cat", "dog"))
    (after,) = made([before], painter, swap_share=0.0, strengths=[1], feather=0)
    assert [prompt for prompt, *_ in painter.asked] == list(after.disrupted_captions)
    for mask, prompt in zip(before.masks, after.disrupted_captions, strict=True):
        assert (after.lose[mask] == 255 - len(prompt)).all()
    outside = ~(before.masks[0] | before.masks[1])
    assert np.array_equal(after.lose[outside], before.win[outside])
    assert after.provenance["disruption"] == {"model": "paint"} and not after.dropped


def test_strength_is_how_far_back_to_noise_it_goes():
    painter = Paint()
    drafts = made([draft(n) for n in range(40)], painter, denoising=[0.6, 0.8], strengths=[1, 2, 3], batch_size=4)
    by_strength = {1: 0.6, 2: 0.8, 3: 0.8}
    expected = sorted((seed_of(0, d.id, "disruption", 0), by_strength[d.disruption["strength"]]) for d in drafts)
    assert sorted((seed, denoising) for _, seed, denoising, _ in painter.asked) == expected
    assert max(size for *_, size in painter.asked) == 4


def test_a_loser_that_shows_what_the_winner_shows_is_dropped():
    class Idle(Paint):
        def paint(self, images, *words):
            return list(images)

    after = made([draft(0), draft(1)], Idle())
    assert [(d.dropped_by, d.dropped) for d in after] == [("disruption", "the loser shows what the winner shows")] * 2


# --- the pipelines ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("painters")
    return {"flux_fill": write_tiny_fill(folder / "fill"), "sdxl": write_tiny_sdxl_inpainting(folder / "sdxl")}


@pytest.mark.parametrize("painter", ["flux_fill", "sdxl"])
def test_real_pipelines_make_losers_that_are_equal_outside_the_masks(models, painter):
    drafts = [draft(0, ("cat", "dog")), draft(1), draft(2, size=(48, 48)), draft(3, ("cat", "dog"))]
    stage = Disruption(settings(painter=painter, model=str(models[painter]), batch_size=2))
    for after in stage.open()(drafts):
        assert after.lose.shape == after.win.shape and after.lose.dtype == np.uint8
        photos = {"references": (after.win,) * len(after.subjects)}
        names = ("id", "prompt", "win", "lose", "masks", "subjects", "captions", "disrupted_captions", "split")
        assert defect(Pair(**{name: getattr(after, name) for name in names}, **photos), tolerance=0) is None


@pytest.mark.parametrize(
    ("painter", "kind"), [("flux_fill", FluxFillPipeline), ("sdxl", StableDiffusionXLInpaintPipeline)]
)
def test_an_image_is_painted_as_the_pipeline_paints_it_alone(models, painter, kind):
    """However many are painted together, and at sizes that the pipeline would not take."""
    ours = painters.Painter(settings(painter=painter, model=str(models[painter])))
    images, masks = [draft(n).win for n in range(2)], [draft(n).masks[0] for n in range(2)]
    together = ours.paint(images, masks, ["a blue cat", "a red cat"], [7, 8], 1.0)
    pipeline = kind.from_pretrained(models[painter])
    size = {"flux_fill": (48, 40), "sdxl": (48, 40)}[painter]  # of 44 × 40, in multiples of 8
    words = {"max_sequence_length": 12} if painter == "flux_fill" else {}
    alone = pipeline(
        prompt="a red cat", image=Image.fromarray(images[1]).resize(size, Image.Resampling.LANCZOS),
        mask_image=Image.fromarray(masks[1]).resize(size, Image.Resampling.NEAREST), height=40, width=48,
        strength=1.0, num_inference_steps=2, guidance_scale=2.0, generator=torch.Generator().manual_seed(8), **words,
    ).images[0]  # fmt: skip
    expected = np.asarray(alone.resize((44, 40), Image.Resampling.LANCZOS), int)
    assert np.abs(together[1] - expected).max() <= 1 and np.abs(together[0] - expected).max() > 20


def refusal(**values):
    with pytest.raises(StageError) as caught:
        Disruption(settings(**values)).open()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_that_cannot_fill_in_or_is_not_there_is_named(models, tiny_flux, tmp_path, monkeypatch):
    assert "its network takes no mask" in refusal(model=str(tiny_flux))
    assert "correct disruption.model" in refusal(model=str(tmp_path / "nothing"))
    assert "correct disruption.model" in refusal(model=str(models["sdxl"]))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "FLUX.1-Fill-dev cannot be loaded (not in the cache" in refusal()
