"""What YAML would read in silence as something else is refused, with line and remedy."""

from pathlib import Path

import nbformat
import pytest
import yaml

from focusdpo_lib import params, strict_yaml
from focusdpo_lib.batch import Job, resolved
from focusdpo_lib.batch.cli import main as batch
from focusdpo_lib.params import ParameterError
from focusdpo_lib.strict_yaml import StrictYamlError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3\n", r"line 3: the key 'a' stands twice \(first in line 1\): keep one of the two"),
        ("a:\n  b: 1\n  b: 1\n", r"line 3: the key 'b' stands twice \(first in line 2\)"),
        ("a: {b: 1, b: 2}", "line 1: the key 'b' stands twice"),
        ("- a: 1\n- {b: 1, b: 2}\n", "line 2: the key 'b' stands twice"),
        ("a: 1:30", "line 1: 1:30 would be read as 90: write it as a decimal number, or a text in quotes"),
        ("\na: [0100]", "line 2: 0100 would be read as 64"),
        ("a: 0x10", "0x10 would be read as 16"),
        ("a: -0b11", "-0b11 would be read as -3"),
        ("a: 1:30.5", "1:30.5 would be read as 90.5"),
        ("a: [1", "not YAML .*: correct that line"),
    ],
)
def test_what_would_be_read_as_something_else_is_refused_with_its_line(text, says):
    with pytest.raises(StrictYamlError, match=says) as caught:
        strict_yaml.load(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\nb: {a: 2}\nc: [0, 0.5, 1.0e-8, -3, 10, 0e0]\n",
        "a: '1:30'\nb: \"0100\"\nc: null\nd: true\n",
        "base: &base {a: 1}\nmore: {<<: *base, a: 2}\n",
        "",
    ],
)
def test_everything_else_is_what_the_safe_loader_reads(text):
    assert strict_yaml.load(text) == yaml.safe_load(text)


def test_a_params_file_and_an_override_are_read_so(tmp_path, capsys):
    (tmp_path / "x.yaml").write_text("training:\n  steps: 2000\nobjective: {name: dpo}\ntraining:\n  seed: 1\n")
    with pytest.raises(ParameterError, match=r"x\.yaml is not accepted: line 4: the key 'training' stands twice"):
        params.read_yaml(tmp_path / "x.yaml")
    words = ["notebooks/03_training.ipynb", "x.yaml", "--into", str(tmp_path), "--set", "training.steps=0100"]
    assert batch(words) == 1
    assert "nothing was run: --set training.steps=0100 is not accepted: line 1: 0100" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["training.steps", "=3", "results=[", "training={a: 1, a: 2}"])
def test_a_set_that_says_nothing_clear_is_refused(text, tmp_path, capsys):
    assert batch(["notebooks/03_training.ipynb", "x.yaml", "--into", str(tmp_path), "--set", text]) == 1
    assert f"nothing was run: --set {text} is not accepted" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["/some where/x", "../up", "{user}", "'a: b'"])
def test_a_value_with_slashes_or_braces_reaches_the_notebook_and_names_one_folder(value, tmp_path):
    book = nbformat.v4.new_notebook()
    book.cells = [
        nbformat.v4.new_code_cell("place = 'x'", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("print(f'<{place}>')"),
    ]
    nbformat.write(book, tmp_path / "a.ipynb")
    (tmp_path / "a.yaml").write_text("place: y\n")
    words = [str(tmp_path / "a.ipynb"), str(tmp_path / "a.yaml"), "--into", str(tmp_path / "out")]
    assert batch([*words, "--set", f'place="{value}"']) == 0
    (folder,) = (tmp_path / "out").iterdir()
    assert f"<{value}>" in (folder / f"{folder.name}.ipynb").read_text("utf-8")


@pytest.mark.parametrize(
    ("name", "values", "key"),
    [
        ("dip", {"seed": -1}, "dip.seed = -1"),
        ("training", {"seed": 99999999999999999999999}, "training.seed"),
        ("generation", {"seed": -1}, "generation.seed = -1"),
        ("evaluation", {"seed": -1}, "evaluation.seed = -1"),
        ("dip", {"strengths": []}, "dip.strengths = []"),
        ("dip", {"strengths": [9]}, "dip.strengths.0 = 9"),
        ("training", {"lora": {"targets": []}}, "training.lora.targets = []"),
        ("masks", {"layers": []}, "masks.layers = []"),
        ("training", {"steps": None}, "training.steps = None"),
    ],
)
def test_values_that_would_break_later_are_refused_by_name(name, values, key):
    with pytest.raises(ParameterError) as caught:
        params.section(name, values)
    assert key in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("run: null", "run = None in .* should be a str"),
        ("results:", "results = None in .* should be a str"),
        ("run: ''", "run in .* is empty: give it a value"),
        ("samples: 0", "samples = 0 in .* should be above 0"),
        ("samples: -2", "samples = -2 in .* should be above 0"),
        ("masks: {layers: [0o7]}", r"masks\.layers"),
    ],
)
def test_a_notebook_s_own_parameters_are_checked_too(line, says, tmp_path):
    (tmp_path / "a.yaml").write_text(line + "\n")
    with pytest.raises(ParameterError, match=says):
        resolved(Job(ROOT / "notebooks" / "03_training.ipynb", tmp_path / "x", tmp_path / "a.yaml"))


def test_a_list_of_a_notebook_keeps_its_kind(tmp_path):
    book = ROOT / "notebooks" / "02_mask_derivation.ipynb"
    for text, says in (("timesteps: []", "is empty"), ("timesteps: [0.1, x]", r"timesteps\[1\] = 'x'"),
                       ("timesteps: [-0.5]", "should be above 0"), ("seed: -1", "should be 0 or more")):  # fmt: skip
        (tmp_path / "a.yaml").write_text(text + "\n")
        with pytest.raises(ParameterError, match=says):
            resolved(Job(book, tmp_path / "x", tmp_path / "a.yaml"))
    (tmp_path / "a.yaml").write_text("ipap: null\ntimesteps: [1]\nseed: 0\n")
    assert resolved(Job(book, tmp_path / "x", tmp_path / "a.yaml"))["ipap"] is None
