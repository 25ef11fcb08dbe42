"""UNO's DreamBench cases, built from the dataset's own prompts and classes: 750 of one subject and 750 of two.

Which photo stands for a subject and which subjects are paired is UNO's choice (its lists, Apache-2.0; 30 photos and 30
pairs, below). Every prompt follows by rule. Of one subject: the dataset's prompt of its kind, without the unique token.
Of two objects: "a red bowl and a red can", which repeats an attribute and says a place once. Where the first is live:
the prompts that live subjects and objects share name both, the others are the first one's, "…, next to it is a can".
"""

from collections.abc import Mapping, Sequence

NAME = "uno"  # what a case list is called that is built here
LIVE = ("cat", "dog")
PHOTO = {
    "backpack": 2, "backpack_dog": 2, "bear_plushie": 3, "berry_bowl": 2, "can": 1, "candle": 2, "cat": 4, "cat2": 2,
    "clock": 3, "colorful_sneaker": 1, "dog": 2, "dog2": 2, "dog3": 5, "dog5": 0, "dog6": 2, "dog7": 1, "dog8": 4,
    "duck_toy": 1, "fancy_boot": 2, "grey_sloth_plushie": 4, "monster_toy": 4, "pink_sunglasses": 4, "poop_emoji": 0,
    "rc_car": 3, "red_cartoon": 0, "robot_toy": 0, "shiny_sneaker": 1, "teapot": 4, "vase": 2, "wolf_plushie": 4,
}  # fmt: skip
PAIRS = (
    ("backpack_dog", "bear_plushie"), ("berry_bowl", "can"), ("candle", "clock"), ("colorful_sneaker", "duck_toy"),
    ("fancy_boot", "grey_sloth_plushie"), ("monster_toy", "pink_sunglasses"), ("poop_emoji", "rc_car"),
    ("red_cartoon", "robot_toy"), ("shiny_sneaker", "teapot"), ("vase", "wolf_plushie"),
    ("cat", "dog"), ("cat", "dog6"), ("cat", "dog8"), ("cat2", "cat"), ("cat2", "dog3"), ("cat2", "dog7"),
    ("dog", "dog2"), ("dog3", "dog5"), ("dog6", "dog7"), ("dog7", "dog8"),
    ("cat", "backpack"), ("cat2", "bear_plushie"), ("dog", "can"), ("dog2", "clock"), ("dog3", "duck_toy"),
    ("dog5", "grey_sloth_plushie"), ("dog6", "pink_sunglasses"), ("dog7", "rc_car"), ("dog8", "robot_toy"),
    ("dog6", "teapot"),
)  # fmt: skip


def missing(subjects: Sequence[str]) -> list[str]:
    """The subjects of UNO's cases that a dataset does not have."""
    return [name for name in PHOTO if name not in subjects]


def entries(kind: str, classes: Mapping[str, str], prompts: Mapping[str, Sequence[str]]) -> list[dict]:
    """The case list of a kind ("single", "multi") in UNO's format, in its order: {"prompt": …, "image_paths": […]}.

    `classes` and `prompts` as of `benchmark.read_prompts_and_classes`.
    """
    units = [(name,) for name in PHOTO] if kind == "single" else PAIRS
    made = []
    for names in units:
        words = [classes[name] for name in names]
        of_kind = prompts["live" if words[0] in LIVE else "object"]
        paths = [f"{name}/{PHOTO[name]:02d}.jpg" for name in names]
        made += [{"prompt": prompt(template, words, prompts), "image_paths": paths} for template in of_kind]
    return made


def prompt(template: str, words: Sequence[str], prompts: Mapping[str, Sequence[str]]) -> str:
    """The prompt of a template for subjects of one or two class words."""
    first, *others = words
    if not others:
        return _of(template, first)
    before = template.partition("{0}")[0]  # "a " or, of a property, "a red "
    live = first in LIVE
    if live and not (before == "a " and template in prompts["object"]):
        return f"{_of(template, first)}, next to it is a {others[0]}"
    return _of(template, f"{first} and {before}{others[0]}")


def _of(template: str, words: str) -> str:
    """A template with the class's words and no unique token."""
    return template.replace("{0} {1}", words)
