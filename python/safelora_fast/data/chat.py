"""Encoding conversations as tokens with a tokenizer's chat template, for every command.

The tokens equal those of `apply_chat_template(tokenize=True)`. A template that drops part of a turn is refused.
"""

from __future__ import annotations

import json
import logging
import re
from itertools import product
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from safelora_fast.data.chat_text import common_prefix, lost, named, says, wrongly_marked
from safelora_fast.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    Turns = Sequence[Mapping[str, Any]]
    Span = tuple[int, int]

logger = logging.getLogger(__name__)
# Cache: for each live tokenizer, its rules and the results found with them. Weak keys do not keep a tokenizer alive.
_tried_out: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[str, dict[str, Any]]] = WeakKeyDictionary()

SYSTEM, QUESTION = "Seven silver swans swim here.", "Which five words came first?"
ANSWERS = ("One pale heron waits.", "Two old boats drift!")  # different endings, so a common tail is the template's
REFUSES = "the chat template refuses it: "
MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
CONTROL = re.compile(r"<\|[^|<>\s]{1,40}\|>|<(?:start|end)_of_turn>")
HEADER = re.compile(r"(?i)\b(assistant|model|bot|ai|gpt)\b")


class Chat:
    """A tokenizer's chat template; get one by :func:`chat_of`.

    A prompt plus its completion must equal the conversation. A template that writes prompts differently is refused.

    Args:
        tokenizer: the tokenizer that has the template.

    Attributes:
        warnings: cases in which prompts or conversations may surprise the user.
        unanswered_reason: why the template cannot write a conversation that ends with a completion; None if it can.
        dated: whether the template writes today's date.
        end: the control token that ends the assistant's turn; None if the template writes none.

    Raises:
        DataError: the tokenizer has no template, or the template cannot be used for prompts and completions.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not has_template(tokenizer):
            raise DataError("the tokenizer has no chat template")
        self._tokenizer = tokenizer
        self._composes = False  # whether tokenizing the rendered text gives the conversation's tokens
        self._parts = False  # whether the template expects content as a list of parts
        self._fault: str | None = None
        self.unanswered_reason: str | None = None
        self.end: int | None = None
        self.dated = False
        self.warnings: tuple[str, ...] = ()
        template = getattr(tokenizer, "chat_template", None)
        self._marked = bool(
            isinstance(template, str) and MARKER.search(template) and getattr(tokenizer, "is_fast", False)
        )
        self._examine()

    def prompt(self, turns: Turns, place: str = "a conversation") -> list[int]:
        """Return the tokens of a prompt, up to the start of the completion.

        Raises:
            DataError: the template refuses the turns, or drops the content of one of them.
        """
        self._refuse_fault(place)
        text, ids = self._read(place, turns, generation=True)
        self._refuse_lost(place, turns, text)
        return ids

    def conversation(
        self, turns: Turns, answers: Sequence[int], place: str = "a conversation", *, marks: bool = False
    ) -> tuple[list[int], list[Span]]:
        """Return a conversation's tokens and the span (first, last + 1) of each completion, end of turn included.

        Args:
            turns: the conversation.
            answers: indices of the assistant turns to find.
            place: the conversation's location, for error messages.
            marks: use the template's own `{% generation %}` marks if it has them.

        Raises:
            DataError: the template refuses the turns, drops words, or writes a completion whose tokens cannot be found.
        """
        text, ids = self._read(place, turns)
        if marks and self._marked:
            self._refuse_lost(place, turns, text)
            spans = self._marks(place, turns, text, ids) if answers else []
        else:
            spans = [self._span(place, turns, number, text, ids) for number in answers]
        self._refuse_lost(place, turns, text)
        return ids, spans

    def unsupported_reason(self, role: str, words: str = SYSTEM) -> str | None:
        """Return why the template takes no turn of a role before the user's turn, or None if it does.

        The text completes a sentence that begins "the chat template".
        """
        turns = [_turn(role, words), _turn("user", QUESTION)]
        try:
            text, _ = self._read("", turns)
        except DataError as error:
            return f"takes no {role} turn: {str(error).partition(REFUSES)[2]}"
        return None if lost(turns, text) is None else f"leaves the {role} turn out"

    def _read(self, place: str, turns: Turns, *, generation: bool = False) -> tuple[str, list[int]]:
        try:
            text = str(self._apply(turns, tokenize=False, generation=generation))
            if self._composes:
                return text, self._encode(text)
            return text, list(self._apply(turns, tokenize=True, generation=generation)["input_ids"])
        except Exception as error:  # templates raise any exception: Jinja's own, and those of the example's values
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(f"{place}: {REFUSES}{reason}{self._whose()}") from error

    def _apply(self, turns: Turns, *, tokenize: bool, generation: bool) -> Any:
        options = {"return_dict": True} if tokenize else {}
        given = self._given(turns)
        return self._tokenizer.apply_chat_template(
            given, tokenize=tokenize, add_generation_prompt=generation, **options
        )

    def _given(self, turns: Turns) -> list[dict[str, Any]]:
        """Return the turns in the form that the template expects."""
        if not self._parts:
            return [dict(turn) for turn in turns]
        return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _whose(self) -> str:
        """Return advice for a tokenizer that writes conversations with its own code; empty for one with a template."""
        if getattr(self._tokenizer, "chat_template", None):
            return ""
        return f" (the tokenizer is {type(self._tokenizer).__name__}: give the model with a tokenizer.json and a chat template)"

    def _refuse_fault(self, place: str) -> None:
        if self._fault is not None:
            raise DataError(f"{place}: {self._fault}")

    def _refuse_lost(self, place: str, turns: Turns, text: str) -> None:
        missing = lost(turns, text)
        if missing is not None:
            raise DataError(f"{place}: the chat template leaves out what {named(turns, missing)} says")

    def _span(self, place: str, turns: Turns, number: int, text: str, ids: list[int]) -> Span:
        """Return the span from the end of a completion's prompt to the end of its turn."""
        self._refuse_fault(place)
        last = number == len(turns) - 1
        text, until = (text, ids) if last else self._read(place, turns[: number + 1])
        if until != ids[: len(until)]:
            raise DataError(
                f"{place}: the chat template writes completion {number + 1} differently once the conversation goes on, so its "
                "tokens cannot be identified: use a template with {% generation %} markers, or one completion for each example"
            )
        asked, before = self._read(place, turns[:number], generation=True)
        shared = asked if text.startswith(asked) else text[: common_prefix(asked, text)]
        missing = lost(turns[:number], shared)
        if missing is not None:
            for written in (text, asked):
                self._refuse_lost(place, turns[:number], written)
            raise DataError(
                f"{place}: the chat template writes {named(turns, missing)} differently before a completion than in a prompt for "
                "one, so the completion's tokens cannot be identified: give another one"
            )
        former = turns[number - 1]["content"].strip()
        begin = shared.rfind(former) + len(former)  # a prompt may open the thoughts at the start of the completion
        if not says(text[begin:], turns[number]["content"]):
            raise DataError(
                f"{place}: the chat template leaves out part of what {named(turns, number)} says, which could not be learned: "
                "give another one"
            )
        return common_prefix(before, until), len(until)

    def _marks(self, place: str, turns: Turns, text: str, ids: list[int]) -> list[Span]:
        """Return the token spans that the template marks.

        They are found by character offsets, because some versions of transformers compute the token mask incorrectly.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        tokenizer = self._tokenizer
        (rendered,), (marks,) = render_jinja_template(
            conversations=[self._given(turns)],
            chat_template=tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if rendered != text or list(encoded["input_ids"]) != ids:
            raise DataError(
                f"{place}: the chat template's markers cannot be located: give a template without {{% generation %}}"
            )
        wrong = wrongly_marked(turns, text, marks)
        if wrong is not None:
            raise DataError(f"{place}: the chat template's {{% generation %}} marks are wrong: {wrong}")
        spans = []
        for first, end in marks:
            inside = [
                number for number, (start, stop) in enumerate(encoded["offset_mapping"]) if start < end and stop > first
            ]
            spans += [(inside[0], inside[-1] + 1)] if inside else []
        return spans

    def _examine(self) -> None:
        """Probe the template with a question, and with the question and each of two completions."""
        user = _turn("user", QUESTION)
        for parts, turns in product((False, True), ([user], [_turn("system", SYSTEM), user])):
            self._parts = parts  # vision models' templates expect a list of parts, and some drop any other content
            try:
                asked, prompt = self._read("", turns, generation=True)
            except DataError:
                continue
            if not says(asked, QUESTION):
                continue
            self._composes = self._encode(asked) == prompt
            try:
                (text, one), (_, other) = (self._read("", [*turns, _turn("assistant", words)]) for words in ANSWERS)
            except DataError as error:  # the template writes prompts, but no completions
                self.unanswered_reason = str(error).removeprefix(": ")
                return
            self.dated = self._is_dated(turns, asked)
            self._fault = self._begins_late(asked, text)
            self.warnings = tuple(self._doubts(asked, text, one))
            self.end = _end_of_turn(self._tokenizer, one, other) if ANSWERS[0] in text else None
            return
        self._parts = False

    def _begins_late(self, asked: str, text: str) -> str | None:
        """Return an error message if the prompt lacks the completion's header, else None."""
        between = text[len(asked) :].partition(ANSWERS[0])[0] if text.startswith(asked) else ""
        if not HEADER.search(between):
            return None
        return (
            f"the chat template begins a completion with {between!r}, and a prompt for one ends before that: write it where "
            "add_generation_prompt is true"
        )

    def _is_dated(self, turns: Turns, asked: str) -> bool:
        if "strftime_now" not in json.dumps(getattr(self._tokenizer, "chat_template", None)):
            return False
        try:
            another = self._tokenizer.apply_chat_template(
                self._given(turns), tokenize=False, add_generation_prompt=True, strftime_now=lambda _: "another day"
            )
        except Exception:  # newer versions of transformers do not pass functions on, so the call fails
            return True
        return str(another) != asked

    def _doubts(self, asked: str, text: str, ids: list[int]) -> Iterator[str]:
        """Yield warnings about prompts or conversations that may surprise the user.

        Args:
            asked: a question, written as a prompt.
            text: the question with a completion.
            ids: the tokens of `text`.

        Raises:
            DataError: the tokenizer splits its own control tokens.
        """
        tokenizer = self._tokenizer
        left = asked[common_prefix(asked, text) :]
        if left.strip():
            yield (
                f"the chat template ends a prompt with {left!r}, which is not there in a conversation with its completion: "
                "completions are generated with it, and learned and scored without"
            )
        if self.dated:
            yield (
                "the chat template writes today's date, so prompts change from day to day: fix the date with --template-args if "
                "the template reads it from a variable"
            )
        bos = tokenizer.bos_token_id
        if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] and bos not in ids:
            yield f"the chat template writes no {tokenizer.bos_token}, which the tokenizer puts before every text"
        if bos is not None and ids[:2] == [bos, bos]:
            yield f"a conversation begins with {tokenizer.bos_token} twice: the chat template and the tokenizer both write it"
        for name in dict.fromkeys(CONTROL.findall(text)):
            number = tokenizer.convert_tokens_to_ids(name)
            if number is None or number == tokenizer.unk_token_id:
                yield f"the chat template writes {name}, for which the tokenizer has no token: it is read in pieces"
            elif number not in ids:
                raise DataError(
                    f"the tokenizer reads {name} of the chat template in pieces, although it has a token for it"
                )


