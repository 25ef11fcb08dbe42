"""From drafts to the dataset: which become pairs, in which split, and what is said of them."""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd

from focusdpo_lib.dip import drafts
from focusdpo_lib.dip.chain import Draft
from focusdpo_lib.dip.dataset import SPLITS, DatasetError, write_dataset
from focusdpo_lib.dip.pair import Pair
from focusdpo_lib.dip.rows import Encoded
from focusdpo_lib.dip.scoring import NAME as SCORED
from focusdpo_lib.runs import atomic

DECISIONS = "curation.csv"  # beside the pairs: every draft that was scored, and why it is out


def pair_of(draft: Draft) -> Pair:
    """A draft that has been through every stage, as a pair."""
    return Pair(**{name: getattr(draft, name) for name in Pair.__dataclass_fields__})


def write_pairs(folder: Path, chain: Path, decisions: pd.DataFrame, tolerance: int = 0) -> None:
    """Writes the drafts of a chain's folder that `decisions` (of `curation.curated`) keep, and the decisions beside.

    A part of drafts is in memory at a time. A split in which nothing is left is not written. Raises DatasetError where
    an identity stands in two splits, where no pair for training is left, and for a pair with a defect.
    """
    kept = decisions[decisions["out"] == ""]
    if "train" not in set(kept["split"]):
        most = decisions["out"].value_counts().index[:1].tolist() or ["there was none"]
        raise DatasetError(
            f"of {len(decisions)} drafts in {chain} none is left to train on (most often: {most[0]}): loosen that "
            "limit of curation, or make more"
        )
    encoded: Encoded = {}
    seen: dict[str, str] = {}
    splits = {s: _kept(chain, s, set(kept["id"][kept["split"] == s]), encoded, seen) for s in SPLITS}
    write_dataset(folder, {s: pairs for s, pairs in splits.items() if s in set(kept["split"])}, tolerance, encoded)
    with atomic(folder / DECISIONS) as partial:
        decisions.drop(columns=["signature", "subjects"]).to_csv(partial, index=False)


def _kept(chain: Path, split: str, wanted: Collection[str], encoded: Encoded, seen: dict[str, str]) -> Iterator[Pair]:
    """The wanted drafts of a split; a part that has none of them is not opened."""
    for path in drafts.parts(chain, SCORED):
        if wanted.isdisjoint(drafts.column(path, "id")):
            continue
        encoded.clear()
        for draft in drafts.read(path, encoded, only=wanted):
            _check_split(draft, seen)
            yield pair_of(draft)


def _check_split(draft: Draft, seen: dict[str, str]) -> None:
    for identity in draft.identities:
        if (there := seen.setdefault(identity, draft.split)) != draft.split:
            raise DatasetError(
                f"the identity {identity!r} stands in {there} and, with the pair {draft.id!r}, in {draft.split}: give "
                "the plan's drafts their splits by `splits_by_identity`"
            )


def splits_by_identity(identities: Sequence[Sequence[str]], shares: Mapping[str, float], seed: int = 0) -> list[str]:
    """A split for each pair, given who its subjects are: no identity is in two splits, whatever pairs join them.

    Pairs that share an identity, or are joined by others that do, go together; which split such a group goes to is a
    hash of the smallest name in it and `seed`, so that it depends neither on the order of the pairs nor on the machine.
    `shares` of the groups are expected in each split; a group of more than a tenth of all pairs, which would upset
    them, goes to the split with the largest share, unless all its identities are of one split by themselves.
    """
    group: dict[str, str] = {}

    def root(name: str) -> str:
        while (above := group.setdefault(name, name)) != name:
            group[name] = group[above]  # half the way up, for the next who asks
            name = above
        return name

    for names in identities:
        roots = sorted({root(name) for name in names})
        for other in roots[1:]:
            group[other] = roots[0]  # the smallest name of all, since each root is the smallest of its group
    roots = [root(names[0]) for names in identities]
    of_its_own = {name: set() for name in roots}
    for name in group:
        of_its_own[root(name)].add(split_of(name, shares, seed))
    large, most = Counter(roots), max(shares, key=shares.get)
    upset = {name for name in of_its_own if 10 * large[name] > len(roots) > 10 and len(of_its_own[name]) > 1}
    return [most if name in upset else split_of(name, shares, seed) for name in roots]


def split_of(name: str, shares: Mapping[str, float], seed: int = 0) -> str:
    """The split of an identity that stands alone: a hash of its name and `seed`, as frequent as its share.

    A plan that joins only identities of one split keeps the shares, however many pairs it makes of them.
    """
    at = int.from_bytes(hashlib.sha256(f"{seed}|{name}".encode()).digest()[:8], "big") / 2**64 * sum(shares.values())
    for split, share in shares.items():
        if at < share:
            return split
        at -= share
    return split
