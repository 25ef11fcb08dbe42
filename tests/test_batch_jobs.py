"""Notebooks are checked before they run, whole or absent after, and one that fails says where and why."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import nbformat
import pytest

from focusdpo_lib import runs
from focusdpo_lib.batch import Job, cli, notebooks, run_all, warm
from focusdpo_lib.batch import jobs as batch
from focusdpo_lib.batch.engines import on_local, said
from focusdpo_lib.params import ParameterError

PARAMETERS = "seed = 0\nrate = 0.5\nfolder = 'x'\nlimit = None\nmasks = {'tau': 0.1}"


def notebook(path, *cells, parameters=PARAMETERS):
    made = nbformat.v4.new_notebook()
    made.metadata.kernelspec = {"name": "not-installed", "display_name": "a reader's own", "language": "python"}
    made.cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    made.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
    path.parent.mkdir(exist_ok=True)
    nbformat.write(made, path)
    return path


def printed(path):
    return "".join(o.get("text", "") for c in nbformat.read(path, 4).cells for o in c.get("outputs", []))


# A batch of real notebooks, run once for the tests of this block


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A good job, one that raises, one whose kernel dies, one that depends on a failed one, one without its product."""
    folder = tmp_path_factory.mktemp("a {batch}")  # with a space and braces, as a reader's folder may have
    good = notebook(
        folder / "books" / "good.ipynb",
        "import os, sys; print(seed, masks, os.path.basename(os.getcwd()))",
        "print(sys.executable)",
    )
    bad = notebook(folder / "books" / "bad.ipynb", "print('so far')", "# a comment\nraise ValueError('too\\nlarge')")
    dead = notebook(folder / "books" / "dead.ipynb", "import os, signal", "os.kill(os.getpid(), signal.SIGKILL)")
    (folder / "good.yaml").write_text("seed: 3\nmasks: {tau: 0.2}\n")
    into = folder / "results"
    jobs = [
        Job(good, into / "good", folder / "good.yaml", {"masks.gamma": 0.4}),
        Job(bad, into / "bad"),
        Job(dead, into / "dead"),
        Job(good, into / "follower", after=["bad"]),
        Job(good, into / "forgetful", products=[folder / "training"]),
    ]
    broken = folder / "jupyter" / "kernels" / "python3"  # a kernel of the user that comes before ours and cannot start
    broken.mkdir(parents=True)
    (broken / "kernel.json").write_text('{"argv": ["false"], "display_name": "broken", "language": "python"}')
    printed_lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
        patch.setattr(on_local, "say", printed_lines.append)
        code = run_all(jobs)
    return folder, jobs, printed_lines, code


def test_a_job_leaves_a_whole_run_and_gets_its_parameters(ran):
    folder = ran[0] / "results" / "good"
    names = {"good.ipynb", "good.html", "params.yaml", "inputs.json", "provenance.json", "complete.json"}
    assert {p.name for p in folder.iterdir()} == names
    assert printed(folder / "good.ipynb") == f"3 {{'tau': 0.2, 'gamma': 0.4}} books\n{sys.executable}\n"
    assert "0.4" in (folder / "good.html").read_text()


def test_an_error_is_one_sentence_that_names_notebook_cell_and_what_is_kept(ran):
    folder, _, said, _ = ran
    kept = folder / "results" / "bad.failed.ipynb"
    sentence = f"cell [3] of {folder / 'books' / 'bad.ipynb'} (`raise ValueError('too\\nlarge')`) stopped with "
    assert f"[2/5] bad: FAILED. {sentence}ValueError: too large (the notebook as far as it went: {kept})" in said
    assert printed(kept).startswith("so far")
    assert not (folder / "results" / "bad").exists()


def test_a_killed_kernel_is_one_sentence_too(ran):
    said = next(text for text in ran[2] if "dead: FAILED" in text)
    assert "the kernel died in cell [3] of" in said and "lack of memory" in said and "dead.failed.ipynb" in said


def test_only_what_depends_on_a_failed_job_is_held_up(ran):
    folder, _, said, code = ran
    assert "[4/5] follower: not run, for it needs bad" in said
    assert not (folder / "results" / "follower").exists()
    assert any("[5/5] forgetful: started, about" in text for text in said)  # it went on, and says how long
    assert code == 1


