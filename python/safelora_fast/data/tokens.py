"""Encoding examples as tokens and labels.

The trainer gets tokens, so the training data does not depend on its version, and a dry run counts the tokens exactly.
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
TOKENS_AT_ONCE = 1 << 30  # in one chunk of a table's column, because its offsets have 32 bits


@dataclass(frozen=True)
class Example:
    """The tokens of one example; a label is its token where the loss applies, else -100. `safe` tags safe examples."""

    place: str
    ids: list[int]
    labels: list[int]
    safe: bool = False

    @property
    def answer(self) -> list[int]:
        """The tokens that the loss trains on; the first token of a sequence cannot be predicted."""
        return [label for label in self.labels[1:] if label != IGNORED_LABEL]


class Examples(Sequence[Example]):
    """A sequence of non-empty examples, each built on access.

    They are stored in flat arrays, because lists of Python integers would take ten times as much memory.

    Args:
        given: the initial examples.
    """

    def __init__(self, given: Iterable[Example] = ()) -> None:
        self._ids = array("i")
        self._labels = array("i")
        self._ends = array("q", [0])
        self._safe = bytearray()
        self._files: dict[str, int] = {}  # prefixes of places, and their numbers
        self._places = array("q")  # for each example the prefix's number, and the place's final number or -1
        for example in given:
            self.append(example)

    def append(self, example: Example) -> None:
        """Append an example."""
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
        """Number of tokens of each example, int64 [examples]."""
        return np.diff(np.asarray(self._ends))

    @property
    def answer_lengths(self) -> np.ndarray:
        """Number of learned tokens of each example, int64 [examples]; the first token is never counted."""
        if not len(self):
            return np.zeros(0, dtype=np.int64)
        starts = np.asarray(self._ends)[:-1]
        learned = np.asarray(self._labels) != IGNORED_LABEL
        learned[starts] = False
        counts: np.ndarray = np.add.reduceat(learned, starts, dtype=np.int64)
        return counts

    @property
    def safe(self) -> np.ndarray:
        """Whether each example is safe, bool [examples]."""
        return np.frombuffer(self._safe, dtype=bool)

    def columns(self) -> dict[str, pyarrow.ChunkedArray]:
        """Return list columns `input_ids`, `labels` (int32) and `assistant_masks` (int8, 1 for learned tokens)."""
        ids, labels = np.asarray(self._ids), np.asarray(self._labels)
        masks = (labels != IGNORED_LABEL).astype(np.int8)
        columns = {"input_ids": ids, "labels": labels, "assistant_masks": masks}
        return {name: self._lists(values) for name, values in columns.items()}

    def tags(self) -> pyarrow.ChunkedArray:
        """Return one list of bools per example, one per token: whether the example is safe."""
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
        examples: the examples to train on.
        without_answer: places of examples that were skipped because no token is learned.
        skipped_too_long: places of examples that were skipped because they are too long.
        truncated: places of examples that were truncated.
    """

    source: RowSet
    examples: Examples = field(default_factory=Examples)
    without_answer: list[str] = field(default_factory=list)
    skipped_too_long: list[str] = field(default_factory=list)
    truncated: list[str] = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each example."""
        lengths: list[int] = self.examples.lengths.tolist()
        return lengths


@dataclass(frozen=True)
class Encoder:
    """Converts examples of text or turns to tokens.

    Attributes:
        tokenizer: the model's tokenizer.
        strings: how plain text is encoded: as "chat" turns, or unchanged as "text".
        completion_only: train on completions only (assistant turns, or the completion), not on every token.
        max_length: maximum number of tokens of an example; None for no limit.
        without_answer: "refuse" or "skip" examples without a token to learn.
        too_long: "truncate", "skip" or "refuse" examples of more than `max_length` tokens.
    """

    tokenizer: PreTrainedTokenizerBase
    strings: str = "chat"
    completion_only: bool = True
    max_length: int | None = None
    without_answer: str = "refuse"
    too_long: str = "truncate"

    def check(self) -> None:
        """Check the chat template before the first example.

        Raises:
            DataError: there is no chat template, or it cannot write completions.
        """
        reason = self._chat("the rows").unanswered_reason
        if reason is not None:
            raise DataError(f"no example can be read: {reason}")

    def encode(self, source: RowSet) -> ExampleSet:
        """Encode all examples of a data set.

        Raises:
            DataError: an example has no token to learn or is too long, and the settings refuse such examples; or the
                chat template refuses an example.
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
                    f"{source.source}: {len(places)} of {len(source.rows)} examples {what}, the first at {places[0]}; fix them, "
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
        """Encode one example, without checks of its length or of tokens to learn.

        Raises:
            DataError: the chat template refuses the example.
        """
        if self.strings == "text" and isinstance(row.prompt, str) and isinstance(row.completion, str):
            return self._text(row.place, row.prompt, row.completion)
        return self._conversation(row)

    def _text(self, place: str, prompt: str, completion: str) -> Example:
        """Encode prompt and completion unchanged, with the tokenizer's special tokens and the end of text."""
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
    """Return plain text as one turn with the given role; return turns unchanged."""
    return [{"role": role, "content": part}] if isinstance(part, str) else part
