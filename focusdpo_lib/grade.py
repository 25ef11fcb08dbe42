"""Does Eq. 3 find the subject? Its scores graded against known masks: the toybox's, or those of any DIP dataset.

The paper cannot say so of its model, since nobody knows the masks of its tokens; a DIP dataset's M_prior says it of
ours. What is graded is a *reading*: the settings of `masks` (layers, features, pool, similarity, source).
"""

from collections.abc import Iterator, Sequence
from itertools import groupby, product

import pandas as pd
import torch
from torch import Tensor

from focusdpo_lib import params
from focusdpo_lib.backbones import Backbone
from focusdpo_lib.masks import CorrespondenceTap, confusion, hit_rate, matched
from focusdpo_lib.training import PreparedPairs, draw_view_noise, focus_masks, generator, new_tap, noised_views

READING = ("features", "source", "pool", "similarity", "layers")  # columns that say which reading a row grades
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
    """Taps of one kind of features and source as one."""

    def __init__(self, taps: Sequence[CorrespondenceTap]):
        self.taps = taps
        self.features, self.source, self.samples = taps[0].features, taps[0].source, taps[0].samples

    def __call__(self, *tokens, **facts) -> None:
        for tap in self.taps:
            tap(*tokens, **facts)


def readings(backbone: Backbone, base: params.Masks, **choices: Sequence) -> list[params.Masks]:
    """Every combination of `choices` (settings of masks and their values) that means something, for each single layer
    and for all, and for FLUX's double-stream blocks: what `grade` compares."""
    total = len(backbone.attention_layers("all"))
    sets = ["all", *[[i] for i in range(total)]]
    if len(backbone.attention_layers("double")) < total:
        sets.insert(0, "double")
    found = []
    for values in product(*choices.values()):
        changed = dict(zip(choices, values, strict=True))
        if changed.get("source") == "image_keys" and (changed["pool"], changed["features"]) != ("all", "query_key"):
            continue
        found += [params.Masks.model_validate(base.model_dump() | changed | {"layers": layers}) for layers in sets]
    return found


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
        source = generator(seed, 0)
        noise = torch.randn(pairs.win.shape, generator=source)
        views = draw_view_noise(pairs.conditioning, len(pairs), source)
        for t in times:
            for part in torch.arange(len(pairs)).split(batch):
                for reading, tap in _looks(backbone, pairs, part, readings, noise, views, t):
                    rows.append(_row(backbone, pairs, part, reading, tap) | {"references": count, "t": t})
    of_parts, by = pd.DataFrame(rows), [*READING, "references", "t"]
    weights = of_parts.pop("subjects")
    means = [name for name in of_parts if name not in by]
    summed = of_parts.assign(**{name: of_parts[name] * weights for name in means}, subjects=weights)
    summed = summed.groupby(by, sort=False)[[*means, "subjects"]].sum()
    return summed[means].div(summed["subjects"], axis=0).join(summed["subjects"]).reset_index()


def _looks(backbone, pairs, rows, readings, noise, views, t) -> Iterator[tuple[params.Masks, CorrespondenceTap]]:
    """Every reading with the tap that watched it: one pass for each kind of features and source."""

    def kind(reading: params.Masks) -> tuple[str, str]:
        return reading.features, reading.source

    times = torch.full((len(rows),), t, device=backbone.device)
    condition = pairs.conditioning[rows].to(backbone.device)
    condition = noised_views(backbone, condition, [n[rows] for n in views], times)
    noised = backbone.noised(pairs.win[rows].to(backbone.device), noise[rows].to(backbone.device), times)
    for _, group in groupby(sorted(readings, key=kind), kind):
        together = list(group)
        taps = [new_tap(backbone, reading, pairs, rows) for reading in together]
        backbone.predict(noised, times, condition, taps=_Several(taps))
        yield from zip(together, taps, strict=True)


def _row(backbone, pairs: PreparedPairs, rows: Tensor, reading: params.Masks, tap: CorrespondenceTap) -> dict:
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
