"""What a prediction is conditioned on: computed once per dataset, indexed per batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch


class View(NamedTuple):
    """A reference as the network itself can look at it (R7): latents (B, C, h, w) and its subject's class as prompt."""

    latents: torch.Tensor
    text: torch.Tensor
    pooled: torch.Tensor


@dataclass(frozen=True)
class Conditioning:
    """Text and reference conditioning of B samples with S references each.

    text: (B, L, d) token embeddings; pooled: (B, d_pooled); references: S latents or image tokens (B, …), one per
    subject; regions: (B, S, h, w) in [0, 1], where each reference may act, or None: everywhere; views: S, where masks
    are to be derived from them, else none.
    """

    text: torch.Tensor
    pooled: torch.Tensor
    references: tuple[torch.Tensor, ...]
    regions: torch.Tensor | None = None
    views: tuple[View, ...] = ()

    def __len__(self) -> int:
        return len(self.text)

    def _map(self, function: Callable) -> "Conditioning":
        regions = None if self.regions is None else function(self.regions)
        references = tuple(function(reference) for reference in self.references)
        views = tuple(View(*map(function, view)) for view in self.views)
        return Conditioning(function(self.text), function(self.pooled), references, regions, views)

    def __getitem__(self, index) -> "Conditioning":
        """The samples of an index, slice or mask over the batch."""
        return self._map(lambda x: x[index])

    def to(self, device) -> "Conditioning":
        return self._map(lambda x: x.to(device))

    def twice(self) -> "Conditioning":
        """The batch followed by itself: winners and losers share their conditioning, and only winners have views."""
        both = self._map(lambda x: torch.cat([x, x]))
        return Conditioning(both.text, both.pooled, both.references, both.regions, self.views)

    @staticmethod
    def join(parts: "list[Conditioning]") -> "Conditioning":
        """Batches with the same number of references, one after the other."""
        return Conditioning(
            torch.cat([p.text for p in parts]),
            torch.cat([p.pooled for p in parts]),
            tuple(torch.cat(same) for same in zip(*(p.references for p in parts), strict=True)),
            None if parts[0].regions is None else torch.cat([p.regions for p in parts]),
            tuple(
                View(*map(torch.cat, zip(*same, strict=True))) for same in zip(*(p.views for p in parts), strict=True)
            ),
        )
