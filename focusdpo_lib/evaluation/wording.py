"""Whether a prompt names the subjects that its references show: DreamBench's wording, and people's own.

A word counts as named in singular or plural, in either case, with any adjectives. Another class word counts as a
subject only at the head of the prompt or beside it ("a dog and a cat"); elsewhere it is scenery ("a dog next to a cat
statue").
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from functools import partial

DETERMINERS = "a|an|the|this|that|my|your|his|her|its|our|their|one|another"
PICTURES = "photo|photograph|picture|image|painting|drawing|sketch|rendering"
# Words that end a phrase of determiner, adjectives and noun.
LINKS = (
    "and|or|with|without|in|on|at|by|of|from|to|into|near|next|beside|behind|before|under|over|above|below|between|"
    "against|around|inside|outside|through|along|for|as|while|is|are|that|who|which"
)


def plain(text: str) -> str:
    """Lower case, composed letters, and one space where there are spaces or hyphens."""
    return re.sub(r"[\s\-_]+", " ", unicodedata.normalize("NFC", text).lower()).strip()


def plurals(word: str) -> tuple[str, ...]:
    """A class word in singular and plural; irregular plurals are for a case's own "classes" to give."""
    ends = [word + "s"]
    if re.search(r"(s|x|z|ch|sh|o)$", word):
        ends.append(word + "es")
    if re.search(r"[^aeiou]y$", word):
        ends.append(word[:-1] + "ies")
    return (word, *ends)


def mentions(prompt: str, word: str) -> float:
    """How often a prompt names a class word anywhere; a plural stands for as many as are wanted."""
    text, (singular, *several) = plain(prompt), plurals(plain(word))
    if any(re.search(rf"\b{re.escape(form)}\b", text) for form in several):
        return float("inf")
    return len(re.findall(rf"\b{re.escape(singular)}\b", text))


def exchanged(text: str, word: str, other: str) -> str | None:
    """The text with the class word `other` in place of `word`, in singular or plural; none where `word` is not in it.

    An article right before it becomes the one that `other` takes: "a mug with an owl on it", mug for owl.
    """
    several = plurals(other)[-1]
    for form in sorted(plurals(word), key=len, reverse=True):
        found = re.compile(rf"\b(?:(a)n? )?{re.escape(form)}\b", re.IGNORECASE)
        if found.search(text):
            new = other if form == word else several
            after = "n " if new[0].lower() in "aeiou" else " "
            return found.sub(partial(_with_article, after + new), text)
    return None


def _with_article(ending: str, match: re.Match) -> str:
    return match[1] + ending if match[1] else ending.split(" ", 1)[1]


def with_token(prompt: str, classes: Sequence[str], token: str) -> str:
    """A prompt with a unique token before the first mention of each class word: "a sks dog in the snow"."""
    at = 0
    for word in classes:
        if match := re.compile(_any_form(word), re.IGNORECASE).search(prompt, at):
            prompt = f"{prompt[: match.start()]}{token} {prompt[match.start() :]}"
            at = match.end() + len(token) + 1
    return prompt


def without_subjects(prompt: str, classes: Sequence[str]) -> str:
    """What a prompt says beside its subjects: "in the snow" of "a cat and a dog in the snow", "red" of "a red cat"."""
    adjectives = rf"((?:(?!(?:{LINKS}|{DETERMINERS})\b)[\w'-]+ )*?)"
    for number, word in enumerate(classes):
        joined = r"(?:,? and |, next to it is |, | & )" if number else ""
        phrase = re.compile(rf"{joined}(?:\b(?:{DETERMINERS}) )?{adjectives}{_any_form(word)}", re.IGNORECASE)
        prompt = phrase.sub("" if number else r"\1", prompt, count=1)  # a pair's second adjective is the first again
    return re.sub(r"\s+", " ", prompt).strip(" ,")


def _any_form(word: str) -> str:
    return rf"\b(?:{'|'.join(map(re.escape, sorted(plurals(word), key=len, reverse=True)))})\b"


def subjects(prompt: str, words: Collection[str]) -> Counter:
    """The class words that stand as subjects: at the prompt's head, and joined to it by "and" or a comma."""
    known = {plain(word): word for word in words}
    forms = "|".join(sorted(map(re.escape, known), key=len, reverse=True))
    phrase = rf"(?:(?:{DETERMINERS}) )?(?:(?!(?:{LINKS}|{DETERMINERS})\b)[^\s,.;:]+,? )*?({forms})"
    pattern = re.compile(rf"{phrase}(?=$|[,.;:]| (?:{LINKS}|\w+ing|\w+ed)\b)")
    text, found = plain(prompt), Counter()
    at = re.match(rf"(?:(?:{DETERMINERS}) )?(?:{PICTURES}) of |", text).end()
    while match := pattern.match(text, at):
        found[known[match[1]]] += 1
        joined = re.compile(r"(?:, and | and |, | & )").match(text, match.end())
        if not joined:
            break
        at = joined.end()
    return found


def problem(prompt: str, expected: Sequence[str], words: Collection[str]) -> tuple[str | None, bool]:
    """(what speaks against a prompt for references of the `expected` class words, whether it is certain).

    Certain is another class word in the place of one that is missing, and one more beside them. A word that is not
    there may be one's own name for the subject, and another at the head may be what it stands on.
    """
    wanted, named = Counter(expected), subjects(prompt, {*words, *expected})
    missing = any(mentions(prompt, word) < count for word, count in wanted.items())
    other = any(count > wanted[word] for word, count in named.items())
    if not (missing or other):
        return None, True
    return f"names {counted(named)}", other and (missing or named.total() > 1)


def counted(names: Counter) -> str:
    return " and ".join(f"{count} × {name}" for name, count in sorted(names.items())) or "no subject"
