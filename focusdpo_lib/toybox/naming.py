"""Middle tokens that name what they show: supervision of the toybox's transformer with what the world knows.

Published transformers of this kind train for thousands of GPU-days; representation alignment (REPA, Yu et al. 2025)
shortens that by asking of the tokens of an early block what a pre-trained encoder sees in the clean image. Here the
world itself says it. The heads are thrown away after training.
"""

import torch
from torch import nn
from torch.nn import functional as F

from focusdpo_lib.toybox.batches import ABSENT, VALUES, slot_labels


class MiddleTokens:
    """A tap (see `FluxUno.predict`) that keeps one layer's tokens: target (B, P_t, d), each reference's (B, P_r, d)."""

    features, reference_tokens = "block_output", "own"

    def __init__(self, layer: int):
        self.layer = layer

    def __call__(self, layer: int, target: torch.Tensor, references: list[torch.Tensor]) -> None:
        if layer == self.layer:
            self.target, self.references = target, references


class Naming(nn.Module):
    """Linear heads that name the attributes of the subject that a token shows; target and references share them."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(values)) for name, values in VALUES.items()})

    def forward(
        self, tokens: MiddleTokens, cover: torch.Tensor, labels: torch.Tensor, kept: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Cross-entropy of the target's tokens, and of the mean of each reference's, and both alone.

        cover (B, S, h, w), the share of each latent cell that a subject covers; labels (B, S, 5); kept (B,) bool:
        samples without prompt and reference are not asked.
        """
        grid = [side // 2 for side in cover.shape[-2:]]
        shown = token_labels(cover, labels, grid).masked_fill(~kept.view(-1, 1, 1), ABSENT)
        of_target = self._loss(tokens.target.flatten(0, 1), shown.flatten(0, 1))
        means = torch.stack([reference.float().mean(1) for reference in tokens.references], 1)
        asked = labels.masked_fill(~kept.view(-1, 1, 1), ABSENT)
        of_references = self._loss(means.flatten(0, 1), asked.flatten(0, 1))
        return of_target + of_references, {"named": of_target.item(), "named_reference": of_references.item()}

    def _loss(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean over attributes of the cross-entropy, tokens (N, d) and labels (N, 5)."""
        tokens = self.norm(tokens.float())
        guesses = [head(tokens) for head in self.heads.values()]
        terms = [F.cross_entropy(g, label, ignore_index=ABSENT) for g, label in zip(guesses, labels.T, strict=True)]
        return sum(terms) / len(terms)


def token_labels(cover: torch.Tensor, labels: torch.Tensor, grid: list[int]) -> torch.Tensor:
    """What each of the P_t tokens shows, (B, P_t, 5): the labels of the subject that covers half of it, or none's."""
    covered = F.adaptive_avg_pool2d(cover, tuple(grid)).flatten(2) >= 0.5
    shown = torch.tensor(slot_labels(None), device=cover.device).expand(*covered[:, 0].shape, -1)
    for subject in range(cover.shape[1]):
        shown = torch.where(covered[:, subject, :, None], labels[:, subject, None], shown)
    return shown
