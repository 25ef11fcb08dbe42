"""Does Eq. 3 find the subject? Its scores graded against known masks: the toybox's, or those of any DIP dataset.

The paper cannot say so of its model, since nobody knows the masks of its tokens; a DIP dataset's M_prior says it of
ours. What is graded is a *reading*: the settings of `masks` (layers, features, pool, similarity, reference_tokens).
"""

from collections.abc import Sequence
from itertools import groupby, product
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from focusdpo_lib import params
from focusdpo_lib.backbones import Backbone
from focusdpo_lib.masks import CorrespondenceTap, Focus, confusion, hit_rate, matched, to_grid
from focusdpo_lib.training import PreparedPairs, draw_view_noise, focus_masks, generator, new_tap, noised_views

READING = (
    "features",
    "reference_tokens",
    "pool",
    "similarity",
    "layers",
)  # columns that say which reading a row grades
TIE = 0.01  # of the hit rate; a standard error of a hundred pairs' mean is larger
GRADES = ("hit", "chance", "other", "background", "auc")


def scores_against(correspondence: Tensor, prior_tokens: Tensor) -> dict[str, Tensor]:
    """Grades of S against M_prior, both (B, S, P_t); each (B, S).

    hit         share of the subject's K tokens that its M' takes: what M_s then leaves out
    chance      K / P_t, the hit rate of random scores
    other       share of M' on other subjects alone (confusion)
    background  share of M' on no subject; hit + other + background = 1
    auc         area under the ROC curve: how often a token of the subject scores above one that is not; ties count half
    """
    taken = matched(correspondence, prior_tokens)
    hit, other = hit_rate(taken, prior_tokens), confusion(taken, prior_tokens)
    return {
        "hit": hit,
        "chance": prior_tokens.mean(-1),
        "other": other,
        "background": 1 - hit - other,
        "auc": _area_under_roc(correspondence, prior_tokens),
    }


def _area_under_roc(scores: Tensor, labels: Tensor) -> Tensor:
    """Mann and Whitney's: (B, S) from scores and {0, 1} labels (B, S, P)."""
    areas = []
    for score, label in zip(scores.flatten(0, 1), labels.flatten(0, 1), strict=True):
        others, own = score[label == 0].sort().values, score[label == 1].contiguous()
        below = torch.searchsorted(others, own) + torch.searchsorted(others, own, right=True)
        areas.append(below.float().mean() / (2 * len(others)))
    return torch.stack(areas).reshape(scores.shape[:2])


class _Several:
    """Taps of one kind of features and reference tokens as one."""

    def __init__(self, taps: Sequence[CorrespondenceTap]):
        self.taps = taps
        self.features, self.reference_tokens, self.samples = taps[0].features, taps[0].reference_tokens, taps[0].samples

    def __call__(self, *tokens, **facts) -> None:
        for tap in self.taps:
            tap(*tokens, **facts)


def readings(backbone: Backbone, base: params.Masks, **choices: Sequence) -> list[params.Masks]:
    """What `grade` compares: every combination of `choices`, settings of masks and their values, that means something.

    Each for every layer alone, for all, and for FLUX's double-stream blocks.
    """
    total = len(backbone.attention_layers("all"))
    sets = ["all", *[[i] for i in range(total)]]
    if len(backbone.attention_layers("double")) < total:
        sets.insert(0, "double")
    found = []
    for values in product(*choices.values()):
        changed = dict(zip(choices, values, strict=True))
        if changed.get("reference_tokens") == "image_keys" and (changed["pool"], changed["features"]) != (
            "all",
            "query_key",
        ):
            continue
        found += [params.Masks.model_validate(base.model_dump() | changed | {"layers": layers}) for layers in sets]
    return found


class Look(NamedTuple):
    """What one pass over N pairs shows, on the CPU: x_t (N, C, h, w), S (N, S, P_t) and the masks."""

    noised: Tensor
    scores: Tensor
    focus: Focus


@torch.no_grad()
def look(backbone: Backbone, pairs: PreparedPairs, t: float, settings: params.Masks, seed: int = 0) -> Look:
    """ComputeMasks of Algorithm 1 with its steps 2 and 3: noise the winners, run the model once, derive the masks."""
    rows = torch.arange(len(pairs))
    tap = new_tap(backbone, settings, pairs, rows)
    noised = _watch(backbone, pairs, rows, t, tap, *_noise(pairs, seed))
    focus = focus_masks(backbone, tap, pairs, rows, settings)
    return Look(noised.cpu(), tap.result().cpu(), Focus(*(field.cpu() for field in focus)))


