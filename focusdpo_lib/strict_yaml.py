"""YAML that says each thing once and means what it shows: what YAML 1.1 would silently read otherwise is refused.

Of a key that stands twice PyYAML keeps the second value without a word; `0100` is 64 to it, and `1:30` is 90.
"""

import copy
from functools import lru_cache
from typing import Any, NoReturn

import yaml


class StrictYamlError(ValueError):
    """What cannot be read as meant; the message says where, what and what to do."""


TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """The safe loader, but for tags, repeated keys, keys that are no text, and numbers in base 60, 8, 16 or 2."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            _refuse(event, f"the tag {event.tag.replace(TAG, '!!')} is not accepted: write the value alone")
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag not in (f"{TAG}str", f"{TAG}merge"):
                shown = repr(key.value) if isinstance(key, yaml.ScalarNode) else "a group or list"
                _refuse(key, f"the key {shown} is no text: correct it, or put it in quotes")
            if key.value in seen:
                first = seen[key.value] + 1
                _refuse(key, f"the key {key.value!r} stands twice (first in line {first}): keep one of the two")
            seen[key.value] = key.start_mark.line
        return node

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        of_kind = {"int": self.construct_yaml_int, "float": self.construct_yaml_float}
        try:
            value = of_kind[node.tag.rpartition(":")[2]](node)
        except ValueError:  # Python reads no number of thousands of digits
            _refuse(node, f"{node.value[:20]} … is no number that can be read: correct it")
        digits = node.value.lstrip("+-").lower()
        if ":" in digits or (digits[0] == "0" and len(digits) > 1 and digits[1] not in ".e"):
            _refuse(node, f"{node.value} would be read as {value}: write it as a decimal number, or a text in quotes")
        return value

    def construct_text(self, node: yaml.ScalarNode) -> str:
        if "\0" in node.value:
            _refuse(node, "a text that holds the character NUL names no file: take it out")
        return self.construct_yaml_str(node)

    def construct_date(self, node: yaml.ScalarNode) -> None:
        _refuse(node, f"{node.value} would be read as a date: put it in quotes")


_Loader.add_constructor(f"{TAG}timestamp", _Loader.construct_date)
_Loader.add_constructor(f"{TAG}str", _Loader.construct_text)
for _kind in ("int", "float"):
    _Loader.add_constructor(f"{TAG}{_kind}", _Loader.construct_number)


def _refuse(node: yaml.Node | yaml.Event, problem: str) -> NoReturn:
    raise StrictYamlError(f"line {node.start_mark.line + 1}: {problem}")


def load(text: str) -> Any:
    """The plain values of a YAML text. Raises StrictYamlError, in one sentence with the line."""
    return copy.deepcopy(_values(text))


@lru_cache(maxsize=256)  # the same few files are read again for every job and stage
def _values(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise StrictYamlError(f"it is not YAML ({' '.join(str(error).split())}): correct that line") from None
    except RecursionError:
        raise StrictYamlError("groups and lists stand in each other a hundred deep: no setting is like that") from None