def test_a_notebook_that_leaves_its_product_unfinished_is_not_complete(ran):
    folder, _, said, _ = ran
    assert any("forgetful: FAILED" in text and "left" in text and "training unfinished" in text for text in said)
    assert not (folder / "results" / "forgetful").exists()


def test_a_complete_job_is_skipped_and_an_edited_one_replaced_only_by_a_good_one(ran, capsys):
    folder, jobs, _, _ = ran
    assert run_all(jobs[:1]) == 0 and "good: complete already, skipped" in capsys.readouterr().out
    before = (folder / "results" / "good" / "good.ipynb").read_bytes()
    notebook(jobs[0].notebook, "raise RuntimeError('an edit that fails')")
    assert run_all(jobs[:1]) == 1
    assert (folder / "results" / "good" / "good.ipynb").read_bytes() == before  # and it is not taken for the edited one
    assert not runs.Run(jobs[0].folder, batch.resolved(jobs[0]), {"notebook": "another"}).complete
    notebook(jobs[0].notebook, "print('mended')")
    assert run_all(jobs[:1]) == 0
    assert printed(folder / "results" / "good" / "good.ipynb") == "mended\n"
    assert not (folder / "results" / "good.failed.ipynb").exists()


def test_a_killed_batch_leaves_no_notebook_and_no_kernel_and_its_rest_is_removed_by_the_next(tmp_path):
    """Of two runs, so that their kernels are forked; from a process that has imported nothing, to be quick."""
    slow = notebook(
        tmp_path / "slow.ipynb",
        "import os, pathlib, time; pathlib.Path('pid').write_text(f'{os.getpid()}'); os.rename('pid', 'begun')",
        "time.sleep(600)",
    )
    for name in "ab":
        (tmp_path / f"{name}.yaml").write_text("seed: 1\n")
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    words = [str(word) for word in (slow, *files, "--into", tmp_path / "results")]
    code = "import sys; from focusdpo_lib.batch import cli, warm; warm.context.set_forkserver_preload([])"
    command = [sys.executable, "-c", f"{code}; sys.exit(cli.main(sys.argv[1:]))", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "begun").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)  # the kernel ends by itself when it sees that its parent is gone
    process.wait()
    kernel = int((tmp_path / "begun").read_text())
    while os.path.exists(f"/proc/{kernel}"):  # of Linux, where kernels are forked
        assert time.monotonic() < deadline, "the kernel outlived its batch"
        time.sleep(0.1)
    assert not (tmp_path / "results" / "a").exists()
    assert list((tmp_path / "results").glob(f"{runs.PARTIAL}*"))
    notebook(slow, "print('quick')")
    assert cli.main(words) == 0
    assert sorted(p.name for p in (tmp_path / "results").glob("[!.]*")) == ["a", "b"]


@pytest.mark.skipif(not warm.FORKS, reason="kernels are forked on Linux, where there is no GPU")
def test_a_warm_kernel_has_imported_everything_and_is_else_as_a_fresh_one(tmp_path):
    asks = notebook(
        tmp_path / "books" / "asks.ipynb",
        "import sys; imported = 'focusdpo_lib.comparison' in sys.modules",
        "import gc, multiprocessing, os; print(imported, gc.get_freeze_count() > 1e5, gc.isenabled(), "
        "os.environ['ASKED'], os.path.basename(os.getcwd()), multiprocessing.get_start_method(), "
        "multiprocessing.current_process().daemon, os.getpgrp() == os.getpid())",
        "import matplotlib.pyplot as plt; figure = plt.subplots()[0]; plt.close(figure); figure",
    )
    said = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASKED", "as the batch was")
        for how in (True, False):
            job = Job(asks, tmp_path / f"warm-{how}")
            assert batch.execute(job, warm=how)
            cells = nbformat.read(job.folder / f"{job.name}.ipynb", 4).cells
            assert any("image/png" in o.get("data", {}) for o in cells[-1].outputs), "figures are shown inline"
            said[how] = printed(job.folder / f"{job.name}.ipynb")
    start_method = multiprocessing.get_context().get_start_method()
    assert said[False] == f"False False True as the batch was books {start_method} False True\n"
    assert said[True] == said[False].replace("False", "True", 2)


# Before anything runs


def refused(tmp_path, text, overrides=None):
    job = Job(notebook(tmp_path / "n.ipynb"), tmp_path / "results" / "n", tmp_path / "n.yaml", overrides or {})
    job.params.write_text(text)
    with pytest.raises(ParameterError) as caught:
        batch.resolved(job)
    return str(caught.value)


