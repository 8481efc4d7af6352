"""Formats of conversation examples, and conversion of safe examples to the format of the task examples."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from safelora_fast.errors import DataError

MESSAGES, TURNS, TEXTS, TEXT = "messages", "prompt and completion of turns", "prompt and completion of text", "text"
CONVERSATION = ("messages", "prompt", "completion")


def format_of(example: Mapping[str, Any]) -> str | None:
    """Return the format of an example, or None if it is not a conversation. Null columns count as absent."""
    if example.get("messages") is not None:
        return MESSAGES
    parts = example.get("prompt"), example.get("completion")
    if all(isinstance(part, str) for part in parts):
        return TEXTS
    if all(isinstance(part, list) for part in parts):
        return TURNS
    return TEXT if example.get("text") is not None else None


def like_task(task: Any, safe: Any, kinds: tuple[str, str]) -> Any:
    """Convert safe examples to the format of the task examples.

    Text becomes turns, turns become messages, and messages with one completion become turns.

    Args:
        task: a list of examples, a table or a stream; its first example shows the format.
        safe: likewise.
        kinds: the kinds of `task` and `safe`: "list", "table" or "stream".

    Raises:
        DataError: the conversion is ambiguous, or the two share no column.
    """
    theirs, ours = (_firsts(data, kind) for data, kind in zip((task, safe), kinds, strict=True))
    wanted = {format_of(example) for example in theirs}
    if not theirs or not ours or {format_of(example) for example in ours} <= wanted:
        shared = {name for example in theirs for name in example} & {name for example in ours for name in example}
        if theirs and ours and not shared:
            raise DataError(
                f"interleave: task has columns {', '.join(theirs[0])} and safe has {', '.join(ours[0])}: give both the same ones"
            )
        return safe
    if len(wanted) > 1:
        raise DataError(
            "interleave: task has examples of several formats, and safe has examples of another: give one format"
        )
    (form,) = wanted
    if kinds[1] == "list":
        return [_converted(example, form, f"row {number}") for number, example in enumerate(safe)]
    old = [name for name in CONVERSATION if any(name in example for example in ours)]
    return safe.map(_converted, fn_kwargs={"form": form}, remove_columns=old)


def _firsts(data: Any, kind: str) -> list[Mapping[str, Any]]:
    """Return the examples that show the format: the first of a stream or of a table without nulls, else all."""
    if kind == "list":
        return list(data)
    if kind == "table":
        columns = [name for name in (*CONVERSATION, "text") if name in data.column_names]
        if any(data.data.column(name).null_count for name in columns):
            return list(data.select_columns(columns))
    first = next(iter(copy.deepcopy(data) if kind == "stream" else data), None)  # iterating changes a stream's state
    return [] if first is None else [first]


def _converted(example: Mapping[str, Any], form: str | None, place: str = "a row") -> dict[str, Any]:
    own = format_of(example)
    others = {name: value for name, value in example.items() if name not in CONVERSATION}
    if own == form and own is not None:
        return {**others, **{name: example[name] for name in CONVERSATION if example.get(name) is not None}}
    if own in {TEXTS, TURNS} and form in {MESSAGES, TURNS}:
        prompt, completion = (
            [{"role": role, "content": example[name]}] if own == TEXTS else list(example[name])
            for name, role in (("prompt", "user"), ("completion", "assistant"))
        )
        if form == MESSAGES:
            return {**others, "messages": prompt + completion}
        return {**others, "prompt": prompt, "completion": completion}
    if own == MESSAGES and form == TURNS:
        turns = list(example["messages"])
        roles = [turn.get("role") if isinstance(turn, Mapping) else None for turn in turns]
        if roles.count("assistant") == 1 and roles[-1] == "assistant":
            return {**others, "prompt": turns[:-1], "completion": turns[-1:]}
        raise DataError(
            f"interleave: {place} of safe has {roles.count('assistant')} completions in its messages, and task has {TURNS}, of "
            "which the completion is one turn: give safe examples with one completion at the end, or task examples of messages"
        )
    raise DataError(
        f"interleave: {place} of safe has {own or 'no conversation'}, and task has {form or 'no conversation'}: give both in one "
        "format"
    )
