"""Rows as tokens and labels: what the model reads, and which of it the loss learns.

The trainer is given tokens, so that what is learnt does not depend on its version, and so that a dry run counts exactly
what a run trains on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from safelora_fast.data.chat import Chat, chat_of, has_template
from safelora_fast.data.chat_text import common_prefix
from safelora_fast.data.example_arrays import IGNORED_LABEL, Example, Examples
from safelora_fast.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from safelora_fast.data.rows import Message, Row, RowSet


@dataclass
class ExampleSet:
    """The examples that a data set gives.

    Attributes:
        source: the data set.
        examples: those that are trained on.
        without_answer: places of rows that were left out because they leave nothing to learn.
        skipped_too_long: places of rows that were left out because they are too long.
        truncated: places of rows that were cut.
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
    """Makes rows into examples.

    Attributes:
        tokenizer: the model's.
        strings: what text becomes: "chat" turns, or "text" as it stands.
        completion_only: learn answers only (the assistant's turns, the completion), or every token.
        max_length: the most tokens of an example; None is no limit.
        without_answer: "refuse" rows that leave nothing to learn, or "skip" them.
        too_long: "truncate", "skip" or "refuse" longer rows.
    """

    tokenizer: PreTrainedTokenizerBase
    strings: str = "chat"
    completion_only: bool = True
    max_length: int | None = None
    without_answer: str = "refuse"
    too_long: str = "truncate"

    def encode(self, source: RowSet) -> ExampleSet:
        """All rows of a data set.

        Raises:
            DataError: a row that leaves nothing to learn, or that is too long, unless the recipe says otherwise; a row
                that the chat template refuses.
        """
        result = ExampleSet(source)
        for row in source.rows:
            self._sort_in(self.example(row), result)
        self._judge(result)
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

    def _judge(self, result: ExampleSet) -> None:
        count = len(result.source.rows)
        for places, policy, option, what in (
            (result.without_answer, self.without_answer, "data.without_answer", "leave no answer token to learn"),
            (result.skipped_too_long, self.too_long, "data.too_long", f"have more than {self.max_length} tokens"),
        ):
            if places and policy == "refuse":
                raise DataError(
                    f"{result.source.source}: {len(places)} of {count} rows {what}, the first at {places[0]}; mend them, "
                    f"or say {option}: skip"
                )
        if not result.examples:
            raise DataError(f"{result.source.source}: no row is left to train on")

    def example(self, row: Row) -> Example:
        """One row, however long, and whether or not it leaves anything to learn.

        Raises:
            DataError: the chat template refuses the row.
        """
        if isinstance(row.prompt, str) and self.strings == "text":
            return self._text(row)
        return self._conversation(row)

    def _text(self, row: Row) -> Example:
        """Prompt and completion as they stand, with the tokenizer's own special tokens and the end of text."""
        assert isinstance(row.prompt, str)  # noqa: S101
        assert isinstance(row.completion, str)  # noqa: S101
        ids = list(self.tokenizer(row.prompt + row.completion)["input_ids"])
        end = self.tokenizer.eos_token_id
        if end is not None and ids[-1:] != [end]:
            ids.append(end)
        prompt = list(self.tokenizer(row.prompt)["input_ids"])
        spans = [(common_prefix(prompt, ids), len(ids))] if row.completion.strip() else []
        return self._example(row.place, ids, spans)

    def _conversation(self, row: Row) -> Example:
        prompt, completion = _as_turns(row.prompt, "user"), _as_turns(row.completion, "assistant")
        turns = [*prompt, *completion]
        answers = [
            number
            for number, turn in enumerate(turns)
            if number >= len(prompt) and turn["role"] == "assistant" and turn["content"].strip()
        ]
        if answers[:1] == [0]:
            raise DataError(f"{row.place}: a conversation cannot begin with the assistant's answer")
        ids, spans = self._chat(row.place).conversation(turns, answers, row.place, marks=not prompt)
        return self._example(row.place, ids, spans)

    def check(self) -> None:
        """Refuse a chat template that cannot be used, before the first row.

        Raises:
            DataError: there is none, or it writes no answers.
        """
        reason = self._chat("the rows").unanswered_reason
        if reason is not None:
            raise DataError(f"no row can be taken: {reason}")

    def _chat(self, place: str) -> Chat:
        if not has_template(self.tokenizer):
            raise DataError(
                f"{place}: the model's tokenizer has no chat template: say model.chat_template, or for rows of text "
                "data.strings: text"
            )
        try:
            return chat_of(self.tokenizer)
        except DataError as error:
            raise DataError(f"{place}: {error}") from error

    def _example(self, place: str, ids: list[int], spans: Sequence[tuple[int, int]]) -> Example:
        if not self.completion_only:
            return Example(place, ids, list(ids) if spans else [IGNORED_LABEL] * len(ids))
        labels = [IGNORED_LABEL] * len(ids)
        for first, end in spans:
            labels[first:end] = ids[first:end]
        return Example(place, ids, labels)


def _as_turns(part: str | list[Message], role: str) -> list[Message]:
    return [{"role": role, "content": part}] if isinstance(part, str) else part
