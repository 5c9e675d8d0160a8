"""YAML read along a schema of dataclasses: a scalar is text, as it is typed, where the schema has text.

So `run_name: 007` is "007" and not 7, and `2024_05_01` no number. YAML's own rules would make numbers, dates and truth
values of words; here they hold for nothing but null, and numbers are Python's.
"""

import difflib
import os
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import get_args, get_origin

import yaml

TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NOUNS = {int: "a whole number", float: "a number", bool: "true or false"}
MERGE, NULL = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:null"


def config_keys(schema: type, prefix: str = "") -> list[str]:
    """Every key of a config dataclass, those of its parts dotted."""
    keys = []
    for entry in fields(schema):
        keys.append(prefix + entry.name)
        if is_dataclass(entry.type):
            keys += config_keys(entry.type, f"{prefix}{entry.name}.")
    return keys


def read_document(text: str, schema: type) -> object:
    """A YAML document as plain data: dicts, lists, and scalars of the types that the schema has there.

    Lists and mappings where the schema has none are left to the building of the dataclasses.

    Raises:
        ValueError: no YAML, an unknown key (with a suggestion), or a scalar of another type; the key is named.
    """
    return _read(text, schema, schema, "")


def read_override(override: str, schema: type) -> dict:
    """One `key=value` of the command line as nested plain data; a value that the schema has as text is text as typed.

    Quotes around the whole of such a value are YAML's and are taken off; where it may be None, `null` is.

    Raises:
        ValueError: as `read_document` does, or the override is not of the form `key=value`.
    """
    key, equals, text = override.partition("=")
    if not equals:
        raise ValueError("it is not of the form key=value")
    _check_text(override)
    part, names = schema, key.split(".")
    for depth, name in enumerate(names):
        part = _part(part, name, ".".join(names[:depth]), schema)
    kinds = _kinds(part)
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if str not in kinds or quoted:
        value = _read(text, part, schema, key)
    elif NoneType in kinds and text in ("", "null"):
        value = None
    else:
        value = _at_home(text)
    for name in reversed(names):
        value = {name: value}
    return value


def _read(text: str, part: type, schema: type, key: str) -> object:
    try:
        document = _Document(text, schema)
        node = document.get_single_node()
        return None if node is None else document.read(node, part, key)
    except yaml.YAMLError as error:
        raise ValueError(f"it cannot be read: no YAML ({' '.join(str(error).split())[:200]})") from error
    except RecursionError as error:
        raise ValueError("it cannot be read: nested too deeply") from error


def _kinds(part: type) -> tuple[type, ...]:
    return get_args(part) if isinstance(part, UnionType) else (part,)


def _part(part: type, name: str, above: str, schema: type) -> type:
    """The type of a key below a part of the schema."""
    for kind in _kinds(part):
        if get_origin(kind) is dict:
            return get_args(kind)[1]
        if is_dataclass(kind) and (found := [entry.type for entry in fields(kind) if entry.name == name]):
            return found[0]
    key = f"{above}.{name}" if above else name
    close = difflib.get_close_matches(key, config_keys(schema), n=1)
    beside = [entry.name for kind in _kinds(part) if is_dataclass(kind) for entry in fields(kind)]
    hint = f"did you mean {close[0]}?" if close else f"known ones there: {', '.join(beside) or 'none'}"
    raise ValueError(f"unknown key {key}; {hint}")


def _check_text(text: str) -> None:
    """Raises ValueError where a text holds half a character, which a shell or YAML's "\\ud800" may give."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("it is no UTF-8 text") from error


def _at_home(text: str) -> str:
    """Paths below the home folder, which a shell leaves alone behind `key=`."""
    return os.path.expanduser(text) if text == "~" or text.startswith("~/") else text


class _Document(yaml.SafeLoader):
    """One document; `read` turns its nodes into plain data."""

    def __init__(self, text: str, schema: type):
        super().__init__(text)
        self.schema, self.pairs = schema, {}

    def read(self, node: yaml.Node, part: type, key: str) -> object:
        kinds = _kinds(part)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, kinds, key)
        lists = [kind for kind in kinds if get_origin(kind) in (list, tuple)]
        if isinstance(node, yaml.SequenceNode) and lists:
            return [self.read(item, get_args(lists[0])[0], f"{key}[{k}]") for k, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode) and any(is_dataclass(k) or get_origin(k) is dict for k in kinds):
            below = {name: (_part(part, name, key, self.schema), value) for name, value in self._pairs(node).items()}
            return {name: self.read(value, kind, f"{key}.{name}".lstrip(".")) for name, (kind, value) in below.items()}
        return self.construct_object(node, deep=True)

    def _scalar(self, node: yaml.ScalarNode, kinds: tuple[type, ...], key: str) -> object:
        text = node.value
        if node.tag == NULL and NoneType in kinds:
            return None
        if str in kinds:
            _check_text(text)
            return text if node.tag == NULL else _at_home(text)
        for kind in (int, float, bool):
            if kind in kinds:
                try:
                    return TRUTH[text.lower()] if kind is bool else kind(text)
                except (ValueError, KeyError):
                    raise ValueError(f"{key} is {text[:60]!r}; it must be {NOUNS[kind]}") from None
        return self.construct_object(node, deep=True)

    def _pairs(self, node: yaml.MappingNode) -> dict[str, yaml.Node]:
        """A mapping's keys and values, those that it merges (`<<`) first."""
        if node in self.pairs:
            return self.pairs[node]
        own, merged = {}, {}
        for name, value in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise yaml.YAMLError(f"a key that is no word{name.start_mark}")
            if name.tag == MERGE:
                for other in reversed(value.value) if isinstance(value, yaml.SequenceNode) else [value]:
                    if not isinstance(other, yaml.MappingNode):
                        raise yaml.YAMLError(f"<< merges mappings alone{name.start_mark}")
                    merged |= self._pairs(other)
            elif name.value in own:
                raise yaml.YAMLError(f"duplicate key {name.value}{name.start_mark}")
            else:
                own[name.value] = value
        self.pairs[node] = merged | own
        return self.pairs[node]
