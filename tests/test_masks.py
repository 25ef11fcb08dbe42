"""Eq. 2–9. Expected values come from derivations by hand, NumPy, Pillow and scikit-image, never from our own output."""

import time

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.filters.rank import entropy as skimage_entropy

from focusdpo_lib import masks


def tokens(*vectors):
    """Vectors of one sample -> (1, P, d)."""
    return torch.tensor([vectors], dtype=torch.float32)


def random_layers(layers=3, batch=2, targets=12, references=(5, 7), channels=8, seed=0):
    draw = torch.Generator().manual_seed(seed)
    target = [torch.randn(batch, targets, channels, generator=draw) for _ in range(layers)]
    reference = [[torch.randn(batch, n, channels, generator=draw) for n in references] for _ in range(layers)]
    return target, reference


def numpy_correspondence(target, reference, power):
    """Eq. 3 in float64: every vector over its norm to the given power, mean over layers."""
    terms = []
    for layer_target, layer_reference in zip(target, reference, strict=True):
        h = layer_target.double().numpy()
        h = h / np.linalg.norm(h, axis=-1, keepdims=True) ** power
        cls = np.stack([r.double().numpy().mean(1) for r in layer_reference], 1)
        cls = cls / np.linalg.norm(cls, axis=-1, keepdims=True) ** power
        terms.append(np.einsum("bsd,bpd->bsp", cls, h))
    return np.mean(terms, 0)


# --- Eq. 3 ---


@pytest.mark.parametrize(("similarity", "power"), [("cosine", 1), ("printed", 2)])
def test_correspondence_is_eq_3_for_subjects_with_different_token_counts(similarity, power):
    target, reference = random_layers()
    scores = masks.correspondence(target, reference, similarity)
    assert scores.shape == (2, 2, 12) and scores.dtype == torch.float32
    np.testing.assert_allclose(scores, numpy_correspondence(target, reference, power), rtol=2e-5, atol=1e-6)


def test_only_the_subject_s_tokens_are_pooled():
    """R20, by hand: the reference's tokens are its subject, (3, 0) and (0, 1), and a background of (-9, -9)."""
    reference, subject = tokens((3, 0), (-9, -9), (0, 1)), torch.tensor([[1.0, 0.0, 1.0]])
    torch.testing.assert_close(masks.pool(reference, subject), tokens((1.5, 0.5)))
    torch.testing.assert_close(masks.pool(reference), tokens((-2, -8 / 3)))
    target = tokens((3, 1), (-1, 3))  # along the pooled vector, and across it
    score = masks.layer_correspondence(target, [reference], subject_tokens=[subject])
    torch.testing.assert_close(score, torch.tensor([[[1.0, 0.0]]]), atol=1e-6, rtol=0)
    assert masks.layer_correspondence(target, [reference])[0, 0, 0] < 0  # misled by the background
    # A subject without a token says nothing of any token.
    assert not masks.layer_correspondence(target, [reference], subject_tokens=[subject * 0]).any()


def test_each_sample_and_subject_is_pooled_over_its_own_tokens():
    target, reference = random_layers()
    chosen = [torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 1, 1.0]]), torch.tensor([[0, 1.0] + [0] * 5, [1.0] * 7])]
    scores = masks.correspondence(target, reference, "cosine", chosen)
    for b in range(2):
        kept = [[r[b : b + 1, own[b] > 0] for r, own in zip(layer, chosen, strict=True)] for layer in reference]
        alone = numpy_correspondence([t[b : b + 1] for t in target], kept, 1)
        np.testing.assert_allclose(scores[b : b + 1], alone, rtol=2e-5, atol=1e-6)


def test_a_reference_token_belongs_to_the_subject_that_covers_half_of_it():
    cover = torch.zeros(1, 4, 4)
    cover[0, 0, :2], cover[0, 2:, 2:], cover[0, 2, 0] = 1, 0.5, 1  # shares of the 2×2 tokens: ½, 0, ¼, ½
    assert masks.subject_tokens(cover, 4).tolist() == [[1, 0, 0, 1]]
    assert masks.subject_tokens(cover, 16).sum() == 2 + 4 + 1
    with pytest.raises(ValueError, match="5 tokens do not divide a reference of 4×4 cells"):
        masks.subject_tokens(cover, 5)


