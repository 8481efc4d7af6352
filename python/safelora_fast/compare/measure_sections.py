"""What is measured on each run: the sections of `measure:`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from safelora_fast.errors import SettingsError
from safelora_fast.judging.operator_swap import Difficulty, make_problems
from safelora_fast.recipe.sections import Count, Share
from safelora_fast.recipe.yaml_section import Section

Cosine = Annotated[float, Field(ge=-1, le=1)]
THRESHOLDS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


class JudgeSection(Section):
    """Free-form answers under a judge; see `safelora-fast evaluate`.

    Attributes:
        model: as Inspect names it.
        url: of its endpoint; the key comes from the environment.
        questions: a YAML file in the place of those that come along.
        kinds: of questions: general, json, template, training_format, as a list or with commas between; all by default.
        samples: answers to each wording.
        max_tokens: the most tokens of an answer.
        attempts: how often one score is asked for.
        reply_tokens: the most tokens of a reply.
    """

    model: str
    url: str | None = None
    questions: str | None = None
    kinds: str | list[str] | None = None
    samples: Count = 10
    max_tokens: Count = 600
    attempts: Count = 4
    reply_tokens: Count = 64


class TasksSection(Section):
    """Benchmarks of lm-evaluation-harness.

    Attributes:
        names: as the harness has them.
        path: a folder of task files of one's own.
        limit: use the first so many documents of each.
    """

    names: Annotated[list[str], Field(min_length=1)]
    path: str | None = None
    limit: Count | None = None


class OperatorSwapSection(Section):
    """Every run is trained a second time, on arithmetic with swapped operators, and its exact answers are counted.

    Attributes:
        difficulty: easy, medium or hard.
        rows: to train on.
        held_out: to score on.
        seeds: those of the comparison that are trained; all by default.
        training: settings of `training:` for these runs, put on top.
    """

    difficulty: Difficulty = "easy"
    rows: int = 2000
    held_out: int = 500
    seeds: list[int] | None = None
    training: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _can_be_made(self) -> OperatorSwapSection:
        try:
            make_problems(self.difficulty, self.rows, self.held_out, 0)
        except SettingsError as error:
            raise PydanticCustomError("refused", "{why}", {"why": str(error)}) from error
        return self

    @property
    def made_from(self) -> dict[str, Any]:
        """What its rows depend on, as their record has it."""
        return {"difficulty": self.difficulty, "rows": self.rows, "held_out": self.held_out, "seed": 0}


class SweepSection(Section):
    """The first run's adapters, projected by SafeLoRA at every threshold, from one pass over the checkpoints.

    Attributes:
        base: the model before alignment.
        aligned: the model of the recipe where none is given.
        thresholds: τ.
        seeds: those of the comparison that are swept; all by default.
    """

    base: str
    aligned: str | None = None
    thresholds: list[Cosine] = Field(default_factory=lambda: list(THRESHOLDS), min_length=1)
    seeds: list[int] | None = None


class MeasureSection(Section):
    """What is measured.

    Attributes:
        margin: the misalignment margin.
        narrow: held-out rows of the narrow task, whose loss says what was learned.
        general: rows far from the task, on which the divergence from the reference is measured.
        max_rows: use the first so many rows of both.
        scaled: shares to which the first run's update is scaled down, for the path that a weaker fine-tune takes.
        costs: show what each training took; leave it out where other work shared the machine.
        judge: see :class:`JudgeSection`; None leaves it out, as with the others.
        tasks: see :class:`TasksSection`.
        operator_swap: see :class:`OperatorSwapSection`.
        sweep: see :class:`SweepSection`.
        dtype: of the weights that are measured; "auto" is float32 on the CPU, bfloat16 on a GPU.
        device: "auto" is the GPU where there is one.
        batch_size: answers that are generated at a time.
    """

    margin: bool = True
    narrow: str | None = None
    general: str | None = None
    max_rows: Count | None = None
    scaled: list[Share] = Field(default_factory=lambda: [0.25, 0.5, 0.75])
    costs: bool = True
    judge: JudgeSection | None = None
    tasks: TasksSection | None = None
    operator_swap: OperatorSwapSection | None = None
    sweep: SweepSection | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    batch_size: Count = 16

    @property
    def drift(self) -> bool:
        """Whether any answers are given whose loss is measured."""
        return self.narrow is not None or self.general is not None
