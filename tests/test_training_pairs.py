"""Prepared pairs on disk: batch by batch, whole or unfinished, gone on with, and made by one process at a time."""

import shutil
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import tiny_pairs

from focusdpo_lib import params, stages
from focusdpo_lib.dip.dataset import write_dataset
from focusdpo_lib.runs import LOCK, Run, RunError, locked
from focusdpo_lib.training import pairs as module
from focusdpo_lib.training import row_file
from focusdpo_lib.training.pairs import BATCHES, join, load, prepare_into
from focusdpo_lib.training.row_file import RowFile

FACTS = {"ids": "[]"}


def rows(start, stop):
    """Rows start … stop of three tensors of every kind that is written."""
    n = torch.arange(start, stop)
    return {
        "a": (n.view(-1, 1, 1) + torch.arange(6).view(2, 3) / 10).float(),
        "b": (n.view(-1, 1) * torch.ones(5)).bfloat16(),
        "c": n.view(-1, 1) % 3 == 0,
    }


@pytest.mark.parametrize("sizes", [[7], [3, 3, 1], [1] * 7])
def test_a_row_file_is_the_safetensors_file_of_all_its_rows(sizes, tmp_path):
    at = 0
    for size in sizes:
        file = RowFile(tmp_path / "x.safetensors", 7)  # as after a kill: what is known is on disk
        assert file.rows == at and not file.path.exists()
        file.append(rows(at, at + size), FACTS)
        at += size
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == rows(0, 1).keys()
    for name, expected in rows(0, 7).items():
        assert found[name].dtype == expected.dtype and torch.equal(found[name], expected)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    assert RowFile(tmp_path / "x.safetensors", 7).rows == 7


