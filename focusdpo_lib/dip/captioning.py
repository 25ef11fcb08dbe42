"""Captioning: what each subject of the winner looks like, and which details of it the loser may show otherwise.

A subject is cut out by its mask, put on white and described in one structured answer (`questions`). A refusal, an
answer that cannot be read and a caption that does not name its subject drop the draft. The details wait in the draft's
`disruption` for the stage of that name.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from focusdpo_lib import params
from focusdpo_lib.dip.answers import Answers, Reply
from focusdpo_lib.dip.captioners import Captioner, load_captioner
from focusdpo_lib.dip.chain import Draft, Maker, Unfit
from focusdpo_lib.dip.questions import Answer, question, region, understood

NAME = "captioning"
DETAILS = "details"  # in a draft's `disruption`: of each subject a list of questions.Detail as dicts


@dataclass(frozen=True)
class Captioning:
    """The stage; `cache` is the folder that keeps answers and what they cost, for all runs that name it.

    Raises StageError, when opened, for a captioner that cannot be had; when run, for a server that gives no answer and
    a budget that is used up: what was answered is kept, and not asked again.
    """

    settings: params.Captioning
    cache: str
    name: str = NAME

    def open(self) -> Maker:
        folder = Path(self.cache)
        return partial(make, self.settings, load_captioner(self.settings, folder), Answers(folder))


def make(settings: params.Captioning, captioner: Captioner, answers: Answers, drafts: Sequence[Draft]) -> list[Draft]:
    """The drafts with `captions`, or dropped."""
    questions = [
        (region(draft.win, mask, settings.side), question(subject, settings.details))
        for draft in drafts
        for subject, mask in zip(draft.subjects, draft.masks, strict=True)
    ]
    replies = iter(_replies(captioner, answers, questions))
    return [_captioned(settings, draft, [next(replies) for _ in draft.subjects]) for draft in drafts]


def _replies(captioner: Captioner, answers: Answers, questions: list[tuple[bytes, str]]) -> list[Reply]:
    """A reply a question: those that are kept, and the others from the captioner, each question once."""
    replies = {asked: answers.get(*asked, captioner.model) for asked in questions}
    new = [asked for asked, reply in replies.items() if reply is None]

    def keep(index: int, reply: Reply) -> None:
        replies[new[index]] = reply
        answers.put(*new[index], captioner.model, reply)

    captioner.ask(new, keep)
    return [replies[asked] for asked in questions]


def _captioned(settings: params.Captioning, draft: Draft, replies: list[Reply]) -> Draft:
    facts = {
        "model": settings.model,
        "served": sorted({reply.model for reply in replies}),  # a server may give it another name, such as a date's
        "tokens": sum(sum(reply.tokens) for reply in replies),
        "dollars": round(sum(reply.cost for reply in replies), 6),
    }
    draft = replace(draft, provenance=draft.provenance | {NAME: facts})
    try:
        found = [_understood(reply, subject) for reply, subject in zip(replies, draft.subjects, strict=True)]
    except Unfit as reason:
        return draft.drop(NAME, str(reason))
    details = [[detail.model_dump() for detail in answer.details] for answer in found]
    return replace(
        draft,
        captions=tuple(answer.caption for answer in found),
        disruption=draft.disruption | {DETAILS: details},
    )


def _understood(reply: Reply, subject: str) -> Answer:
    if reply.refused:
        raise Unfit("the captioner refused")
    return understood(reply.text, subject)
