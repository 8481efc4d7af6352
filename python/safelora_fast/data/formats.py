"""The formats that rows of conversations come in, and safe rows in the format of the task's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from safelora_fast.errors import DataError

MESSAGES, TURNS, TEXTS, TEXT = "messages", "prompt and completion of turns", "prompt and completion of text", "text"
CONVERSATION = ("messages", "prompt", "completion")


def format_of(row: Mapping[str, Any]) -> str | None:
    """The format of a row; None where it is none of a conversation. A column that is null counts as absent."""
    if row.get("messages") is not None:
        return MESSAGES
    parts = row.get("prompt"), row.get("completion")
    if all(isinstance(part, str) for part in parts):
        return TEXTS
    if all(isinstance(part, list) for part in parts):
        return TURNS
    return TEXT if row.get("text") is not None else None


def like_task(task: Any, safe: Any, kinds: tuple[str, str]) -> Any:
    """Safe rows in the format of the task's: text becomes turns, and turns become messages, or messages with one answer turns.

    Args:
        task: a list of rows, a table or a stream, of which the first row tells the format.
        safe: likewise.
        kinds: "list", "table" or "stream", of both.

    Raises:
        DataError: rows of one format cannot become rows of the other without a guess, or share no column.
    """
    theirs, ours = (_firsts(data, kind) for data, kind in zip((task, safe), kinds, strict=True))
    wanted = {format_of(row) for row in theirs}
    if not theirs or not ours or {format_of(row) for row in ours} <= wanted:
        shared = {name for row in theirs for name in row} & {name for row in ours for name in row}
        if theirs and ours and not shared:
            raise DataError(
                f"interleave: task has columns {', '.join(theirs[0])} and safe has {', '.join(ours[0])}: give both the same ones"
            )
        return safe
    if len(wanted) > 1:
        raise DataError("interleave: task has rows of several formats, and safe has rows of another: give one format")
    (form,) = wanted
    if kinds[1] == "list":
        return [_converted(row, form, f"row {number}") for number, row in enumerate(safe)]
    old = [name for name in CONVERSATION if any(name in row for row in ours)]
    return safe.map(_converted, fn_kwargs={"form": form}, remove_columns=old)


def _firsts(data: Any, kind: str) -> list[Mapping[str, Any]]:
    """Rows that tell the format: of a table without nulls, or a stream, the first."""
    if kind == "list":
        return list(data)
    if kind == "table":
        columns = [name for name in (*CONVERSATION, "text") if name in data.column_names]
        if any(data.data.column(name).null_count for name in columns):
            return list(data.select_columns(columns))
    first = next(iter(copy.deepcopy(data) if kind == "stream" else data), None)  # reading leaves a mark on a stream
    return [] if first is None else [first]


def _converted(row: Mapping[str, Any], form: str | None, place: str = "a row") -> dict[str, Any]:
    own = format_of(row)
    others = {name: value for name, value in row.items() if name not in CONVERSATION}
    if own == form and own is not None:
        return {
            **others,
            **{name: row[name] for name in CONVERSATION if row.get(name) is not None},
        }
    if own in {TEXTS, TURNS} and form in {MESSAGES, TURNS}:
        prompt, completion = (
            ([{"role": role, "content": row[name]}] if own == TEXTS else list(row[name]))
            for name, role in (("prompt", "user"), ("completion", "assistant"))
        )
        return {
            **others,
            **({"messages": prompt + completion} if form == MESSAGES else {"prompt": prompt, "completion": completion}),
        }
    if own == MESSAGES and form == TURNS:
        turns = list(row["messages"])
        answers = [number for number, turn in enumerate(turns) if _role(turn) == "assistant"]
        if answers == [len(turns) - 1]:
            return {**others, "prompt": turns[:-1], "completion": turns[-1:]}
        raise DataError(
            f"interleave: {place} of safe has {len(answers)} answers in its messages, and task has {TURNS}, of which the "
            "completion is one answer: give safe rows with one answer at the end, or task rows of messages"
        )
    raise DataError(
        f"interleave: {place} of safe has {own or 'no conversation'}, and task has {form or 'no conversation'}: give both in one "
        "format"
    )


def _role(turn: Any) -> Any:
    return turn.get("role") if isinstance(turn, Mapping) else None