def test_a_tap_pools_the_subject_at_each_layer_s_own_resolution():
    cover = [torch.tensor([[[1.0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]])]
    draw = torch.Generator().manual_seed(3)
    target, fine, coarse = (torch.randn(1, n, 6, generator=draw) for n in (9, 16, 4))
    tap = masks.CorrespondenceTap(cover=cover)
    tap(0, target, [fine])
    tap(1, target, [coarse])
    terms = [
        masks.layer_correspondence(target, [fine[:, [0, 1, 4]]]),
        masks.layer_correspondence(target, [coarse[:, [0]]]),  # three quarters of the first token
    ]
    torch.testing.assert_close(tap.result(), sum(terms) / 2)


def test_cosine_prefers_direction_and_the_printed_form_prefers_small_norms():
    # cls = (1, 0). Token 0 = (4, 0): cosine 1, printed 4/16 = 0.25. Token 1 = (1, 1): cosine 0.707, printed 1/2.
    target, reference = tokens((4, 0), (1, 1)), [tokens((1, 0))]
    cosine = masks.layer_correspondence(target, reference, "cosine")
    printed = masks.layer_correspondence(target, reference, "printed")
    torch.testing.assert_close(cosine, torch.tensor([[[1.0, 0.5**0.5]]]))
    torch.testing.assert_close(printed, torch.tensor([[[0.25, 0.5]]]))


def test_the_reference_is_pooled_before_it_is_normalised():
    # mean of (3, 0) and (0, 1) is (1.5, 0.5), direction (3, 1)/√10; the mean of directions would be (1, 1)/√2.
    score = masks.layer_correspondence(tokens((1, 0)), [tokens((3, 0), (0, 1))])
    torch.testing.assert_close(score, torch.tensor([[[3 / 10**0.5]]]))


def test_a_zero_token_scores_zero_instead_of_nan():
    for similarity in ("cosine", "printed"):
        assert masks.layer_correspondence(tokens((0, 0)), [tokens((1, 0))], similarity).item() == 0


def test_correspondence_computes_in_fp32_for_bf16_tokens_and_under_autocast():
    target, reference = random_layers()
    low_target = [t.bfloat16() for t in target]
    low_reference = [[r.bfloat16() for r in layer] for layer in reference]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = masks.correspondence(low_target, low_reference)
    assert scores.dtype == torch.float32
    # Against the same rounded tokens in float64: no further rounding beyond fp32 has happened.
    np.testing.assert_allclose(scores, numpy_correspondence(low_target, low_reference, 1), atol=1e-6)


def test_unfit_tokens_and_unknown_similarities_are_named_in_the_error():
    with pytest.raises(ValueError, match="subject 1 has reference tokens"):
        masks.layer_correspondence(torch.ones(1, 4, 8), [torch.ones(1, 3, 8), torch.ones(1, 3, 6)])
    with pytest.raises(ValueError, match="similarity must be one of cosine, printed"):
        masks.layer_correspondence(torch.ones(1, 4, 8), [torch.ones(1, 3, 8)], "dot")
    with pytest.raises(ValueError, match="reference_tokens is empty"):
        masks.layer_correspondence(torch.ones(1, 4, 8), [])
    with pytest.raises(ValueError, match="no layers"):
        masks.correspondence([], [])


# --- The tap ---


def test_the_tap_folds_layers_into_the_same_scores_as_keeping_them_all():
    target, reference = random_layers(layers=5)
    tap = masks.CorrespondenceTap()
    for layer in range(5):
        tap(layer, target[layer], reference[layer])
    torch.testing.assert_close(tap.result(), masks.correspondence(target, reference))


def test_the_tap_looks_only_at_the_chosen_layers():
    target, reference = random_layers(layers=4)
    tap = masks.CorrespondenceTap(layers=[1, 3], similarity="printed")
    for layer in range(4):
        tap(layer, target[layer], reference[layer])
    chosen = masks.correspondence([target[1], target[3]], [reference[1], reference[3]], "printed")
    torch.testing.assert_close(tap.result(), chosen)
    assert not torch.allclose(tap.result(), masks.correspondence(target, reference, "printed"))


@pytest.mark.parametrize("samples", [slice(0, 2), slice(2, 4)])
def test_the_tap_can_look_at_one_half_of_a_winner_loser_batch_only(samples):
    target, reference = random_layers(batch=4)
    tap = masks.CorrespondenceTap(samples=samples)
    for layer in range(3):
        tap(layer, target[layer], reference[layer])
    half = masks.correspondence([t[samples] for t in target], [[r[samples] for r in layer] for layer in reference])
    torch.testing.assert_close(tap.result(), half)


def test_the_tap_keeps_no_graph():
    target, reference = random_layers(layers=1)
    tap = masks.CorrespondenceTap()
    tap(0, target[0].requires_grad_(), reference[0])
    assert not tap.result().requires_grad


def test_the_tap_refuses_a_second_pass_but_ignores_the_recomputation_of_checkpointing():
    target, reference = random_layers()
    tap = masks.CorrespondenceTap()
    tap(0, target[0], reference[0])
    with pytest.raises(RuntimeError, match="tapped twice"):
        tap(0, target[1], reference[1])
    before = tap.result().clone()
    tap(0, target[1], reference[1])
    assert torch.equal(tap.result(), before)


def test_the_tap_says_which_layers_never_came():
    target, reference = random_layers(layers=1)
    tap = masks.CorrespondenceTap(layers=[0, 7])
    tap(0, target[0], reference[0])
    with pytest.raises(RuntimeError, match=r"layers \[7\] were never tapped; tapped: \[0\]"):
        tap.result()
    with pytest.raises(RuntimeError, match="layers all were never tapped"):
        masks.CorrespondenceTap().result()
    with pytest.raises(ValueError, match='layers must be "all"'):
        masks.CorrespondenceTap(layers="double")


def test_layers_of_a_u_net_are_resampled_to_one_grid_before_they_are_averaged():
    target, reference = random_layers(layers=2, targets=16, references=(3,))
    fine, coarse = target[0], target[1][:, :4]
    tap = masks.CorrespondenceTap(grid=(4, 4))
    tap(0, fine, reference[0], grid=(4, 4))
    tap(1, coarse, reference[1], grid=(2, 2))
    small = masks.layer_correspondence(coarse, reference[1]).reshape(2, 2, 2).numpy()
    # Bilinear from 2 to 4 samples puts weights (1, 0), (¾, ¼), (¼, ¾), (0, 1) on the two samples of each axis.
    blend = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    resampled = np.einsum("yi,bij,xj->byx", blend, small, blend).reshape(2, 1, 16)
    expected = (masks.layer_correspondence(fine, reference[0]).numpy() + resampled) / 2
    np.testing.assert_allclose(tap.result(), expected, atol=1e-6)

    tap = masks.CorrespondenceTap()
    tap(0, fine, reference[0])
    with pytest.raises(ValueError, match="give tap and call a grid"):
        tap(1, coarse, reference[1])


# --- Token grids ---


def test_tokens_run_row_by_row_and_a_token_is_the_subjects_from_half_its_area_on():
    prior = torch.zeros(1, 2, 4, 6)
    prior[0, 0, 0:2, 4:6] = 1  # fills the token in row 0, column 2
    prior[0, 0, 2, 0:2] = 1  # exactly half of the token in row 1, column 0
    prior[0, 1, 3, 3] = 1  # a quarter of the token in row 1, column 1: too little
    expected = torch.zeros(1, 2, 6)
    expected[0, 0, [2, 3]] = 1
    assert torch.equal(masks.prior_tokens(prior, (2, 3)), expected)
    assert torch.equal(masks.prior_tokens(prior.bool(), (2, 3)), expected)
    with pytest.raises(ValueError, match="one mask per subject"):
        masks.prior_tokens(prior[:, 0], (2, 3))


def test_a_token_covers_a_block_of_latents():
    field = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    expected = field.reshape(2, 3).repeat_interleave(2, 0).repeat_interleave(2, 1)[None]
    assert torch.equal(masks.to_grid(field, (2, 3), (4, 6)), expected)
    assert masks.to_grid(torch.ones(2, 3, 6), (2, 3), (4, 6)).shape == (2, 3, 4, 6)
    with pytest.raises(ValueError, match="6 tokens do not fill a 3×3 grid"):
        masks.to_grid(field, (3, 3), (6, 6))


# --- Eq. 4–6 ---


def test_every_subject_matches_as_many_tokens_as_its_own_prior_has():
    scores = torch.tensor([[[0.1, 0.9, 0.5, 0.7], [0.3, 0.2, 0.8, 0.1]], [[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]]])
    prior = torch.tensor([[[1, 1, 0, 0], [0, 0, 1, 0]], [[1, 1, 1, 0], [0, 0, 0, 0]]])
    expected = torch.tensor([[[0, 1, 0, 1], [0, 0, 1, 0]], [[1, 1, 1, 0], [0, 0, 0, 0]]])
    assert torch.equal(masks.matched(scores, prior), expected.float())


def test_ties_still_give_exactly_k_tokens_the_earliest_first():
    flat = torch.zeros(1, 1, 6)
    prior = torch.tensor([[[0, 0, 0, 1, 1, 1]]])
    assert masks.matched(flat, prior).tolist() == [[[1, 1, 1, 0, 0, 0]]]
    draw = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 3, (8, 3, 50), generator=draw).float()  # three values: ties everywhere
    prior = (torch.rand(8, 3, 50, generator=draw) < 0.3).float()
    chosen = masks.matched(scores, prior)
    assert torch.equal(chosen.sum(-1), prior.sum(-1))
    lowest_chosen = scores.masked_fill(chosen == 0, 9).amin(-1)
    highest_left = scores.masked_fill(chosen == 1, -9).amax(-1)
    assert (lowest_chosen >= highest_left).all()


