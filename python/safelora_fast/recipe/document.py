"""A YAML file as plain values that remember their lines, with `key=value` overrides put on top."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import yaml

from safelora_fast.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Keys: TypeAlias = "tuple[str, ...]"
BOOL = "tag:yaml.org,2002:bool"
TRUTH = re.compile(r"(true|True|TRUE|false|False|FALSE)$")
FLOAT = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$")
SHAPES = {
    "recipe": "a mapping of sections, e.g. `model:`, `data:`, `output:`",
    "comparison": "a mapping of `recipe:`, `runs:`, `measure:` and `output:`",
    "trait": "a mapping of `name:`, `description:`, `pairs:` and `questions:`",
}
PLAIN = {"tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"}


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """SafeLoader with the scalars of YAML 1.2: 1e-4 is a number, and `save_strategy: no` is text.

    PyYAML reads YAML 1.1, which takes the first for text and the second for false.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, Any]]]] = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != BOOL]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
_Loader.add_implicit_resolver(BOOL, TRUTH, list("tTfF"))


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """SafeDumper that quotes what _Loader would not read as text."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


@dataclass
class Document:
    """The values of a file.

    Attributes:
        source: the YAML file, as the user named it.
        values: nested mappings, sequences and scalars.
        lines: the line that a key is on, by the keys that lead to it; overridden keys have none.
        overridden: keys that an override set.
    """

    source: str
    values: dict[str, Any]
    lines: dict[Keys, int] = field(default_factory=dict)
    overridden: set[Keys] = field(default_factory=set)

    def problem(self, keys: Keys, what: str) -> SettingsError:
        """The error for a key: file, line, dotted path, and what is wrong with it."""
        return SettingsError(f"{self._place(keys)}: {'.'.join(keys) + ': ' if keys else ''}{what}")

    def _place(self, keys: Keys) -> str:
        for length in range(len(keys), 0, -1):
            part = keys[:length]
            if part in self.overridden:
                return "command line"
            if part in self.lines:
                return f"{self.source}:{self.lines[part]}"
            if any(other[:length] == part for other in self.overridden):
                return "command line"
        return self.source

    def unknown(self, keys: Keys, known: Iterable[str]) -> SettingsError:
        """The error for a key that does not exist."""
        return self.problem(keys, f"unknown; {suggestion(keys[-1], known)}")

    def section(self, *keys: str) -> dict[str, Any]:
        """The settings of a section, which may lie in another; empty where it is absent.

        Raises:
            SettingsError: it is no mapping.
        """
        values: Any = self.values
        for depth, key in enumerate(keys, start=1):
            values = values.get(key)
            if values is None:
                return {}
            if not isinstance(values, dict):
                raise self.problem(keys[:depth], f"must be a section with settings of its own, not {values!r}")
        found: dict[str, Any] = values
        return found

    def override(self, words: Sequence[str]) -> None:
        """Put `a.b=value` settings on top; values are YAML.

        Raises:
            SettingsError: a word is no setting, or a part of its path is no section.
        """
        for word in words:
            path, equals, text = word.partition("=")
            keys = tuple(path.split("."))
            if not equals or not all(keys):
                raise SettingsError(f"{word!r} is no setting: write section.key=value, e.g. training.seed=1")
            inside = self.values
            for depth, key in enumerate(keys[:-1], start=1):
                if inside.get(key) is None:
                    inside[key] = {}
                inside = inside[key]
                if not isinstance(inside, dict):
                    raise SettingsError(f"command line: {path}: {'.'.join(keys[:depth])} is a value, not a section")
            self.lines = {known: line for known, line in self.lines.items() if known[: len(keys)] != keys}
            inside[keys[-1]] = _parse(text, f"command line: {path}", None)
            self.overridden.add(keys)


def suggestion(name: str, known: Iterable[str]) -> str:
    """The known names nearest to one that is not known, or all of them when they are few."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"did you mean {near[0]}"
    if len(known) <= 12:
        return f"known are {', '.join(known)}"
    return f"there are {len(known)} others; see docs/training.md"


def read_document(path: str | Path, overrides: Sequence[str] = (), *, what: str = "recipe") -> Document:
    """Read a YAML file whose top level is a mapping, and put overrides on top.

    Args:
        path: the file.
        overrides: settings put on top, "section.key=value" with YAML values.
        what: what the file is to be, for messages: a key of :data:`SHAPES`.

    Raises:
        SettingsError: the file cannot be read, is no YAML, or repeats a key; the line is named.
    """
    source = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{source}: the {what} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{source}: the {what} is not UTF-8 text") from error
    lines: dict[Keys, int] = {}
    values = _parse(text, source, lines)
    if not isinstance(values, dict):
        raise SettingsError(f"{source}: a {what} is {SHAPES[what]}")
    document = Document(source, values, lines)
    document.override(overrides)
    return document


def dump_document(values: dict[str, Any]) -> str:
    """YAML that :func:`read_document` reads as these values, in their order."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def _parse(text: str, source: str, lines: dict[Keys, int] | None) -> Any:
    """Plain values of a YAML text; `lines`, where given, is filled with the line of every key."""
    loader: Any = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _value(loader, node, (), {} if lines is None else lines, source, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = source if mark is None or lines is None else f"{source}:{mark.line + 1}"
        raise SettingsError(f"{where}: this is no YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{source}: this is no YAML: {error}") from error
    except ValueError as error:  # a date that does not exist
        raise SettingsError(f"{source}: {error}") from error
    finally:
        if loader is not None:
            loader.dispose()


def _value(loader: Any, node: Any, keys: Keys, lines: dict[Keys, int], source: str, above: tuple[int, ...]) -> Any:
    if id(node) in above:
        raise SettingsError(f"{source}:{node.start_mark.line + 1}: an alias contains itself")
    if not isinstance(node, yaml.ScalarNode) and node.tag not in PLAIN:
        raise SettingsError(f"{source}:{node.start_mark.line + 1}: {node.tag}: only plain mappings and lists are read")
    above = (*above, id(node))
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, item, keys, lines, source, above) for item in node.value]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    repeated: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise SettingsError(f"{source}:{line}: keys must be plain words")
        if key.value in repeated:
            raise SettingsError(
                f"{source}:{line}: {'.'.join((*keys, key.value))}: given twice, also on line {repeated[key.value]}"
            )
        repeated[key.value] = line
    loader.flatten_mapping(node)
    result = {}
    for key, item in node.value:
        inner = (*keys, str(key.value))
        lines[inner] = key.start_mark.line + 1
        result[str(key.value)] = _value(loader, item, inner, lines, source, above)
    return result
