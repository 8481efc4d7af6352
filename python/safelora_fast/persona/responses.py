"""Requests to the model, its responses, and the JSONL file next to the vector that stores the responses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from safelora_fast.errors import SettingsError
from safelora_fast.files.json_reader import COUNT, LIST, OBJECT, TEXT, check_fields, of_kind
from safelora_fast.files.store import JsonlStore, changed_settings, settings_message

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from safelora_fast.persona.trait import Trait

Side = Literal["positive", "negative"]
SUFFIX = ".responses.jsonl"
ROW = {"id": TEXT, "system": TEXT, "user": TEXT, "answer": TEXT, "tokens": LIST, "made": OBJECT}
MODEL = "model"  # the model's name in `made`; it may change, because the digest of the weights identifies the model
REMEDY = "pass --regenerate to start anew, or choose another output"


@dataclass(frozen=True)
class Request:
    """One question under one system prompt.

    Attributes:
        side: "positive" if the system prompt asks for the trait, "negative" if it asks for the opposite.
        pair: index of the pair of system prompts, from 0.
        question: index of the question, from 0.
        sample: index of the response to the same question, from 0.
        system: the system prompt.
        user: the question.
    """

    side: Side
    pair: int
    question: int
    sample: int
    system: str
    user: str

    @property
    def id(self) -> str:
        """Identifier in files: side/pair/question/sample."""
        return f"{self.side}/{self.pair}/{self.question}/{self.sample}"

    def draws(self, seed: int, count: int) -> np.ndarray:
        """Return `count` uniform random numbers in [0, 1), one for each token. They do not depend on the batch."""
        numbers = (get_args(Side).index(self.side), self.pair, self.question, self.sample)
        return np.random.default_rng([seed, *numbers]).random(count)


@dataclass(frozen=True)
class Response:
    """A response: its tokens without the end token, and its text without special tokens."""

    request: Request
    tokens: tuple[int, ...]
    answer: str


def requests(trait: Trait, samples: int) -> list[Request]:
    """Return `samples` requests for every question under both prompts of every pair, grouped by system prompt."""
    return [
        Request(side, number, index, sample, getattr(pair, side), question)
        for number, pair in enumerate(trait.pairs)
        for side in get_args(Side)
        for index, question in enumerate(trait.questions)
        for sample in range(samples)
    ]


class Journal:
    """The file of responses, from which an interrupted extraction can resume.

    Args:
        path: the JSONL file.
        made: how responses are generated now: the model, the seed and everything else that determines them.
    """

    def __init__(self, path: Path, made: Mapping[str, Any]) -> None:
        self.path = path
        self._made = made
        self._store = JsonlStore(path, "response of persona extract")

    @classmethod
    def beside(cls, output: Path, made: Mapping[str, Any]) -> Journal:
        """Return the journal that belongs to a vector's file."""
        return cls(output.with_suffix(SUFFIX), made)

    def read(self, wanted: Sequence[Request]) -> dict[str, Response]:
        """Return the stored responses to these requests, by id.

        Raises:
            DataError: a line is not a response; the message names the line.
            SettingsError: the responses were generated with other settings or prompts.
        """
        by_id = {request.id: request for request in wanted}
        found: dict[str, Response] = {}
        for row in self._store.read(_check):
            changed = changed_settings({**row["made"], MODEL: None}, {**self._made, MODEL: None})
            if message := settings_message(self.path, changed, REMEDY):
                raise SettingsError(message)
            request = by_id.get(row["id"])
            if request is None or request.id in found:
                continue
            if (row["system"], row["user"]) != (request.system, request.user):
                raise SettingsError(
                    f"{self.path}: the trait has changed: {request.id} had another question or system prompt; {REMEDY}"
                )
            found[request.id] = Response(request, tuple(row["tokens"]), row["answer"])
        return found

    def append(self, responses: Sequence[Response]) -> None:
        """Append responses.

        Raises:
            OutputError: the file cannot be written.
        """
        self._store.append(self.to_row(response) for response in responses)

    def to_row(self, response: Response) -> dict[str, Any]:
        """Return a response as a row of the file."""
        one = response.request
        values = (one.id, one.system, one.user, response.answer, list(response.tokens), self._made)
        return dict(zip(ROW, values, strict=True))

    def remove(self) -> None:
        """Delete the file."""
        self._store.remove()


def _check(row: Any) -> dict[str, Any]:
    for token in check_fields(row, ROW)["tokens"]:
        of_kind(token, COUNT, "a token")
    fields: dict[str, Any] = row
    return fields
