"""Files are whole or absent, runs are complete or resumed and never mixed; also when the process is killed."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from focusdpo_lib import params, runs
from focusdpo_lib.runs import MARKER, Run, RunError, atomic


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*"))


def child(code, *arguments):
    """A real Python process that runs `code`; a SIGKILL that it sends itself shows as return code -9."""
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


# Files


def test_a_file_appears_under_its_name_only_when_the_block_ends(tmp_path):
    with atomic(tmp_path / "new" / "a.txt") as partial:
        partial.write_text("whole")
        assert not (tmp_path / "new" / "a.txt").exists()
        assert not list((tmp_path / "new").glob("*.txt"))  # a reader that lists the folder does not see it either
    assert names(tmp_path) == ["new", "new/a.txt"]


@pytest.mark.parametrize("reason", [ValueError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_the_old_file(tmp_path, reason):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(reason), atomic(tmp_path / "a.txt") as partial:
        partial.write_text("half")
        raise reason
    assert names(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for content in ("1", "2"):
        with atomic(tmp_path / "model") as partial:
            partial.mkdir()
            (partial / content).write_text(content)
    assert names(tmp_path) == ["model", "model/2"]


def test_a_killed_process_leaves_no_half_file_and_its_rest_is_swept(tmp_path):
    code = """
import os, signal, sys
from focusdpo_lib.runs import atomic
with atomic(sys.argv[1]) as partial:
    partial.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert child(code, tmp_path / "a.txt").returncode == -signal.SIGKILL
    assert not (tmp_path / "a.txt").exists() and not list(tmp_path.glob("*.txt"))
    assert any(runs.PARTIAL in name for name in names(tmp_path))
    runs.sweep(tmp_path)
    assert names(tmp_path) == []


WRITERS = {
    "a.txt": "partial.write_bytes(bytes(200_000))",
    "a.npy": "numpy.save(partial, numpy.zeros(200_000))",
    "a.pt": "torch.save(torch.zeros(200_000), partial)",
    "a.safetensors": "s.save_file({'t': torch.zeros(200_000)}, partial)",
}


def test_a_full_disk_is_one_clear_sentence_and_the_old_file_stays(tmp_path):
    for name in WRITERS:
        (tmp_path / name).write_text("old")
    code = """
import resource, sys, numpy, torch
import safetensors.torch as s
from focusdpo_lib.runs import RunError, atomic
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))  # as if 64 KiB were free
"""
    for name, writer in WRITERS.items():
        code += f"""
try:
    with atomic(sys.argv[1] + "/{name}") as partial:
        {writer}
except RunError as error:
    print(error)
"""
    said = child(code, tmp_path).stdout.splitlines()
    assert said == [
        f"no space left to write {tmp_path / name}: free some disk space and run again; what was complete is kept"
        for name in WRITERS
    ]
    assert names(tmp_path) == sorted(WRITERS)
    assert {(tmp_path / name).read_text() for name in WRITERS} == {"old"}


def test_another_failure_is_not_called_a_full_disk(tmp_path):
    with pytest.raises(PermissionError, match="mine"), atomic(tmp_path / "a"):
        raise PermissionError("mine")


# Runs


def test_a_run_is_complete_only_after_its_block(tmp_path):
    run = Run(tmp_path / "r", {"seed": 1, "masks": params.section("masks")}, {"model": "toybox@1"})
    with run:
        assert not run.complete
        assert yaml.safe_load((run.folder / "params.yaml").read_text())["masks"]["tau"] == 0.1
    assert run.complete and runs.is_complete(run.folder)


def test_the_marker_is_the_last_file_written(tmp_path, monkeypatch):
    written = []
    replace = runs._replace
    monkeypatch.setattr(runs, "_replace", lambda new, path: (written.append(path.name), replace(new, path)))
    with Run(tmp_path / "r", {}):
        runs.write_text(tmp_path / "r" / "output.txt", "")
    assert written == ["inputs.json", "params.yaml", "output.txt", "provenance.json", "complete.json"]


