"""A trait: the system prompts that ask for it and for its opposite, and the questions, in one checked YAML file."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast.errors import SettingsError
from safelora_fast.recipe.yaml_document import Document, read_document

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

SHIPPED = Path(__file__).parent / "traits"
NAME = re.compile(r"[\w.-]+")
KEYS = ("name", "description", "pairs", "questions")
SIDES = ("positive", "negative")
FEWEST_QUESTIONS = 2  # each half of them judges the vector of the other half


@dataclass(frozen=True)
class Pair:
    """Two system prompts that differ in what they ask for.

    Attributes:
        positive: asks for the trait.
        negative: asks for its opposite.
    """

    positive: str
    negative: str


@dataclass(frozen=True)
class Trait:
    """What a persona vector is extracted for.

    Attributes:
        name: letters, digits, dots and dashes; a monitor's default name in the log.
        description: for people.
        pairs: at least one.
        questions: at least two; each is asked under both prompts of every pair.
    """

    name: str
    description: str
    pairs: tuple[Pair, ...]
    questions: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Of all of it as canonical JSON."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def shipped_traits() -> list[str]:
    """Names of the traits that come with this package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load_trait(source: str | Path) -> Trait:
    """Read a trait file, or one that comes with this package by its name; a file that exists wins.

    Raises:
        SettingsError: the file cannot be read, or is not as it must be; file, line and key are named.
    """
    path = Path(source).expanduser()
    if not path.exists() and str(source) in shipped_traits():
        path = SHIPPED / f"{source}.yaml"
    elif not path.exists():
        raise SettingsError(
            f"{source}: there is no such trait file, and the traits that come with this package are "
            f"{', '.join(shipped_traits())}"
        )
    document = read_document(path, what="trait")
    for key in document.values:
        if key not in KEYS:
            raise document.unknown((key,), KEYS)
    name = _text(document, "name")
    if not NAME.fullmatch(name):
        raise document.problem(("name",), f"is {name!r}, it must be letters, digits, dots and dashes")
    questions = tuple(
        _text_in(document, "questions", number, question)
        for number, question in enumerate(_list(document, "questions"), start=1)
    )
    if len(questions) < FEWEST_QUESTIONS:
        raise document.problem(("questions",), "needs at least two: each half judges the vector of the other")
    _refuse_twins(document, "questions", questions)
    pairs = tuple(_pair(document, number, pair) for number, pair in enumerate(_list(document, "pairs"), start=1))
    _refuse_twins(document, "pairs", pairs)
    return Trait(name, _text(document, "description"), pairs, questions)


def _text(document: Document, key: str) -> str:
    value = document.values.get(key)
    if value is None:
        raise document.problem((key,), "missing")
    if not isinstance(value, str) or not value.strip():
        raise document.problem((key,), f"must be text, not {value!r}")
    return value.strip()


def _list(document: Document, key: str) -> list[Any]:
    value = document.values.get(key)
    if value is None and key not in document.values:
        raise document.problem((key,), "missing")
    if not isinstance(value, list) or not value:
        raise document.problem((key,), f"must be a list that is not empty, not {value!r}")
    return value


def _text_in(document: Document, key: str, number: int, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise document.problem((key,), f"number {number} must be text, not {value!r}")
    return value.strip()


def _pair(document: Document, number: int, value: Any) -> Pair:
    if not isinstance(value, dict) or set(value) != set(SIDES):
        raise document.problem(("pairs",), f"number {number} must have positive and negative, and nothing else")
    positive, negative = (_text_in(document, "pairs", number, value[side]) for side in SIDES)
    if positive == negative:
        raise document.problem(("pairs",), f"number {number} asks for the same on both sides")
    return Pair(positive, negative)


def _refuse_twins(document: Document, key: str, values: Sequence[Hashable]) -> None:
    for number, value in enumerate(values, start=1):
        if value in values[: number - 1]:
            raise document.problem((key,), f"number {number} is the same as number {values.index(value) + 1}")
