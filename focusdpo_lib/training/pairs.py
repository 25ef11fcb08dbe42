"""Preference pairs as a training step wants them: latents, conditioning and M_d, computed once per dataset."""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from tqdm import tqdm

from focusdpo_lib import params
from focusdpo_lib.backbones import Backbone, Conditioning, View
from focusdpo_lib.dip.dataset import DatasetError, Pair
from focusdpo_lib.masks import detail_field, prior_tokens, to_grid
from focusdpo_lib.objectives import patch_quality
from focusdpo_lib.training.row_file import RowFile

# Pixels (B, 3, H, W) in [-1, 1] → patch tokens (B, P, d) of a vision encoder, row-major on a square grid.
PatchEncoder = Callable[[torch.Tensor], torch.Tensor]
PIXELS = 2**18  # of winners that are encoded at once: 64 of 64×64, one of 512×512
FILE = "references_{}.safetensors"  # prepared pairs by their number of references


@dataclass(frozen=True)
class PreparedPairs:
    """N pairs with the same number of references S.

    win, lose (N, C, h, w) latents; prior_tokens (N, S, P_t) on `token_grid`; detail (N, h, w), M_d; cover: of each of S
    references the share (N, h_r, w_r) of every latent cell that its subject covers, or none where the dataset has no
    reference masks; quality (N, 2, h, w), PatchDPO's target map and patch-quality map, or None.
    """

    ids: tuple[str, ...]
    win: torch.Tensor
    lose: torch.Tensor
    conditioning: Conditioning
    prior_tokens: torch.Tensor
    detail: torch.Tensor
    token_grid: tuple[int, int]
    cover: tuple[torch.Tensor, ...] = ()
    quality: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)


