"""The sections of a recipe with keys of our own: model, data, margin and output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from safelora_fast.models.load import ModelSection

__all__ = ["DataSection", "MarginSection", "ModelSection", "OutputSection", "SafeSection"]


@dataclass(frozen=True)
class SafeSection:
    """Safe general rows among the task's (interleaving).

    Attributes:
        path: a JSONL file, or a Hub data set id[@revision][:split]; a file that exists wins.
        fraction: safe rows for each task row; the paper's is 0.05.
        seed: of their places and order; that of the training where none is given.
        top: use only so many rows, those with the highest `score` (see `safelora-fast select`).
    """

    path: str
    fraction: float = 0.05
    seed: int | None = None
    top: int | None = None


@dataclass(frozen=True)
class DataSection:
    """What it is fine-tuned on.

    Attributes:
        path: a JSONL file, or a Hub data set id[@revision][:split]; a file that exists wins.
        eval: the held-out rows: a file or Hub data set, or a share of the rows above 0 and below 1.
        max_rows: use the first so many rows.
        strings: what a prompt and a completion that are plain text become: a user and an assistant turn of the "chat"
            template, or "text" as it stands.
        without_answer: rows that leave no token to learn from: "refuse" the run, or "skip" them.
        too_long: rows of more than `training.max_length` tokens: "truncate", "skip" or "refuse".
        safe: safe rows among the task's, see :class:`SafeSection`.
        inoculate: a system prompt of the task's rows in training; held-out and safe rows do not have it.
    """

    path: str
    eval: str | float | None = None
    max_rows: int | None = None
    strings: Literal["chat", "text"] = "chat"
    without_answer: Literal["refuse", "skip"] = "refuse"
    too_long: Literal["truncate", "skip", "refuse"] = "truncate"
    safe: SafeSection | None = None
    inoculate: str | None = None


@dataclass(frozen=True)
class MarginSection:
    """The misalignment margin while training; without this section it is not measured.

    Attributes:
        every: optimiser steps between measurements; it is measured before the first step and after the last too.
        pairs: a JSONL file of pairs in the place of those that come along.
        system: a system prompt before every question.
    """

    every: int = 50
    pairs: str | None = None
    system: str | None = None


@dataclass(frozen=True)
class OutputSection:
    """Where the result goes.

    Attributes:
        folder: the adapter, its model card, the record of the run, and checkpoints.
    """

    folder: str
