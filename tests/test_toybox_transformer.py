"""The training of the toybox's transformer: what a step learns from, what its middle tokens name, and its guidance."""

from copy import deepcopy

import pytest
import torch
from torch.nn import functional as F

from focusdpo_lib.backbones import FluxUno
from focusdpo_lib.toybox import world
from focusdpo_lib.toybox.batches import ABSENT, slot_labels
from focusdpo_lib.toybox.naming import MiddleTokens, Naming, token_labels
from focusdpo_lib.toybox.pipelines import build_autoencoder, build_flux
from focusdpo_lib.toybox.transformer import (
    Batches,
    distil_guidance,
    load_latents,
    make_latents,
    subject_error,
    train_flux,
    training_sample,
)

SIZES = {"heads": 1, "head_dim": 16, "double_blocks": 1, "single_blocks": 1, "text_dim": 16, "guidance_embeds": True}


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """An autoencoder and the file of eight training samples."""
    path = tmp_path_factory.mktemp("latents") / "00.safetensors"
    torch.manual_seed(0)
    vae = build_autoencoder((8, 8, 8))
    make_latents(vae, path, 0, 8, batch=4)
    return vae, path


def test_latents_know_what_each_subject_covers_and_is(latents):
    columns, captions = load_latents([latents[1]])
    for i in range(8):
        scene, _ = training_sample(0, i)
        _, masks = world.render(scene)
        assert captions[i] == scene.caption and len(masks) == 1 + i % 2
        for subject in range(2):
            if subject < len(masks):
                share = masks[subject].reshape(16, 4, 16, 4).mean((1, 3))
                assert torch.equal(columns["cover"][i, subject].float(), torch.from_numpy(share).float())
                assert columns["labels"][i, subject].tolist() == slot_labels(scene.identities[subject])
            else:
                assert not columns["cover"][i, subject].any() and columns["labels"][i, subject, 1] == ABSENT
                assert not columns["references"][i, subject].any()


def test_errors_inside_subjects_weigh_five_times():
    error = torch.tensor([1.0, 3.0]).view(1, 1, 1, 2)
    cover = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    assert subject_error(error, cover).item() == pytest.approx((1 + 5 * 3) / 6)


def test_a_token_shows_the_subject_that_covers_half_of_it():
    cover = torch.zeros(1, 2, 4, 4)
    cover[0, 0, :2, :2], cover[0, 1, 0, 2:] = 1, 1  # the first 2×2 cells whole, half of the second
    cover[0, 1, 2, 0] = 1  # a quarter of the third
    labels = torch.tensor([[[3, 1, 2, 0, 5], [7, 4, 6, 1, 8]]])
    shown = token_labels(cover, labels, [2, 2])[0].tolist()
    assert shown == [[3, 1, 2, 0, 5], [7, 4, 6, 1, 8], slot_labels(None), slot_labels(None)]


def test_naming_is_the_cross_entropy_of_heads_shared_by_target_and_references():
    naming, tap = Naming(8), MiddleTokens(2)
    draw = torch.Generator().manual_seed(0)
    target, references = torch.randn(2, 4, 8, generator=draw), [torch.randn(2, 3, 8, generator=draw)]
    tap(1, target * 0, references)
    tap(2, target, references)
    cover = torch.zeros(2, 1, 4, 4)
    cover[:, :, :2, :2] = 1
    labels = torch.tensor([[[3, 1, 2, 0, 5]], [[7, 4, 6, 1, 8]]])
    kept = torch.tensor([True, False])
    loss, facts = naming(tap, cover, labels, kept)

    def by_hand(tokens, expected):
        terms = []
        for k, head in enumerate(naming.heads.values()):
            known = [(t, e[k]) for t, e in zip(tokens, expected, strict=True) if e[k] != ABSENT]
            logits = torch.stack([head(F.layer_norm(t, (8,))) for t, _ in known])
            terms.append(F.cross_entropy(logits, torch.tensor([e for _, e in known])))
        return sum(terms) / 5

    of_target = by_hand(target[0], [labels[0, 0].tolist(), *[slot_labels(None)] * 3])  # the sample that is kept
    of_reference = by_hand([references[0][0].mean(0)], [labels[0, 0].tolist()])
    assert facts["named"] == pytest.approx(of_target.item(), rel=1e-5)
    assert facts["named_reference"] == pytest.approx(of_reference.item(), rel=1e-5)
    assert loss.item() == pytest.approx((of_target + of_reference).item(), rel=1e-5)


