"""Where the error went: base and policy on held-out pairs, inside and outside the subjects' prior masks."""

import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pandas as pd
import torch

from focusdpo_lib import params
from focusdpo_lib.backbones import Backbone
from focusdpo_lib.dip.dataset import Pair
from focusdpo_lib.masks import to_grid
from focusdpo_lib.runs import atomic
from focusdpo_lib.training.pairs import BATCHES, PreparedPairs, batches, groups, prepare
from focusdpo_lib.workers import SILENT, WHOLE, Progress, Shard

TIMES = (0.3, 0.5, 0.7)
CELLS = 2**13  # of latents that go through the network at once: 32 images of 16×16, two of 64×64
KEY = ["image", "region"]


def measure_into(
    folder: Path,
    backbone: Backbone,
    pairs: Sequence[Pair],
    masks: params.Masks,
    *,
    times: Sequence[float] = TIMES,
    seed: int = 0,
    shard: Shard = WHOLE,
    progress: Progress = SILENT,
) -> None:
    """Measures every batch of pairs that has no file in `folder`; `table` puts them together.

    Winner and loser share noise and times, as in training, and every pair is seen once at each time.
    """
    grouped = groups(pairs)
    size = max(1, CELLS // math.prod(side // backbone.stride for side in next(iter(grouped.values())).sizes[0]))
    todo = [b for b in batches(grouped, backbone, size)[shard[0] :: shard[1]] if not _file(folder, *b[:2]).exists()]
    progress.expects(sum(len(rows) for *_, rows in todo))
    for count, at, rows in todo:
        progress.begins(f"pair {grouped[count].ids[rows[0]]}")
        prepared = prepare(backbone, [pairs[i] for i in rows], masks)[count]
        draw = torch.Generator().manual_seed(seed + count)
        noise = torch.randn(len(grouped[count].ids), *prepared.win.shape[1:], generator=draw)
        with atomic(_file(folder, count, at)) as partial:
            _errors(backbone, prepared, noise[at : at + len(rows)], times).to_csv(partial)
        progress.done(len(rows))


@torch.no_grad()
def _errors(backbone: Backbone, pairs: PreparedPairs, noise: torch.Tensor, times: Sequence[float]) -> pd.DataFrame:
    """Sums of squared errors (base, trained) and how many latents each is over (area), by image and region."""
    inside = to_grid(pairs.prior_tokens.amax(1), pairs.token_grid, pairs.win.shape[-2:])
    regions = {"subjects": inside, "background": 1 - inside}
    condition, sums = pairs.conditioning.to(backbone.device), {}
    for (image, clean), t in product((("winner", pairs.win), ("loser", pairs.lose)), times):
        x, e, at = (value.to(backbone.device) for value in (clean, noise, torch.full((len(pairs),), t)))
        arguments = backbone.noised(x, e, at), at, condition
        with backbone.reference_model():
            found = {"base": backbone.predict(*arguments)}
        found["trained"] = backbone.predict(*arguments)
        errors = {
            name: (predicted - backbone.target(x, e, at)).square().mean(1).cpu() for name, predicted in found.items()
        }
        for region, mask in regions.items():
            total = sums.setdefault((image, region), dict.fromkeys((*errors, "area"), 0.0))
            for name, error in errors.items():
                total[name] += (error * mask).sum().item()
            total["area"] += mask.sum().item()
    return pd.DataFrame(sums).T.rename_axis(KEY)


def table(folder: Path) -> pd.DataFrame:
    """Mean squared errors of what `measure_into` measured: columns base, trained and change (trained / base − 1)."""
    files = sorted((Path(folder) / BATCHES).glob("*.csv"))
    sums = sum((pd.read_csv(file, index_col=KEY) for file in files[1:]), pd.read_csv(files[0], index_col=KEY))
    means = sums[["base", "trained"]].div(sums["area"], axis=0)
    return means.assign(change=means["trained"] / means["base"] - 1)


def _file(folder: Path, count: int, at: int) -> Path:
    return Path(folder) / BATCHES / f"{count}-{at:09d}.csv"
