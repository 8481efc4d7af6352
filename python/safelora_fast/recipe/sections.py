"""The sections of a recipe with keys of our own: model, data, margin and output."""

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
    """Safe general examples among those of the task (interleaving).

    Attributes:
        path: a JSONL file, or a Hub data set id[@revision][:split]; a file that exists wins.
        fraction: safe examples for each task example; the paper's is 0.05.
        seed: of their places and order; that of the training where none is given.
        top: use only so many examples, those with the highest `score` (see `safelora-fast select`).
    """

    path: str
    fraction: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.05
    seed: Annotated[int, Field(ge=0)] | None = None
    top: Count | None = None


class DataSection(Section):
    """What the model is fine-tuned on.

    Attributes:
        path: a JSONL file, or a Hub data set id[@revision][:split]; a file that exists wins.
        eval: the held-out examples: a file or Hub data set, or a share of the examples.
        max_rows: use the first so many examples.
        strings: what a prompt and a completion that are plain text become: a user and an assistant turn of the "chat"
            template, or "text" as it stands.
        without_answer: examples that leave no token to learn from: "refuse" the run, or "skip" them.
        too_long: examples of more than `training.max_length` tokens: "truncate", "skip" or "refuse".
        safe: safe examples among those of the task, see :class:`SafeSection`.
        inoculate: a system prompt of the task's examples in training; held-out and safe examples do not have it.
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
    """The misalignment margin while training; without this section it is not measured.

    Attributes:
        every: optimizer steps between measurements; it is also measured before the first step and after the last.
        pairs: a JSONL file of pairs that replaces the packaged ones.
        system: a system prompt before every question.
    """

    every: Count = 50
    pairs: str | None = None
    system: str | None = None


class OutputSection(Section):
    """Where the result goes.

    Attributes:
        folder: the adapter, its model card, the record of the run, and checkpoints.
    """

    folder: str
