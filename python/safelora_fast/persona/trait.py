"""Traits: system prompts that ask for a trait and for its opposite, and questions, read from a validated YAML file."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safelora_fast.configuration.yaml_document import Document, read_document
from safelora_fast.errors import SettingsError
from safelora_fast.files.digest import text_digest

SHIPPED = Path(__file__).parent / "traits"
NAME = re.compile(r"[\w.-]+")
KEYS = ("name", "description", "pairs", "questions")
SIDES = {"positive", "negative"}


@dataclass(frozen=True)
class Pair:
    """Two system prompts: `positive` asks for the trait, `negative` for its opposite."""

    positive: str
    negative: str


@dataclass(frozen=True)
class Trait:
    """The trait that a persona vector is extracted for.

    Attributes:
        name: letters, digits, dots and dashes; also a monitor's default name in the log.
        description: an explanation for readers.
        pairs: at least one pair of system prompts.
        questions: at least two; each is asked under both prompts of every pair.
    """

    name: str
    description: str
    pairs: tuple[Pair, ...]
    questions: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """SHA-256 of the whole trait as canonical JSON."""
        return text_digest(asdict(self))


def shipped_traits() -> list[str]:
    """Return the names of the traits that come with this package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load_trait(source: str | Path) -> Trait:
    """Read a trait from a file, or a trait of this package by its name. An existing file wins.

    Raises:
        SettingsError: the file cannot be read or is invalid; the message names file, line and key.
    """
    path = Path(source).expanduser()
    if not path.exists():
        if str(source) not in shipped_traits():
            raise SettingsError(
                f"{source}: there is no such trait file, and the traits that come with this package are "
                f"{', '.join(shipped_traits())}"
            )
        path = SHIPPED / f"{source}.yaml"
    document = read_document(path, what="trait")
    for key in document.values:
        if key not in KEYS:
            raise document.unknown((key,), KEYS)
    name = _text(document, "name", document.values.get("name"))
    if not NAME.fullmatch(name):
        raise document.problem(("name",), f"is {name!r}, it must be letters, digits, dots and dashes")
    description = _text(document, "description", document.values.get("description"))
    questions = _list(document, "questions", _text)
    if len(questions) < 2:
        raise document.problem(("questions",), "needs at least two: each half judges the vector of the other")
    return Trait(name, description, _list(document, "pairs", _pair), questions)


def _text(document: Document, key: str, value: Any, number: int | None = None) -> str:
    if value is None and number is None:
        raise document.problem((key,), "missing")
    if not isinstance(value, str) or not value.strip():
        raise document.problem((key,), f"{'' if number is None else f'number {number} '}must be text, not {value!r}")
    return value.strip()


def _pair(document: Document, key: str, value: Any, number: int) -> Pair:
    if not isinstance(value, dict) or set(value) != SIDES:
        raise document.problem((key,), f"number {number} must have positive and negative, and nothing else")
    pair = Pair(*(_text(document, key, value[side], number) for side in ("positive", "negative")))
    if pair.positive == pair.negative:
        raise document.problem((key,), f"number {number} asks for the same on both sides")
    return pair


def _list(document: Document, key: str, parse: Any) -> tuple[Any, ...]:
    """Parse the items of a list, which must all be different."""
    if key not in document.values:
        raise document.problem((key,), "missing")
    values = document.values[key]
    if not isinstance(values, list) or not values:
        raise document.problem((key,), f"must be a list that is not empty, not {values!r}")
    items = tuple(parse(document, key, value, number) for number, value in enumerate(values, start=1))
    for number, item in enumerate(items, start=1):
        if item in items[: number - 1]:
            raise document.problem((key,), f"number {number} is the same as number {items.index(item) + 1}")
    return items