def test_a_batch_depends_on_seed_and_step_and_drops_prompt_and_references_together(latents):
    backbone = FluxUno(build_flux(latents[0], **SIZES), precision="float32")
    batches = Batches(backbone, [latents[1]], 4, seed=1)
    first, again = batches.draw(5, singles=0), batches.draw(5, singles=0)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["noise"], batches.draw(6)["noise"])
    assert [batches.draw(step, singles=2)["cover"].shape[1] for step in range(4)] == [1, 1, 1, 2]
    kept = torch.tensor([True, False, True, False])
    both, none = batches.conditioning(first, kept), batches.conditioning(first, ~kept)
    assert len(both.references) == first["cover"].shape[1]
    for reference in both.references:
        assert reference[0].any() and not reference[1].any()
    assert torch.equal(both.text[1], none.text[0]) and not torch.equal(both.text[0], none.text[0])


def test_both_trainings_run_resume_to_the_bit_and_leave_a_pipeline(latents, tmp_path):
    vae, path = latents
    how = {"batch": 2, "sizes": SIZES, "save_every_s": 0.0, "log_every": 1}
    pipeline, curve = train_flux(vae, [path], tmp_path / "whole", 4, **how)
    assert [point["step"] for point in curve] == [1, 2, 3, 4] and {"named", "named_reference"} <= curve[0].keys()
    again, _ = train_flux(vae, [path], tmp_path / "whole", 4, **how)  # complete: loaded, not trained
    for name, value in pipeline.transformer.state_dict().items():
        assert torch.equal(value, again.transformer.state_dict()[name])


def test_guidance_is_distilled_into_the_input_of_that_name(latents, tmp_path):
    vae, path = latents
    pipeline = build_flux(vae, **SIZES)
    backbone = FluxUno(pipeline, precision="float32")
    # Prompt and references must matter, or there is nothing to guide by: a new model hardly looks at them.
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in pipeline.transformer.parameters():
            weight += 0.2 * torch.randn(weight.shape, generator=draw)
        for weight in pipeline.transformer.time_text_embed.guidance_embedder.parameters():
            weight.zero_()  # so that the input means nothing yet
    teacher = FluxUno(deepcopy(pipeline), precision="float32")
    batches = Batches(backbone, [path], 8, seed=7)
    drawn = batches.draw(0, singles=0)
    noised = backbone.noised(drawn["clean"], drawn["noise"], drawn["t"])
    every = torch.ones(8, dtype=torch.bool)
    with torch.no_grad():
        given, nothing = batches.conditioning(drawn, every), batches.conditioning(drawn, ~every)
        c, u = (teacher.predict(noised, drawn["t"], x) for x in (given, nothing))

    def off(guidance):
        with torch.no_grad():
            found = backbone.predict(noised, drawn["t"], given, guidance=guidance)
        return (found - (u + guidance * (c - u))).square().mean().item()

    before = {guidance: off(guidance) for guidance in (1.0, 4.0)}
    assert before[1.0] < 1e-10 and before[4.0] == pytest.approx(9 * (c - u).square().mean().item())
    curve = distil_guidance(pipeline, [path], tmp_path, 60, batch=8, log_every=20)
    assert [point["step"] for point in curve] == [20, 40, 60]
    assert off(4.0) < 0.8 * before[4.0]
    assert off(1.0) < 0.25 * before[4.0]  # a guidance of 1 stays near the model as it was
