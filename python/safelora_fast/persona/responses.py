"""What is asked of the model and what it answered, in memory and as rows of a JSONL file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

if TYPE_CHECKING:
    from safelora_fast.persona.trait import Trait

Side = Literal["positive", "negative"]


@dataclass(frozen=True)
class Request:
    """One question under one system prompt.

    Attributes:
        side: whether the system prompt asks for the trait ("positive") or for its opposite.
        pair: number of the pair of system prompts, from 0.
        question: number of the question, from 0.
        sample: which of several answers to the same, from 0.
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
        """Its name in files: side/pair/question/sample."""
        return f"{self.side}/{self.pair}/{self.question}/{self.sample}"

    def draws(self, seed: int, count: int) -> np.ndarray:
        """Uniform numbers in [0, 1), one for each token to draw: of this request alone, whatever it is batched with."""
        numbers = (get_args(Side).index(self.side), self.pair, self.question, self.sample)
        return np.random.default_rng([seed, *numbers]).random(count)


@dataclass(frozen=True)
class Response:
    """An answer.

    Attributes:
        request: what was asked.
        tokens: its tokens, without the one that ends it.
        answer: its text, without special tokens.
    """

    request: Request
    tokens: tuple[int, ...]
    answer: str

    def to_row(self, made: dict[str, Any]) -> dict[str, Any]:
        """As a row for JSON; `made` says how it was generated."""
        request = self.request
        return {
            "id": request.id,
            "system": request.system,
            "user": request.user,
            "answer": self.answer,
            "tokens": list(self.tokens),
            "made": made,
        }


def requests(trait: Trait, samples: int) -> list[Request]:
    """Every question under both prompts of every pair, so often; in an order that puts equal system prompts together."""
    return [
        Request(side, number, index, sample, getattr(pair, side), question)
        for number, pair in enumerate(trait.pairs)
        for side in get_args(Side)
        for index, question in enumerate(trait.questions)
        for sample in range(samples)
    ]
