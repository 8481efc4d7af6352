"""The recipe sections whose keys this package defines: model, data, margin and output."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from safelora_fast.configuration.yaml_section import Section
from safelora_fast.models.model_settings import ModelSection

__all__ = [
    "Count",
    "DataSection",
    "MarginSection",
    "ModelSection",
    "OutputSection",
    "SafeSection",
    "Share",
    "StopSection",
]


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


class StopSection(Section):
    """When the margin, or a monitor of the recipe, ends the training.

    Attributes:
        alpha: rate of false alarms per run, see :class:`~safelora_fast.scoring.stop_rule.StopRule`.
        limits: by signal, "margin" or the name of a monitor; each needs one, or clean runs.
        clean: output folders of clean runs with the same `margin` and `monitors`; their highest values become the limits.
        after_task: stop only once the held-out loss has stopped falling.
    """

    alpha: Share = 0.05
    limits: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = {}  # noqa: RUF012
    clean: list[str] = []  # noqa: RUF012
    after_task: bool = False


class MarginSection(Section):
    """The misalignment margin during training; it is not measured if this section is absent.

    Attributes:
        every: optimizer steps between measurements; it is also measured before the first step and after the last.
        pairs: a JSONL file of pairs that replaces the built-in pairs.
        system: a system prompt before every question.
        stop: when to end the training; it never ends early by default.
    """

    every: Count = 50
    pairs: str | None = None
    system: str | None = None
    stop: StopSection | None = None


class OutputSection(Section):
    """The output location.

    Attributes:
        folder: the folder for the adapter, its model card, the record of the run, and checkpoints.
    """

    folder: str
