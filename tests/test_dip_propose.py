"""Lists that a language model lengthens: what can be drawn is kept, and the old lists stay as they are."""

import json

import pytest
import yaml
from caption_server import caption_server, completion
from tiny_perception import write_tiny_captioner

from focusdpo_lib import params
from focusdpo_lib.dip import propose
from focusdpo_lib.dip.lists import read_lists
from focusdpo_lib.dip.models import StageError
from focusdpo_lib.dip.propose import added, question
from focusdpo_lib.dip.synthesis import plan

LISTS = {
    "slots": {"colour": ["red", "green"], "pattern": ["dots", "stripes"]},
    "subjects": {
        "object": [{"word": "mug", "looks": ["{colour} mug with {pattern}"]}],
        "animal": [{"word": "cat", "looks": ["grey cat with a {colour} bow"]}],
    },
    "scenes": {"object": ["on a table"], "animal": ["on a sofa"]},
}
PROPOSED = {
    "subjects": [
        {"word": "kettle", "looks": ["{colour} kettle with {pattern}", "a kettle of {metal}", "{colour} pot"]},
        {"word": "mug", "looks": ["tall {colour} mug"]},  # there already
        {"word": "cat", "looks": ["{colour} toy cat"]},  # of another kind
        {"word": "lamp", "looks": ["{colour light"]},
        {"word": " ", "looks": ["{colour} thing"]},
    ],
    "scenes": ["on a table", "in the rain", " ", "in the rain"],
}


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """A YAML of notebook 01 with the lists beside it, in a folder without notebooks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "secret-0123456789")
    (tmp_path / "lists.yaml").write_text(yaml.safe_dump(LISTS))

    def write(**captioning):
        values = {"results": "results", "synthesis": {"lists": "lists.yaml"}, "captioning": captioning}
        (tmp_path / "01_dip.yaml").write_text(yaml.safe_dump(values))
        return "01_dip.yaml"

    return write


def test_what_can_be_drawn_is_added_and_the_rest_said():
    lists, left_out = added(LISTS, "object", f"Sure: {json.dumps(PROPOSED)}")
    assert lists["subjects"]["object"][1:] == [{"word": "kettle", "looks": ["{colour} kettle with {pattern}"]}]
    assert lists["scenes"]["object"] == ["on a table", "in the rain"]
    assert lists["subjects"]["animal"] == LISTS["subjects"]["animal"] and len(LISTS["subjects"]["object"]) == 1
    reasons = ["mug: there already", "cat: there already", "lamp: no look can be drawn", " : no look can be drawn"]
    assert left_out == reasons


def test_a_kind_that_is_new_begins_a_list():
    lists, _ = added(
        LISTS, "human", json.dumps({"subjects": [{"word": "man", "looks": ["tall man"]}], "scenes": ["at sea"]})
    )
    assert lists["subjects"]["human"] == [{"word": "man", "looks": ["tall man"]}]
    assert "human" in question("human", LISTS, 5, 5) and "{colour}, such as red" in question("human", LISTS, 5, 5)


def test_a_server_is_asked_without_a_picture_and_its_answer_can_be_drawn_from(settings, tmp_path, capsys):
    with caption_server(completion(json.dumps(PROPOSED), usage=(1000, 500))) as server:
        path = settings(base_url=server.address, first_wait=0.01)
        assert propose.main([path, "--into", "more.yaml", "--kinds", "object", "--subjects", "5"]) == 0
        (asked,) = (request["body"] for request in server.requests)
    (content,) = asked["messages"][0]["content"]
    assert content["type"] == "text" and "propose 5 subjects of the kind object" in content["text"]
    assert asked["response_format"]["json_schema"]["name"] == "proposal" and asked["max_tokens"] >= 400
    assert "lamp: no look can be drawn" in capsys.readouterr().out
    drawn = plan(params.Synthesis(lists=str(tmp_path / "more.yaml"), single=40, double=0))
    assert {draft.subjects[0] for draft in drawn} == {"mug", "kettle", "cat"}
    assert "secret" not in "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())


@pytest.mark.parametrize(
    ("script", "text"),
    [
        (completion(None, refusal="No."), "the captioner refused to propose any object: leave it out of --kinds"),
        (completion('{"subjects": ['), "the answer for the kind object cannot be read: run again, or ask for fewer"),
        ((401, {"error": {"message": "who?"}}, {}), "does not accept the key"),
    ],
)
def test_an_answer_of_no_use_leaves_no_file(script, text, settings, tmp_path, capsys):
    with caption_server(script) as server:
        path = settings(base_url=server.address, first_wait=0.01)
        assert propose.main([path, "--into", "more.yaml", "--kinds", "object"]) == 1
    said = capsys.readouterr().err
    assert text in said and said.count("\n") == 1 and not (tmp_path / "more.yaml").exists()


def test_a_file_that_is_there_is_not_written_over(settings, tmp_path, capsys):
    assert propose.main([settings(), "--into", "lists.yaml"]) == 1
    assert "is there already" in capsys.readouterr().err and read_lists(tmp_path / "lists.yaml") == LISTS


def test_a_model_on_this_machine_is_asked_without_a_picture(settings, tmp_path):
    """A random one, whose answer nobody can read: it is asked, and that is said."""
    write_tiny_captioner(tmp_path / "captioner")
    path = settings(by="local", model=str(tmp_path / "captioner"), max_tokens=8)
    with pytest.raises(StageError, match="the answer for the kind object cannot be read"):
        propose.propose(params.read_yaml(path), 0, 0, ["object"])
