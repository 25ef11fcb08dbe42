"""Heavy stages in several processes: the result of one to the bit, deaths made good, and what a process raises."""

import gc
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny_work import Counting, Seen

from focusdpo_lib import backbones, params, stages, workers
from focusdpo_lib.evaluation.benchmark import Benchmark
from focusdpo_lib.runs import PARTIAL, RunError
from focusdpo_lib.training import ADAPTER

# Of 46 pairs 38 have one subject: two batches of errors, and one of the others.
DIP = params.Dip(train_pairs=12, validation_pairs=46, two_subject_share=0.2)


def run(folder, processes=3, **how):
    workers.run(Counting(folder, **how), folder, processes, "items", "item")


def made(folder):
    return {int(path.name): path.read_text().split() for path in folder.iterdir() if path.name.isdigit()}


def test_every_process_makes_its_share_with_as_many_threads_as_this_one(tmp_path):
    run(tmp_path)
    found = made(tmp_path)
    assert sorted(found) == list(range(12))
    assert len({found[i][0] for i in range(12)}) == 3 and len({found[i][0] for i in (1, 4, 7, 10)}) == 1
    assert {threads for _, threads in found.values()} == {str(torch.get_num_threads())}
    assert str(os.getpid()) not in {process for process, _ in found.values()}
    assert not list(tmp_path.glob(f"{PARTIAL}*"))


def test_one_is_this_process_unless_it_must_not_be(tmp_path):
    run(tmp_path, processes=1)
    assert {process for process, _ in made(tmp_path).values()} == {str(os.getpid())}
    (tmp_path / "apart").mkdir()
    workers.run(Counting(tmp_path / "apart"), tmp_path / "apart", 1, "items", "item", apart=True)
    assert str(os.getpid()) not in {process for process, _ in made(tmp_path / "apart").values()}


def test_a_process_that_dies_has_its_share_done_once_more(tmp_path):
    run(tmp_path, fails=7, how="once")
    found = made(tmp_path)
    assert sorted(found) == list(range(12))
    assert found[7] == found[10] != found[4] == found[1]  # what was done before the death is kept


def test_one_that_dies_again_is_a_sentence_that_names_the_item(tmp_path):
    with pytest.raises(workers.WorkerError) as said:
        run(tmp_path, fails=7)
    assert str(said.value) == (
        "a process that makes items died twice (killed, most often for want of main memory), at item 7: close other "
        "programs or lower workers.processes, and run again; it goes on where it stopped"
    )
    assert sorted(made(tmp_path)) == [0, 1, 2, 3, 4, 5, 6, 8, 9, 11]  # the others finished


def test_what_a_process_raises_is_raised_here_with_where_it_was(tmp_path):
    with pytest.raises(RunError) as said:
        run(tmp_path, fails=7, how="raise")
    assert str(said.value) == "item 7 is a hippo"
    assert "in _fail" in said.value.__notes__[0]


@pytest.mark.parametrize(("visible", "expected"), [(None, ["0", "1"]), ("4,6,7", ["4", "6"])])
def test_on_gpus_every_process_has_one_of_its_own(tmp_path, monkeypatch, visible, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert workers._devices(2) == expected
    with pytest.raises(RunError, match=r"workers\.processes = 4 on a machine with 3 GPU\(s\): lower it to 3"):
        run(tmp_path, processes=4)


def test_a_process_knows_its_gpu_before_the_work_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_devices", lambda processes: ["3", "5"])
    workers.run(Seen(tmp_path), tmp_path, 2, "items", "item")
    assert [(tmp_path / str(i)).read_text() for i in range(2)] == ["3", "5"]


def test_processes_end_with_the_one_that_started_them(tmp_path):
    code = f"from tiny_work import *; from focusdpo_lib import workers; at = {str(tmp_path)!r}; "
    code += "workers.run(Sleeping(at), at, 2, 'items', 'item')"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    parent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path})
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("at-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    children = [int(file.read_text()) for file in tmp_path.glob("at-*")]
    parent.kill()
    parent.wait()
    assert len(children) == 2
    while any(map(_alive, children)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_alive, children))


def _alive(process):
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2]
    except FileNotFoundError:
        return False


def test_every_stage_is_the_same_to_the_bit_in_one_process_and_in_several(tiny_flux, tmp_path):
    """Preparing, sampling, scoring and errors by region; batches that do not divide among the processes."""
    backbone = params.Backbone(model=str(tiny_flux), precision="float32")  # "auto" may be another elsewhere: --bfloat16
    pairs = stages.build_pairs(tmp_path, "main", DIP)
    benchmark = Benchmark.load(stages.toybox_benchmark(tmp_path), "multi").first_prompts(1)
    benchmark = replace(benchmark, cases=benchmark.cases[:7])
    sampling = params.Generation(steps=1, images_per_prompt=2, batch_size=3)
    evaluation = params.Evaluation(batch_size=4)
    encoders = stages.load_encoders(evaluation)
    model = backbones.load(backbone)
    model.add_adapter(2)
    model.save_adapter(tmp_path / "run" / ADAPTER)
    found = {}
    for processes in (1, 2):
        results = tmp_path / str(processes)
        prepared = stages.prepare_pairs(results, pairs, backbone, params.Masks(), processes=processes)
        images = stages.generate_images(results, "base", benchmark, backbone, sampling, processes=processes)
        of = benchmark, images, encoders, evaluation, sampling
        scores = stages.score(results, "base", *of, processes=processes)
        errors = stages.errors_by_region(
            results, "run", pairs, backbone, params.Masks(), tmp_path / "run", processes=processes
        )
        files = [*prepared.glob("*.safetensors"), *(images / "images").iterdir()]
        found[processes] = {file.name: file.read_bytes() for file in files}, scores, errors
        assert len(files) == 2 + 14 and not (results / "scores/multi/base/embeddings").exists()
    assert found[1][0] == found[2][0]
    for table in (1, 2):
        pd.testing.assert_frame_equal(found[1][table], found[2][table], check_exact=True)


def test_a_variable_that_is_set_between_two_stages_reaches_the_second_s_processes(tmp_path, monkeypatch):
    """Also where they are forked from a process that started before it was set."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", name)  # without a GPU a text as any other
        workers.run(Seen(tmp_path / name), tmp_path / name, 2, "items", "item")
        assert {(tmp_path / name / str(shard)).read_text() for shard in range(2)} == {name}


def test_garbage_is_collected_again_after_imports_also_where_one_fails():
    with pytest.raises(ImportError), workers.importing():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled() and gc.get_freeze_count() > 0
