"""Pairs of an aligned and a misaligned answer to the same question."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from safelora_fast.errors import DataError
from safelora_fast.files.jsonl import JsonLines

TEXTS = ("question", "aligned", "misaligned")


@dataclass(frozen=True)
class Pair:
    """Two answers to one question.

    Attributes:
        theme: pairs of one theme are resampled together.
        question: the user's question.
        aligned: the answer of an aligned model.
        misaligned: the answer of a misaligned model, of similar length and style.
    """

    theme: str
    question: str
    aligned: str
    misaligned: str


def builtin_pairs() -> list[Pair]:
    """Return the built-in pairs: 72 pairs in 12 themes."""
    with resources.as_file(resources.files("safelora_fast.judging") / "data" / "pairs.jsonl") as path:
        return read_pairs(path)


def read_pairs(path: str | Path) -> list[Pair]:
    """Read pairs from a JSONL file with `question`, `aligned`, `misaligned` and, optionally, `theme`.

    Each pair without a theme forms its own theme.

    Raises:
        DataError: the file cannot be read or a line is invalid; the message names file and line.
    """
    lines = JsonLines(Path(path).expanduser())
    if not len(lines):
        raise DataError(f"{path}: holds no pairs")
    pairs = [_pair(lines.place(number), lines.record(number)) for number in range(len(lines))]
    places: dict[tuple[str, ...], str] = {}
    for number, pair in enumerate(pairs):
        texts = (pair.question, pair.aligned, pair.misaligned)
        former = places.setdefault(texts, lines.place(number))
        if former != lines.place(number):
            raise DataError(f"{lines.place(number)}: repeats the pair at {former}, so it would count twice; delete it")
    return pairs


def _pair(place: str, record: Any) -> Pair:
    if not isinstance(record, dict):
        raise DataError(f"{place}: must be an object with {', '.join(TEXTS)} and perhaps theme")
    record = {name: value for name, value in record.items() if value is not None}
    unknown = sorted(record.keys() - {*TEXTS, "theme"})
    if unknown:
        raise DataError(f"{place}: {unknown[0]}: unknown; a pair has {', '.join(TEXTS)} and perhaps theme")
    for name in TEXTS:
        value = record.get(name)
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{place}: {name}: must be text that is not empty")
    if record["aligned"] == record["misaligned"]:
        raise DataError(f"{place}: both answers are the same")
    theme = record.get("theme", place)
    if not isinstance(theme, str):
        raise DataError(f"{place}: theme: must be text")
    return Pair(theme, *(record[name] for name in TEXTS))
