"""The lines of a JSONL file: all are located at once, and each is parsed on request."""

from __future__ import annotations

import hashlib
import mmap
from pathlib import Path
from typing import Any

import numpy as np

from safelora_fast.errors import DataError
from safelora_fast.files.json_reader import is_file, parse_json, read_bytes

NEWLINE = 10
SPACES = (9, 10, 11, 12, 13, 32)
AT_ONCE = 1 << 24


class JsonLines:
    """A JSONL file, mapped into memory (a pipe is read into memory). Blank lines do not count.

    Args:
        path: the file. While this object is open, replace the file by renaming, never in place.
        what: the content, for messages.

    Raises:
        DataError: the file cannot be read.
    """

    def __init__(self, path: str | Path, what: str = "data") -> None:
        self.path = Path(path)
        try:
            if (
                is_file(self.path) and self.path.stat().st_size
            ):  # an empty file cannot be mapped, and a pipe looks empty
                with self.path.open("rb") as file:
                    self._content: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            else:
                self._content = read_bytes(self.path, None)
        except OSError as error:
            raise DataError(f"{path}: the {what} cannot be read: {error.strerror}") from error
        ends = _line_ends(self._content)
        starts = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends
        blank = self._blank(starts, ends)
        self._starts, self._ends = starts[~blank], ends[~blank]
        self._numbers = np.flatnonzero(~blank) + 1

    def _blank(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        blank: np.ndarray = starts == ends
        filled = np.flatnonzero(~blank)
        if not len(filled):
            return blank
        first = np.frombuffer(self._content, dtype=np.uint8)[starts[filled]]
        for index in filled[np.isin(first, SPACES)].tolist():
            blank[index] = not self._content[starts[index] : ends[index]].strip()
        return blank

    def __len__(self) -> int:
        return len(self._starts)

    def place(self, index: int) -> str:
        """Return path and line number, for messages."""
        return f"{self.path}:{self._numbers[index]}"

    def raw(self, index: int) -> bytes:
        """Return a line without its line ending."""
        line: bytes = self._content[self._starts[index] : self._ends[index]]
        return line.rstrip(b"\r")

    def record(self, index: int) -> Any:
        """Return the JSON value of a line.

        Raises:
            DataError: the line is not JSON.
        """
        try:
            return parse_json(self.raw(index))
        except ValueError as error:
            raise DataError(f"{self.place(index)}: {error}") from error

    def sha256(self) -> str:
        """Return the SHA-256 of the whole file."""
        return hashlib.sha256(self._content).hexdigest()


def _line_ends(content: Any) -> np.ndarray:
    """Return the positions of line endings. A last line without one ends at the end of the file."""
    size = len(content)
    parts = []
    for start in range(0, size, AT_ONCE):
        piece = np.frombuffer(content, dtype=np.uint8, count=min(AT_ONCE, size - start), offset=start)
        parts.append(np.flatnonzero(piece == NEWLINE) + start)
    if size and content[size - 1] != NEWLINE:
        parts.append(np.array([size]))
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