def chat_of(tokenizer: PreTrainedTokenizerBase) -> Chat:
    """Return a tokenizer's chat template, and log its warnings.

    The result is cached until the tokenizer's template or tokens change.

    Raises:
        DataError: as :class:`Chat`.
    """
    rules = json.dumps(
        [
            getattr(tokenizer, "chat_template", None),
            getattr(tokenizer, "special_tokens_map", None),
            len(tokenizer),  # changes when tokens are added
        ],
        default=str,
    )
    former, found = _tried_out.get(tokenizer, (None, {}))
    if former == rules:
        chat = Chat.__new__(Chat)
        vars(chat).update(found, _tokenizer=tokenizer)
        return chat
    chat = Chat(tokenizer)
    for warning in chat.warnings:
        logger.warning("%s", warning)
    found = {name: value for name, value in vars(chat).items() if name != "_tokenizer"}
    _tried_out[tokenizer] = rules, found
    return chat


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer writes conversations, with a template or with its own code."""
    from transformers import PreTrainedTokenizerBase as Base

    own = getattr(type(tokenizer), "apply_chat_template", None)
    return bool(getattr(tokenizer, "chat_template", None)) or own not in {None, Base.apply_chat_template}


def answer_ends(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a completion, sorted.

    They come from the model's generation settings, the tokenizer, and the template's end of turn. The last is needed
    because an adapter learns its own template's end of turn, whatever the base model's settings are.
    """
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [*(given if isinstance(given, list | tuple) else [given]), tokenizer.eos_token_id]
    if has_template(tokenizer):
        ends.append(chat_of(tokenizer).end)
    return sorted({int(token) for token in ends if token is not None})


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, one: list[int], other: list[int]) -> int | None:
    """Return the first control token after a completion if only white space precedes it, else None.

    `one` and `other` are conversations that differ only in the completion.
    """
    tail = one[len(one) - common_prefix(one[::-1], other[::-1]) :]
    control = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())}
    for number, token in enumerate(tail):
        if token in control:
            return token
        if tokenizer.decode(tail[: number + 1]).strip():
            return None
    return None
