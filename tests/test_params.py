"""A wrong setting ends with one sentence that names the key, where it stands and what to do."""

import pytest

from focusdpo_lib import params, stages
from focusdpo_lib.params import ParameterError

WHERE = "params/toybox/03.yaml"


def refusal(name, values):
    with pytest.raises(ParameterError) as caught:
        params.section(name, values, WHERE)
    text = str(caught.value)
    assert WHERE in text and "\n" not in text
    return text


def test_what_is_not_given_keeps_its_default():
    masks = params.section("masks", {"tau": 0.2})
    assert (masks.tau, masks.gamma) == (0.2, 0.3)
    assert params.section("masks") == params.section("masks", {})


def test_an_unknown_key_is_named_with_its_section_and_the_remedy():
    assert refusal("masks", {"tua": 0.1}).startswith(f"masks.tua in {WHERE} is not a setting of the kit: remove it")
    assert refusal("training", {"lora": {"rnak": 4}}).startswith("training.lora.rnak")


def test_a_number_that_yaml_reads_as_text_gets_a_hint(tmp_path):
    (tmp_path / "x.yaml").write_text("training:\n  learning_rate: 1e-8\n")  # YAML 1.1: a text, for want of a dot
    with pytest.raises(ParameterError, match=r"training\.learning_rate = '1e-8' in .*x\.yaml .* write 1\.0e-8\)"):
        params.read_yaml(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text("training:\n  learning_rate: 1.0e-8\n")
    assert params.section("training", params.read_yaml(tmp_path / "x.yaml")["training"]).learning_rate == 1e-8


@pytest.mark.parametrize(
    ("name", "values", "key", "says"),
    [
        ("training", {"steps": 1.5}, "training.steps = 1.5", "valid integer"),
        ("training", {"steps": True}, "training.steps = True", "valid integer"),
        ("training", {"lora": {"rank": "8"}}, "training.lora.rank = '8'", "valid integer"),
        ("masks", {"layers": [-1]}, "masks.layers.0 = -1", "greater than or equal to 0"),
        ("masks", {"layers": [3, 0, 3]}, "masks.layers = [3, 0, 3]", "3 stands twice: name each once"),
        ("training", {"lora": {"targets": ["to_q", " "]}}, "training.lora.targets.1 = ' '", "it is empty: give a name"),
        ("training", {"lora": {"targets": ["a", "a"]}}, "training.lora.targets = ['a', 'a']", "'a' stands twice"),
        ("backbone", {"model": ""}, "backbone.model = ''", "it is empty: give a name"),
        ("benchmark", {"single": " "}, "benchmark.single = ' '", "it is empty: give a name"),
        ("evaluation", {"bootstrap": 1}, "evaluation.bootstrap = 1", "greater than or equal to 50"),
        ("evaluation", {"clip_text_clamp": "yes"}, "evaluation.clip_text_clamp = 'yes'", "valid boolean"),
        ("objective", {"name": "dop"}, "objective.name = 'dop'", "'sft', 'dpo', 'patchdpo' or 'focusdpo'"),
        ("objective", {"beta": 0}, "objective.beta = 0", "greater than 0"),
        ("masks", {"tau": 1.5}, "masks.tau = 1.5", "less than or equal to 1"),
        ("masks", {"gamma": float("nan")}, "masks.gamma = nan", "finite number"),
        ("masks", {"entropy_window": 4}, "'entropy_window': 4", "must be odd"),
        ("masks", {"pool": "mean"}, "masks.pool = 'mean'", "'subject' or 'all'"),
        ("masks", {"entropy_kernel": "disk"}, "masks.entropy_kernel = 'disk'", "'box' or 'gaussian'"),
        (
            "masks",
            {"reference_tokens": "image_keys"},
            "'reference_tokens': 'image_keys'",
            "set pool to all",
        ),
        ("masks", {"layers": "some"}, "masks.layers = 'some'", "'double' or 'all'"),
        ("masks", 3, "masks = 3", "a group of 'key: value' lines"),
    ],
)
def test_a_wrong_type_or_range_names_the_key_the_value_and_what_it_should_be(name, values, key, says):
    text = refusal(name, values)
    assert key in text and says in text


@pytest.mark.parametrize(
    ("families", "says"),
    [
        ({"upap": {}}, "families.upap in params/toybox/03.yaml is not a setting of the kit"),
        ({"uno": {"generation": {"guidance": "2"}}}, "families.uno.generation.guidance = '2'"),
        ({"uno": {"adapters": {"simpo": []}}}, "families.uno.adapters.simpo"),
        ({"uno": {"adapters": {"sft": "uno_sft-seed0"}}}, "families.uno.adapters.sft = 'uno_sft-seed0'"),
        ({"ipap": {}}, "ipap.backbone.family must be sdxl_ip, not flux_uno"),
        ({}, "it names no family: give at least one of uno, ipap"),
        (
            {"uno": {}, "ipap": {"backbone": {"family": "sdxl_ip"}, "generation": {"prompts": 2}}},
            "generation.prompts must be the same for all",
        ),
    ],
)
def test_the_families_of_a_table_are_checked_to_the_last_key(families, says):
    text = refusal("families", families)
    assert says in text and len(text) < 250


def test_a_family_that_is_not_given_is_not_there():
    rows = params.section("families", {"ipap": {"backbone": {"family": "sdxl_ip"}}}).given
    assert list(rows) == ["ipap"] and rows["ipap"].adapters == params.Adapters()


def test_several_mistakes_are_all_told():
    text = refusal("masks", {"tau": 2.0, "gama": 0.3})
    assert "masks.tau" in text and "masks.gama" in text


def test_a_section_cannot_be_changed_after_it_was_checked():
    with pytest.raises(ValueError, match="frozen"):
        params.section("masks").tau = 0.5


@pytest.mark.parametrize(
    ("text", "says"), [("a: [1", "is not YAML"), ("- 1", "'key: value' lines, not a list"), ("7", "not a int")]
)
def test_a_file_that_is_no_params_file_is_refused(tmp_path, text, says):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ParameterError, match=says) as caught:
        params.read_yaml(tmp_path / "x.yaml")
    assert "x.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_named():
    with pytest.raises(ParameterError, match=r"nowhere\.yaml does not exist"):
        params.read_yaml("nowhere.yaml")


def test_an_empty_file_changes_nothing(tmp_path):
    (tmp_path / "x.yaml").write_text("# only a comment\n")
    assert params.read_yaml(tmp_path / "x.yaml") == {}


@pytest.mark.parametrize(
    "name", ["", " ", ".", "..", ".hidden", "a/b", "../a", "/a", "a\0b", "a\nb", "x" * 300, "é" * 101]
)
def test_a_name_that_is_no_folder_s_is_refused_by_stages_and_among_adapters(name, tmp_path):
    with pytest.raises(ParameterError, match="names no folder of a run: give a name of up to 200 letters") as caught:
        stages.place(tmp_path, "training", name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250
    assert "families.uno.adapters.dpo.1" in refusal("families", {"uno": {"adapters": {"dpo": ["fine", name]}}})


@pytest.mark.parametrize("name", ["uno_dpo-seed0", "a b", "ünï {x} 100%", "x" * 200])
def test_any_other_name_is_a_folder_of_its_stage(name, tmp_path):
    assert stages.place(tmp_path, "training", name).parent == tmp_path / "training"
    params.section("families", {"uno": {"adapters": {"dpo": [name]}}})
