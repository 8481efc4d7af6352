"""The rows among which is chosen: a JSONL file, checked as a whole before the first of them is scored."""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

from safelora_fast.data.rows import Row, check_row
from safelora_fast.errors import DataError
from safelora_fast.files.jsonl import JsonLines

if TYPE_CHECKING:
    from pathlib import Path

REFUSALS = {"sorry", "apologize", "cannot", "can't", "unable"}
FIRST_WORDS = 10
BYTE_ORDER_MARK = "\ufeff"  # belongs to the start of a file, not to the row that stands there
WORD = re.compile(r"[\w']+")


class Candidates:
    """Rows of a JSONL file, as :func:`~safelora_fast.data.rows.check_row` takes them.

    Args:
        path: the file.

    Raises:
        DataError: it cannot be read, holds no row, or a row is not as it must be; file and line are named.
    """

    def __init__(self, path: str | Path) -> None:
        self._lines = JsonLines(path)
        self.source = str(path)
        if not len(self._lines):
            raise DataError(f"{path}: holds no rows")
        for index in range(len(self)):
            self.row(index)

    def __len__(self) -> int:
        return len(self._lines)

    def place(self, index: int) -> str:
        """Where a row stands, for messages."""
        return self._lines.place(index)

    def row(self, index: int) -> Row:
        """A row."""
        return check_row(self.place(index), self._lines.record(index))

    def sha256(self) -> str:
        """Of the file."""
        return self._lines.sha256()

    def fingerprint(self, index: int) -> str:
        """Of a row's text: another row, or the same row after an edit, has another one."""
        return hashlib.blake2b(self._lines.raw(index), digest_size=8).hexdigest()

    def with_figures(self, index: int, figures: dict[str, Any]) -> str:
        """The row's line with figures added, all else as it is written there."""
        raw = self._lines.raw(index).strip()
        record = self._lines.record(index)
        if record.keys() & figures.keys():
            line = json.dumps({**record, **figures}, ensure_ascii=False)
            # Half of a surrogate pair, in a column that is not read, can only be written as the escape that it was.
            return line.encode(errors="backslashreplace").decode()
        return f"{raw[:-1].decode().removeprefix(BYTE_ORDER_MARK).rstrip()}, {json.dumps(figures)[1:-1]}}}"


def is_refusal(row: Row) -> bool:
    """Whether the first answer refuses: one of a few words is among its first ten (Kaczér et al., Interleaving++)."""
    if isinstance(row.completion, str):
        answer = row.completion
    else:
        answer = next((turn["content"] for turn in row.completion if turn["role"] == "assistant"), "")
    words = WORD.findall(answer.lower().replace("’", "'"))[:FIRST_WORDS]
    return not REFUSALS.isdisjoint(word.strip("'") for word in words)