def test_a_token_of_subject_a_claimed_by_reference_b_stays_in_focus_per_subject_but_not_in_the_union():
    # Tokens 0, 1 are A's, tokens 2, 3 are B's. Reference A finds 0 and the background 4; reference B finds 1 and 2.
    prior = torch.tensor([[[1.0, 1, 0, 0, 0], [0, 0, 1, 1, 0]]])
    found = torch.tensor([[[1.0, 0, 0, 0, 1], [0, 1, 1, 0, 0]]])
    assert masks.structure_field(prior, found).tolist() == [[0, 1, 0, 1, 0]]
    assert masks.structure_field(prior, found, "union").tolist() == [[0, 0, 0, 1, 0]]
    with pytest.raises(ValueError, match="multi_subject must be one of per_subject, union"):
        masks.structure_field(prior, found, "both")


def test_structure_field_is_prior_minus_matched_for_one_subject_whatever_the_reading():
    prior, found = torch.tensor([[[1.0, 1, 0, 0]]]), torch.tensor([[[0.0, 1, 1, 0]]])
    for reading in ("per_subject", "union"):
        assert masks.structure_field(prior, found, reading).tolist() == [[1, 0, 0, 0]]


# --- Eq. 7 ---


def gray_images():
    draw = np.random.default_rng(0)
    flat = np.full((20, 23), 77)
    gradient = np.arange(20)[:, None] * 5 + np.arange(23)[None] * 2
    coarse = draw.integers(0, 4, (20, 23)) * 80
    return {"random": draw.integers(0, 256, (20, 23)), "flat": flat, "gradient": gradient, "coarse": coarse}


