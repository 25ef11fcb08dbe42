"""Captions by a server that answers well or badly, and by a model on this machine; what they cost, and who may know."""

import base64
import io
import json
import logging
import multiprocessing
import time
from dataclasses import replace

import numpy as np
import pytest
from caption_server import ANSWER, answer, caption_server, completion
from PIL import Image
from tiny_perception import write_tiny_captioner

from focusdpo_lib import params
from focusdpo_lib.dip import captioners, questions
from focusdpo_lib.dip.answers import Answers, Purse, Reply
from focusdpo_lib.dip.captioning import Captioning
from focusdpo_lib.dip.chain import Draft, Unfit
from focusdpo_lib.dip.models import StageError
from focusdpo_lib.dip.questions import Detail, edited, region, understood
from focusdpo_lib.params import ParameterError
from focusdpo_lib.runs import RunError

KEY = "secret-0123456789"
QUICK = {"first_wait": 0.01, "longest_wait": 2.0, "timeout": 5.0, "retries": 3}


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def draft(number=0, subjects=("cat",)):
    """Every subject is a square of its own colour, so that no two questions are alike."""
    win, masks = np.full((40, 40, 3), 200, np.uint8), []
    for place in range(len(subjects)):
        mask = np.zeros((40, 40), bool)
        mask[5:15, 15 * place + 2 : 15 * place + 12] = True
        win[mask] = (number, 100 + place, 30)
        masks.append(mask)
    return Draft(f"train-{number}", " and ".join(subjects), "train", subjects, subjects, win=win, masks=tuple(masks))


def stage(server, folder, **values):
    return Captioning(params.section("captioning", {"base_url": server.address} | QUICK | values), str(folder))


def ended(server, folder, *drafts, **values):
    """What a run says that cannot go on."""
    with pytest.raises(StageError) as caught:
        stage(server, folder, **values).open()(drafts or [draft()])
    message = str(caught.value)
    assert "\n" not in message and KEY not in message and len(message) < 500
    return message


# --- what is asked, and what an answer must hold -------------------------------------------------------------------


def test_a_subject_is_shown_cut_out_on_white():
    image = np.zeros((60, 80, 3), np.uint8)
    mask = np.zeros((60, 80), bool)
    mask[10:30, 20:60] = True
    image[mask] = (10, 20, 30)
    mask[10, 20] = False
    shown = np.asarray(Image.open(io.BytesIO(region(image, mask, side=100))))
    assert shown.shape == (20 + 4, 40 + 4, 3)  # a margin of 5 % of 40 pixels all around
    assert (shown[2, 2] == 255).all() and (shown[2, 3] == (10, 20, 30)).all() and (shown[:2] == 255).all()
    small = Image.open(io.BytesIO(region(image, mask, side=22)))
    assert small.size == (22, 12)


def detail(words, instead, attribute="colour"):
    return Detail(attribute=attribute, words=words, instead=instead)


def test_details_are_exchanged_where_they_stand():
    caption = "a red mug with white dots and a red lid"
    assert edited(caption, [detail("white dots", "blue stars"), detail("a red lid", "no lid")]) == (
        "a red mug with blue stars and no lid"
    )
    assert edited(caption, [detail("white dots", "red stars"), detail("dots and", "x")]) == (
        "a red mug with red stars and a red lid"  # the second shares a word with the first
    )
    assert edited("a b c", [detail("a", "b"), detail("b", "a")]) == "b a c"  # at once, not one after the other