def test_rows_count_once_they_are_safe(tmp_path, monkeypatch):
    """A kill after the rows are written and before they are counted: they are written again."""
    file = RowFile(tmp_path / "x.safetensors", 4)
    file.append(rows(0, 2), FACTS)
    monkeypatch.setattr(row_file, "write_text", lambda *words: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        file.append(rows(90, 92), FACTS)
    monkeypatch.undo()
    again = RowFile(tmp_path / "x.safetensors", 4)
    assert again.rows == 2
    again.append(rows(2, 4), FACTS)
    assert torch.equal(load_file(again.path)["a"], rows(0, 4)["a"])


def test_a_kill_between_the_last_row_and_the_name_loses_nothing(tmp_path, monkeypatch):
    file = RowFile(tmp_path / "x.safetensors", 4)
    monkeypatch.setattr(row_file.os, "replace", lambda *words: 1 / 0 if words[1] == file.path else os_replace(*words))
    os_replace = shutil.os.rename
    with pytest.raises(ZeroDivisionError):
        file.append(rows(0, 4), FACTS)
    monkeypatch.undo()
    assert not file.path.exists()
    assert RowFile(file.path, 4).rows == 4
    assert torch.equal(load_file(file.path)["a"], rows(0, 4)["a"])
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_count_without_its_file_counts_for_nothing(tmp_path, monkeypatch):
    """Somebody deleted the unfinished file, and the next try is killed before its first row."""
    path = tmp_path / "x.safetensors"
    RowFile(path, 4).append(rows(0, 2), FACTS)
    RowFile(path, 4).part.unlink()
    monkeypatch.setattr(row_file.os, "fsync", lambda file: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        RowFile(path, 4).append(rows(0, 2), FACTS)
    assert RowFile(path, 4).rows == 0


@pytest.mark.parametrize("other", ["dtype", "shape", "missing", "total"])
def test_rows_of_another_kind_do_not_mix(tmp_path, other):
    path = tmp_path / "x.safetensors"
    RowFile(path, 4).append(rows(0, 2), FACTS)
    more, total = rows(2, 4), 4
    if other == "dtype":
        more["b"] = more["b"].half()
    elif other == "shape":
        more["b"] = more["b"][:, :4]
    elif other == "missing":
        del more["c"]
    else:
        total = 5
    with pytest.raises(RunError, match=r"x\.part was begun with other tensors .*: delete it and run again"):
        RowFile(path, total).append(more, FACTS)


def test_a_disk_without_room_is_said_before_anything_is_written(backbone, tmp_path, monkeypatch):
    """For all batches, once the first has shown what a pair takes."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    expected = r"what training needs of the pairs will take 0\.0 GB and 0\.0 GB are free where .* lies"
    with pytest.raises(RunError, match=expected):
        prepare_into(tmp_path, backbone, tiny_pairs(20), params.Masks(), batch_size=1)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_preparation_goes_on_and_ends_the_same(backbone, patches, tmp_path, monkeypatch):
    pairs, original, done = tiny_pairs(5), module._prepare, []

    def prepare_all(folder, fail_at=None):
        def watched(model, batch, *rest):
            if len(done) == fail_at:
                raise KeyboardInterrupt
            done.append([pair.id for pair in batch])
            return original(model, batch, *rest)

        monkeypatch.setattr(module, "_prepare", watched)
        done.clear()
        prepare_into(folder, backbone, pairs, params.Masks(), patches=patches, batch_size=2)
        join(folder)
        return list(done)

    for folder in ("whole", "broken"):
        (tmp_path / folder).mkdir()
    batches = prepare_all(tmp_path / "whole")
    assert [len(batch) for batch in batches] == [2, 2, 1, 2, 2, 1]
    with pytest.raises(KeyboardInterrupt):
        prepare_all(tmp_path / "broken", fail_at=4)
    with pytest.raises(RunError, match=r"prepared pairs in .*broken lack references_1"):  # half-made is not whole
        load(tmp_path / "broken")
    assert prepare_all(tmp_path / "broken") == batches[4:]
    assert prepare_all(tmp_path / "broken") == []
    for whole in (tmp_path / "whole").iterdir():
        assert (tmp_path / "broken" / whole.name).read_bytes() == whole.read_bytes()
    assert load(tmp_path / "broken")[2].ids == tuple(pair for batch in batches[3:] for pair in batch)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_kill_while_batches_are_joined_loses_nothing_and_doubles_nothing(backbone, tmp_path, monkeypatch, at):
    """After the batch `at` was appended and before its own file was deleted."""
    for name in ("whole", "broken"):
        prepare_into(tmp_path / name, backbone, tiny_pairs(3), params.Masks(), batch_size=1)
    join(tmp_path / "whole")
    original, left = Path.unlink, [at]

    def unlink(self, **words):
        if self.parent.name == BATCHES and not left[0]:
            raise KeyboardInterrupt
        left[0] -= self.parent.name == BATCHES
        original(self, **words)

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(KeyboardInterrupt):
        join(tmp_path / "broken")
    monkeypatch.undo()
    monkeypatch.setattr(module, "_prepare", None)  # nothing is computed again
    prepare_into(tmp_path / "broken", backbone, tiny_pairs(3), params.Masks(), batch_size=1)
    join(tmp_path / "broken")
    for whole in (tmp_path / "whole").iterdir():
        assert (tmp_path / "broken" / whole.name).read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in (tmp_path / "broken").iterdir()) == [f"references_{n}.safetensors" for n in (1, 2)]


def test_a_batch_that_somebody_deleted_is_not_passed_over(backbone, tmp_path):
    prepare_into(tmp_path, backbone, tiny_pairs(3), params.Masks(), batch_size=1)
    (tmp_path / BATCHES / "1-000000001.safetensors").unlink()
    with pytest.raises(RunError, match=r"lacks the batch before 1-000000002\.safetensors: delete .* and run again"):
        join(tmp_path)


@pytest.mark.parametrize("gone", [1, 2])
def test_prepared_pairs_that_lost_a_file_are_not_trained_on_and_are_prepared_anew(
    backbone, tmp_path, monkeypatch, gone
):
    def prepared():
        run = Run(tmp_path / "prepared", {})
        if not run.complete:
            with run:
                prepare_into(run.folder, backbone, tiny_pairs(2), params.Masks())
                join(run.folder)
        return run.folder

    folder = prepared()
    file = folder / f"references_{gone}.safetensors"
    whole = file.read_bytes()
    file.unlink()
    with pytest.raises(RunError, match=rf"in .*prepared lack references_{gone}\.safetensors: delete .* and run again"):
        load(folder)
    assert {count: len(pairs) for count, pairs in load(prepared()).items()} == {1: 2, 2: 2}
    assert file.read_bytes() == whole


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_prepared_pairs_that_are_cut_are_told(backbone, tmp_path, keep):
    prepare_into(tmp_path, backbone, tiny_pairs(2), params.Masks())
    join(tmp_path)
    file = tmp_path / "references_2.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(RunError, match=r"references_2\.safetensors are damaged .*: delete .* and run again"):
        load(tmp_path)


def test_memory_holds_one_batch(backbone, tmp_path, monkeypatch):
    original, made = module._prepare, []

    def watched(*arguments):
        assert sum(batch() is not None for batch in made) <= 1  # the last, until the next replaces it
        batch = original(*arguments)
        made.append(weakref.ref(batch))
        return batch

    monkeypatch.setattr(module, "_prepare", watched)
    prepare_into(tmp_path, backbone, tiny_pairs(4), params.Masks(), batch_size=1)
    assert len(made) == 8


def test_one_process_prepares_and_others_wait_for_it(tiny_flux, tmp_path, capsys, monkeypatch):
    """The first in a process of its own, as it is where several GPUs train."""
    write_dataset(tmp_path / "pairs", {"train": tiny_pairs(2)})
    backbone, results, folders = params.Backbone(model=str(tiny_flux), precision="float32"), tmp_path / "results", []

    def prepare(own_process=False):
        made = stages.prepare_pairs(results, tmp_path / "pairs", backbone, params.Masks(), own_process=own_process)
        folders.append(made)

    prepare(own_process=True)
    shutil.move(folders[0], tmp_path / "made")
    other, said, deadline = threading.Thread(target=prepare), "", time.monotonic() + 60
    with locked(folders[0] / LOCK):
        other.start()
        while f"another process makes {folders[0]}: waiting for it" not in (said := said + capsys.readouterr().out):
            assert other.is_alive() and time.monotonic() < deadline
            time.sleep(0.05)
        assert [p.name for p in folders[0].iterdir()] == [LOCK]
        shutil.copytree(tmp_path / "made", folders[0], dirs_exist_ok=True)  # what the first process made meanwhile
        monkeypatch.setattr(stages, "prepare_into", None)
    other.join(60)
    assert folders[0] == folders[1]