def test_an_unknown_parameter_is_refused_though_papermill_would_only_warn(tmp_path):
    text = refused(tmp_path, "sed: 1\n")
    assert text.startswith(f"sed in {tmp_path / 'n.yaml'} is not a parameter of {tmp_path / 'n.ipynb'}")
    assert "did you mean 'seed'?" in text


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            "rate: 1e-8",
            r"rate = '1e-8' in .* should be a float (YAML reads a number such as 1e-8 as text: write 1.0e-8)",
        ),
        ("seed: 1.5", "seed = 1.5"),
        ("seed: true", "should be a int"),
        ("folder: 3", "folder = 3"),
        ("masks: {tua: 1}", "masks.tua"),
        ("masks: [1]", "masks = [1]"),
    ],
)
def test_a_wrong_type_is_refused_by_name(tmp_path, line, says):
    text = refused(tmp_path, line)
    for part in says.split(" in .* "):
        assert part in text
    assert "n.yaml" in text


def test_overrides_are_checked_like_the_file(tmp_path):
    assert "masks.tua" in refused(tmp_path, "", {"masks.tua": 1})
    assert "sedd" in refused(tmp_path, "", {"sedd": 1})


def test_a_whole_number_will_do_for_a_float_and_anything_for_none(tmp_path):
    job = Job(notebook(tmp_path / "n.ipynb"), tmp_path / "n", overrides={"rate": 1, "limit": "ten", "masks.tau": 0.3})
    assert batch.resolved(job) == {"rate": 1, "limit": "ten", "masks": {"tau": 0.3}}


def test_every_mistake_is_told_and_nothing_is_run(tmp_path, capsys):
    good = notebook(tmp_path / "n.ipynb", "open('ran', 'w')")
    jobs = [
        Job(good, tmp_path / "results" / "a"),
        Job(good, tmp_path / "results" / "a"),
        Job(good, tmp_path / "results" / "b", after=["c"]),
        Job(tmp_path / "none.ipynb", tmp_path / "results" / "d"),
        Job(good, tmp_path / "results" / "e", tmp_path / "none.yaml"),
    ]
    assert run_all(jobs) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(line.startswith("nothing was run: ") for line in lines)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "cell", ["seed = 1 + 1", "import os", "a, b = 1, 2", "seed = other", "print(1)", "seed =", "masks = {'tua': 1}"]
)
def test_a_parameters_cell_holds_literals_only(tmp_path, cell):
    with pytest.raises(ParameterError, match=r"n\.ipynb"):
        notebooks.parameters(notebook(tmp_path / "n.ipynb", parameters=cell))


# Time left: by hand. 3 expected minutes took 6, so 4 more will take 8.


def test_a_first_short_job_that_takes_longer_than_expected_does_not_multiply_the_others(tmp_path, monkeypatch):
    """0.3 minutes expected, 1.2 taken: of 20 more that is 20 · (2 + 1.2) / (2 + 0.3), not 80."""
    said, clock = [], iter([0, 72, 72, 100])
    monkeypatch.setattr(on_local, "say", said.append)
    monkeypatch.setattr(on_local, "execute", lambda job, warm: True)
    monkeypatch.setattr(on_local.time, "monotonic", lambda: next(clock))
    assert (
        on_local.run_all([Job(tmp_path, tmp_path / "a", minutes=0.3), Job(tmp_path, tmp_path / "b", minutes=20)]) == 0
    )
    assert [line.partition("about ")[2] for line in said if "started" in line] == ["20 min left", "27 min left"]


def test_time_left_follows_the_pace_so_far():
    assert said.time_left(4, [(1, 1.5), (2, 4.5)]) == "8 min 0 s"


def test_durations_are_short_to_read():
    assert [said.span(m) for m in (0.25, 1.5, 12.4)] == ["15 s", "1 min 30 s", "12 min"]


def test_an_error_that_is_no_sentence_is_said_with_its_kind_and_place(tmp_path, monkeypatch, capsys):
    def fails(job, warm):
        raise KeyError("sdxl_ip")

    monkeypatch.setattr(on_local, "execute", fails)
    assert on_local.run_all([Job(tmp_path / "a.ipynb", tmp_path / "a")]) == 1
    shown = capsys.readouterr()
    assert "a: FAILED. KeyError: 'sdxl_ip' (a fault of the kit; where, is said above)" in shown.out
    assert "in fails" in shown.err