def test_an_answer_is_read_whatever_stands_around_it():
    found = understood(f"Sure!\n```json\n{answer('cat')}\n```", "cat")
    assert found.caption == "a red cat with white dots" and [d.words for d in found.details] == ["red", "white dots"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "the captioner's answer cannot be read"),
        (answer("cat")[:-9], "the captioner's answer cannot be read"),
        ('{"caption": 3, "details": []}', "the captioner's answer cannot be read"),
        ('{"caption": "a cat", "details": [], "more": 1}', "the captioner's answer cannot be read"),
        (answer("dog"), "a caption does not name its subject"),
        ('{"caption": "a cat", "details": []}', "a caption has no detail that can be changed"),
        (answer("cat").replace('"red"', '"green"').replace('"white dots"', '"dots of snow"'), "no detail that can be"),
        # the caption would name another class
        ('{"caption": "a cat", "details": [{"attribute": "a", "words": "cat", "instead": "dog"}]}', "no detail that"),
    ],
)
def test_an_answer_of_no_use_says_why(text, reason):
    with pytest.raises(Unfit, match=reason):
        understood(text, "cat")


def test_the_schema_is_strict_as_servers_want_it():
    schema = questions.SCHEMA["schema"]
    for part in (schema, schema["$defs"]["Detail"]):
        assert part["additionalProperties"] is False and set(part["required"]) == set(part["properties"])


# --- a server --------------------------------------------------------------------------------------------------------


def test_every_subject_is_asked_about_and_its_answer_kept(tmp_path):
    with caption_server() as server:
        drafts = [draft(0, ("cat", "dog")), draft(1)]
        made = stage(server, tmp_path).open()(drafts)
        assert [each.captions for each in made] == [
            ("a red cat with white dots", "a red dog with white dots"),
            ("a red cat with white dots",),
        ]
        assert made[0].disruption["details"] == [ANSWER["details"]] * 2
        # 2 · (100 · 2.5 + 20 · 10) dollars a million tokens
        used = {"tokens": 240, "dollars": 0.0009}
        assert made[0].provenance["captioning"] == {"model": "gpt-4o", "served": ["gpt-4o-as-served"], **used}
        assert len(server.requests) == 3
        again = stage(server, tmp_path).open()(drafts)
        assert len(server.requests) == 3 and [d.provenance for d in again] == [d.provenance for d in made]
        asked = stage(server, tmp_path, details=2).open()([draft(1)])  # another prompt is another question
        assert len(server.requests) == 4 and not asked[0].dropped
        stage(server, tmp_path, model="other").open()([draft(1)])
        assert len(server.requests) == 5
    body = server.requests[0]["body"]
    assert server.requests[0]["path"] == "/v1/chat/completions" and server.requests[0]["key"] == f"Bearer {KEY}"
    assert body["response_format"]["json_schema"]["strict"] is True and body["temperature"] == 0
    shown = {request["body"]["messages"][0]["content"][1]["image_url"]["url"] for request in server.requests[:3]}
    expected = [region(d.win, mask, 512) for d in drafts for mask in d.masks]
    assert shown == {"data:image/png;base64," + base64.b64encode(png).decode() for png in expected}


def test_equal_questions_of_one_part_are_asked_once(tmp_path):
    with caption_server() as server:
        made = stage(server, tmp_path).open()([draft(0), replace(draft(0), id="train-9")])
        assert len(server.requests) == 1 and made[0].captions == made[1].captions != ()


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (completion(None, refusal="I cannot help with that."), "the captioner refused"),
        (completion("", finish="content_filter"), "the captioner refused"),
        ((400, {"error": {"message": "no", "code": "content_policy_violation"}}, {}), "the captioner refused"),
        (completion("Here is your cat."), "the captioner's answer cannot be read"),
        (completion(answer("cat")[:40], finish="length"), "the captioner's answer cannot be read"),
        (completion(answer("dog")), "a caption does not name its subject"),
        ({"object": "chat.completion", "choices": []}, "the captioner's answer cannot be read"),
    ],
)
def test_a_refusal_or_an_answer_of_no_use_drops_its_draft_and_the_run_goes_on(tmp_path, reply, reason):
    with caption_server(reply, completion(answer("cat"))) as server:
        made = stage(server, tmp_path, parallel=1).open()([draft(0), draft(1)])
        assert (made[0].dropped_by, made[0].dropped) == ("captioning", reason) and not made[1].dropped
        again = stage(server, tmp_path).open()([draft(0)])  # it is not paid for again
        assert again[0].dropped == reason and len(server.requests) == 2


