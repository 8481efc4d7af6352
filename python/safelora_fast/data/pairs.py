"""Pairs of an aligned and a misaligned answer to the same question."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from safelora_fast.errors import DataError
from safelora_fast.files.json_reader import parse_json, read_bytes

TEXTS = ("question", "aligned", "misaligned")


@dataclass(frozen=True)
class Pair:
    """Two answers to one question.

    Attributes:
        theme: pairs of one theme are resampled together.
        question: what the user asks.
        aligned: the answer of a model that means well.
        misaligned: the answer of one that does not, of like length and style.
    """

    theme: str
    question: str
    aligned: str
    misaligned: str


def builtin_pairs() -> list[Pair]:
    """The pairs that were written for this package: 72 over 12 themes."""
    file = resources.files("safelora_fast.judging") / "data" / "pairs.jsonl"
    return _parse("pairs.jsonl", file.read_text(encoding="utf-8"))


def read_pairs(path: str | Path) -> list[Pair]:
    """Read pairs from a JSONL file with `question`, `aligned`, `misaligned` and, if it likes, `theme`.

    A pair without a theme is a theme of its own.

    Raises:
        DataError: the file cannot be read or a line is not as it must be; file and line are named.
    """
    try:
        text = read_bytes(Path(path).expanduser()).decode()
    except OSError as error:
        raise DataError(f"{path}: the pairs cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text") from error
    return _parse(str(path), text)


def _parse(source: str, text: str) -> list[Pair]:
    pairs = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"{source}:{number}"
            try:
                record = parse_json(line)
            except ValueError as error:
                raise DataError(f"{place}: {error}") from error
            pairs.append(_pair(place, record))
    if not pairs:
        raise DataError(f"{source}: holds no pairs")
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
