"""The chain of Figure 4: parts are the same however they were made, and what falls out says why."""

import shutil
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from test_revisions import cache  # noqa: F401 (a fixture)
from tiny_stages import Drawing, plan

from focusdpo_lib import params, stages
from focusdpo_lib.dip import (
    captioning,
    disruption,
    drafts,
    scoring,
    segmentation,
    sources,
    synthesis,
    toybox,
    toybox_stages,
)
from focusdpo_lib.dip.assembly import STAGES, assembled
from focusdpo_lib.dip.chain import Draft
from focusdpo_lib.dip.dataset import read_dataset
from focusdpo_lib.dip.pair import EXTRA
from focusdpo_lib.dip.run import run_chain, stage_drafts, times
from focusdpo_lib.dip.run_sheet import run_sheet
from focusdpo_lib.runs import PARTIAL, RunError, is_complete

NAMES = ("drawing", "painting")


def run(folder, processes=1, part_size=3, count=20, of=NAMES, **how):
    """Two stages; what happens, happens in the second."""
    (folder / "opened").mkdir(parents=True, exist_ok=True)
    made_by = [Drawing(of[0], folder / "opened"), Drawing(of[1], folder / "opened", **how)]
    run_chain(folder, lambda: plan(count), made_by, part_size, 1000, processes)


