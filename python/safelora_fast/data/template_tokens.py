"""The tokens that a chat template writes before a user's text and before a completion, and where they are in a batch."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from safelora_fast.data.chat import ANSWERS, QUESTION, SYSTEM, chat_of, has_template
from safelora_fast.data.chat_text import common_prefix
from safelora_fast.errors import DataError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

Part = Literal["prefix", "header"]
PARTS = ("prefix", "header")
QUESTIONS = (QUESTION, "9 owls flew. Where to")  # other first and last letters, so what is common is the template's
SYSTEMS = (SYSTEM, "Be brief")


@dataclass(frozen=True)
class TemplateTokens:
    """The headers that a chat template writes, as token ids.

    Attributes:
        user: the end of what stands before a user's text, the same with and without a system turn (its role).
        assistant: what stands between a user's turn and a completion (its role).
    """

    user: tuple[int, ...]
    assistant: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any, *, owner: str) -> TemplateTokens:
        """Read the headers of a tokenizer's chat template, or of a processor's tokenizer.

        Where a template writes the system prompt inside of the user's turn (Gemma, Mistral), the user's header is what
        comes before both.

        Args:
            tokenizer: the tokenizer; None if the caller has none.
            owner: the defense that needs them, for messages.

        Raises:
            SettingsError: there is no tokenizer, or no chat template.
            DataError: the template writes no such tokens, or cannot be used.
        """
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        if tokenizer is None or not has_template(tokenizer):
            raise SettingsError(
                f"{owner}: it looks for tokens of the chat template: give a tokenizer that has one, as tokenizer= to defend() "
                "or as processing_class= to a trainer"
            )
        found = cls(_user_header(tokenizer), _assistant_header(tokenizer))
        for role, header in (("user", found.user), ("assistant", found.assistant)):
            if not tokenizer.decode(list(header)).strip():
                raise DataError(f"{owner}: the chat template writes no tokens before the {role}'s text")
        return found

    def mask(self, ids: torch.Tensor, real: torch.Tensor, segments: torch.Tensor | None, part: Part) -> torch.Tensor:
        """Return which tokens belong to a part of the template, bool [batch, tokens].

        Args:
            ids: token ids [batch, tokens].
            real: tokens that are not padding [batch, tokens].
            segments: document numbers of packed rows [batch, tokens]; None if each row is one document.
            part: "prefix" is everything from a document's start to the end of its first user header; "header" is every
                assistant header.
        """
        import torch

        header = np.array(self.user if part == "prefix" else self.assistant, np.int64)
        numbers, found = ids.detach().cpu().numpy(), np.zeros(ids.shape, dtype=bool)
        for row, start, end in documents(real, segments):
            ends = [start + place + len(header) for place in _places(numbers[row, start:end], header)]
            for stop in ends[:1] if part == "prefix" else ends:
                found[row, start if part == "prefix" else stop - len(header) : stop] = True
        return torch.from_numpy(found).to(ids.device)


def documents(real: torch.Tensor, segments: torch.Tensor | None) -> Iterator[tuple[int, int, int]]:
    """Yield (row, first token, last token + 1) of every document of a batch; tokens [batch, tokens] as in `Spans`."""
    kept = real.cpu().numpy()
    numbers = np.zeros(kept.shape, np.int64) if segments is None else segments.cpu().numpy()
    for row, (mask, document) in enumerate(zip(kept, numbers, strict=True)):
        places = np.flatnonzero(mask)
        if len(places):
            first = places[np.flatnonzero(np.diff(document[places], prepend=document[places[0]] - 1))]
            last = [*(places[np.searchsorted(places, first[1:]) - 1] + 1), places[-1] + 1]
            yield from ((row, int(start), int(end)) for start, end in zip(first, last, strict=True))


def _places(document: np.ndarray[Any, Any], header: np.ndarray[Any, Any]) -> list[int]:
    """Return where a header begins in a document, in ascending order."""
    if len(document) < len(header):
        return []
    windows = np.lib.stride_tricks.sliding_window_view(document, len(header))
    candidates = np.flatnonzero(windows[:, 0] == header[0])
    return [int(place) for place in candidates if np.array_equal(windows[place], header)]


def _user_header(tokenizer: Any) -> tuple[int, ...]:
    """Return the common end of what stands before a user's text: alone, in a later turn, and after system prompts."""
    answered = [_turn("user", QUESTION), _turn("assistant", ANSWERS[0])]
    header = _before_user(tokenizer, [])
    with suppress(DataError):  # a template that takes one turn only
        header = _common_end(header, _before_user(tokenizer, answered))
    if chat_of(tokenizer).unsupported_reason("system") is None:
        after_system = header
        for words in SYSTEMS:
            after_system = _common_end(after_system, _before_user(tokenizer, [_turn("system", words)]))
        if tokenizer.decode(list(after_system)).strip():
            header = after_system
    return tuple(header)


def _before_user(tokenizer: Any, turns: list[dict[str, str]]) -> list[int]:
    first, second = (chat_of(tokenizer).prompt([*turns, _turn("user", words)]) for words in QUESTIONS)
    return first[: common_prefix(first, second)]


def _assistant_header(tokenizer: Any) -> tuple[int, ...]:
    """Return what training conversations have between the end of a user's turn and a completion.

    Where the template writes it without a prompt for a completion too (Mistral's "[/INST]"), it is what follows the
    user's text.
    """
    chat, befores = chat_of(tokenizer), []
    for words in QUESTIONS:
        asked = [_turn("user", words)]
        one, other = (chat.conversation([*asked, _turn("assistant", text)], ())[0] for text in ANSWERS)
        befores.append(one[: common_prefix(one, other)])
    with suppress(DataError):
        asked_alone, _ = chat.conversation([_turn("user", QUESTIONS[0])], ())
        header = befores[0][common_prefix(asked_alone, befores[0]) :]
        if tokenizer.decode(header).strip():
            return tuple(header)
    return tuple(_common_end(*befores))


def _common_end(left: list[int], right: list[int]) -> list[int]:
    return left[len(left) - common_prefix(left[::-1], right[::-1]) :]


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
