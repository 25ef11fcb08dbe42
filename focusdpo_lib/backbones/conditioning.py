"""What a prediction is conditioned on: computed once per dataset, indexed per batch."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Conditioning:
    """Text and reference conditioning of B samples with S references each.

    text: (B, L, d) token embeddings; pooled: (B, d_pooled); references: S latents or image tokens (B, …), one per
    subject; regions: (B, S, h, w) in [0, 1], where each reference may act, or None: everywhere.
    """

    text: torch.Tensor
    pooled: torch.Tensor
    references: tuple[torch.Tensor, ...]
    regions: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.text)

    def _map(self, function) -> "Conditioning":
        regions = None if self.regions is None else function(self.regions)
        references = tuple(function(reference) for reference in self.references)
        return Conditioning(function(self.text), function(self.pooled), references, regions)

    def __getitem__(self, index) -> "Conditioning":
        """The samples of an index, slice or mask over the batch."""
        return self._map(lambda x: x[index])

    def to(self, device) -> "Conditioning":
        return self._map(lambda x: x.to(device))

    def twice(self) -> "Conditioning":
        """The batch followed by itself: winners and losers share their conditioning."""
        return self._map(lambda x: torch.cat([x, x]))

    @staticmethod
    def join(parts: "list[Conditioning]") -> "Conditioning":
        """Batches with the same number of references, one after the other."""
        return Conditioning(
            torch.cat([p.text for p in parts]),
            torch.cat([p.pooled for p in parts]),
            tuple(torch.cat(same) for same in zip(*(p.references for p in parts), strict=True)),
            None if parts[0].regions is None else torch.cat([p.regions for p in parts]),
        )