def test_provenance_tells_where_a_result_comes_from(tmp_path):
    (tmp_path / "in.txt").write_text("hello")
    with Run(tmp_path / "r", {}, {"text": tmp_path / "in.txt", "model": "toybox@1"}) as run:
        run.facts["steps"] = np.int64(3)
    told = json.loads((tmp_path / "r" / "provenance.json").read_text())
    hello = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"  # printf hello | sha256sum
    assert told["inputs"]["text"]["hash"] == hello and told["inputs"]["model"]["hash"] == "toybox@1"
    assert told["steps"] == 3 and told["packages"]["numpy"] == np.__version__
    assert told["peak_memory_bytes"] > 2**20 and told["wall_seconds"] >= 0 and told["device"]
    assert {"git", "python", "platform", "started"} <= told.keys()


def test_a_failed_run_has_no_marker_and_is_resumed_with_its_files(tmp_path):
    with pytest.raises(ZeroDivisionError), Run(tmp_path / "r", {"seed": 1}) as run:
        runs.write_text(run.folder / "first.txt", "kept")
        raise ZeroDivisionError
    assert not run.complete
    with Run(tmp_path / "r", {"seed": 1}) as again:
        assert again.resumed and (again.folder / "first.txt").read_text() == "kept"
    assert again.complete and json.loads((tmp_path / "r" / "provenance.json").read_text())["resumed"]


def test_a_run_killed_while_it_finishes_is_not_complete_and_goes_on(tmp_path):
    code = """
import os, signal, sys
from focusdpo_lib import runs
with runs.Run(sys.argv[1], {"seed": 1}) as run:
    runs.write_text(run.folder / "first.txt", "kept")
    for name in ("write_json", "write_text"):  # dies in the first file of finish()
        setattr(runs, name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
"""
    assert child(code, tmp_path / "r").returncode == -signal.SIGKILL
    run = Run(tmp_path / "r", {"seed": 1})
    assert not run.complete and not (tmp_path / "r" / "complete.json").exists()
    with run:
        assert run.resumed and (tmp_path / "r" / "first.txt").read_text() == "kept"
    assert run.complete


def test_other_parameters_are_not_mixed_into_a_folder(tmp_path):
    with Run(tmp_path / "r", {"masks": {"tau": 0.1, "gamma": 0.3}}):
        pass
    other = Run(tmp_path / "r", {"masks": {"tau": 0.2, "gamma": 0.3}})
    assert not other.complete
    with pytest.raises(RunError, match=r"masks\.tau is 0\.1 there, 0\.2 here.*choose another name, or delete"):
        other.start()
    assert runs.is_complete(tmp_path / "r")


@pytest.mark.parametrize(
    ("there", "here"), [({"a": 1}, {}), ({}, {"a": None}), ({"a": 1}, {"a": 1.0}), ({"a": [1]}, {"a": [2]})]
)
def test_every_difference_of_parameters_counts(tmp_path, there, here):
    with Run(tmp_path / "r", there):
        pass
    with pytest.raises(RunError, match=r"other parameters or inputs \(a "):
        Run(tmp_path / "r", here).start()


def test_the_order_of_parameters_does_not_count(tmp_path):
    with Run(tmp_path / "r", {"a": 1, "b": (2, 3)}):
        pass
    assert Run(tmp_path / "r", {"b": [2, 3], "a": 1}).complete


def test_a_complete_run_is_not_started_again(tmp_path):
    with Run(tmp_path / "r", {}):
        pass
    with pytest.raises(RunError, match="complete: use it, or delete"):
        Run(tmp_path / "r", {}).start()


@pytest.mark.parametrize("bad", [{"a": object()}, {"a": {"b": np.zeros(2)}}])
def test_a_parameter_that_no_file_can_hold_is_named(tmp_path, bad):
    with pytest.raises(RunError, match=r"params\.a(\.b)? is a (object|ndarray): give a number"):
        Run(tmp_path, bad)


# Inputs


def test_a_changed_input_makes_another_run(tmp_path):
    source = tmp_path / "pairs"
    source.mkdir()
    (source / "a").write_text("1")
    with Run(tmp_path / "r", {}, {"pairs": source}):
        pass
    assert Run(tmp_path / "r", {}, {"pairs": source}).complete
    (source / "a").write_text("2")
    changed = Run(tmp_path / "r", {}, {"pairs": source})
    assert not changed.complete
    with pytest.raises(RunError, match="its input 'pairs' has changed"):
        changed.start()