@pytest.mark.parametrize("window", [1, 3, 9, 17, 31])
def test_patch_entropy_equals_scikit_image_up_to_the_border(window):
    images = np.stack(list(gray_images().values())).astype(np.uint8)
    ours = masks.patch_entropy(torch.from_numpy(images), window)
    for name, image, entropy in zip(gray_images(), images, ours, strict=True):
        expected = skimage_entropy(image, np.ones((window, window), np.uint8))
        np.testing.assert_allclose(entropy, expected, atol=5e-6, err_msg=name)


@pytest.mark.parametrize("window", [3, 9])
def test_gaussian_patch_entropy_weighs_pixels_by_their_distance(window):
    """R21, against loops over pixels in float64: a histogram of exp(−d²/2σ²), σ = window/6, cut at the border."""
    gray = np.random.default_rng(0).integers(0, 5, (11, 8)) * 50
    ours = masks.patch_entropy(torch.from_numpy(gray)[None], window, kernel="gaussian")[0]
    for y, x in np.ndindex(gray.shape):
        weight_of = {}
        for v, u in np.ndindex(gray.shape):
            if max(abs(v - y), abs(u - x)) <= window // 2:
                weight = np.exp(-((v - y) ** 2 + (u - x) ** 2) / (2 * (window / 6) ** 2))
                weight_of[gray[v, u]] = weight_of.get(gray[v, u], 0) + weight
        share = np.array(list(weight_of.values())) / sum(weight_of.values())
        assert ours[y, x].item() == pytest.approx(-(share * np.log2(share)).sum(), abs=2e-5)
    assert not torch.allclose(ours, masks.patch_entropy(torch.from_numpy(gray)[None], window)[0], atol=0.1)


