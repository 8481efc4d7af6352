"""Examples as tokens and labels: what the model reads, and which of it the loss learns.

The trainer gets tokens, so what is learned does not depend on its version, and a dry run counts exactly what a run trains on.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, overload

import numpy as np

from safelora_fast.data.chat import Chat, chat_of, has_template
from safelora_fast.data.chat_text import common_prefix
from safelora_fast.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pyarrow
    from transformers import PreTrainedTokenizerBase

    from safelora_fast.data.rows import Message, Row, RowSet

IGNORED_LABEL = -100
PLACE = re.compile(r"(.*?)([1-9]\d{0,17})", re.DOTALL)
TOKENS_AT_ONCE = 1 << 30  # in one piece of a table's column, whose offsets have 32 bits


@dataclass(frozen=True)
class Example:
    """Tokens of one example; labels are the tokens that the loss learns and -100 elsewhere; safe examples are tagged."""

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

    Flat arrays keep them, because lists of Python numbers would take ten times as much memory.

    Args:
        given: the first of them.
    """

    def __init__(self, given: Iterable[Example] = ()) -> None:
        self._ids = array("i")
        self._labels = array("i")
        self._ends = array("q", [0])
        self._safe = bytearray()
        self._files: dict[str, int] = {}  # what places begin with, and their numbers
        self._places = array("q")  # for each example the file's number, and the number that its place ends with or -1
        for example in given:
            self.append(example)

    def append(self, example: Example) -> None:
        """Add one."""
        self._ids.extend(example.ids)
        self._labels.extend(example.labels)
        self._ends.append(len(self._ids))
        self._safe.append(example.safe)
        match = PLACE.fullmatch(example.place)
        file, line = match.groups() if match else (example.place, -1)
        self._places.extend([self._files.setdefault(file, len(self._files)), int(line)])

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
        place = f"{list(self._files)[file]}{'' if line < 0 else line}"
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
        """Whether each is a safe example, bool [examples]."""
        return np.frombuffer(self._safe, dtype=bool)

    def columns(self) -> dict[str, pyarrow.ChunkedArray]:
        """`input_ids`, `labels` (int32) and `assistant_masks` (int8, 1 where a token is learned): a list for each example."""
        ids, labels = np.asarray(self._ids), np.asarray(self._labels)
        masks = (labels != IGNORED_LABEL).astype(np.int8)
        columns = {"input_ids": ids, "labels": labels, "assistant_masks": masks}
        return {name: self._lists(values) for name, values in columns.items()}

    def tags(self) -> pyarrow.ChunkedArray:
        """For each example a list with one truth value for each token: whether the example is safe."""
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


@dataclass
class ExampleSet:
    """The tokens of a data set.

    Attributes:
        source: the data set.
        examples: those that are trained on.
        without_answer: places of examples that were left out because they leave nothing to learn.
        skipped_too_long: places of examples that were left out because they are too long.
        truncated: places of examples that were cut.
    """

    source: RowSet
    examples: Examples = field(default_factory=Examples)
    without_answer: list[str] = field(default_factory=list)
    skipped_too_long: list[str] = field(default_factory=list)
    truncated: list[str] = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        lengths: list[int] = self.examples.lengths.tolist()
        return lengths


