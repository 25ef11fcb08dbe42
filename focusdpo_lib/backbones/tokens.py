"""FLUX's tokens: 2×2 packing of latents, UNO's position ids, and hooks that hand a block's tokens to a tap."""

from collections.abc import Sequence

import torch
from diffusers import FluxPipeline
from torch import nn


def pack(latents: torch.Tensor) -> torch.Tensor:
    """2×2 packing, (B, C, H, W) → tokens (B, H/2 · W/2, 4 C), row-major."""
    b, c, h, w = latents.shape
    return FluxPipeline._pack_latents(latents, b, c, h, w)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Inverse of `pack` for latents of height × width."""
    b, _, c = tokens.shape
    tokens = tokens.view(b, height // 2, width // 2, c // 4, 2, 2)
    return tokens.permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, height, width)


def position_ids(target: tuple[int, int], references: Sequence[tuple[int, int]], mode: str = "d") -> torch.Tensor:
    """UNO's ids (0, y, x) of target and reference tokens, (P_t + Σ P_r, 3); sizes are token grids (height, width).

    In mode d a reference starts at the height and width where everything before it ends (diagonally), in h and w only
    one of the two is offset, in o neither.
    """
    offset_h, offset_w, ids = 0, 0, []
    for i, (h, w) in enumerate((target, *references)):
        grid = torch.zeros(h, w, 3)
        grid[..., 1] = torch.arange(h)[:, None] + (offset_h if i and mode in "dh" else 0)
        grid[..., 2] = torch.arange(w)[None, :] + (offset_w if i and mode in "dw" else 0)
        ids.append(grid.reshape(-1, 3))
        offset_h, offset_w = offset_h + h, offset_w + w
    return torch.cat(ids)


def output_hook(taps, layer: int, lengths: list[int]):
    """A block returns (text tokens, image tokens), both kinds of block alike."""

    @torch.compiler.disable  # each layer's and step's hook is another: its block would be compiled anew for it
    def hook(module, inputs, output):
        target, *references = output[1].split(lengths, 1)
        taps(layer, target, references)

    return hook


def attention_hooks(taps, layer: int, attention: nn.Module, skipped: int, lengths: list[int]):
    """The target's queries, and the references' keys or queries, as attention takes them: normalised, heads joined."""
    kept = {}

    def split(output):
        return output[:, skipped:].flatten(2).split(lengths, 1)

    @torch.compiler.disable
    def query_hook(module, inputs, output):
        kept["target"], *references = split(output)
        if taps.features == "query":
            taps(layer, kept["target"], references)

    @torch.compiler.disable
    def key_hook(module, inputs, output):
        if taps.features == "query_key":
            taps(layer, kept["target"], list(split(output)[1:]))

    return [attention.norm_q.register_forward_hook(query_hook), attention.norm_k.register_forward_hook(key_hook)]
