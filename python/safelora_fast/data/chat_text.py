"""Which turns of a conversation are in the text that a chat template makes of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from safelora_fast.data.thoughts import answer_after_thoughts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Turns = Sequence[Mapping[str, Any]]
    Span = tuple[int, int]


def common_prefix(left: Sequence[object], right: Sequence[object]) -> int:
    """How many items (tokens, letters) two sequences share at their start."""
    for number, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return number
    return min(len(left), len(right))


def named(turns: Turns, number: int) -> str:
    """A turn, for messages."""
    role = turns[number]["role"]
    return f"{'an' if role == 'assistant' else 'a'} {role} turn"


def lost(turns: Turns, text: str) -> int | None:
    """The number of the first turn whose words are not in the text; earlier completions may lack their thoughts."""
    for number, turn in enumerate(turns):
        content = turn["content"]
        if turn["role"] == "assistant" and number < len(turns) - 1:
            content = answer_after_thoughts(content) or ""
        if not says(text, content):
            return number
    return None


def says(text: str, content: str) -> bool:
    """Whether words are in a text, up to white space, or quoted as JSON (tools' results)."""
    words = content.strip()
    if words in text:
        return True
    dense = "".join(text.split())
    return any(
        "".join(form.split()) in dense
        for form in (words, json.dumps(words)[1:-1], json.dumps(words, ensure_ascii=False)[1:-1])
    )


def wrongly_marked(turns: Turns, text: str, marks: Sequence[Span]) -> str | None:
    """What is wrong with marks of the assistant's words: a completion outside of them, or other words inside."""
    cursor = 0
    for number, turn in enumerate(turns):
        words = turn["content"].strip()
        if not words:
            continue
        found = text.find(words, cursor)
        if turn["role"] == "assistant":
            around = [end for first, end in marks if end > cursor and says(text[max(first, cursor) : end], words)]
            if not around:
                return f"what {named(turns, number)} says is not inside them"
            cursor = around[0]
        elif found >= 0:
            if any(first < found + len(words) and found < end for first, end in marks):
                return f"what {named(turns, number)} says is inside them"
            cursor = found + len(words)
    return None