FAULTS = [
    (429, {"error": {"message": "slow down", "code": "rate_limit_exceeded"}}, {}),
    (500, "oops", {}),
    (503, "<html>busy</html>", {}),
    (200, '{"choices": [', {}),
    "cut",
]


def test_faults_that_pass_are_asked_again(tmp_path):
    with caption_server(*FAULTS, completion(answer("cat"))) as server:
        (made,) = stage(server, tmp_path, retries=5).open()([draft()])
        assert not made.dropped and len(server.requests) == 6


def test_an_answer_that_trickles_in_counts_as_lost_too(tmp_path):
    with caption_server("trickling", completion(answer("cat"))) as server:
        begun = time.monotonic()
        (made,) = stage(server, tmp_path, longest_answer=1.0).open()([draft()])
        assert made.captions and len(server.requests) == 2 and time.monotonic() - begun < 20


def test_a_server_that_only_trickles_is_named(tmp_path):
    with caption_server("trickling") as server:
        text = ended(server, tmp_path, longest_answer=0.2, retries=1)
        assert "gives no answer (an answer takes more than 0.2 s)" in text


def test_a_slow_answer_counts_as_lost_and_is_asked_for_again(tmp_path):
    """The second comes within the time, also on a slow machine."""
    with caption_server("silent", completion(answer("cat"))) as server:
        (made,) = stage(server, tmp_path, timeout=1.0).open()([draft()])
        assert not made.dropped and len(server.requests) == 2


def test_a_server_that_asks_to_wait_is_waited_for(tmp_path):
    busy = (429, {"error": {"message": "slow down"}}, {"Retry-After": "1"})
    with caption_server(busy, completion(answer("cat"))) as server:
        stage(server, tmp_path).open()([draft()])
        first, second = (request["at"] for request in server.requests)
        assert second - first >= 1
    busy = (429, {"error": {"message": "slow down"}}, {"Retry-After": "3600"})
    with caption_server(busy) as server:
        assert "gives no answer (it asks to wait 3600 s)" in ended(server, tmp_path / "other")
        assert len(server.requests) == 1


def test_a_time_of_day_to_wait_for_is_understood(monkeypatch):
    monkeypatch.setattr("time.time", lambda: 784111777.0 - 90)  # the example of RFC 9110
    assert captioners._retry_after({"retry-after": "Sun, 06 Nov 1994 08:49:37 GMT"}) == 90
    assert captioners._retry_after({"retry-after": "soon"}) == captioners._retry_after({}) == 0


@pytest.mark.parametrize("fault", ["silent", "cut", (500, "oops", {})])
def test_a_server_that_never_answers_ends_the_run_in_one_sentence(tmp_path, fault):
    with caption_server(completion(answer("cat")), fault) as server:
        text = ended(server, tmp_path, draft(0), draft(1), timeout=1.0, retries=1, parallel=1)
        assert "gives no answer (" in text and "see that it runs" in text and str(tmp_path) in text
        assert len(server.requests) == 3
    with caption_server() as server:  # once it is back, only what is missing is asked for
        made = stage(server, tmp_path).open()([draft(0), draft(1)])
        assert not any(each.dropped for each in made) and len(server.requests) == 1


def test_nobody_there_ends_the_run_too(tmp_path):
    with caption_server() as server:
        pass
    assert "gives no answer (Connection error.)" in ended(server, tmp_path, retries=1)


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        ((401, {"error": {"message": f"Incorrect API key provided: {KEY}"}}, {}), "does not accept the key (HTTP 401)"),
        ((404, {"error": {"message": f"no model for {KEY} or sk-oth***er"}}, {}), "no model for … or …): correct"),
        ((429, {"error": {"message": "pay", "code": "insufficient_quota"}}, {}), "its quota is used up"),
    ],
)
def test_what_no_other_try_can_mend_ends_the_run_at_once(tmp_path, reply, says):
    with caption_server(reply) as server:
        assert says in ended(server, tmp_path, parallel=1)
        assert len(server.requests) == 1