def test_patch_entropy_with_fewer_bins_merges_neighbouring_grey_levels():
    image = gray_images()["random"]
    expected = np.zeros(image.shape)
    for y in range(20):
        for x in range(23):
            patch = image[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3]
            p = np.histogram(patch, bins=16, range=(0, 256))[0] / patch.size
            expected[y, x] = -(p[p > 0] * np.log2(p[p > 0])).sum()
    ours = masks.patch_entropy(torch.from_numpy(image)[None], 5, bins=16)[0]
    np.testing.assert_allclose(ours, expected, atol=5e-6)
    assert (ours < masks.patch_entropy(torch.from_numpy(image)[None], 5)[0]).any()


def test_a_patch_of_n_different_levels_has_log2_n_bits():
    image = torch.arange(25).reshape(1, 5, 5)
    entropy = masks.patch_entropy(image, 3)
    assert entropy[0, 2, 2].item() == pytest.approx(np.log2(9), abs=1e-6)
    assert entropy[0, 0, 2].item() == pytest.approx(np.log2(6), abs=1e-6)  # cut at an edge
    assert entropy[0, 0, 0].item() == pytest.approx(np.log2(4), abs=1e-6)  # cut at a corner


def test_windows_too_large_for_16_bit_counters_count_right():
    # 201² = 40401 > 32767. Left half one level, right half another: at the centre of 200 columns exactly 1 bit.
    image = torch.zeros(1, 202, 200)
    image[:, :, 100:] = 255
    entropy = masks.patch_entropy(image, 401)
    assert entropy[0, 100, 100].item() == pytest.approx(1, abs=1e-6)


def test_images_of_a_batch_do_not_see_one_another_even_when_the_batch_is_worked_on_in_parts():
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 64, 64), generator=draw)
    together = masks.patch_entropy(images, 5)
    for index in (0, 31, 32, 39):  # 2²⁰ / (8 · 64²) = 32 images a part
        torch.testing.assert_close(together[index], masks.patch_entropy(images[index : index + 1], 5)[0])


