"""What YAML would read in silence as something else is refused, with line and remedy."""

from argparse import Namespace
from pathlib import Path

import nbformat
import pytest
import yaml

from focusdpo_lib import params, strict_yaml
from focusdpo_lib.batch import Job, resolved
from focusdpo_lib.batch.cli import chosen_overrides
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
        ("x: 1\n1: 3", "line 2: the key '1' is no text: correct it, or put it in quotes"),
        ("true: 3", "the key 'true' is no text"),
        ("a: {null: 3, b: 1}", "the key 'null' is no text"),
        ("2024-01-02: 3", "the key '2024-01-02' is no text"),
        ("~: 3", "line 1: the key '~' is no text"),
        ("? [a]\n: 3", "the key a group or list is no text"),
        ("a: !!int x", "line 1: the tag !!int is not accepted: write the value alone"),
        ("a: 1\nb: !!int ''", "line 2: the tag !!int is not accepted"),
        ("a: !!bool maybe", "the tag !!bool is not accepted"),
        ("a: !!null x", "the tag !!null is not accepted"),
        ("a: !!set {a}", "the tag !!set is not accepted"),
        ("a: ! x", "the tag ! is not accepted"),
        ("!foo a: 1", "the tag !foo is not accepted"),
        ("a: !!python/object:os.system x", "the tag !!python/object:os.system is not accepted"),
        ("b: &b {x: 1}\na: {<<: *b, <<: {y: 2}}", "line 2: the key '<<' stands twice"),
        ("a:\n  <<: {x: 1}\n  <<: {x: 1}", r"line 3: the key '<<' stands twice \(first in line 2\)"),
        ("a: " + "[" * 3000 + "]" * 3000, "groups and lists stand in each other a hundred deep"),
        ("{a: " * 3000 + "}" * 3000, "groups and lists stand in each other a hundred deep"),
        ("a: " + "9" * 5000, "is no number that can be read"),
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
        "a: &a {x: 1, y: 1}\nb: {deep: {<<: &c {<<: *a, x: 2}, x: 3}}\nc: *c\n",
        "",
    ],
)
def test_everything_else_is_what_the_safe_loader_reads(text):
    assert strict_yaml.load(text) == yaml.safe_load(text)


def test_what_was_read_is_the_reader_s_own():
    first = strict_yaml.load("a: {b: [1]}")
    first["a"]["b"].append(2)
    assert strict_yaml.load("a: {b: [1]}") == {"a": {"b": [1]}}


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


RANK_2 = {"rank": 2, "alpha": 16.0}
LORA = "training: {steps: 7, learning_rate: 0.001, lora: {rank: 32, alpha: 16.0}}\n"


@pytest.mark.parametrize(
    ("over", "set_", "expected"),
    [
        ("training: {lora: {rank: 8}}", [], {"lora": {"rank": 8, "alpha": 16.0}}),
        ("training: {lora: {alpha: null}, steps: 3}", [], {"lora": {"rank": 32, "alpha": None}, "steps": 3}),
        ("training: {lora: {}}\nobjective:\n", [], {}),
        ("", ["training={steps: 3}"], {"steps": 3}),
        ("training: {steps: 1}", ["training={lora: {rank: 4}}", "training.lora.rank=2"], {"steps": 1, "lora": RANK_2}),
    ],
)
def test_what_goes_over_a_group_leaves_the_rest_of_it(over, set_, expected, tmp_path):
    for name, text in (("x", LORA), ("over", over)):
        (tmp_path / f"{name}.yaml").write_text(text)
    given = Namespace(over=[tmp_path / "over.yaml"], set=set_)
    job = Job(ROOT / "notebooks" / "03_training.ipynb", tmp_path / "x", tmp_path / "x.yaml", chosen_overrides(given))
    assert resolved(job)["training"] == yaml.safe_load(LORA)["training"] | expected


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("training.steps", 0, "training.steps = 0"),
        ("samples", "two", "samples = 'two'"),
        ("trainig.steps", 1, "trainig"),
    ],
)
def test_a_wrong_override_is_not_blamed_on_the_file(key, value, says, tmp_path):
    file, book = tmp_path / "x.yaml", ROOT / "notebooks" / "03_training.ipynb"
    file.write_text(LORA)
    with pytest.raises(ParameterError, match=rf"^{says} in the overrides launch.machines, {key} over .*x.yaml "):
        resolved(Job(book, tmp_path / "x", file, {"launch.machines": 2, key: value}))
    file.write_text("training: {steps: -1}\n")
    with pytest.raises(ParameterError, match=r"^training.steps = -1 in \S*x.yaml is not accepted"):
        resolved(Job(book, tmp_path / "x", file, {key: value}))


@pytest.mark.parametrize("line", ["run: ..", "run: a/b", "pairs: '.x'", "run: ' '", f"run: {'x' * 300}"])
def test_a_run_s_name_is_looked_at_before_anything_runs(line, tmp_path):
    (tmp_path / "x.yaml").write_text(line + "\n")
    with pytest.raises(ParameterError, match=rf"^{line[:3]}.* in .*x.yaml: .* names no folder of a run"):
        resolved(Job(ROOT / "notebooks" / "03_training.ipynb", tmp_path / "x", tmp_path / "x.yaml"))


def test_a_job_s_name_too_long_for_a_folder_is_said(tmp_path, capsys):
    (tmp_path / "x.yaml").write_text("run: x\n")
    words = [str(ROOT / "notebooks" / "03_training.ipynb"), str(tmp_path / "x.yaml"), "--into", str(tmp_path)]
    assert batch([*words, "--set", f"results={'r' * 300}"]) == 1
    assert "nothing was run: " in (said := capsys.readouterr().out) and "names no folder of a run" in said


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
    (folder,) = (tmp_path / "out").glob("[!.]*")
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
        ("masks", {"entropy_window": 9999999}, "masks.entropy_window = 9999999"),
        ("masks", {"entropy_window": 513}, "masks.entropy_window = 513"),
        ("generation", {"reference_size": 1}, "generation.reference_size = 1"),
        ("generation", {"references_size": 7}, "generation.references_size = 7"),
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


def test_a_text_with_the_character_that_ends_a_path_is_refused():
    with pytest.raises(
        StrictYamlError, match=r"line 2: a text that holds the character NUL names no file: take it out"
    ):
        strict_yaml.load('a: 1\nresults: "here\\0there"')
