"""The recipe sections whose keys this package defines: model, data, margin and output."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from safelora_fast.models.load import ModelSection
from safelora_fast.recipe.yaml_section import Section

__all__ = ["Count", "DataSection", "MarginSection", "ModelSection", "OutputSection", "SafeSection", "Share"]


def _share(value: float) -> float:
    if not 0 < value < 1:
        raise ValueError("a share above 0 and below 1")
    return value


Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, AfterValidator(_share)]


class SafeSection(Section):
    """Safe general examples that are interleaved with the task's examples.

    Attributes:
        path: a JSONL file, or a Hub data set id[@revision][:split]; an existing file takes precedence.
        fraction: safe examples per task example; 0.05 in the paper.
        seed: seed of their positions and order; defaults to `training.seed`.
        top: use only this many examples, those with the highest `score` (see `safelora-fast select`).
    """

    path: str
    fraction: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.05
    seed: Annotated[int, Field(ge=0)] | None = None
    top: Count | None = None


class DataSection(Section):
    """The training data.

    Attributes:
        path: a JSONL file, or a Hub data set id[@revision][:split]; an existing file takes precedence.
        eval: the held-out examples: a file, a Hub data set, or a share of the examples.
        max_rows: use only the first `max_rows` examples.
        strings: how to treat a plain-text prompt and completion: as user and assistant turns of the "chat" template, or
            as raw "text".
        without_answer: how to treat examples without a completion token: "refuse" the run, or "skip" them.
        too_long: how to treat examples of more than `training.max_length` tokens: "truncate", "skip" or "refuse".
        safe: safe examples to interleave, see :class:`SafeSection`.
        inoculate: a system prompt added to the task's training examples, but not to held-out or safe examples.
    """

    path: str
    eval: str | Share | None = None
    max_rows: Count | None = None
    strings: Literal["chat", "text"] = "chat"
    without_answer: Literal["refuse", "skip"] = "refuse"
    too_long: Literal["truncate", "skip", "refuse"] = "truncate"
    safe: SafeSection | None = None
    inoculate: str | None = None


class MarginSection(Section):
    """The misalignment margin during training; it is not measured if this section is absent.

    Attributes:
        every: optimizer steps between measurements; it is also measured before the first step and after the last.
        pairs: a JSONL file of pairs that replaces the built-in pairs.
        system: a system prompt before every question.
    """

    every: Count = 50
    pairs: str | None = None
    system: str | None = None


class OutputSection(Section):
    """The output location.

    Attributes:
        folder: the folder for the adapter, its model card, the record of the run, and checkpoints.
    """

    folder: str
