"""Where FocusDPO looks: Eq. 2–9, from token embeddings and pixels to the focus weight M.

Shapes: B samples, S subjects, P_t target tokens, P_r reference tokens, d channels, H×W pixels, h×w a coarser grid.
Tokens lie on their grid row by row: token index = y · width + x, with (0, 0) at the top left.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def _choice(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


# --- Structure-preserving attention field (Eq. 2–6) ---


def _normalised(tokens, similarity):
    """A vector over its norm (`cosine`), or over its squared norm as Eq. 3 prints it (`printed`); zero stays zero."""
    _choice("similarity", similarity, ("cosine", "printed"))
    squared_norm = tokens.square().sum(-1, keepdim=True).clamp_min(1e-24)
    return tokens / (squared_norm.sqrt() if similarity == "cosine" else squared_norm)


def pool(tokens: Tensor, subject: Tensor | None = None) -> Tensor:
    """CLS_xr of Eq. 3, (B, 1, d) in fp32: the mean of a reference's tokens H_xr (B, P_r, d).

    `subject` (B, P_r) in {0, 1} says which of them lie on the subject: the mean is then over those alone (R20), and 0
    where that is none (preparing pairs refuses such a reference; a check here would halt a GPU in every layer).
    """
    tokens = tokens.float()
    if subject is None:
        return tokens.mean(1, keepdim=True)
    share = subject / subject.sum(1, keepdim=True).clamp_min(1)
    return (tokens * share[..., None]).sum(1, keepdim=True)


def layer_correspondence(
    target_tokens: Tensor,
    reference_tokens: list[Tensor],
    similarity: str = "cosine",
    subject_tokens: list[Tensor] | None = None,
) -> Tensor:
    """One layer's term of Eq. 3: how well each target token fits each subject, ⟨CLS_xr, H_xt⟩ of normalised vectors.

    target_tokens H_xt (B, P_t, d); reference_tokens H_xr: one (B, P_r, d) per subject, P_r may differ; subject_tokens:
    one (B, P_r) in {0, 1} per subject, or None to pool all tokens (R20); returns (B, S, P_t), fp32 (under autocast
    too: there is no matrix product here).
    """
    if not reference_tokens:
        raise ValueError("reference_tokens is empty: Eq. 3 needs one (B, P_r, d) tensor per subject")
    target = _normalised(target_tokens.float(), similarity)
    pooled = subject_tokens or [None] * len(reference_tokens)
    scores = []
    for subject, (tokens, own) in enumerate(zip(reference_tokens, pooled, strict=True)):
        if tokens.shape[::2] != target.shape[::2]:
            shapes = f"{tuple(tokens.shape)} for target tokens {tuple(target.shape)}"
            raise ValueError(f"subject {subject} has reference tokens {shapes}: batch and channels must agree")
        cls = _normalised(pool(tokens, own), similarity)
        scores.append((cls * target).sum(-1))
    return torch.stack(scores, 1)


def correspondence(
    target_tokens, reference_tokens, similarity: str = "cosine", subject_tokens: list[Tensor] | None = None
) -> Tensor:
    """Eq. 3: S, the mean of `layer_correspondence` over the N multi-modal attention layers.

    target_tokens[i] (B, P_t, d) and reference_tokens[i], a list over subjects of (B, P_r, d), belong to layer i; their
    grids are the same in all layers, and so are the subject_tokens. Returns (B, S, P_t), fp32.
    """
    layers = zip(target_tokens, reference_tokens, strict=True)
    terms = [layer_correspondence(target, references, similarity, subject_tokens) for target, references in layers]
    if not terms:
        raise ValueError("no layers: Eq. 3 is a mean over at least one attention layer")
    return sum(terms) / len(terms)


class CorrespondenceTap:
    """Folds Eq. 3 layer by layer while a forward pass runs, so that no layer's tokens need to be kept.

    Hand it to `backbone.predict(..., taps=tap)`, which calls `tap(layer, target_tokens, reference_tokens)`; then read
    `tap.result()`, (B, S, P_t). One tap serves one pass. Calls after `result()` are ignored, because gradient
    checkpointing runs the layers a second time during the backward pass.

    layers   "all" the backbone offers, or a collection of layer indices (R2)
    samples  which rows of the batch to look at, e.g. slice(0, B) for the winners of [winners; losers]
    features what the backbone hands over (R3): "block_output", or "query_key"
    grid     (h, w) to which scores of other resolutions are resampled (R7: a U-Net's layers differ in size); such a
             layer's call carries its own `grid`
    cover    of each subject's reference the share of every cell that the subject covers, (B, h, w) of `samples`, on a
             grid that every layer's tokens divide; None pools all of a reference's tokens (R20)
    reference_tokens  which are meant, where the backbone has several (R7)
    """

    def __init__(
        self,
        layers="all",
        similarity: str = "cosine",
        samples: slice = slice(None),
        grid=None,
        features="block_output",
        cover: Sequence[Tensor] | None = None,
        reference_tokens="own",
    ):
        if isinstance(layers, str) and layers != "all":
            raise ValueError(f'layers must be "all" or a collection of layer indices; got {layers!r}')
        self.layers = layers if layers == "all" else frozenset(layers)
        self.similarity, self.samples, self.grid, self.features = similarity, samples, grid, features
        self.cover, self.reference_tokens = cover, reference_tokens
        self.mean, self.seen, self.closed = None, set(), False

    @torch.no_grad()
    def __call__(self, layer: int, target_tokens: Tensor, reference_tokens: list[Tensor], grid=None) -> None:
        if self.closed or (self.layers != "all" and layer not in self.layers):
            return
        if layer in self.seen:
            raise RuntimeError(f"layer {layer} was tapped twice: use a new CorrespondenceTap for every forward pass")
        term = self.term(target_tokens[self.samples], [tokens[self.samples] for tokens in reference_tokens])
        if self.grid is not None and grid is not None and tuple(grid) != tuple(self.grid):
            term = to_grid(term, grid, self.grid, mode="bilinear").flatten(2)
        if self.mean is not None and term.shape != self.mean.shape:
            shapes = f"{tuple(term.shape)} after {tuple(self.mean.shape)}"
            raise ValueError(f"layer {layer} scores {shapes}: give tap and call a grid where layers differ in size")
        self.seen.add(layer)
        self.mean = term if self.mean is None else self.mean + (term - self.mean) / len(self.seen)

    def term(self, target: Tensor, references: list[Tensor]) -> Tensor:
        """A layer's term of Eq. 3; a reference token belongs to the subject that covers half of it (R5)."""
        subjects = None
        if self.cover is not None:
            counts = [tokens.shape[1] for tokens in references]
            subjects = [subject_tokens(cover, n) for cover, n in zip(self.cover, counts, strict=True)]
        return layer_correspondence(target, references, self.similarity, subjects)

    def result(self) -> Tensor:
        """S of Eq. 3 over the layers seen, (B, S, P_t)."""
        missing = set() if self.layers == "all" else self.layers - self.seen
        if missing or not self.seen:
            raise RuntimeError(f"layers {sorted(missing) or 'all'} were never tapped; tapped: {sorted(self.seen)}")
        self.closed = True
        return self.mean


def to_grid(tokens: Tensor, grid, size, mode: str = "nearest") -> Tensor:
    """Tokens (B, ..., P) on `grid` (h, w), row-major, to a map (B, ..., *size); `nearest` repeats, `bilinear` blends.

    Used where the token grid is coarser than the latent grid: FLUX packs 2×2 latents into one token.
    """
    if tokens.shape[-1] != math.prod(grid):
        raise ValueError(f"{tokens.shape[-1]} tokens do not fill a {grid[0]}×{grid[1]} grid")
    maps = F.interpolate(tokens.float().reshape(-1, 1, *grid), tuple(size), mode=mode)
    return maps.reshape(*tokens.shape[:-1], *size)


def prior_tokens(prior: Tensor, grid) -> Tensor:
    """M_prior on the token grid (R5): a token belongs to a subject that covers at least half of its area.

    prior (B, S, H, W) in [0, 1], one mask per subject; returns (B, S, P_t) in {0, 1}.
    """
    if prior.ndim != 4:
        raise ValueError(f"prior must be (B, S, H, W), one mask per subject; got {tuple(prior.shape)}")
    return (F.adaptive_avg_pool2d(prior.float(), tuple(grid)) >= 0.5).float().flatten(2)


def subject_tokens(cover: Tensor, count: int) -> Tensor:
    """Which of a reference's `count` tokens lie on its subject, (B, count) in {0, 1}, by the rule of `prior_tokens`.

    cover (B, h, w): the share of each cell that the subject covers; a token is a square of cells.
    """
    h, w = cover.shape[-2:]
    side = round((h * w / count) ** 0.5)
    if h % side or w % side or (h // side) * (w // side) != count:
        raise ValueError(f"{count} tokens do not divide a reference of {h}×{w} cells: its sides must be multiples")
    return prior_tokens(cover[:, None], (h // side, w // side))[:, 0]


def matched(correspondence: Tensor, prior_tokens: Tensor) -> Tensor:
    """Eq. 4–5: M', the K tokens that fit a subject best, K = the number of that subject's prior tokens.

    Both arguments and the result are (B, S, P_t). Exactly K tokens are chosen; of equal scores the earlier token wins.
    """
    order = correspondence.argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1)  # the inverse permutation: the place of every token in its subject's ranking
    return (rank < prior_tokens.sum(-1, keepdim=True)).float()


def hit_rate(matched: Tensor, prior_tokens: Tensor) -> Tensor:
    """Share of each subject's K tokens that its M' takes, (B, S); random scores take K/P_t of them."""
    return (matched * prior_tokens).sum(-1) / prior_tokens.sum(-1)


def confusion(matched: Tensor, prior_tokens: Tensor) -> Tensor:
    """Share of each subject's M' that lies on other subjects and not on its own, (B, S)."""
    anyone = prior_tokens.amax(1, keepdim=True)
    return (matched * anyone * (1 - prior_tokens)).sum(-1) / prior_tokens.sum(-1)


def structure_field(prior_tokens: Tensor, matched: Tensor, multi_subject: str = "per_subject") -> Tensor:
    """Eq. 6: M_s = M_prior \\ M', the subject tokens that their reference does not reach.

    Both arguments (B, S, P_t) in {0, 1}; returns (B, P_t). With several subjects (R6), `per_subject` is
    ∪ᵣ (prior_r \\ matched_r): a token of A that only reference B claims stays in focus, it is a confusion. `union` is
    prior \\ ∪ᵣ matched_r: any reference's claim settles a token.
    """
    _choice("multi_subject", multi_subject, ("per_subject", "union"))
    if multi_subject == "per_subject":
        return (prior_tokens * (1 - matched)).amax(1)
    return prior_tokens.amax(1) * (1 - matched.amax(1))


# --- Detail-preserving complexity estimator (Eq. 7–8) ---


def _box_sum(x, window, dim):
    """Sums over `window` neighbours along `dim`, which is padded by window - 1; log2(window) additions of slices."""
    length = x.shape[dim] - window + 1
    total, offset, width = 0, 0, 1
    while True:  # `x` holds sums over `width` neighbours; `total` collects the binary digits of `window`
        if window & width:
            total = total + x.narrow(dim, offset, length)
            offset += width
        if 2 * width > window:
            return total
        kept = x.shape[dim] - width
        x = x.narrow(dim, 0, kept) + x.narrow(dim, width, kept)
        width *= 2


def patch_entropy(gray: Tensor, window: int, bins: int = 256, kernel: str = "box") -> Tensor:
    """Eq. 7: C_p, Shannon entropy in bits of the grey levels in the window×window patch around every pixel (R8).

    gray (B, H, W), whole numbers 0–255; returns (B, H, W), fp32. Patches are cut at the image border. `bins` < 256
    merges neighbouring grey levels. By `kernel` (R21) every pixel of the patch counts alike (`box`: the result equals
    `skimage.filters.rank.entropy` with a square footprint), or by its distance d from the centre, exp(−d²/2σ²) with
    σ = window/6 (`gaussian`).
    """
    _choice("kernel", kernel, ("box", "gaussian"))
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window must be odd, so that a patch has a centre; got {window}")
    if not 1 <= bins <= 256:
        raise ValueError(f"bins must be 1–256; got {bins}")
    levels = gray.to(torch.int32) * bins // 256
    # Working memory is bounded by `cells` counts, whatever the batch: small enough for a CPU's cache, large for a GPU.
    cells = 2**20 if gray.device.type == "cpu" else 2**25
    images = max(1, cells // (8 * levels[0].numel()))
    count = {"box": _box_count, "gaussian": _gaussian_count}[kernel]
    return torch.cat([_entropy(part, lambda marked: count(marked, window), cells) for part in levels.split(images)])


def _box_count(marked, window):
    """How many pixels of each patch are marked; `marked` (..., H, W) bool."""
    counter = torch.int16 if window <= 181 else torch.int32
    padded = F.pad(marked.to(counter), [window // 2] * 4)
    return _box_sum(_box_sum(padded, window, -1), window, -2).float()


def _gaussian_count(marked, window):
    """The weight of each patch's marked pixels: a Gaussian is a product of one along y and one along x."""
    distance = torch.arange(window, device=marked.device) - window // 2
    weights = torch.exp(-0.5 * (distance / (window / 6)) ** 2)
    maps = marked.float().flatten(0, -3)[:, None]
    maps = F.conv2d(
        F.conv2d(maps, weights.view(1, 1, -1, 1), padding="same"), weights.view(1, 1, 1, -1), padding="same"
    )
    return maps.reshape(marked.shape)


def _entropy(levels, count, cells):
    """H = log2 n − (1/n) Σ_b c_b log2 c_b, where c_b of the n pixels in a patch have level b; `levels` (B, H, W).

    `count` tells n and c_b of every patch from the pixels that are marked; pixels may count by a weight.
    """

    total = torch.zeros(levels.shape, device=levels.device)
    for some in levels.unique().split(max(1, cells // levels.numel())):
        counts = count(levels[:, None] == some[:, None, None])
        total += torch.xlogy(counts, counts).sum(1)
    pixels = count(torch.ones_like(levels[:1]))
    return ((pixels.log() - total / pixels) / math.log(2)).clamp_min(0)


def detail_field(images: Tensor, grid, window: int, bins: int = 256, kernel: str = "box") -> Tensor:
    """Eq. 7–8: M_d, patch entropy of the winner, min–max scaled over its whole image, then averaged to `grid`.

    images (B, 3, H, W) in [-1, 1]; returns (B, h, w) in [0, 1] for grid = (h, w). C_min and C_max are taken over all
    pixels' patches, before downsampling, as Eq. 8 says "all local regions of the entire image": the result is then
    the mean of M_d over a cell and does not depend on the grid, and one cell alone need not reach 0 or 1. A flat image,
    which has C_min = C_max, has M_d = 0 (R9).
    """
    red, green, blue = ((images.float() + 1) * 127.5).round().clamp(0, 255).unbind(1)
    # ITU-R 601 luma with Pillow's weights ("L"): whole numbers below 2²⁴, so fp32 rounds alike on every device.
    gray = ((19595 * red + 38470 * green + 7471 * blue + 32768) / 65536).floor()
    entropy = patch_entropy(gray, window, bins, kernel)
    low, high = entropy.amin((1, 2), keepdim=True), entropy.amax((1, 2), keepdim=True)
    # 1e-5 bits is far below any real range and far above fp32 rounding, which would otherwise be blown up to [0, 1].
    span = high - low
    detail = torch.where(span > 1e-5, (entropy - low) / span.clamp_min(1e-5), 0.0)
    return F.adaptive_avg_pool2d(detail, tuple(grid))


# --- Fusion (Eq. 9) ---


def fuse(structure: Tensor, detail: Tensor, prior: Tensor, tau: float = 0.1, gamma: float = 0.3):
    """Eq. 9: M = M_s where A_focus > τ, else γ M_s + (1 − γ) M_d ⊙ M_prior, decided for every sample on its own.

    structure M_s, detail M_d, prior M_prior (all subjects): (B, ...) alike, on any grid. Returns focus M (B, ...) and
    focus_coverage A_focus = ‖M_s‖₁ / ‖M_prior‖₁ (B,), both fp32.
    """
    if not structure.shape == detail.shape == prior.shape:
        shapes = ", ".join(str(tuple(field.shape)) for field in (structure, detail, prior))
        raise ValueError(f"structure, detail and prior must have one shape; got {shapes}")
    structure, detail, prior = structure.float(), detail.float(), prior.float()
    size = prior.flatten(1).sum(1)
    if empty := (size == 0).nonzero().flatten().tolist():
        advice = "drop these pairs, or use a finer grid if their subjects cover less than half of every token"
        raise ValueError(f"samples {empty} have an empty prior, so A_focus is 0/0: {advice}")
    coverage = structure.flatten(1).sum(1) / size
    mixed = gamma * structure + (1 - gamma) * detail * prior
    focused = (coverage > tau).reshape(-1, *[1] * (structure.ndim - 1))
    return torch.where(focused, structure, mixed), coverage


# --- Steps 1–3 of Algorithm 1, from a tap's scores to the weight of Eq. 10 ---


class Focus(NamedTuple):
    """Every mask of one batch on the latent grid (B, h, w); matched is per subject (B, S, h, w), coverage is (B,).

    hit and confusion (B,) say of M' what `hit_rate` and `confusion` do, the mean over subjects; chance is K/P_t.
    """

    matched: Tensor
    structure: Tensor
    focus: Tensor
    coverage: Tensor
    hit: Tensor
    confusion: Tensor
    chance: Tensor


def focus_field(
    correspondence: Tensor,
    prior_tokens: Tensor,
    detail: Tensor,
    grid,
    *,
    multi_subject: str = "per_subject",
    tau: float = 0.1,
    gamma: float = 0.3,
) -> Focus:
    """Eq. 4–9: S and M_prior on the token grid, both (B, S, P_t), and M_d (B, h, w) → the fused weight M (B, h, w).

    Token masks are repeated onto the latent grid, so that A_focus is the same on both.
    """
    size = detail.shape[-2:]
    hits = matched(correspondence, prior_tokens)
    structure = to_grid(structure_field(prior_tokens, hits, multi_subject), grid, size)
    prior = to_grid(prior_tokens.amax(1), grid, size)
    focus, coverage = fuse(structure, detail, prior, tau, gamma)
    found = (hit_rate(hits, prior_tokens), confusion(hits, prior_tokens), prior_tokens.mean(-1))
    return Focus(to_grid(hits, grid, size), structure, focus, coverage, *(grade.mean(1) for grade in found))