def files(folder):
    """Every part by its bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.parquet")}


def opened(folder, name):
    return len(list((folder / "opened").glob(f"{name}-*")))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    run(folder, drops=(4, 5), unreadable=(7,))
    return files(folder)


def test_a_draft_comes_back_from_its_part_as_it_was(tmp_path):
    full = Draft(
        **{"id": "a", "prompt": "ein Bär", "split": "test", "subjects": ("bear", "mug"), "identities": ("x", "y")},
        references=(np.full((3, 5, 3), 7, np.uint8), np.full((2, 2, 3), 9, np.uint8)),
        win=np.arange(60, dtype=np.uint8).reshape(4, 5, 3),
        masks=(np.eye(4, 5, dtype=bool), np.zeros((4, 5), bool)),
        reference_masks=(np.ones((3, 5), bool),),
        **{"captions": ("a 'bear'",), "disrupted_captions": ("b", ""), "lose": np.zeros((4, 5, 3), np.uint8)},
        **{"disruption": {"z": [1, {"a": None}]}, "scores": {"s": 0.1}, "provenance": {"seed": 2**62}},
        **{"signature": b"\x00\xff", "dropped_by": "x", "dropped": "y"},
    )
    bare = Draft("b", "p", "train", ("mug",), ("m",))
    path = tmp_path / "part-00000.parquet"
    drafts.write(path, drafts.table([full, bare]))
    for before, after in zip([full, bare], drafts.read(path), strict=True):
        for name in before.__dataclass_fields__:
            a, b = getattr(before, name), getattr(after, name)
            if name in (*drafts.PICTURES, "win", "lose"):
                several = name in drafts.PICTURES
                for x, y in zip(a if several else [a], b if several else [b], strict=True):
                    assert (x is None and y is None) or (x.dtype == y.dtype and np.array_equal(x, y))
            else:
                assert a == b and type(a) is type(b)


def test_the_order_of_notes_is_kept():
    """Bytes depend on it."""
    draft = replace(plan(1)[0], provenance={"z": 1, "a": 2})
    assert drafts.table([draft])["provenance"][0].as_py() == '{"z": 1, "a": 2}'


def test_the_number_of_processes_does_not_show(tmp_path, unbroken):
    run(tmp_path, 3, drops=(4, 5), unreadable=(7,))
    assert files(tmp_path) == unbroken
    assert opened(tmp_path, "painting") == 3  # once each


def test_drafts_keep_their_order_and_who_is_dropped_stands_in_no_later_part(tmp_path):
    run(tmp_path, drops=(4, 5), unreadable=(7,))
    run_chain(tmp_path, plan, [Drawing("drawing"), Drawing("painting"), Drawing("last")], 3, 1000)
    painted = {draft.id: draft for draft in stage_drafts(tmp_path, "painting")}
    assert list(painted) == [str(i) for i in range(20)]
    assert {i: (d.dropped_by, d.dropped) for i, d in painted.items() if d.dropped} == {
        "4": ("painting", "it is too small"),
        "5": ("painting", "it is too small"),
        "7": ("painting", "a picture that cannot be used"),
    }
    assert painted["7"].provenance["painting"]["error"] == "the image /photos/7.png cannot be read: delete it"
    assert painted["7"].win is not None  # of the stage before it: what it was can be looked at
    last = list(stage_drafts(tmp_path, "last"))
    assert [d.id for d in last] == [str(i) for i in range(20) if i not in (4, 5, 7)]
    assert [pq.read_metadata(path).num_rows for path in drafts.parts(tmp_path, "last")] == [3, 1, 2, 3, 3, 3, 2]


def test_what_is_there_is_not_made_again_and_a_part_that_is_lost_is(tmp_path, unbroken):
    run(tmp_path, drops=(4, 5), unreadable=(7,))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    run(tmp_path, drops=(4, 5), unreadable=(7,))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")} == before
    assert opened(tmp_path, "painting") == 1
    drafts.part(tmp_path, "painting", 2).unlink()
    run(tmp_path, drops=(4, 5), unreadable=(7,))
    assert files(tmp_path) == unbroken
    assert opened(tmp_path, "painting") == 2 and opened(tmp_path, "drawing") == 1


def test_a_server_that_is_gone_ends_the_run_in_a_sentence_and_keeps_what_is_complete(tmp_path, unbroken):
    with pytest.raises(RunError, match=r"^the server at localhost is gone: start it and run again$"):
        run(tmp_path, drops=(4, 5), unreadable=(7,), raises=10)
    assert [path.name for path in drafts.parts(tmp_path, "painting")] == [f"part-{n:05d}.parquet" for n in range(3)]
    run(tmp_path, drops=(4, 5), unreadable=(7,))
    assert files(tmp_path) == unbroken


def test_a_process_that_is_killed_has_its_parts_made_by_the_next(tmp_path, unbroken):
    run(tmp_path, 2, drops=(4, 5), unreadable=(7,), dies=13)
    assert files(tmp_path) == unbroken and (tmp_path / "opened" / "died").exists()


def test_a_full_disk_is_said_beforehand_and_by_the_first_part(tmp_path, monkeypatch):
    from focusdpo_lib import runs

    free = runs.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda path: free._replace(free=30_000))
    with pytest.raises(RunError, match=r"^20 drafts in 2 stages will take 0\.0 GB and 0\.0 GB are free"):
        run(tmp_path)  # 20 · 2 · 1000 bytes
    assert not drafts.parts(tmp_path, "drawing")
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda path: free._replace(free=10_000))
    with pytest.raises(RunError, match=r"^the 6 parts of drawing that are missing will take"):
        run_chain(tmp_path, plan, [Drawing("drawing")], 3, 1)
    assert len(drafts.parts(tmp_path, "drawing")) == 1


class Losing:
    name = "losing"

    def open(self):
        return lambda some: some[1:]


class Nameless:
    name = "nameless"

    def open(self):
        return lambda some: [replace(draft, dropped="why") for draft in some]


@pytest.mark.parametrize(
    ("stage", "says"), [(Losing(), "returned 2, or others"), (Nameless(), "dropped the draft '0' without")]
)
def test_a_stage_that_breaks_the_contract_is_named(tmp_path, stage, says):
    with pytest.raises(RunError, match=rf"{stage.name} .*{says}"):
        run_chain(tmp_path, plan, [stage], 3, 1000)
    assert not drafts.parts(tmp_path, stage.name)


def test_what_a_stage_was_given_cannot_be_written_into(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match="read-only"):
        next(stage_drafts(tmp_path, "painting")).win[0, 0] = 0


def test_a_plan_needs_drafts_with_ids_of_their_own(tmp_path):
    with pytest.raises(RunError, match="the plan has two drafts '3': give each an id of its own"):
        run_chain(tmp_path / "a", lambda: [*plan(5), *plan(5)[3:]], [], 4, 1)
    with pytest.raises(RunError, match=r"the plan for .* has no draft: ask for at least one"):
        run_chain(tmp_path / "b", list, [], 4, 1)
    with pytest.raises(RunError, match=r"two stages of the chain have one name \(plan, x, x\)"):
        run_chain(tmp_path / "c", plan, [Drawing("x"), Drawing("x")], 4, 1)


def test_times_lie_beside_the_parts_and_in_no_part(tmp_path):
    run(tmp_path, drops=(4, 5), pause=0.01)
    noted = times(drafts.part(tmp_path, "painting", 1)).read_text().splitlines()
    assert noted[0] == "came,out,seconds,opening" and noted[1].startswith("3,1,")
    assert float(noted[1].split(",")[2]) >= 0.03


# --- The toybox ---

DIP = params.Dip(train_pairs=9, validation_pairs=4)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


def test_the_toybox_s_stages_end_with_the_very_pairs_of_its_builder(results):
    chain = stages.make_drafts(results, "main", params.Chain(part_size=4), {"dip": DIP})
    assert is_complete(chain) and not list(chain.rglob(f"{PARTIAL}*"))
    pairs = read_dataset(stages.build_pairs(results, "main", DIP))
    made = list(stage_drafts(chain, "disruption"))
    assert [draft.id for draft in made] == [pair.id for split in pairs.values() for pair in split]
    for draft, pair in zip(made, (pair for split in pairs.values() for pair in split), strict=True):
        for name in pair.__dataclass_fields__:
            here, there = getattr(draft, name), getattr(pair, name)
            if name in ("win", "lose", "references", "masks", "reference_masks"):
                assert len(here) == len(there) and all(map(np.array_equal, here, there)), name
            elif name not in EXTRA:  # which the quick way leaves out
                assert here == there, name


def test_each_stage_of_the_toybox_adds_its_own(results):
    chain = stages.make_drafts(results, "main", params.Chain(part_size=4), {"dip": DIP})
    first = [next(stage_drafts(chain, name)) for name in ("plan", *toybox_stages.MAKERS)]
    filled = [
        {name for name in ("win", "references", "masks", "reference_masks", "captions", "lose", "disrupted_captions")
         if (value := getattr(draft, name)) is not None and len(value)}
        for draft in first
    ]  # fmt: skip
    assert [new - old for old, new in pairwise(filled)] == [
        {"win", "references"},
        {"masks", "reference_masks"},
        {"captions"},
        {"lose", "disrupted_captions"},
    ]
    assert not filled[0]


def test_identities_are_the_world_s_and_no_two_are_called_alike(results):
    drawn = [toybox.draw(params.Dip(), "train", i) for i in range(300)]
    who = {identity for d in drawn for identity in d.scene.identities}
    called = {name for i in range(300) for name in toybox_stages.planned(params.Dip(), "train", i).identities}
    assert len(called) == len(who)


def test_a_run_of_drafts_goes_on_where_it_was_killed(results, tmp_path):
    whole = stages.make_drafts(results, "main", params.Chain(part_size=4), {"dip": DIP})
    copied = tmp_path / "chain" / "main"
    shutil.copytree(whole, copied)
    (copied / "complete.json").unlink()
    shutil.rmtree(copied / "disruption")
    drafts.part(copied, "captioning", 1).unlink()
    (copied / "captioning" / f"{PARTIAL}x").mkdir()
    stages.make_drafts(tmp_path, "main", params.Chain(part_size=4), {"dip": DIP})
    assert files(copied) == files(whole) and is_complete(copied) and not list(copied.rglob(f"{PARTIAL}*"))


# --- From settings to a chain ---


def test_a_chain_is_made_of_what_its_settings_name(tmp_path):
    chain = params.Chain(synthesis="source", segmentation="models", captioning="models", disruption="models")
    source = params.Source(folder=str(tmp_path), size=256)
    made = assembled(chain, {"source": source, "dip": DIP}, tmp_path / "results")
    assert [stage.name for stage in made.stages] == list(STAGES)
    kinds = [sources.Source, segmentation.Segmentation, captioning.Captioning, disruption.Disruption, scoring.Scoring]
    assert [type(stage) for stage in made.stages] == kinds
    assert set(made.settings) == {"source", *STAGES[1:]} and made.settings["source"] == source
    assert made.inputs["source"] == tmp_path and made.draft_bytes == 4 * 2 * 256**2


def test_a_chain_that_draws_goes_by_its_backbone_too(tmp_path):
    chain = params.Chain(synthesis="models", segmentation="models", captioning="models", disruption="models")
    (tmp_path / "lists.yaml").write_text("")
    drawn = params.Synthesis(lists=str(tmp_path / "lists.yaml"), size=256)
    made = assembled(chain, {"synthesis": drawn}, tmp_path)
    assert type(made.stages[0]) is synthesis.Synthesis and made.draft_bytes == 4 * 2 * 256**2
    assert set(made.settings) == {"synthesis", "backbone", *STAGES[1:]}
    assert made.inputs["lists"] == tmp_path / "lists.yaml"


def test_what_no_stage_reads_is_no_setting_of_a_run(tmp_path):
    made = assembled(params.Chain(), {"dip": DIP, "captioning": params.Captioning()}, tmp_path)
    assert set(made.settings) == {"dip", "scoring"} and set(made.inputs) == {"dino", "clip"}


def test_a_raised_budget_is_no_other_run(tmp_path):
    chain = params.Chain(captioning="models")
    few, more, other = (
        assembled(chain, {"captioning": params.Captioning(**of)}, tmp_path).settings["captioning"]
        for of in ({"budget": 1.0}, {"budget": 9.0, "timeout": 5.0}, {"side": 64})
    )
    assert few == more != other


def test_models_of_a_hub_are_of_the_commits_that_the_results_are_pinned_to(cache, tmp_path):  # noqa: F811
    """Those that a stage loads, by default or by name; a server's model has no commit here."""
    names = ("finder", "facebook/sam2.1-hiera-large", "black-forest-labs/FLUX.1-Fill-dev", "eye", "tongue", "drawer")
    for number, name in enumerate(names):
        cache.add(name if "/" in name else f"some/{name}", f"{number}" * 40)
    chain = params.Chain(synthesis="models", segmentation="models", captioning="models", disruption="models")
    use = {
        "synthesis": params.Synthesis(lists=str(tmp_path / "lists.yaml")),
        "backbone": params.Backbone(model="some/drawer"),
        "segmentation": params.Segmentation(detector="some/finder"),
        "captioning": params.Captioning(by="local", model="some/tongue"),
        "scoring": params.Scoring(dino="some/eye"),
    }
    (tmp_path / "lists.yaml").write_text("")
    made = assembled(chain, use, tmp_path / "results")
    found = {name: made.settings[name].model_dump() for name in made.settings}
    finder, sam, fill, eye, tongue, drawer = (f"{number}" * 40 for number in range(6))
    assert found["segmentation"]["detector_revision"] == finder and found["segmentation"]["segmenter_revision"] == sam
    assert found["disruption"]["revision"] == fill and found["scoring"]["dino_revision"] == eye
    assert found["captioning"]["revision"] == tongue and found["backbone"]["revision"] == drawer
    assert all(stage.settings == made.settings[stage.name] for stage in made.stages if stage.name != "captioning")
    for name in names:
        cache.add(name if "/" in name else f"some/{name}", "f" * 40)
    assert assembled(chain, use, tmp_path / "results").settings == made.settings
    served = assembled(chain, use | {"captioning": params.Captioning(model="some/tongue")}, tmp_path / "results")
    assert served.settings["captioning"].revision is None


def test_the_content_of_a_model_s_folder_is_an_input(tmp_path):
    chain = params.Chain(segmentation="models")
    local = params.Segmentation(detector=str(tmp_path))
    assert assembled(chain, {"segmentation": local}, tmp_path).inputs["segmentation.detector"] == tmp_path


def test_the_run_sheet_lies_beside_the_drafts(tmp_path):
    made = stages.make_drafts(tmp_path, "main", params.Chain(part_size=4), {"dip": DIP})
    kept = pd.read_csv(made / stages.RUN_SHEET, index_col="stage", dtype={"why": str}).fillna({"why": ""})
    pd.testing.assert_frame_equal(kept, run_sheet(made, STAGES), check_dtype=False)
    assert list(kept.index) == ["plan", *STAGES] and (kept["came"] == kept["came"].iloc[0]).all()


def test_the_toybox_s_stages_know_the_toybox_alone():
    with pytest.raises(params.ParameterError, match="captioning by the toybox knows the toybox's own pairs alone"):
        params.section("chain", {"synthesis": "source", "segmentation": "models", "disruption": "models"})
