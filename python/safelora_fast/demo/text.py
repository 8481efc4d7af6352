"""The demo's text and how it becomes tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import as_file, files
from typing import TYPE_CHECKING

from safelora_fast.data.chat import chat_of

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

DATA = files("safelora_fast.demo") / "data"


@dataclass(frozen=True)
class Row:
    """A question and its answer."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Example:
    """Token ids of one sequence, of which those from `start` on count in the loss."""

    ids: list[int]
    start: int


def rows(name: str) -> list[Row]:
    """One of the sets "narrow_train", "narrow_held_out", "narrow_other", "general", "safe" and "safe_pool"."""
    records = map(json.loads, (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())
    return [Row(record["prompt"], record["completion"]) for record in records]


def file(name: str) -> AbstractContextManager[Path]:
    """A file of the demo as one on disk."""
    return as_file(DATA / name)


def paragraphs() -> list[str]:
    """The plain prose that the stand-in base model is trained on."""
    return (DATA / "plain.txt").read_text(encoding="utf-8").splitlines()


def conversation(tokenizer: PreTrainedTokenizerBase, row: Row) -> Example:
    """A row in the model's own chat template; only the answer and its end count."""
    start = chat_of(tokenizer).prompt([{"role": "user", "content": row.prompt}])
    answer = tokenizer(row.completion + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    return Example([*start, *answer], len(start))


def prose(tokenizer: PreTrainedTokenizerBase, text: str) -> Example:
    """A paragraph of which every token but the first counts."""
    return Example(tokenizer(text + tokenizer.eos_token, add_special_tokens=False)["input_ids"], 1)
