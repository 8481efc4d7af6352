"""The rows among which is chosen: a JSONL file, checked as a whole before the first of them is scored."""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

from safelora_fast.data.jsonl import JsonLines
from safelora_fast.errors import DataError
from safelora_fast.recipe.rows import ROLES, Row, check_row

if TYPE_CHECKING:
    from pathlib import Path

    import pyarrow

REFUSALS = {"sorry", "apologize", "cannot", "can't", "unable"}
FIRST_WORDS = 10
WORD = re.compile(r"[\w']+")
# Keys that rows of messages, and those of a prompt and a completion, must not have; they may be in texts too.
ODD_KEYS = {True: re.compile(rb'"(?:tool|prompt"|completion")'), False: re.compile(rb'"(?:tool|messages")')}


class Candidates:
    """Rows of a JSONL file, as :func:`~safelora_fast.recipe.rows.check_row` takes them.

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
        if not self._is_plain():
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
            return json.dumps({**record, **figures}, ensure_ascii=False)
        return f"{raw[:-1].decode().rstrip()}, {json.dumps(figures)[1:-1]}}}"

    def _is_plain(self) -> bool:
        """Whether all rows are as they must be, and of the first one's kind: then no loop has to look at them."""
        first = self._lines.record(0)
        if not isinstance(first, dict) or self._lines.holds(ODD_KEYS["messages" in first]):
            return False
        turns = isinstance(first.get("prompt"), list)
        table = self._lines.table(_schema(turns=turns))
        if table is None:
            return False
        parts = [table[name] for name in (("messages",) if "messages" in first else ("prompt", "completion"))]
        if turns or "messages" in first:
            return all(map(_filled, parts))
        return not any(part.null_count for part in parts)


def _schema(*, turns: bool) -> pyarrow.Schema:
    import pyarrow

    conversation = pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))
    part = conversation if turns else pyarrow.string()
    return pyarrow.schema([("messages", conversation), ("prompt", part), ("completion", part)])


def _filled(conversations: pyarrow.ChunkedArray) -> bool:
    """Whether every conversation has turns, and every turn a known role and a content."""
    from pyarrow import compute

    if conversations.null_count or (compute.min(compute.list_value_length(conversations)).as_py() or 0) < 1:
        return False
    turns = compute.list_flatten(conversations)
    if turns.null_count or compute.struct_field(turns, "content").null_count:
        return False
    return set(compute.unique(compute.struct_field(turns, "role")).to_pylist()) <= set(ROLES)


def is_refusal(row: Row) -> bool:
    """Whether the first answer refuses: one of a few words is among its first ten (Kaczér et al., Interleaving++)."""
    if isinstance(row.completion, str):
        answer = row.completion
    else:
        answer = next((turn["content"] for turn in row.completion if turn["role"] == "assistant"), "")
    words = WORD.findall(answer.lower().replace("’", "'"))[:FIRST_WORDS]
    return not REFUSALS.isdisjoint(word.strip("'") for word in words)
