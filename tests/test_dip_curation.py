"""Curation: what scores say of pairs drawn by hand, who is a near-duplicate of whom, and which pairs are left."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from focusdpo_lib import params, stages
from focusdpo_lib.dip import drafts, pairs, run_sheet, scoring
from focusdpo_lib.dip.card import CARD, licences
from focusdpo_lib.dip.chain import Draft
from focusdpo_lib.dip.curation import DUPLICATE, curated, score_table
from focusdpo_lib.dip.dataset import DatasetError, read_dataset
from focusdpo_lib.dip.pairs import split_of, splits_by_identity
from focusdpo_lib.dip.review import Review
from focusdpo_lib.dip.run import stage_drafts
from focusdpo_lib.runs import RunError

RED, BLUE, GREEN = (255, 0, 0), (0, 0, 255), (0, 255, 0)


class Colours:
    """An encoder whose vector is the mean colour of what is not white, so that likenesses are known by hand."""

    calls = 0

    def images(self, pictures):
        type(self).calls += 1
        rows = [np.asarray(p, float).reshape(-1, 3) for p in pictures]
        means = [x[(x < 255).any(1)].mean(0) if (x < 255).any() else np.ones(3) for x in rows]
        return F.normalize(torch.tensor(np.array(means), dtype=torch.float32), dim=-1)

    def texts(self, texts):
        named = {"red": RED, "blue": BLUE, "green": GREEN}
        return F.normalize(torch.tensor([named[text] for text in texts], dtype=torch.float32), dim=-1)


def draft(win=(RED, BLUE), lose=(GREEN, BLUE), shown=(RED, BLUE), said=("red", "blue"), ground=100):
    """Two subjects of 4 × 4 and 4 × 8 pixels on 16 × 16 of grey; references of 8 × 8, the subject in one quarter."""
    masks = np.zeros((2, 16, 16), bool)
    masks[0, 2:6, 2:6] = masks[1, 8:12, 6:14] = True

    def scene(colours):
        image = np.full((16, 16, 3), ground, np.uint8)
        for mask, colour in zip(masks, colours, strict=True):
            image[mask] = colour
        return image

    corner = np.zeros((8, 8), bool)
    corner[4:, 4:] = True
    references = [np.where(corner[..., None], np.uint8(colour), np.uint8(50)) for colour in shown]
    return Draft(
        **{"id": "a", "prompt": "a mug and a cat", "split": "train", "subjects": ("mug", "cat")},
        identities=("m", "c"),
        **{"references": tuple(references), "win": scene(win), "lose": scene(lose), "masks": tuple(masks)},
        **{"reference_masks": (corner, corner), "captions": said, "disrupted_captions": ("green", "blue")},
    )  # fmt: skip


def scored(*drafts):
    return [made.scores for made in scoring.scored(drafts, Colours(), Colours())]


def test_scores_are_those_that_the_colours_give():
    """Red, green and blue are at right angles: likeness 1 or 0."""
    found = scored(draft())[0]
    assert list(found) == list(scoring.SCORES)
    assert found["similarity"] == pytest.approx(1) and found["caption"] == pytest.approx(1)
    assert found["drop"] == pytest.approx(1) and found["least_drop"] == pytest.approx(0)  # the cat stays
    assert found["context"] == pytest.approx(1) and found["outside"] == 0
    assert found["smallest"] == 16 / 256 and found["covered"] == 48 / 256


def test_each_score_sees_its_own_fault_in_the_worst_subject():
    assert scored(draft(shown=(RED, GREEN)))[0]["similarity"] == pytest.approx(0)
    assert scored(draft(said=("red", "red")))[0]["caption"] == pytest.approx(0)
    assert scored(draft(lose=(GREEN, RED)))[0]["least_drop"] == pytest.approx(1)
    stray = draft()
    lose = stray.lose.copy()
    lose[0, 0] = (0, 100, 100)
    assert scored(replace(stray, lose=lose))[0]["outside"] == 100
    lose[~np.any(stray.masks, 0)] = RED
    assert scored(replace(stray, lose=lose))[0]["context"] < 0.9


def test_subjects_are_compared_on_white_and_by_their_own_masks():
    """What surrounds a subject, in scene and reference alike, counts for nothing."""
    assert scored(draft(ground=10))[0]["similarity"] == pytest.approx(1)
    notched = draft().masks[1].copy()
    notched[8, 6] = False
    assert (np.asarray(scoring.cutout(draft().win, notched))[2, 0] == 255).all()
    part = np.asarray(scoring.cutout(draft().win, draft().masks[1]))
    assert part.shape == (8, 8, 3) and (part[2:6] == BLUE).all() and (part[:2] == 255).all() and (part[6:] == 255).all()


def test_the_encoders_take_the_drafts_of_a_part_together():
    Colours.calls = 0
    several = scored(*[draft()] * 5)
    assert Colours.calls == 6  # winners, losers, references, contexts, whole winners; and CLIP's winners
    assert all(one == scored(draft())[0] for one in several)


def test_a_difference_hash_worked_by_hand():
    """Of rows that get brighter to the right every bit is set, of the others none."""
    rising = np.repeat(np.tile(np.arange(9, dtype=np.uint8) * 20, (8, 1))[..., None], 3, 2)
    rising[3:] = rising[3:, ::-1]
    assert scoring.perceptual_hash(rising) == bytes([255] * 3 + [0] * 5)
    larger = np.asarray(Image.fromarray(rising).resize((90, 80), Image.Resampling.NEAREST))
    assert scoring.perceptual_hash(larger) == scoring.perceptual_hash(rising)


# --- Limits and near-duplicates ---


def signature(angle, bits=0):
    """A unit vector in the plane, and a hash with so many bits set."""
    return np.packbits(np.arange(64) < bits).tobytes() + np.array([np.cos(angle), np.sin(angle)], "<f2").tobytes()


def table(signatures, **scores):
    good = {"similarity": 0.9, "drop": 0.5, "least_drop": 0.5, "context": 1.0, "outside": 0.0, "smallest": 0.1}
    rows = [good | {"covered": 0.2, "caption": 0.3} | {"signature": s} for s in signatures]
    frame = pd.DataFrame(rows).assign(split="train", id=[f"p{i}" for i in range(len(rows))])
    for name, values in scores.items():
        frame[name] = values
    return frame


CLOSE = params.Curation(duplicate=0.98, duplicate_bits=2)  # 0.98 is an angle of 0.2


def test_the_first_of_near_duplicates_stays_and_who_is_out_makes_nobody_a_duplicate():
    """Steps of 0.15: each is like its neighbours alone, so every second one stays."""
    found = curated(table([signature(0.15 * i) for i in range(5)]), CLOSE)
    assert list(found["out"]) == ["", DUPLICATE, "", DUPLICATE, ""]
    assert found["duplicate"][1] == pytest.approx(np.cos(0.15), abs=1e-3) and found["duplicate"][0] == -1
    assert found["duplicate"][2] == pytest.approx(np.cos(0.3), abs=1e-3)  # of those that stay
    small = curated(
        table([signature(0), signature(0.1)], smallest=[0.0, 0.1]), CLOSE.model_copy(update={"smallest": 0.05})
    )
    assert list(small["out"]) == ["a subject is too small", ""]


def test_a_near_duplicate_is_like_by_encoder_and_by_hash():
    found = curated(table([signature(0), signature(0, bits=3), signature(0, bits=2), signature(1.0)]), CLOSE)
    assert list(found["out"]) == ["", "", DUPLICATE, ""]


def test_blocks_of_comparison_do_not_show(monkeypatch):
    rng = np.random.default_rng(0)
    signatures = [
        signature(angle, int(bits)) for angle, bits in zip(rng.uniform(0, 6, 60), rng.integers(0, 4, 60), strict=True)
    ]
    whole = curated(table(signatures), CLOSE)
    assert 10 < (whole["out"] == DUPLICATE).sum() < 50
    monkeypatch.setattr("focusdpo_lib.dip.curation.BLOCK", 7)
    pd.testing.assert_frame_equal(curated(table(signatures), CLOSE), whole)
    kept = []
    for angle, bits in [(np.arctan2(*np.frombuffer(s[8:], "<f2")[::-1].astype(float)), s[0]) for s in signatures]:
        if all(np.cos(angle - a) < 0.98 or bin(bits ^ b).count("1") > 2 for a, b in kept):
            kept.append((angle, bits))
    assert len(kept) == (whole["out"] == "").sum()


LIMITS = {"similarity": (0.8, 0.7), "drop": (0.3, 0.2), "least_drop": (0.3, 0.2), "context": (0.9, 0.8)}
LIMITS |= {"outside": (4, 5), "smallest": (0.05, 0.04), "covered": (0.5, 0.6), "caption": (0.2, 0.1)}


@pytest.mark.parametrize("name", LIMITS)
def test_every_limit_lets_its_own_value_pass_and_no_worse_one(name):
    limit, worse = LIMITS[name]
    settings = params.Curation(**{"duplicate_bits": 0, "outside": None, name: limit})
    scores = table([signature(i) for i in range(3)])
    scores[name] = [float(limit), float(worse), scores[name][2]]
    out = list(curated(scores, settings)["out"])
    assert out[0] == "" and out[1] != "" and out[2] == ""
    assert not any(character.isdigit() for character in out[1])


def test_reviewers_come_last():
    scores = table([signature(i) for i in range(4)], smallest=[0.0, 0.1, 0.1, 0.1])
    said = {"p0": (True, ""), "p1": (False, "mask"), "p2": (True, "")}

    def out(review):
        settings = params.Curation(smallest=0.05, review=review)
        return list(curated(scores, settings, said)["out"])

    assert out("ignore") == ["a subject is too small", "", "", ""]
    assert out("rejected") == ["a subject is too small", "rejected in review", "", ""]
    assert out("accepted") == ["a subject is too small", "rejected in review", "", "not accepted in review"]


# --- Splits ---


def test_no_identity_is_in_two_splits_whatever_joins_the_pairs():
    rng = np.random.default_rng(0)
    joined = [tuple(f"i{n}" for n in rng.choice(300, rng.integers(1, 3), replace=False)) for _ in range(150)]
    shares = {"train": 0.8, "validation": 0.1, "test": 0.1}
    found = splits_by_identity(joined, shares)
    of = {}
    for names, split in zip(joined, found, strict=True):
        for name in names:
            assert of.setdefault(name, split) == split
    assert set(found) == set(shares)
    order = rng.permutation(len(joined))
    assert splits_by_identity([joined[i][::-1] for i in order], shares) == [found[i] for i in order]
    assert splits_by_identity(joined, shares, seed=1) != found


def test_a_group_that_would_upset_the_shares_goes_to_the_largest_split():
    """Half of the pairs hang together by one identity."""
    joined = [("hub", f"i{n}") for n in range(50)] + [(f"j{n}",) for n in range(50)]
    for seed in range(8):
        found = splits_by_identity(joined, {"test": 0.3, "train": 0.7}, seed)
        assert set(found[:50]) == {"train"} and 2 < found[50:].count("test") < 30


def test_a_plan_that_joins_identities_of_one_split_keeps_the_shares():
    """However many pairs hang together: 2,000 of 200 identities."""
    shares, rng = {"train": 0.8, "test": 0.2}, np.random.default_rng(0)
    by = {split: [n for n in map(str, range(200)) if split_of(n, shares) == split] for split in shares}
    joined = [tuple(rng.choice(by[split_of(str(n % 200), shares)], 2, replace=False)) for n in range(2000)]
    found = splits_by_identity(joined, shares)
    assert found == [split_of(names[0], shares) for names in joined]


def test_the_shares_are_those_asked_for_where_nothing_is_joined():
    found = splits_by_identity([(f"i{n}",) for n in range(4000)], {"train": 3, "test": 1})
    assert abs(found.count("test") / 4000 - 0.25) < 0.03  # four standard deviations


# --- The toybox through it all ---

DIP = params.Dip(train_pairs=20, validation_pairs=4)
LOOSE = params.Curation(similarity=0.9, drop=0.1)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def chain(results):
    return stages.make_drafts(results, "toybox", params.Chain(part_size=8), {"dip": DIP})


def test_pairs_are_those_that_pass_with_scores_and_identities(results, chain):
    folder = stages.curate(results, "curated", chain, LOOSE)
    decisions = pd.read_csv(folder / "curation.csv", keep_default_na=False)
    assert len(decisions) == 28 and 0 < (decisions["out"] != "").sum() < 14
    kept = {pair.id: pair for split in read_dataset(folder).values() for pair in split}
    assert list(kept) == list(decisions["id"][decisions["out"] == ""])
    quick = {
        pair.id: pair for split in read_dataset(stages.build_pairs(results, "quick", DIP)).values() for pair in split
    }
    for name, pair in kept.items():
        assert (pair.win == quick[name].win).all() and (pair.lose == quick[name].lose).all()
        assert pair.provenance == quick[name].provenance and len(pair.identities) == len(pair.subjects)
        assert pair.scores["similarity"] >= 0.9 and pair.scores["drop"] >= 0.1
        assert quick[name].scores == {} and quick[name].identities == ()
    assert stages.curate(results, "curated", chain, LOOSE) == folder


def test_other_limits_are_another_run_on_the_same_drafts(results, chain):
    before = {path: path.stat().st_mtime_ns for path in chain.rglob("*")}
    with pytest.raises(
        DatasetError, match=r"^of 28 drafts in .* none is left to train on \(most often: a subject is too"
    ):
        stages.curate(results, "none", chain, params.Curation(smallest=0.9))
    tighter = stages.curate(results, "tighter", chain, params.Curation(similarity=0.95))
    assert len(read_dataset(tighter)["train"]) < 20
    assert {path: path.stat().st_mtime_ns for path in chain.rglob("*")} == before


def test_a_review_decides_what_stays_and_a_new_verdict_is_another_run(results, chain):
    review = Review(stages.reviews(results, chain), "ann", [f"train-{i:05d}" for i in range(20)])
    review.decide([f"train-{i:05d}" for i in range(5)], True)
    review.decide(["train-00005"], False, "mask")
    settings = params.Curation(review="accepted")
    folder = stages.curate(results, "reviewed", chain, settings)
    assert [pair.id for pair in read_dataset(folder, ["train"])["train"]] == [f"train-{i:05d}" for i in range(5)]
    assert not (folder / "test.parquet").exists()
    assert stages.curate(results, "reviewed", chain, settings) == folder
    review.undo()
    with pytest.raises(RunError, match="its input 'review' has changed"):
        stages.curate(results, "reviewed", chain, settings)


def test_an_identity_in_two_splits_is_refused(results, chain, tmp_path):
    table = score_table(chain)
    same = [replace(draft, identities=("same",) * len(draft.subjects)) for draft in stage_drafts(chain, "scoring")]
    drafts.write(drafts.part(tmp_path, "scoring", 0), drafts.table(same))
    says = "the identity 'same' stands in train and, with the pair 'validation-00000', in validation"
    with pytest.raises(DatasetError, match=says):
        pairs.write_pairs(tmp_path / "out", tmp_path, table.assign(out=""))


def test_the_run_sheet_counts_what_came_and_went(results, chain, tmp_path):
    stages_of = ["synthesis", "segmentation", "captioning", "disruption", "scoring"]
    decisions = curated(score_table(chain), LOOSE)
    sheet = run_sheet.run_sheet(chain, stages_of, decisions)
    assert list(sheet.index) == ["plan", *stages_of, "curation"]
    assert list(sheet["came"]) == [28] * 7 and list(sheet["out"]) == [28] * 6 + [(decisions["out"] == "").sum()]
    assert (sheet.loc[stages_of, "seconds"] > 0).all() and (sheet.loc[stages_of, "rows a second"] > 0).all()
    assert f"({sheet['dropped']['curation']})" in sheet["why"]["curation"] or ";" in sheet["why"]["curation"]
    found = run_sheet.reasons(chain, stages_of, decisions)
    assert found["drafts"].sum() == (decisions["out"] != "").sum() and set(found["stage"]) == {"curation"}


def test_the_run_sheet_adds_up_what_a_stage_noted_and_why_drafts_fell_out(tmp_path):
    def noted(i, **changes):
        used = {"captioning": {"tokens": 10 + i, "dollars": 0.5}, "synthesis": {"tokens": 1000}}
        return Draft(str(i), "p", "train", ("mug",), ("m",), provenance=used, **changes)

    refused = {"dropped_by": "captioning", "dropped": "refused"}
    drafts.write(drafts.part(tmp_path, "plan", 0), drafts.table([noted(i) for i in range(3)]))
    drafts.write(
        drafts.part(tmp_path, "captioning", 0), drafts.table([noted(0), noted(1, **refused), noted(2, **refused)])
    )
    row = run_sheet.run_sheet(tmp_path, ["captioning"]).loc["captioning"]
    assert (row["came"], row["out"], row["dropped"], row["why"]) == (3, 1, 2, "refused (2)")
    assert row["tokens"] == 33 and row["dollars"] == 1.5  # its own alone


def test_the_card_says_what_is_in_it_and_under_which_licences(results, chain):
    text = (stages.curate(results, "curated", chain, LOOSE) / CARD).read_text()
    decisions = curated(score_table(chain), LOOSE)
    kept = decisions[decisions["out"] == ""]
    assert text.startswith("---\nlicense: apache-2.0\n")
    train = kept[kept["split"] == "train"]
    single = sum(len(names) == 1 for names in train["subjects"])
    assert f"| train | {len(train)} | {single} | {len(train) - single} |" in text
    assert f"{len(kept)} of 28 drafts were kept" in text and "| focusdpo_lib.dip.toybox | Apache-2.0 |" in text


def test_a_model_s_licence_is_what_the_row_says_or_the_kit_knows_or_unknown():
    found = licences([{"synthesis": {"model": "black-forest-labs/FLUX.1-dev", "deep": {"model": "my/own", "seed": 3}}},
                      {"source": "photos", "licence": "CC0"}])  # fmt: skip
    assert found == {
        "black-forest-labs/FLUX.1-dev": "FLUX.1-dev non-commercial licence",
        "my/own": "not known to the kit: look it up",
        "photos": "CC0",
    }