def pixels(images: Sequence[np.ndarray]) -> torch.Tensor:
    """uint8 images (H, W, 3) of one size → (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def prepare(
    backbone: Backbone,
    pairs: Sequence[Pair],
    masks: params.Masks,
    *,
    patches: PatchEncoder | None = None,
    batch_size: int | None = None,
) -> dict[int, PreparedPairs]:
    """Prepares pairs in memory, grouped by their number of references: a batch can only hold one number.

    `patches` is the vision encoder of PatchDPO's maps, needed for that objective alone; `batch_size` pairs are encoded
    at once (none: as many as their size allows). Raises DatasetError for a subject that covers no token (its K would
    be 0) and for images of sizes that cannot form one batch.
    """
    groups, fitting = _groups(pairs, backbone)
    size = batch_size or fitting
    return {
        count: _join([_prepare(backbone, [pairs[i] for i in rows], masks, patches) for rows in _batched(ids, size)])
        for count, ids in groups.items()
    }


def prepare_into(
    folder: Path,
    backbone: Backbone,
    pairs: Sequence[Pair],
    masks: params.Masks,
    *,
    patches: PatchEncoder | None = None,
    batch_size: int | None = None,
) -> None:
    """As `prepare`, batch by batch into a folder that `load` reads; one that was left unfinished goes on.

    Memory holds one batch, whatever the number of pairs. A pair of FLUX at 512×512 takes 5 MB of disk, 4.2 as text.
    """
    groups, fitting = _groups(pairs, backbone)
    with tqdm(total=len(pairs), desc="pairs", unit="pair", mininterval=5, delay=5, file=sys.stdout, ncols=90) as bar:
        for count, ids in groups.items():
            file = RowFile(Path(folder) / FILE.format(count), len(ids))
            bar.update(file.rows)
            for rows in _batched(list(ids)[file.rows :], batch_size or fitting):
                batch = _prepare(backbone, [pairs[i] for i in rows], masks, patches)
                facts = {"ids": json.dumps([*ids.values()]), "token_grid": json.dumps(batch.token_grid)}
                file.append(_tensors(batch), facts)
                bar.update(len(batch))


def _groups(pairs: Sequence[Pair], backbone: Backbone) -> tuple[dict[int, dict[int, str]], int]:
    """By number of references the ids of the pairs, by index; and how many fit into one batch. Checks all sizes."""
    groups: dict[int, dict[int, str]] = {}
    sizes: dict[int, tuple] = {}
    for i, pair in enumerate(pairs):
        count = len(pair.references)
        groups.setdefault(count, {})[i] = pair.id
        _check_sizes(pair, sizes.setdefault(count, _sizes(pair)), backbone)
    fitting = max([1, *(PIXELS // (height * width) for (height, width), *_ in sizes.values())])
    return dict(sorted(groups.items())), fitting


def _batched(rows: Iterable[int], size: int) -> list[list[int]]:
    rows = list(rows)
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def _sizes(pair: Pair) -> tuple[tuple[int, int], ...]:
    return tuple(image.shape[:2] for image in (pair.win, *pair.references))


def _check_sizes(pair: Pair, expected: tuple[tuple[int, int], ...], backbone: Backbone) -> None:
    sizes = _sizes(pair)
    words = " and ".join(f"{w}×{h}" for h, w in sizes)
    multiples = (backbone.multiple, *[backbone.reference_multiple] * len(pair.references))
    for size, multiple in zip(sizes, multiples, strict=True):
        if any(side % multiple for side in size):
            raise DatasetError(
                f"pair {pair.id}: its images are {words} pixels: crop the one of {size[1]}×{size[0]} to multiples of "
                f"{multiple}"
            )
    if sizes != expected:
        raise DatasetError(
            f"pair {pair.id}: winner and references are {words} pixels, but "
            f"{' and '.join(f'{w}×{h}' for h, w in expected)} in the pairs before it: bring them to one size"
        )


def _prepare(backbone: Backbone, pairs: list[Pair], masks: params.Masks, patches: PatchEncoder | None) -> PreparedPairs:
    win, lose = pixels([p.win for p in pairs]), pixels([p.lose for p in pairs])
    latents = backbone.encode_images(win).cpu()
    grid, size = backbone.token_grid(latents.shape[-2:]), latents.shape[-2:]
    prior = torch.from_numpy(np.stack([p.prior for p in pairs]))
    tokens = prior_tokens(prior, grid)
    for pair, counts in zip(pairs, tokens.sum(-1), strict=True):
        if (counts == 0).any():
            subject = pair.subjects[int((counts == 0).int().argmax())]
            raise DatasetError(
                f"pair {pair.id}: the mask of its {subject} covers half of no token ({grid[0]}×{grid[1]} tokens): "
                "leave the pair out or draw the subject larger"
            )
    window = masks.entropy_window or 2 * backbone.stride + 1
    references = [pixels([p.references[s] for p in pairs]) for s in range(len(pairs[0].references))]
    looked_at = masks.reference_tokens == "own"  # by the network itself, in a pass of their own
    classes = [[p.subjects[s] for p in pairs] for s in range(len(references))] if looked_at else []
    regions = to_grid(tokens, grid, size)
    return PreparedPairs(
        ids=tuple(p.id for p in pairs),
        win=latents,
        lose=backbone.encode_images(lose).cpu(),
        conditioning=backbone.condition([p.prompt for p in pairs], references, regions, classes).to("cpu"),
        prior_tokens=tokens,
        detail=detail_field(win, size, window, masks.entropy_bins, masks.entropy_kernel),
        token_grid=grid,
        cover=_cover(backbone, pairs) if masks.pool == "subject" else (),
        quality=None if patches is None else _quality(patches, win, lose, size),
    )


def _cover(backbone: Backbone, pairs: list[Pair]) -> tuple[torch.Tensor, ...]:
    """`PreparedPairs.cover`. Raises DatasetError for a subject that no token of its reference would belong to."""
    if not all(pair.reference_masks for pair in pairs):
        return ()
    found = []
    for s in range(len(pairs[0].references)):
        masks = torch.from_numpy(np.stack([p.reference_masks[s] for p in pairs])).float()
        cover = F.avg_pool2d(masks, backbone.stride)
        coarsest = prior_tokens(masks[:, None], [side // backbone.reference_multiple for side in masks.shape[-2:]])
        for pair, count in zip(pairs, coarsest.sum((1, 2)), strict=True):
            if count == 0:
                raise DatasetError(
                    f"pair {pair.id}: the mask of its {pair.subjects[s]} covers half of no token of its reference: "
                    "leave the pair out, give a reference that shows the subject larger, or set masks.pool to all"
                )
        found.append(cover)
    return tuple(found)


@torch.no_grad()
def _quality(patches: PatchEncoder, win: torch.Tensor, lose: torch.Tensor, size) -> torch.Tensor:
    """PatchDPO's two maps, (B, 2, h, w): which winner patches the loser reproduces, and how good the loser's are."""
    real, generated = patches(win), patches(lose)
    maps = torch.stack([patch_quality(real, generated), patch_quality(generated, real)], 1).cpu()
    side = round(maps.shape[-1] ** 0.5)
    return to_grid(maps, (side, side), size, mode="bilinear")


def _join(parts: list[PreparedPairs]) -> PreparedPairs:
    return PreparedPairs(
        ids=sum((p.ids for p in parts), ()),
        win=torch.cat([p.win for p in parts]),
        lose=torch.cat([p.lose for p in parts]),
        conditioning=Conditioning.join([p.conditioning for p in parts]),
        prior_tokens=torch.cat([p.prior_tokens for p in parts]),
        detail=torch.cat([p.detail for p in parts]),
        token_grid=parts[0].token_grid,
        cover=tuple(torch.cat(same) for same in zip(*(p.cover for p in parts), strict=True)),
        quality=None if parts[0].quality is None else torch.cat([p.quality for p in parts]),
    )


def _tensors(pairs: PreparedPairs) -> dict[str, torch.Tensor]:
    condition = pairs.conditioning
    tensors = {
        **{name: getattr(pairs, name) for name in ("win", "lose", "prior_tokens", "detail", "quality")},
        **{name: getattr(condition, name) for name in ("text", "pooled", "regions")},
        **{f"reference_{i}": reference for i, reference in enumerate(condition.references)},
        **{f"cover_{i}": cover for i, cover in enumerate(pairs.cover)},
        **{f"view_{name}_{i}": x for i, view in enumerate(condition.views) for name, x in view._asdict().items()},
    }
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def load(folder: Path) -> dict[int, PreparedPairs]:
    """Reads what `prepare_into` wrote. The tensors stay on disk, mapped into memory that all processes share."""
    return dict(_load(path) for path in sorted(Path(folder).glob(FILE.format("*"))))


def _load(path: Path) -> tuple[int, PreparedPairs]:
    with safe_open(path, "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        facts = {name: json.loads(value) for name, value in file.metadata().items()}

    def several(name: str) -> tuple[torch.Tensor, ...]:
        return tuple(found.pop(f"{name}_{i}") for i in range(sum(n.startswith(f"{name}_") for n in found)))

    references, cover = several("reference"), several("cover")
    views = tuple(View(*parts) for parts in zip(*(several(f"view_{name}") for name in View._fields), strict=True))
    text, pooled, regions = (found.pop(name, None) for name in ("text", "pooled", "regions"))
    return len(references), PreparedPairs(
        ids=tuple(facts["ids"]),
        token_grid=tuple(facts["token_grid"]),
        conditioning=Conditioning(text, pooled, references, regions, views),
        cover=cover,
        **found,
    )
