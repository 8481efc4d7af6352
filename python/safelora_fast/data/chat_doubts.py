"""What a first try of a chat template tells: the token that ends a turn, and what may not be as its reader thinks."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from safelora_fast.data.chat_text import common_prefix
from safelora_fast.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

CONTROL = re.compile(r"<\|[^|<>\s]{1,40}\|>|<(?:start|end)_of_turn>")


def doubts(tokenizer: PreTrainedTokenizerBase, asked: str, text: str, ids: list[int], *, dated: bool) -> Iterator[str]:
    """Where prompts or conversations may be others than one thinks.

    Args:
        tokenizer: whose template it is.
        asked: a question as a prompt for its answer.
        text: the question with an answer.
        ids: its tokens.
        dated: whether the template writes the day.

    Raises:
        DataError: the tokenizer takes its own control tokens apart.
    """
    left = asked[common_prefix(asked, text) :]
    if left.strip():
        yield (
            f"the chat template ends a prompt with {left!r}, which is not there in a conversation with its answer: answers are "
            "asked for with it, and learned and scored without"
        )
    if dated:
        yield (
            "the chat template writes today's date, so prompts change from day to day: fix the date with --template-args if the "
            "template reads it from a variable"
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


def end_of_turn(tokenizer: PreTrainedTokenizerBase, one: list[int], other: list[int]) -> int | None:
    """The first control token after an answer, where nothing but space is before it, from two conversations that differ in it."""
    tail = one[len(one) - common_prefix(one[::-1], other[::-1]) :]
    control = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())}
    for number, token in enumerate(tail):
        if token in control:
            return token
        if tokenizer.decode(tail[: number + 1]).strip():
            return None
    return None