def against_truth(
    backbone: Backbone, pairs: PreparedPairs, true: Sequence[Tensor], times: Sequence[float], settings: params.Masks
) -> dict[str, float]:
    """Where masks that may be wrong make the loss look, by the true prior tokens (S, P_t) of each pair; means over all.

    hit: share of M' on its subject's true tokens; weight: share of M² (Eq. 10) on the subjects' true tokens; reached:
    share of these on which M is above 0; detail: share of pairs in the branch of Eq. 9 that looks at detail too.
    """
    tokens, rows = torch.stack(list(true)), []
    for t in times:
        focus = look(backbone, pairs, t, settings).focus
        own = to_grid(tokens, pairs.token_grid, focus.focus.shape[-2:])
        anyone, square = own.amax(1), focus.focus.square()
        hit = (focus.matched * own).sum((-2, -1)) / focus.matched.sum((-2, -1))
        rows.append(
            {
                "hit": hit.mean(),
                "weight": ((square * anyone).sum((-2, -1)) / square.sum((-2, -1)).clamp_min(1e-12)).mean(),
                "reached": (((square > 0) * anyone).sum((-2, -1)) / anyone.sum((-2, -1))).mean(),
                "detail": (focus.coverage <= settings.tau).float().mean(),
            }
        )
    return {name: float(sum(row[name] for row in rows) / len(rows)) for name in rows[0]}


@torch.no_grad()
def grade(
    backbone: Backbone,
    data: dict[int, PreparedPairs],
    readings: Sequence[params.Masks],
    times: Sequence[float],
    seed: int = 0,
    batch: int = 48,
) -> pd.DataFrame:
    """Mean grades of each reading at each time, over the pairs of `data` by their number of references.

    A row has the columns of READING, references, t, subjects (how many were graded), those of GRADES, and coverage and
    fused: the mean A_focus, and the share of pairs in the branch of Eq. 9 that looks at detail too.
    """
    rows = []
    for count, pairs in data.items():
        drawn = _noise(pairs, seed)
        for t, part in product(times, torch.arange(len(pairs)).split(batch)):
            for _, group in groupby(sorted(readings, key=_pass), _pass):
                together = list(group)
                taps = [new_tap(backbone, reading, pairs, part) for reading in together]
                _watch(backbone, pairs, part, t, _Several(taps), *drawn)
                for reading, tap in zip(together, taps, strict=True):
                    rows.append(_row(backbone, pairs, part, reading, tap) | {"references": count, "t": t})
    table, by = pd.DataFrame(rows), [*READING, "references", "t"]
    means = table.columns.difference([*by, "subjects"], sort=False)
    table[means] = table[means].mul(table["subjects"], axis=0)  # parts of a batch's size and the last count by size
    table = table.groupby(by, sort=False).sum()
    return table[means].div(table["subjects"], axis=0).join(table["subjects"]).reset_index()


def recommended(table: pd.DataFrame) -> dict[str, str | list[int]]:
    """The settings of `masks` with the highest hit rate, the mean over times and numbers of references.

    Of readings that are nearly as good (TIE) one of more layers goes before one of less, as the paper has the mean over
    all: a single layer may only have been lucky with these pairs.
    """
    hits = table.groupby(list(READING), sort=False)["hit"].mean().reset_index()
    good = hits[hits["hit"] >= hits["hit"].max() - TIE]
    reach = good["layers"].map(lambda layers: {"all": 2, "double": 1}.get(layers, 0))
    best = good[reach == reach.max()].sort_values("hit").iloc[-1]
    found = {name: best[name] for name in READING}
    if found["layers"] not in ("double", "all"):
        found["layers"] = [int(layer) for layer in found["layers"].split("+")]
    return found


def _pass(reading: params.Masks) -> tuple[str, str]:
    """What needs a pass of its own."""
    return reading.features, reading.reference_tokens


def _noise(pairs: PreparedPairs, seed: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Noise for the winners, and for the views of their references."""
    source = generator(seed, 0)
    return torch.randn(pairs.win.shape, generator=source), draw_view_noise(pairs.conditioning, len(pairs), source)


def _watch(backbone: Backbone, pairs: PreparedPairs, rows: Tensor, t: float, tap, noise, view_noise) -> Tensor:
    """Runs the model on the winners of some rows at t, with a tap; returns x_t."""
    times = torch.full((len(rows),), float(t), device=backbone.device)
    condition = pairs.conditioning[rows].to(backbone.device)
    condition = noised_views(backbone, condition, [n[rows] for n in view_noise], times)
    noised = backbone.noised(pairs.win[rows].to(backbone.device), noise[rows].to(backbone.device), times)
    backbone.predict(noised, times, condition, taps=tap)
    return noised


def _row(backbone: Backbone, pairs: PreparedPairs, rows: Tensor, reading: params.Masks, tap: CorrespondenceTap) -> dict:
    """The means of one reading over the subjects of some pairs."""
    prior = pairs.prior_tokens[rows].to(backbone.device)
    grades = {name: value.mean().item() for name, value in scores_against(tap.result(), prior).items()}
    coverage = focus_masks(backbone, tap, pairs, rows, reading).coverage
    layers = reading.layers if isinstance(reading.layers, str) else "+".join(map(str, reading.layers))
    return {
        **{name: getattr(reading, name) for name in READING},
        "layers": layers,
        **grades,
        "coverage": coverage.mean().item(),
        "fused": (coverage <= reading.tau).float().mean().item(),
        "subjects": prior.shape[0] * prior.shape[1],
    }
