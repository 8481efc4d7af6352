"""Examples of tokens and labels, kept in flat arrays: lists of Python numbers would take ten times as much memory."""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pyarrow

IGNORED_LABEL = -100
PLACE = re.compile(r"(.*?)([1-9]\d{0,17})", re.DOTALL)
TOKENS_AT_ONCE = 1 << 30  # of one piece of a table's column, whose offsets have 32 bits


@dataclass(frozen=True)
class Example:
    """Tokens of one row; labels are the tokens that the loss learns and -100 elsewhere; safe rows are tagged."""

    place: str
    ids: list[int]
    labels: list[int]
    safe: bool = False

    @property
    def answer(self) -> list[int]:
        """The tokens that are learned; the first of a sequence cannot be predicted."""
        return [label for label in self.labels[1:] if label != IGNORED_LABEL]


class Examples(Sequence[Example]):
    """A sequence of examples, none of which is empty; each is made when it is asked for.

    Args:
        given: the first of them.
    """

    def __init__(self, given: Iterable[Example] = ()) -> None:
        self._ids = array("i")
        self._labels = array("i")
        self._ends = array("q", [0])
        self._safe = bytearray()
        self._files: list[str] = []  # what places begin with
        self._numbers: dict[str, int] = {}  # of files
        self._places = array(
            "q"
        )  # of each example the file's number, and the number that its place ends with, -1 for none
        for example in given:
            self.append(example)

    def append(self, example: Example) -> None:
        """Add one."""
        self._ids.extend(example.ids)
        self._labels.extend(example.labels)
        self._ends.append(len(self._ids))
        self._safe.append(example.safe)
        match = PLACE.fullmatch(example.place)
        file, line = match.groups() if match else (example.place, None)
        if file not in self._numbers:
            self._numbers[file] = len(self._files)
            self._files.append(file)
        self._places.extend([self._numbers[file], -1 if line is None else int(line)])

    def __len__(self) -> int:
        return len(self._safe)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...

    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return Examples(self[number] for number in range(*index.indices(len(self))))
        number = range(len(self))[index]
        piece = slice(self._ends[number], self._ends[number + 1])
        file, line = self._places[2 * number : 2 * number + 2]
        place = f"{self._files[file]}{'' if line < 0 else line}"
        return Example(place, self._ids[piece].tolist(), self._labels[piece].tolist(), bool(self._safe[number]))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each, int64 [examples]."""
        return np.diff(np.asarray(self._ends))

    @property
    def answer_lengths(self) -> np.ndarray:
        """Tokens of each that are learned, int64 [examples]; the first of a sequence cannot be."""
        if not len(self):
            return np.zeros(0, dtype=np.int64)
        starts = np.asarray(self._ends)[:-1]
        learned = np.asarray(self._labels) != IGNORED_LABEL
        learned[starts] = False
        counts: np.ndarray = np.add.reduceat(learned, starts, dtype=np.int64)
        return counts

    @property
    def safe(self) -> np.ndarray:
        """Whether each is a safe row, bool [examples]."""
        return np.frombuffer(self._safe, dtype=bool)

    def columns(self) -> dict[str, pyarrow.ChunkedArray]:
        """`input_ids`, `labels` (int32) and `assistant_masks` (int8, 1 where a token is learned): a list for each example."""
        ids, labels = np.asarray(self._ids), np.asarray(self._labels)
        masks = (labels != IGNORED_LABEL).astype(np.int8)
        return {
            name: self._lists(values)
            for name, values in (("input_ids", ids), ("labels", labels), ("assistant_masks", masks))
        }

    def tags(self) -> pyarrow.ChunkedArray:
        """For each example a list with one truth value for each token: whether it is a safe row's."""
        return self._lists(np.repeat(self.safe, self.lengths))

    def _lists(self, values: np.ndarray) -> pyarrow.ChunkedArray:
        import pyarrow

        ends, pieces, start = np.asarray(self._ends), [], 0
        while start < len(self):
            stop = max(int(np.searchsorted(ends, ends[start] + TOKENS_AT_ONCE, side="right")) - 1, start + 1)
            offsets = (ends[start : stop + 1] - ends[start]).astype(np.int32)
            pieces.append(pyarrow.ListArray.from_arrays(offsets, pyarrow.array(values[ends[start] : ends[stop]])))
            start = stop
        return pyarrow.chunked_array(pieces)