def test_patch_entropy_of_256_small_images_takes_about_a_second_on_one_core():
    images = torch.randint(0, 256, (64, 64, 64), generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = time.process_time()
        masks.patch_entropy(images, 9)
        assert 4 * (time.process_time() - start) < 5  # 0.9 s on the machine this was written on
    finally:
        torch.set_num_threads(threads)


def test_patch_entropy_refuses_windows_without_a_centre_and_impossible_bins():
    image = torch.zeros(1, 4, 4)
    with pytest.raises(ValueError, match="window must be odd"):
        masks.patch_entropy(image, 4)
    with pytest.raises(ValueError, match="bins must be 1–256"):
        masks.patch_entropy(image, 3, bins=300)


# --- Eq. 8 ---


def textured(batch=2, size=32, seed=0):
    """Images whose left half is flat and whose right half is noise, (B, 3, H, W) in [-1, 1]."""
    images = torch.full((batch, 3, size, size), -0.2)
    draw = torch.Generator().manual_seed(seed)
    images[..., size // 2 :] = torch.randint(0, 256, (batch, 3, size, size // 2), generator=draw) / 127.5 - 1
    return images


def test_detail_field_is_the_luma_entropy_scaled_over_the_image_and_then_averaged():
    images = textured()
    detail = masks.detail_field(images, (8, 8), window=5)
    for image, field in zip(images, detail, strict=True):
        pixels = ((image.permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)
        gray = np.array(Image.fromarray(pixels).convert("L"))
        entropy = skimage_entropy(gray, np.ones((5, 5), np.uint8))
        scaled = (entropy - entropy.min()) / (entropy.max() - entropy.min())
        np.testing.assert_allclose(field, scaled.reshape(8, 4, 8, 4).mean((1, 3)), atol=1e-5)


def test_detail_is_scaled_before_it_is_averaged_so_the_mean_of_four_cells_is_the_cell_of_a_coarser_grid():
    images = textured()
    fine, coarse = masks.detail_field(images, (16, 16), 5), masks.detail_field(images, (8, 8), 5)
    torch.testing.assert_close(coarse, fine.reshape(2, 8, 2, 8, 2).mean((2, 4)))
    pixels = masks.detail_field(images, (32, 32), 5)
    assert pixels.amin().item() == 0 and pixels.amax().item() == 1
    assert coarse.amax() < 1


def test_each_image_is_scaled_by_its_own_extremes():
    noise = textured(batch=1)
    two_levels = torch.where(noise > 0, 0.5, -0.5)  # at most 1 bit, where noise has up to log2 25
    together = masks.detail_field(torch.cat([noise, two_levels]), (32, 32), 5)
    assert together.amax((1, 2)).tolist() == [1, 1]
    for field, image in zip(together, (noise, two_levels), strict=True):
        torch.testing.assert_close(field, masks.detail_field(image, (32, 32), 5)[0])


@pytest.mark.parametrize("value", [-1.0, -0.3, 0.0, 0.42, 1.0])
def test_a_flat_image_has_no_detail(value):
    assert masks.detail_field(torch.full((1, 3, 32, 32), value), (8, 8), 9).abs().sum().item() == 0


def test_detail_window_and_bins_change_the_field_and_dark_texture_needs_the_bins():
    images = textured()
    assert not torch.allclose(masks.detail_field(images, (8, 8), 3), masks.detail_field(images, (8, 8), 9))
    # Texture between grey levels 0 and 7 is one single level when 256 are merged into 32.
    faint = torch.randint(0, 8, (1, 1, 32, 32), generator=torch.Generator().manual_seed(0)).expand(1, 3, 32, 32)
    faint = faint / 127.5 - 1
    assert masks.detail_field(faint, (8, 8), 5).mean() > 0.3
    assert masks.detail_field(faint, (8, 8), 5, bins=32).abs().sum() == 0


def test_bf16_images_give_nearly_the_same_detail():
    images = textured()
    low = masks.detail_field(images.bfloat16(), (8, 8), 5)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, masks.detail_field(images, (8, 8), 5), atol=0.1, rtol=0)


# --- Eq. 9 ---


def fields(focused, size=10, cells=16):
    """One sample with `size` prior cells of which `focused` are in M_s; detail rises from 0 to 1."""
    prior, structure = torch.zeros(1, cells), torch.zeros(1, cells)
    prior[:, :size], structure[:, :focused] = 1, 1
    return structure, torch.linspace(0, 1, cells)[None], prior


def test_coverage_above_tau_takes_the_structure_field_alone():
    structure, detail, prior = fields(2)
    focus, coverage = masks.fuse(structure, detail, prior)
    assert torch.equal(focus, structure) and coverage.item() == pytest.approx(0.2)


def test_coverage_of_exactly_tau_takes_the_mixture():
    structure, detail, prior = fields(1)
    focus, coverage = masks.fuse(structure, detail, prior, tau=0.1, gamma=0.3)
    assert coverage.item() == pytest.approx(0.1)
    torch.testing.assert_close(focus, 0.3 * structure + 0.7 * detail * prior)
    assert focus[0, 0].item() == pytest.approx(0.3)  # structure 1, detail 0
    assert focus[0, 5].item() == pytest.approx(0.7 * 5 / 15)  # structure 0
    assert focus[0, 10:].abs().sum() == 0  # never outside the prior


@pytest.mark.parametrize(("numerator", "denominator"), [(1, 20), (1, 10), (1, 5), (3, 10), (1, 3), (1, 2), (3, 4)])
def test_the_threshold_is_exact_for_every_size_of_subject(numerator, denominator):
    for scale in range(1, 60):
        structure, detail, prior = fields(numerator * scale, denominator * scale, denominator * scale + 4)
        tau = numerator / denominator
        assert not torch.equal(masks.fuse(structure, detail, prior, tau)[0], structure)
        structure[0, numerator * scale] = 1
        assert torch.equal(masks.fuse(structure, detail, prior, tau)[0], structure)


def test_every_sample_takes_its_own_branch():
    many, few = fields(5), fields(1)
    focus, coverage = masks.fuse(*(torch.cat(pair) for pair in zip(many, few, strict=True)))
    assert torch.equal(focus[:1], masks.fuse(*many)[0]) and torch.equal(focus[1:], masks.fuse(*few)[0])
    torch.testing.assert_close(coverage, torch.tensor([0.5, 0.1]))


def test_tau_moves_the_branch_and_gamma_moves_the_mixture():
    structure, detail, prior = fields(5)
    assert torch.equal(masks.fuse(structure, detail, prior, tau=0.4)[0], structure)
    assert not torch.equal(masks.fuse(structure, detail, prior, tau=0.6)[0], structure)
    assert torch.equal(masks.fuse(structure, detail, prior, tau=0.6, gamma=1.0)[0], structure)
    assert torch.equal(masks.fuse(structure, detail, prior, tau=0.6, gamma=0.0)[0], detail * prior)


def test_fuse_works_on_tokens_and_on_latent_grids_alike():
    structure, detail, prior = fields(1)
    flat, coverage = masks.fuse(structure, detail, prior)
    grid, grid_coverage = masks.fuse(*(field.reshape(1, 4, 4) for field in (structure, detail, prior)))
    assert torch.equal(grid.flatten(1), flat) and torch.equal(grid_coverage, coverage)


def test_fuse_accepts_bf16_and_boolean_fields():
    structure, detail, prior = fields(1)
    focus, coverage = masks.fuse(structure.bool(), detail.bfloat16(), prior.bool())
    assert focus.dtype == coverage.dtype == torch.float32
    torch.testing.assert_close(focus, masks.fuse(structure, detail, prior)[0], atol=3e-3, rtol=0)


def test_an_empty_prior_is_an_error_that_names_the_sample():
    structure, detail, prior = (field.repeat(3, 1) for field in fields(0))
    prior[1] = 0
    with pytest.raises(ValueError, match=r"samples \[1\] have an empty prior"):
        masks.fuse(structure, detail, prior)
    with pytest.raises(ValueError, match="must have one shape"):
        masks.fuse(structure, detail[:, :8], prior)


def test_a_perfect_correspondence_leaves_detail_alone_and_a_useless_one_leaves_the_whole_prior():
    prior = torch.zeros(1, 1, 8, 8)
    prior[..., 2:6, 2:6] = 1
    subject = masks.prior_tokens(prior, (8, 8))
    detail = torch.rand(1, 64, generator=torch.Generator().manual_seed(0))
    perfect = masks.structure_field(subject, masks.matched(subject, subject))
    focus, coverage = masks.fuse(perfect, detail, subject.amax(1))
    assert coverage.item() == 0
    torch.testing.assert_close(focus, 0.7 * detail * subject.amax(1))
    useless = masks.structure_field(subject, masks.matched(-subject, subject))
    focus, coverage = masks.fuse(useless, detail, subject.amax(1))
    assert coverage.item() == 1 and torch.equal(focus, subject.amax(1))