def test_a_folder_is_known_by_names_and_contents_not_by_its_place(tmp_path):
    for name, file in (("x", "a"), ("y", "a"), ("z", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("1")
    x, y, z = (runs.fingerprint(tmp_path / name) for name in "xyz")
    assert x == y != z


def test_a_run_is_known_by_what_it_was_asked_not_by_when_it_ran(tmp_path):
    for name, seed in (("x", 1), ("y", 1), ("z", 2)):
        with Run(tmp_path / name, {"seed": seed}):
            pass
    x, y, z = (runs.fingerprint(tmp_path / name) for name in "xyz")
    assert x == y != z


def rewritten(file, text):
    """Another content of the same size; even on a file system that counts time in whole seconds it is another time."""
    file.write_text(text)
    os.utime(file, (file.stat().st_atime, file.stat().st_mtime + 2))


def test_a_finished_run_whose_files_are_rewritten_is_another_input(tmp_path):
    for name in ("pairs", "again"):
        with Run(tmp_path / name, {"seed": 1}) as run:
            (run.folder / "train.parquet").write_text("one")
            (run.folder / "steps.csv").write_text(f"seconds\n{name}")  # how it went
    before = runs.fingerprint(tmp_path / "pairs")
    assert runs.fingerprint(tmp_path / "again") == before
    rewritten(tmp_path / "pairs" / "train.parquet", "two")
    assert runs.fingerprint(tmp_path / "pairs") != before
    (tmp_path / "pairs" / "train.parquet").unlink()
    with pytest.raises(RunError, match="pairs has lost a file that it made: run it again"):
        runs.fingerprint(tmp_path / "pairs")


def test_a_file_is_read_again_only_where_it_may_have_changed(tmp_path, monkeypatch):
    file = tmp_path / "weights.safetensors"
    file.write_text("one")
    first = runs.fingerprint(file)
    with monkeypatch.context() as patch:
        patch.setattr(runs.hashlib, "file_digest", None)
        assert runs.fingerprint(file) == first
    rewritten(file, "two")
    assert runs.fingerprint(file) != first


def test_an_unfinished_run_is_no_input(tmp_path):
    Run(tmp_path / "dip", {}).start()
    with pytest.raises(RunError, match="dip is an unfinished run: run it again"):
        Run(tmp_path / "r", {}, {"pairs": tmp_path / "dip"})


def test_a_missing_input_is_named(tmp_path):
    with pytest.raises(RunError, match=r"nowhere does not exist: make it first"):
        Run(tmp_path / "r", {}, {"pairs": tmp_path / "nowhere"})


@pytest.mark.parametrize("marker", ["{", "", "{}", "[]", "3", '{"fingerprint": 3}', '{"fingerprint": "", "files": 1}'])
def test_a_damaged_marker_is_told(tmp_path, marker):
    with Run(tmp_path / "r", {}) as run:
        pass
    (run.folder / "complete.json").write_text(marker)
    for look in (lambda: run.complete, lambda: runs.is_complete(run.folder), lambda: runs.fingerprint(run.folder)):
        with pytest.raises(RunError, match=r"complete\.json cannot be read .*: delete the folder .*r and run again"):
            look()


@pytest.mark.parametrize(
    ("record", "content"),
    [
        *(("params.yaml", content) for content in (b"a: [1", b"", b"\xff\xfe", b"3")),
        *(("inputs.json", content) for content in (None, b"[]", b'{"a": 1}', b'{"a": {}}')),
    ],
)
def test_a_damaged_record_of_an_unfinished_run_is_told(tmp_path, record, content):
    run = Run(tmp_path / "r", {"a": 1})
    run.start()
    (run.folder / record).unlink() if content is None else (run.folder / record).write_bytes(content)
    with pytest.raises(RunError, match=rf"{record} cannot be read .*: delete the folder .*r and run again") as caught:
        Run(tmp_path / "r", {"a": 1}).start()
    assert "\n" not in str(caught.value)


# What a run made


@pytest.mark.parametrize("lost", ["adapter/weights.bin", "table.csv"])
def test_a_run_that_lost_a_file_is_made_again(tmp_path, lost):
    def make():
        run = Run(tmp_path / "r", {"a": 1})
        run.passing = ("checkpoint",)
        with run:
            for name in ("adapter/weights.bin", "table.csv", "checkpoint", "said.log", ".hidden"):
                runs.write_text(run.folder / name, name)
        return run

    run = make()
    for name in ("checkpoint", "said.log", ".hidden"):  # what nobody misses
        (run.folder / name).unlink()
    assert run.complete
    (run.folder / lost).unlink()
    assert not run.complete and not runs.is_complete(run.folder)
    with pytest.raises(ZeroDivisionError), Run(tmp_path / "r", {"a": 1}):
        assert not (run.folder / "complete.json").exists()  # killed now, it is an unfinished run like any other
        raise ZeroDivisionError
    assert make().complete and (run.folder / lost).read_text() == lost


def test_a_run_whose_marker_lists_no_files_stays_complete_and_the_same_input(tmp_path):
    """As runs were finished before the list was kept: their inputs are known by the marker of that time."""
    with Run(tmp_path / "r", {"a": 1}) as run:
        runs.write_text(run.folder / "out.bin", "x")
    known = runs.fingerprint(run.folder)
    text = json.dumps({"fingerprint": run.fingerprint}, indent=2) + "\n"
    (run.folder / "complete.json").write_text(text)
    hashes = {name: hashlib.sha256(what.encode()).hexdigest() for name, what in (("out.bin", "x"), (MARKER, text))}
    assert run.complete and runs.fingerprint(run.folder) == known == runs.digest(hashes)
    (run.folder / "out.bin").unlink()
    assert run.complete


# Places that cannot hold a run


@pytest.mark.parametrize("place", ["file", "file/training/run"])
def test_a_file_where_a_run_should_go_is_named(tmp_path, place):
    (tmp_path / "file").write_text("x")
    run = Run(tmp_path / place, {})
    assert not run.complete
    for make in (run.start, lambda: run.alone().__enter__()):
        with pytest.raises(RunError, match=r"cannot be written \(.*file is a file\): choose another place"):
            make()


@pytest.mark.parametrize("folder", ["proc", "sys"])
def test_a_folder_that_nobody_may_write_to_is_not_called_a_full_disk(folder):
    """The kernel's own folders, of which not even root may make another."""
    with pytest.raises(RunError, match=rf"^the folder /{folder}/x/y cannot be written \(.* in /{folder}\): choose"):
        Run(f"/{folder}/x/y", {}).start()


# Folders as inputs


def test_what_lies_behind_a_link_belongs_to_a_folder_and_what_is_hidden_does_not(tmp_path):
    data, other = tmp_path / "data", tmp_path / "other"
    for folder in (data, other):
        folder.mkdir()
        (folder / "a").write_text("1")
    plain = runs.fingerprint(data)
    for hidden in (".DS_Store", ".cache/huggingface/b", ".git/c"):
        (data / hidden).parent.mkdir(parents=True, exist_ok=True)
        (data / hidden).write_text("x")
    assert runs.fingerprint(data) == plain == runs.digest({"a": hashlib.sha256(b"1").hexdigest()})
    (data / "link").symlink_to(other)
    linked = runs.fingerprint(data)
    assert linked == runs.digest(dict.fromkeys(("a", "link/a"), hashlib.sha256(b"1").hexdigest()))
    rewritten(other / "a", "2")
    assert runs.fingerprint(data) != linked


def test_links_in_a_circle_end(tmp_path):
    for name, target in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
        (tmp_path / name / "to").symlink_to(tmp_path / target)
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "broken").symlink_to("nowhere")
    of = {name: hashlib.sha256(name.encode()).hexdigest() for name in "ab"}
    assert runs.fingerprint(tmp_path / "a") == runs.digest({"file": of["a"], "to/file": of["b"]})
