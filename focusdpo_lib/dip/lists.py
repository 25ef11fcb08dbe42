"""The lists that synthesis draws from: subjects, their looks and scenes, by kind."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from focusdpo_lib import strict_yaml
from focusdpo_lib.dip.models import StageError

KINDS = ("object", "animal", "human")


def read_lists(path: str | Path) -> dict[str, Any]:
    """The lists of a YAML: `slots`, by name its words; `subjects` and `scenes`, by kind. Raises StageError.

    A subject is {word, looks}: the class word, and descriptions with slots in braces, each of which names the word.
    """
    try:
        lists = strict_yaml.load(Path(path).read_text(encoding="utf-8"))
        for kind in KINDS & lists["subjects"].keys():
            scenes, subjects = lists["scenes"][kind], lists["subjects"][kind]
            if not all(isinstance(scene, str) for scene in scenes) or not scenes:
                raise ValueError(f"the scenes of {kind} are no list of texts")
            for subject in subjects:
                for look in subject["looks"]:
                    require_look(look, subject["word"], lists["slots"])
        if unknown := lists["subjects"].keys() - {*KINDS}:
            raise ValueError(f"{', '.join(sorted(unknown))} is none of {', '.join(KINDS)}")
        return lists
    except (OSError, ValueError, KeyError, TypeError, AttributeError, LookupError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise StageError(f"{path} holds no lists to draw from ({reason}): correct it, or synthesis.lists") from None


def require_look(look: str, word: str, slots: Mapping[str, Sequence[str]]) -> None:
    """ValueError for a description that does not name its word; KeyError or ValueError for slots that there are not."""
    described = look.format(**{name: words[0] for name, words in slots.items()})
    if word not in described.split():
        raise ValueError(f"{look!r} does not name its {word}")
