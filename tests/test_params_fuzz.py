"""Mutated params files are read or refused in a sentence, never with a traceback. The seed is fixed."""

import random
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest

from focusdpo_lib.batch import Job, notebooks, resolved, search
from focusdpo_lib.params import ParameterError

ROOT = Path(__file__).parents[1]
BOOKS = {path.stem[:2]: path for path in (ROOT / "notebooks").glob("0*.ipynb")}
FILES = sorted(p for p in (ROOT / "params").glob("*/*.yaml") if p.stem[:2] in BOOKS or p.stem.startswith("search"))
KNOWN = cache(notebooks.parameters)
VALUES = (
    *("null", "~", "[]", "{}", "''", "-1", "0", "1e400", ".nan", "-.inf", "true", "0x1F", "0100", "1:30", "1_000"),
    *(
        "2024-02-30",
        "!!python/object:os.system x",
        "&a [*a]",
        "*b",
        "<<: {a: 1}",
        "? x",
        "- - -",
        "|",
        ">",
        "%",
        "@",
        "\t",
    ),
    *("!!int x", "!!int ''", "!!bool maybe", "!!null x", "!!float 3", "!foo x", "! x", "[" * 3000, "{a: " * 400),
    *(
        "9" * 400,
        "9" * 5000,
        "{a: [1, {b: 2}]}",
        "[1, [2, [3]]]",
        "\x00",
        "\ud83d\ude00",
        "e\u0301",
        "toybox",
        "../../x",
        "~/x",
    ),
)
KEYS = ("1", "true", "null", "~", "", "2024-01-02", "? [a]", "!!int a", "<<", "'training'", "[a]", "&a b", "*a", "1e3")


def mutated(text: str, dice: random.Random) -> str:
    """A line dropped, doubled, moved, indented, cut, with another key or value, or with characters changed."""
    lines = text.splitlines()
    at = dice.randrange(len(lines))
    match dice.randrange(8):
        case 0:
            del lines[at]
        case 1:
            lines.insert(at, lines[at])
        case 2:
            lines.insert(dice.randrange(len(lines)), lines.pop(at))
        case 3:
            lines[at] = " " * dice.choice((1, 2, 3)) + lines[at]
        case 4:
            lines[at] = lines[at][: dice.randrange(len(lines[at]) + 1)]
        case 5:
            lines[at] = lines[at].partition(":")[0] + ": " + dice.choice(VALUES)
        case 7:
            key, colon, value = lines[at].partition(":")
            indent = key[: len(key) - len(key.lstrip())]
            lines[at] = indent + dice.choice(KEYS) + (colon or ":") + value
        case 6:
            place = dice.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:place] + dice.choice("{}[]:,&*!|>'\"%@`#-\t\ufeff\x07é ") + lines[at][place:]
    return "\n".join(lines) + "\n"


def read(path: Path) -> None:
    if path.stem.startswith("search"):
        search.read(path)
    else:
        resolved(Job(BOOKS[path.stem[:2]], path.with_suffix(""), path))


@pytest.fixture(autouse=True)
def books_are_read_once(monkeypatch):
    monkeypatch.setattr(notebooks, "parameters", lambda path: deepcopy(KNOWN(path)))


@pytest.mark.parametrize("file", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_mutated_file_is_read_or_refused_in_a_sentence(file, tmp_path):
    dice, path, refused = random.Random(str(file.relative_to(ROOT))), tmp_path / file.name, 0
    text = file.read_text("utf-8")
    for _ in range(40):
        path.write_text(mutated(mutated(text, dice), dice), "utf-8", errors="surrogatepass")
        try:
            read(path)
        except ParameterError as error:
            refused += 1
            assert "\n" not in str(error).strip() and len(str(error)) < 2000
    assert refused
