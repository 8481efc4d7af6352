"""Candidate examples from a JSONL file, all checked before the first one is scored."""

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
BYTE_ORDER_MARK = "\ufeff"  # belongs to the file, not to the first example
WORD = re.compile(r"[\w']+")


class Candidates(JsonLines):
    """Examples of a JSONL file, checked by :func:`~safelora_fast.data.rows.check_row`.

    Args:
        path: the file.

    Raises:
        DataError: the file cannot be read or has no examples, or one is invalid; the message names file and line.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.source = str(path)
        if not len(self):
            raise DataError(f"{path}: holds no examples")
        for index in range(len(self)):
            self.row(index)

    def row(self, index: int) -> Row:
        """Return the example at an index."""
        return check_row(self.place(index), self.record(index))

    def fingerprint(self, index: int) -> str:
        """Return a digest of an example's text, which changes when the example is edited."""
        return hashlib.blake2b(self.raw(index), digest_size=8).hexdigest()

    def with_values(self, index: int, values: dict[str, Any]) -> str:
        """Return the example's line with values added and everything else unchanged."""
        raw = self.raw(index).strip()
        record = self.record(index)
        if record.keys() & values.keys():
            line = json.dumps({**record, **values}, ensure_ascii=False)
            # A lone surrogate in an unused column can only be written as an escape.
            return line.encode(errors="backslashreplace").decode()
        return f"{raw[:-1].decode().removeprefix(BYTE_ORDER_MARK).rstrip()}, {json.dumps(values)[1:-1]}}}"


def is_refusal(row: Row) -> bool:
    """Return whether the first completion has a refusal word among its first ten (Kaczér et al., Interleaving++)."""
    if isinstance(row.completion, str):
        answer = row.completion
    else:
        answer = next((turn["content"] for turn in row.completion if turn["role"] == "assistant"), "")
    words = WORD.findall(answer.lower().replace("’", "'"))[:FIRST_WORDS]
    return not REFUSALS.isdisjoint(word.strip("'") for word in words)
