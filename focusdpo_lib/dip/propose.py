"""More subjects and scenes to draw pairs of, proposed by a language model.

    python -m focusdpo_lib.dip.propose params/paper/01_dip.yaml --into more_subjects.yaml

Asks the captioner of notebook 01's YAML (`captioning`, with its key and its budget) for what the YAML's
`synthesis.lists` do not have, one question a kind. What can be drawn is written with the old lists to a new file: read
it, delete what you do not want, and name it in `synthesis.lists`.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from focusdpo_lib import params
from focusdpo_lib.dip.captioners import load_captioner
from focusdpo_lib.dip.lists import KINDS, read_lists, require_look
from focusdpo_lib.dip.models import StageError
from focusdpo_lib.runs import home, write_text

TOKENS = {"subjects": 80, "scenes": 20}  # that one of them takes at most, in JSON


class Subject(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    word: str
    looks: list[str]


class Proposal(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    subjects: list[Subject]
    scenes: list[str]


SCHEMA = {"name": "proposal", "strict": True, "schema": Proposal.model_json_schema()}


def question(kind: str, lists: Mapping[str, Any], subjects: int, scenes: int) -> str:
    """The prompt for more of a kind."""
    known = lists["subjects"].get(kind, [])
    slots = "; ".join(f"{{{name}}}, such as {words[0]}" for name, words in lists["slots"].items())
    example = f' For instance: {{"word": "{known[0]["word"]}", "looks": {known[0]["looks"]}}}.' if known else ""
    return (
        f"For photos of a subject in a scene, propose {subjects} subjects of the kind {kind} and {scenes} scenes for "
        'them. Answer with JSON of two keys. "subjects": a list, each with "word" (one common noun, the class) and '
        '"looks" (two descriptions of how one of that class may look, each a noun phrase without an article that '
        f"contains the word itself and two or three details that a photo shows; use these slots in braces: {slots})."
        f'{example} "scenes": a list of short phrases of place and light, such as "{_first(lists, kind)}", without '
        f"any subject. Propose none of these subjects: {', '.join(s['word'] for s in known) or 'none yet'}."
    )


def _first(lists: Mapping[str, Any], kind: str) -> str:
    return next((scenes[0] for scenes in (lists["scenes"].get(kind), *lists["scenes"].values()) if scenes), "in a park")


def added(lists: Mapping[str, Any], kind: str, text: str) -> tuple[dict[str, Any], list[str]]:
    """The lists with what an answer proposes for a kind, and why each proposal that is not in them is not.

    Raises StageError where the answer cannot be read.
    """
    try:
        proposal = Proposal.model_validate_json(text[text.find("{") : text.rfind("}") + 1])
    except ValidationError:
        raise StageError(f"the answer for the kind {kind} cannot be read: run again, or ask for fewer") from None
    lists, left_out = deepcopy(dict(lists)), []
    subjects, scenes = (lists[name].setdefault(kind, []) for name in ("subjects", "scenes"))
    words = {subject["word"] for of_kind in lists["subjects"].values() for subject in of_kind}
    for subject in proposal.subjects:
        looks = [look for look in subject.looks if _can_be_drawn(look, subject.word, lists["slots"])]
        if subject.word in words or not looks:
            left_out.append(f"{subject.word}: {'there already' if subject.word in words else 'no look can be drawn'}")
            continue
        words.add(subject.word)
        subjects.append({"word": subject.word, "looks": looks})
    scenes += [scene for scene in dict.fromkeys(proposal.scenes) if scene.strip() and scene not in scenes]
    return lists, left_out


def _can_be_drawn(look: str, word: str, slots: Mapping[str, Sequence[str]]) -> bool:
    try:
        require_look(look, word, slots)
    except (ValueError, LookupError, AttributeError):
        return False
    return bool(word.strip())


def propose(settings: Mapping[str, Any], subjects: int, scenes: int, kinds: Sequence[str]) -> dict[str, Any]:
    """The lists of a YAML's settings with what its captioner proposes; prints what was left out. Raises StageError."""
    captioning = params.section("captioning", settings.get("captioning"))
    lists = read_lists(_from_notebooks(params.section("synthesis", settings.get("synthesis")).lists))
    longest = TOKENS["subjects"] * subjects + TOKENS["scenes"] * scenes
    captioning = captioning.model_copy(update={"max_tokens": max(captioning.max_tokens, longest)})
    answers = home(_from_notebooks(settings.get("results", "results"))) / "captions"
    captioner, replies = load_captioner(captioning, answers, SCHEMA), {}
    captioner.ask([(None, question(kind, lists, subjects, scenes)) for kind in kinds], replies.__setitem__)
    for number, kind in enumerate(kinds):
        if replies[number].refused:
            raise StageError(f"the captioner refused to propose any {kind}: leave it out of --kinds, or ask another")
        lists, left_out = added(lists, kind, replies[number].text)
        print(
            f"{kind}: {len(lists['subjects'][kind])} subjects, {len(lists['scenes'][kind])} scenes",
            *left_out,
            sep="\n  ",
        )
    return lists


def _from_notebooks(path: str) -> Path:
    """A path of a YAML, which is read from within notebooks/."""
    return Path("notebooks") / path if Path("notebooks").is_dir() else Path(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1, with one sentence, where nothing can be proposed."""
    parser = argparse.ArgumentParser(prog="python -m focusdpo_lib.dip.propose", description=__doc__.splitlines()[0])
    parser.add_argument("yaml", type=Path, help="of notebook 01: its captioning and synthesis.lists are read")
    parser.add_argument("--into", type=Path, required=True, help="the new file")
    parser.add_argument("--subjects", type=int, default=20, help="to ask for, of each kind (default: %(default)s)")
    parser.add_argument("--scenes", type=int, default=10, help="the same (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    given = parser.parse_args(arguments)
    try:
        if given.into.exists():
            raise StageError(f"{given.into} is there already: name another file")
        lists = propose(params.read_yaml(given.yaml), given.subjects, given.scenes, given.kinds)
        write_text(given.into, yaml.safe_dump(lists, allow_unicode=True, sort_keys=False, width=120))
        read_lists(given.into)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"nothing is proposed: {error}", file=sys.stderr)
        return 1
    print(f"{given.into} holds the lists: read them, then name it in synthesis.lists")
    return 0


if __name__ == "__main__":
    sys.exit(main())
