"""A YAML file as plain values with line numbers, after applying `key=value` overrides."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast.checkpoints.resolver import did_you_mean
from safelora_fast.configuration.synonyms import meant
from safelora_fast.errors import SettingsError
from safelora_fast.files.json_reader import read_bytes
from safelora_fast.files.yaml_reader import MOST_DEPTH, parse_yaml

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from safelora_fast.files.yaml_reader import Keys

SHAPES = {
    "recipe": "a mapping of sections, e.g. `model:`, `data:`, `output:`",
    "comparison": "a mapping of `recipe:`, `runs:`, `measure:` and `output:`",
    "policy": "a mapping of `subject:` and `criteria:`",
    "settings": "a mapping",
    "trait": "a mapping of `name:`, `description:`, `pairs:` and `questions:`",
}


@dataclass
class Document:
    """The values of a file.

    Attributes:
        source: the YAML file, as given by the user.
        values: nested mappings, sequences and scalars.
        lines: the line number of each key path; overridden keys have none.
        overridden: key paths set by an override.
        what: the kind of file, see :data:`SHAPES`.
    """

    source: str
    values: dict[str, Any]
    lines: dict[Keys, int] = field(default_factory=dict)
    overridden: set[Keys] = field(default_factory=set)
    what: str = "recipe"

    def problem(self, keys: Keys, what: str) -> SettingsError:
        """Return the error for a key: file, line, dotted path, and what is wrong."""
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
        return "command line" if () in self.overridden else self.source

    def unknown(self, keys: Keys, known: Iterable[str]) -> SettingsError:
        """Return the error for an unknown key; in a recipe, it translates the names that other tools use."""
        known = list(known)
        instead = meant(keys, known) if self.what == "recipe" else None
        return self.problem(keys, f"unknown; {suggestion(keys[-1], known) if instead is None else f'say {instead}'}")

    def blame(self, section: str, words: str) -> SettingsError:
        """Return the error for a section that a class of another package rejected.

        Args:
            section: the name of the section.
            words: that class's error message. If it starts with a key's value, or mentions exactly one key, the error
                names this key. Otherwise the error names each place where the section is set.
        """
        given = self.section(section)
        named = [name for name, value in given.items() if words.startswith((f"{value} ", f"{value!r} "))]
        named = named or [
            name for name in given if re.search(rf"\b{name.replace('_', '[ _]')}\b", words, re.IGNORECASE)
        ]
        named = named or [name for name, value in given.items() if isinstance(value, str) and value in words.split()]
        if len(named) == 1:
            return self.problem((section, named[0]), words)
        place = self._place((section,))
        if (section,) in self.lines and any(keys[:1] == (section,) for keys in self.overridden):
            place = f"{place} or the command line"
        return SettingsError(f"{place}: {section}: {words}")

    def section(self, *keys: str) -> dict[str, Any]:
        """Return the settings of a (possibly nested) section; empty if it is absent.

        Raises:
            SettingsError: the section is not a mapping.
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

    def below(self, keys: Keys) -> Document:
        """Return the section at a key path as a separate document."""
        depth = len(keys)
        lines = {path[depth:]: line for path, line in self.lines.items() if path[:depth] == keys}
        overridden = {path[depth:] for path in self.overridden if path[:depth] == keys}
        return Document(self.source, self.section(*keys), lines, overridden, self.what)

    def override(self, words: Sequence[str]) -> None:
        """Apply `a.b=value` overrides; values are YAML.

        Raises:
            SettingsError: a word is not a setting, or a part of its path is not a section.
        """
        for word in words:
            path, equals, text = word.partition("=")
            keys = tuple(path.split("."))
            if not equals or not all(keys) or len(keys) > MOST_DEPTH:
                raise SettingsError(f"{word!r} is not a setting: write section.key=value, e.g. training.seed=1")
            inside = self.values
            for depth, key in enumerate(keys[:-1], start=1):
                if inside.get(key) is None:
                    inside[key] = {}
                inside = inside[key]
                if not isinstance(inside, dict):
                    raise SettingsError(f"command line: {path}: {'.'.join(keys[:depth])} is a value, not a section")
            self.lines = {known: line for known, line in self.lines.items() if known[: len(keys)] != keys}
            inside[keys[-1]] = parse_yaml(text, f"command line: {path}", has_lines=False)
            self.overridden.add(keys)


def suggestion(name: str, known: Iterable[str]) -> str:
    """Suggest the known name closest to an unknown one; if none is close, list (or count) the known names."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"did you mean {near[0]}"
    if len(known) <= 12:
        return f"known are {', '.join(known)}"
    return f"there are {len(known)} others; see docs/recipe.md"


def read_document(path: str | Path, overrides: Sequence[str] = (), *, what: str = "recipe") -> Document:
    """Read a YAML file whose top level is a mapping, and apply overrides.

    Args:
        path: the file.
        overrides: settings that replace those of the file, as "section.key=value" with YAML values.
        what: the expected kind of file, for messages: a key of :data:`SHAPES`.

    Raises:
        SettingsError: the file cannot be read, is not YAML, or repeats a key; the message names the line.
    """
    source = str(path)
    try:
        text = read_bytes(path).decode()
    except OSError as error:
        hint = did_you_mean(Path(path)) if isinstance(error, FileNotFoundError) else ""
        raise SettingsError(f"{source}: the {what} cannot be read: {error.strerror}{hint}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{source}: the {what} is not UTF-8 text") from error
    lines: dict[Keys, int] = {}
    values = parse_yaml(text, source, lines)
    if not isinstance(values, dict):
        raise SettingsError(f"{source}: a {what} is {SHAPES[what]}")
    document = Document(source, values, lines, what=what)
    document.override(overrides)
    return document
