"""Checks that the text written by a chat template contains the turns of the conversation."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from safelora_fast.data.thoughts import answer_after_thoughts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Turns = Sequence[Mapping[str, Any]]
    Span = tuple[int, int]


def common_prefix(left: Sequence[object], right: Sequence[object]) -> int:
    """Return the number of items (tokens, characters) that two sequences share at their start."""
    for number, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return number
    return min(len(left), len(right))


def named(turns: Turns, number: int) -> str:
    """Return a turn's role with its article, for error messages."""
    role = turns[number]["role"]
    return f"{'an' if role == 'assistant' else 'a'} {role} turn"


def lost(turns: Turns, text: str) -> int | None:
    """Return the index of the first turn missing from the text, or None; earlier completions may lack thoughts."""
    for number, turn in enumerate(turns):
        content = turn["content"]
        if turn["role"] == "assistant" and number < len(turns) - 1:
            content = answer_after_thoughts(content) or ""
        if not says(text, content):
            return number
    return None


def says(text: str, content: str) -> bool:
    """Return whether a text contains some content, plain or JSON-quoted (tool results), ignoring white space."""
    words = content.strip()
    if words in text:
        return True
    dense = "".join(text.split())
    return any(
        "".join(form.split()) in dense
        for form in (words, json.dumps(words)[1:-1], json.dumps(words, ensure_ascii=False)[1:-1])
    )


def wrongly_marked(turns: Turns, text: str, marks: Sequence[Span]) -> str | None:
    """Return the error in the marks of assistant text, or None: a completion outside them, or other text inside."""
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
