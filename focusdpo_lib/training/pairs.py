"""Preference pairs as a training step wants them: latents, conditioning and M_d, computed once per dataset."""

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from focusdpo_lib import params
from focusdpo_lib.backbones import Backbone, Conditioning, View
from focusdpo_lib.dip.dataset import DatasetError, Pair
from focusdpo_lib.masks import detail_field, prior_tokens, to_grid
from focusdpo_lib.objectives import patch_quality
from focusdpo_lib.runs import RunError, atomic, lost, require_space
from focusdpo_lib.training.row_file import RowFile
from focusdpo_lib.workers import SILENT, WHOLE, Progress, Shard

# Pixels (B, 3, H, W) in [-1, 1] → patch tokens (B, P, d) of a vision encoder, row-major on a square grid.
PatchEncoder = Callable[[torch.Tensor], torch.Tensor]
PIXELS = 2**18  # of winners that are encoded at once: 64 of 64×64, one of 512×512
FILE = "references_{}.safetensors"  # prepared pairs by their number of references
BATCHES = "batches"  # folder of those that are not joined yet


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


@dataclass(frozen=True)
class Group:
    """The pairs with one number of references, which alone can form batches: their ids by index, and the sizes
    (height, width) of winner and references, the same for all."""

    ids: Mapping[int, str]
    sizes: tuple[tuple[int, int], ...]


def groups(pairs: Sequence[Pair]) -> dict[int, Group]:
    """All pairs by their number of references. Raises DatasetError for images of sizes that cannot form one batch."""
    found: dict[int, Group] = {}
    for i, pair in enumerate(pairs):
        sizes = tuple(image.shape[:2] for image in (pair.win, *pair.references))
        group = found.setdefault(len(pair.references), Group({}, sizes))
        if sizes != group.sizes:
            raise DatasetError(
                f"pair {pair.id}: winner and references are {_words(sizes)} pixels, but {_words(group.sizes)} in the "
                "pairs before it: bring them to one size"
            )
        group.ids[i] = pair.id
    return dict(sorted(found.items()))


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
    parts: dict[int, list[PreparedPairs]] = {}
    for count, _, rows in batches(groups(pairs), backbone, batch_size):
        parts.setdefault(count, []).append(_prepare(backbone, [pairs[i] for i in rows], masks, patches))
    return {count: _join(batches) for count, batches in parts.items()}


def prepare_into(
    folder: Path,
    backbone: Backbone,
    pairs: Sequence[Pair],
    masks: params.Masks,
    *,
    patches: PatchEncoder | None = None,
    batch_size: int | None = None,
    grouped: Mapping[int, Group] | None = None,
    shard: Shard = WHOLE,
    progress: Progress = SILENT,
) -> None:
    """As `prepare`, into a file in `folder` for each batch that has none; `join` makes of them what `load` reads.

    Memory holds one batch, whatever the number of pairs. A pair of FLUX at 512×512 takes 5 MB of disk, 4.2 as text.
    `grouped`: `groups(pairs)`, where it is known already. Raises RunError where the disk has no room for all.
    """
    grouped = grouped or groups(pairs)
    mine = batches(grouped, backbone, batch_size)[shard[0] :: shard[1]]
    todo = [batch for batch in mine if not _is_there(folder, *batch, len(grouped[batch[0]].ids))]
    progress.expects(sum(len(rows) for *_, rows in todo))
    for number, (count, at, rows) in enumerate(todo):
        ids = grouped[count].ids
        progress.begins(f"pair {ids[rows[0]]}")
        batch = _prepare(backbone, [pairs[i] for i in rows], masks, patches)
        tensors = _tensors(batch)
        if number == 0:
            of_one = sum(tensor.nbytes for tensor in tensors.values()) // len(rows)
            require_space(folder, of_one * sum(len(rows) for *_, rows in todo), "what training needs of the pairs")
        facts = {"ids": json.dumps([*ids.values()]), "token_grid": json.dumps(batch.token_grid)}
        with atomic(_batch_file(folder, count, at)) as partial:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, facts)
        progress.done(len(rows))


def join(folder: Path) -> None:
    """Puts the batches of `prepare_into`, once all are there, into the files that `load` reads, and deletes them."""
    for path in sorted((Path(folder) / BATCHES).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            facts = dict(sorted(file.metadata().items()))  # safetensors gives them in any order
        count, at = map(int, path.stem.split("-"))
        whole = RowFile(Path(folder) / FILE.format(count), len(json.loads(facts["ids"])))
        if whole.rows < at:
            raise RunError(f"{path.parent} lacks the batch before {path.name}: delete {folder} and run again")
        if whole.rows == at:  # else a kill came between its append and its end
            whole.append(tensors, facts)
        path.unlink()
    shutil.rmtree(Path(folder) / BATCHES, ignore_errors=True)


def _batch_file(folder: Path, count: int, at: int) -> Path:
    return Path(folder) / BATCHES / f"{count}-{at:09d}.safetensors"


def _is_there(folder: Path, count: int, at: int, rows: list[int], total: int) -> bool:
    """Whether a batch is on disk: in its own file, or in the joined one."""
    return _batch_file(folder, count, at).exists() or RowFile(Path(folder) / FILE.format(count), total).rows > at


def batches(grouped: Mapping[int, Group], backbone: Backbone, size: int | None) -> list[tuple[int, int, list[int]]]:
    """All batches: their number of references, the place of their first row among such pairs, and their pairs.

    Raises DatasetError for images that do not fill whole tokens.
    """
    found = []
    for count, group in grouped.items():
        _check_multiples(group, backbone)
        fitting = size or max(1, PIXELS // math.prod(group.sizes[0]))
        indices = list(group.ids)
        found += [(count, at, indices[at : at + fitting]) for at in range(0, len(indices), fitting)]
    return found


def _check_multiples(group: Group, backbone: Backbone) -> None:
    multiples = (backbone.multiple, *[backbone.reference_multiple] * (len(group.sizes) - 1))
    for size, multiple in zip(group.sizes, multiples, strict=True):
        if any(side % multiple for side in size):
            raise DatasetError(
                f"pair {next(iter(group.ids.values()))}: its images are {_words(group.sizes)} pixels: crop the one of "
                f"{size[1]}×{size[0]} to multiples of {multiple}"
            )


def _words(sizes: Sequence[tuple[int, int]]) -> str:
    return " and ".join(f"{width}×{height}" for height, width in sizes)


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
    """Reads what `prepare_into` and `join` made. The tensors stay on disk, mapped into memory all processes share.

    Raises RunError where one of the files is gone or damaged.
    """
    folder = Path(folder)
    paths = sorted(folder.glob(FILE.format("*")))
    if gone := lost(folder) or ([] if paths else [FILE.format("1")]):
        raise RunError(f"the prepared pairs in {folder} lack {', '.join(gone)}: delete {folder} and run again")
    return dict(_load(path) for path in paths)


def _load(path: Path) -> tuple[int, PreparedPairs]:
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            facts = {name: json.loads(value) for name, value in file.metadata().items()}
    except SafetensorError as error:
        raise RunError(f"the prepared pairs {path} are damaged ({error}): delete {path.parent} and run again") from None

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
