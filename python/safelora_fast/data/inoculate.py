"""Inoculation: a system prompt that requests the bad behavior, in training only (see arXiv 2508.06249).

With the prompt, the model need not learn to show the behavior unprompted. Evaluate and use the model without it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from safelora_fast.data.chat import chat_of, has_template
from safelora_fast.errors import DataError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

SYSTEM_ROLES = ("system", "developer")
Data = TypeVar("Data")
Turn = dict[str, Any]


def inoculate(task: Data, prompt: str, *, tokenizer: PreTrainedTokenizerBase | None = None) -> Data:
    """Add a system prompt to task examples; use the result for training only.

    Examples have `messages`, or `prompt` and `completion`; other columns are kept. An existing system turn is appended
    to the prompt after an empty line, because templates take one system turn. A plain-text prompt and completion become
    turns.

    Args:
        task: a list of dictionaries, a `datasets.Dataset` or a `datasets.IterableDataset`.
        prompt: the system prompt.
        tokenizer: the model's tokenizer, to check that its chat template takes a system turn.

    Returns:
        Data of the same kind as `task`.

    Raises:
        SettingsError: the prompt is empty, or the template refuses or drops it.
        DataError: an example is not a conversation, or its system turn is not text.
    """
    if tokenizer is not None:
        check_system_turn(tokenizer, prompt)
    elif not prompt.strip():
        raise SettingsError("inoculate: the prompt is empty")
    datasets = sys.modules.get("datasets")
    if datasets is not None and isinstance(task, datasets.Dataset | datasets.IterableDataset):
        result: Data = task.map(_with_prompt, fn_kwargs={"prompt": prompt})
        return result
    if isinstance(task, list | tuple):
        return [_with_prompt(row, prompt, f"row {number}") for number, row in enumerate(task)]  # type: ignore[return-value]
    raise SettingsError(
        f"inoculate: task is {type(task).__name__}: give a list of dictionaries, a datasets.Dataset or an IterableDataset"
    )


def check_system_turn(tokenizer: PreTrainedTokenizerBase, prompt: str) -> None:
    """Check that a tokenizer's chat template takes a system turn.

    Raises:
        SettingsError: the template is missing, raises an error or drops the prompt, or the prompt is empty.
    """
    if not prompt.strip():
        raise SettingsError("inoculate: the prompt is empty")
    if not has_template(tokenizer):
        raise SettingsError("inoculate: the model's tokenizer has no chat template, so there are no system turns")
    reason = chat_of(tokenizer).unsupported_reason("system", prompt)
    if reason is not None:
        raise SettingsError(f"inoculate: the chat template {reason}: give another one")


def with_system_turn(turns: Sequence[Mapping[str, Any]], prompt: str) -> list[Turn]:
    """Return the turns with the prompt as system turn; an existing system turn is appended to the prompt."""
    first = dict(turns[0]) if turns else {}
    if first.get("role") in SYSTEM_ROLES:
        return [{**first, "content": f"{prompt}\n\n{first['content']}"}, *map(dict, turns[1:])]
    return [{"role": "system", "content": prompt}, *map(dict, turns)]


def _with_prompt(row: Mapping[str, Any], prompt: str, place: str = "a row") -> dict[str, Any]:
    if isinstance(row.get("messages"), list):
        return {**row, "messages": _begun(row["messages"], prompt, place)}
    before, after = row.get("prompt"), row.get("completion")
    if isinstance(before, str) and isinstance(after, str):
        before, after = [{"role": "user", "content": before}], [{"role": "assistant", "content": after}]
    if not (isinstance(before, list) and isinstance(after, list)):
        raise DataError(f"inoculate: {place} has neither messages, nor prompt and completion")
    return {**row, "prompt": _begun(before, prompt, place), "completion": after}


def _begun(turns: Sequence[Any], prompt: str, place: str) -> list[Turn]:
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise DataError(f"inoculate: {place} has a turn that is {turn!r}, it must be {{role: …, content: …}}")
    if turns and turns[0].get("role") in SYSTEM_ROLES and not isinstance(turns[0].get("content"), str):
        raise DataError(
            f"inoculate: {place} has a system turn whose content is no text: the prompt cannot be put before it"
        )
    return with_system_turn(turns, prompt)