@dataclass(frozen=True)
class Encoder:
    """Turns examples of text or turns into tokens.

    Attributes:
        tokenizer: the model's.
        strings: what plain text becomes: "chat" turns, or "text" as it stands.
        completion_only: learn completions only (the assistant's turns, the completion), or every token.
        max_length: the most tokens of an example; None is no limit.
        without_answer: "refuse" examples that leave nothing to learn, or "skip" them.
        too_long: "truncate", "skip" or "refuse" longer examples.
    """

    tokenizer: PreTrainedTokenizerBase
    strings: str = "chat"
    completion_only: bool = True
    max_length: int | None = None
    without_answer: str = "refuse"
    too_long: str = "truncate"

    def check(self) -> None:
        """Refuse a chat template that cannot be used, before the first example.

        Raises:
            DataError: there is none, or it writes no completions.
        """
        reason = self._chat("the rows").unanswered_reason
        if reason is not None:
            raise DataError(f"no example can be read: {reason}")

    def encode(self, source: RowSet) -> ExampleSet:
        """All examples of a data set.

        Raises:
            DataError: an example leaves nothing to learn or is too long, unless the settings allow it; or the chat template
                refuses it.
        """
        result = ExampleSet(source)
        for row in source.rows:
            self._sort_in(self.example(row), result)
        for places, policy, option, what in (
            (result.without_answer, self.without_answer, "data.without_answer", "leave no completion token to learn"),
            (result.skipped_too_long, self.too_long, "data.too_long", f"have more than {self.max_length} tokens"),
        ):
            if places and policy == "refuse":
                raise DataError(
                    f"{source.source}: {len(places)} of {len(source.rows)} examples {what}, the first at {places[0]}; mend them, "
                    f"or say {option}: skip"
                )
        if not result.examples:
            raise DataError(f"{source.source}: no example is left to train on")
        return result

    def _sort_in(self, example: Example, result: ExampleSet) -> None:
        if self.max_length is not None and len(example.ids) > self.max_length:
            if self.too_long != "truncate":
                result.skipped_too_long.append(example.place)
                return
            example = Example(example.place, example.ids[: self.max_length], example.labels[: self.max_length])
            if example.answer:
                result.truncated.append(example.place)
        if example.answer:
            result.examples.append(example)
        else:
            result.without_answer.append(example.place)

    def example(self, row: Row) -> Example:
        """The tokens of one example, however long, and whether or not it leaves anything to learn.

        Raises:
            DataError: the chat template refuses it.
        """
        if self.strings == "text" and isinstance(row.prompt, str) and isinstance(row.completion, str):
            return self._text(row.place, row.prompt, row.completion)
        return self._conversation(row)

    def _text(self, place: str, prompt: str, completion: str) -> Example:
        """Prompt and completion as they stand, with the tokenizer's own special tokens and the end of text."""
        ids = list(self.tokenizer(prompt + completion)["input_ids"])
        end = self.tokenizer.eos_token_id
        if end is not None and ids[-1:] != [end]:
            ids.append(end)
        before = list(self.tokenizer(prompt)["input_ids"])
        spans = [(common_prefix(before, ids), len(ids))] if completion.strip() else []
        return self._labeled(place, ids, spans)

    def _conversation(self, row: Row) -> Example:
        prompt, completion = as_turns(row.prompt, "user"), as_turns(row.completion, "assistant")
        turns = [*prompt, *completion]
        answers = [
            number
            for number, turn in enumerate(turns)
            if number >= len(prompt) and turn["role"] == "assistant" and turn["content"].strip()
        ]
        if answers[:1] == [0]:
            raise DataError(f"{row.place}: a conversation cannot begin with the assistant's answer")
        ids, spans = self._chat(row.place).conversation(turns, answers, row.place, marks=not prompt)
        return self._labeled(row.place, ids, spans)

    def _chat(self, place: str) -> Chat:
        if not has_template(self.tokenizer):
            raise DataError(
                f"{place}: the model's tokenizer has no chat template: say model.chat_template, or for plain text "
                "data.strings: text"
            )
        try:
            return chat_of(self.tokenizer)
        except DataError as error:
            raise DataError(f"{place}: {error}") from error

    def _labeled(self, place: str, ids: list[int], spans: Sequence[tuple[int, int]]) -> Example:
        if not self.completion_only:
            return Example(place, ids, list(ids) if spans else [IGNORED_LABEL] * len(ids))
        labels = [IGNORED_LABEL] * len(ids)
        for first, end in spans:
            labels[first:end] = ids[first:end]
        return Example(place, ids, labels)


def as_turns(part: str | list[Message], role: str) -> list[Message]:
    """Plain text as one turn of a role; turns as they are."""
    return [{"role": role, "content": part}] if isinstance(part, str) else part