# --- the key ---------------------------------------------------------------------------------------------------------


def test_the_key_reaches_no_log_no_file_and_no_stage(tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    with caption_server((500, "oops", {}), (401, {"error": {"message": f"bad {KEY}"}}, {})) as server:
        use = stage(server, tmp_path, parallel=1)
        maker = use.open()
        with pytest.raises(StageError) as caught:
            maker([draft()])
    with caption_server() as server:
        (made,) = stage(server, tmp_path).open()([draft()])
    assert server.requests[0]["key"] == f"Bearer {KEY}"
    texts = [repr(use), str(caught.value), json.dumps(made.provenance), caplog.text, *capfd.readouterr()]
    texts += [file.read_text() for file in tmp_path.rglob("*") if file.is_file()]
    assert len(texts) > 7 and not any(KEY in text for text in texts)


def test_without_a_key_openai_is_not_asked(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(StageError, match="OPENAI_API_KEY is not set, and OpenAI's server needs it"):
        Captioning(params.Captioning(), str(tmp_path)).open()
    with caption_server() as server:  # another server may do without
        assert not stage(server, tmp_path).open()([draft()])[0].dropped


def test_an_address_that_holds_a_secret_is_refused():
    with pytest.raises(ParameterError, match="base_url holds a secret"):
        params.section("captioning", {"base_url": "https://me:secret@host/v1"})


# --- the budget ------------------------------------------------------------------------------------------------------


def test_a_budget_that_is_used_up_ends_the_run_and_keeps_the_answers(tmp_path):
    """A question costs 0.01 dollars at most (1000 tokens of answer and nothing else), and 0.0002 in truth."""
    prices = {"price_read": 0.0, "price_written": 10.0, "max_tokens": 1000}
    with caption_server() as server:
        text = ended(server, tmp_path, *map(draft, range(9)), **prices, budget=0.0105, parallel=1)
        # 0.0105 − n · 0.0002 leaves 0.01 for the third question, but not for the fourth
        assert len(server.requests) == 3 and "the budget of 0.01 dollars is used up (0.00 spent" in text
        assert "raise captioning.budget and run again" in text
        assert Purse(tmp_path, None).spent == pytest.approx(0.0006)
        made = stage(server, tmp_path, **prices, budget=1.0).open()(list(map(draft, range(4))))
        assert len(server.requests) == 4 and not any(each.dropped for each in made)


def test_what_may_have_been_charged_stays_counted(tmp_path):
    prices = {"price_read": 0.0, "price_written": 10.0, "max_tokens": 1000}
    with caption_server("cut", (500, "oops", {}), completion(answer("cat"))) as server:
        stage(server, tmp_path, **prices).open()([draft()])
    assert Purse(tmp_path, None).spent == pytest.approx(0.01 + 0 + 0.0002)


class SlowPurse(Purse):
    """Leaves others time between what it reads and what it writes."""

    def _note(self, entry):
        time.sleep(0.005)
        super()._note(entry)


def _spend(folder, count):
    purse = SlowPurse(folder, 1.0)
    for _ in range(count):
        try:
            with purse.paying(0.1) as settle:
                settle(0.05)
        except StageError:
            return


def test_processes_share_one_budget(tmp_path):
    """At 0.95 spent or set aside no question of 0.1 is left; with 4 at once that is reached between 0.65 and 0.95."""
    children = [multiprocessing.get_context("fork").Process(target=_spend, args=(tmp_path, 30)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    entries = [json.loads(line) for line in (tmp_path / "spent.jsonl").read_text().splitlines()]
    held, most = {}, 0.0
    for entry in entries:  # as they were written
        held[entry["question"]] = entry.get("paid", entry.get("most"))
        most = max(most, sum(held.values()))
    assert most <= 1.0 + 1e-9 and Purse(tmp_path, None).spent == pytest.approx(0.05 * len(held)) and len(held) >= 13


def test_a_damaged_ledger_is_named(tmp_path):
    (tmp_path / "spent.jsonl").write_text("{no\n")
    with pytest.raises(RunError, match=r"spent\.jsonl is damaged"), Purse(tmp_path, 1.0).paying(0.1):
        pass


def test_a_damaged_answer_is_none(tmp_path):
    answers, asked = Answers(tmp_path), (b"picture", "prompt", "model")
    answers.put(*asked, Reply("yes", tokens=(1, 2)))
    assert answers.get(*asked) == Reply("yes", tokens=(1, 2))
    for other in ((b"other", *asked[1:]), (asked[0], "other", asked[2]), (*asked[:2], "other")):
        assert answers.get(*other) is None
    (file,) = tmp_path.rglob("*.json")
    file.write_text(file.read_text()[:20])
    assert answers.get(*asked) is None


def test_how_it_is_asked_is_no_part_of_what_answers_depend_on():
    use = params.Captioning(details=2, model="mine", base_url="http://localhost:1/v1", budget=7.0, parallel=1)
    moved = use.model_copy(update={"base_url": "http://localhost:2/v1", "budget": None, "timeout": 1.0})
    assert use.deciding == moved.deciding == params.Captioning(details=2, model="mine")
    assert params.Captioning(side=64).deciding != params.Captioning().deciding


# --- a model on this machine -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    return write_tiny_captioner(tmp_path_factory.mktemp("models") / "captioner")


def local(captioner, folder, **values):
    return Captioning(params.section("captioning", {"by": "local", "model": str(captioner)} | values), str(folder))


def test_a_random_model_s_answers_cannot_be_read_and_are_kept(captioner, tmp_path):
    made = local(captioner, tmp_path, max_tokens=8, parallel=2).open()([draft(i) for i in range(3)])
    assert {each.dropped for each in made} == {"the captioner's answer cannot be read"}
    assert len(list(tmp_path.rglob("*.json"))) == 3
    assert all(each.provenance["captioning"]["tokens"] > 0 for each in made)


def test_what_a_local_model_writes_is_read_after_its_question(captioner, tmp_path, monkeypatch):
    """Its weights know nothing, so its words are put into its mouth, behind the tokens of the question."""
    import torch
    import transformers as hf

    seen = []

    def generate(self, input_ids, max_new_tokens, do_sample, **inputs):
        seen.append({name: tuple(value.shape) for name, value in inputs.items()})
        words = hf.Qwen3VLProcessor.from_pretrained(captioner).tokenizer(answer("cat")).input_ids
        return torch.cat([input_ids, torch.tensor([words] * len(input_ids))], 1)

    monkeypatch.setattr(hf.Qwen3VLForConditionalGeneration, "generate", generate)
    made = local(captioner, tmp_path, parallel=2).open()([draft(i) for i in range(3)])
    assert [each.captions for each in made] == [("a red cat with white dots",)] * 3
    assert [shapes["image_grid_thw"] for shapes in seen] == [(2, 3), (1, 3)]
    assert made[0].provenance["captioning"]["dollars"] == 0


def test_a_local_model_s_answer_does_not_depend_on_its_batch(captioner):
    use = params.Captioning(by="local", model=str(captioner), max_tokens=6, parallel=2)
    model, kept = captioners.Local(use), {}
    asked = [(region(d.win, d.masks[0], 64), "say " * n) for n, d in enumerate([draft(0), draft(1)], 1)]
    model.ask(asked, lambda i, reply: kept.update({i: reply.text}))
    alone = {}
    for i, question in enumerate(asked):
        model.ask([question], lambda _, reply, i=i: alone.update({i: reply.text}))
    assert kept == alone


def test_a_local_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(StageError, match=r"the model /no/such does not exist: correct captioning\.model"):
        local("/no/such", tmp_path).open()
