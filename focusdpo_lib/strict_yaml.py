"""YAML that says each thing once and means what it shows: what YAML 1.1 would silently read otherwise is refused.

Of a key that stands twice PyYAML keeps the second value without a word; `0100` is 64 to it, and `1:30` is 90.
"""

from typing import Any

import yaml


class StrictYamlError(ValueError):
    """What cannot be read as meant; the message says where, what and what to do."""


class _Loader(yaml.SafeLoader):
    """The safe loader, but for repeated keys and for numbers in base 60, 8, 16 or 2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    first = seen[key.value] + 1
                    _refuse(key, f"the key {key.value!r} stands twice (first in line {first}): keep one of the two")
                seen[key.value] = key.start_mark.line
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        of_kind = {"int": self.construct_yaml_int, "float": self.construct_yaml_float}
        value = of_kind[node.tag.rpartition(":")[2]](node)
        digits = node.value.lstrip("+-").lower()
        if ":" in digits or (digits[0] == "0" and len(digits) > 1 and digits[1] not in ".e"):
            _refuse(node, f"{node.value} would be read as {value}: write it as a decimal number, or a text in quotes")
        return value

    def construct_date(self, node: yaml.ScalarNode) -> None:
        _refuse(node, f"{node.value} would be read as a date: put it in quotes")


_Loader.add_constructor("tag:yaml.org,2002:timestamp", _Loader.construct_date)
for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)


def _refuse(node: yaml.Node, problem: str) -> None:
    raise StrictYamlError(f"line {node.start_mark.line + 1}: {problem}")


def load(text: str) -> Any:
    """The plain values of a YAML text. Raises StrictYamlError, in one sentence with the line."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise StrictYamlError(f"it is not YAML ({' '.join(str(error).split())}): correct that line") from None
