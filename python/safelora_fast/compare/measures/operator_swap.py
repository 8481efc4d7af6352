"""Whether a run can still learn a benign task that is new to the model: arithmetic with swapped operators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from safelora_fast.compare.measures.base import Measure, Metric
from safelora_fast.compare.report import Column
from safelora_fast.compare.runs import OPERATOR_SWAP
from safelora_fast.compare.statistics import shares
from safelora_fast.configuration.yaml_section import Section
from safelora_fast.errors import SettingsError
from safelora_fast.files.digest import digest
from safelora_fast.files.output import whole_folder
from safelora_fast.judging import operator_swap
from safelora_fast.judging.operator_swap import Difficulty

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from safelora_fast.compare.comparison import CompareConfig
    from safelora_fast.compare.runs import Run
    from safelora_fast.compare.statistics import Sample
    from safelora_fast.compare.workbench import Workbench

EXACT = Column(
    "exact", "benign", "operator swap", "%", "higher",
    "Exact answers to held-out arithmetic with swapped operators after the same training on that task.",
)  # fmt: skip


class OperatorSwapSection(Section):
    """The `operator_swap:` section.

    Attributes:
        difficulty: easy, medium or hard.
        rows: number of training examples.
        held_out: number of held-out problems.
        seeds: the comparison's seeds to train; all by default.
        training: `training:` settings for these runs, merged over the recipe's.
    """

    difficulty: Difficulty = "easy"
    rows: int = 2000
    held_out: int = 500
    seeds: list[int] | None = None
    training: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _can_be_made(self) -> OperatorSwapSection:
        try:
            operator_swap.make_problems(self.difficulty, self.rows, self.held_out, 0)
        except SettingsError as error:
            raise PydanticCustomError("refused", "{why}", {"why": str(error)}) from error
        return self

    @property
    def made_from(self) -> dict[str, Any]:
        """The settings that the problems depend on, in the format of their record."""
        return {"difficulty": self.difficulty, "rows": self.rows, "held_out": self.held_out, "seed": 0}


class OperatorSwap(Measure):
    """Share of held-out problems solved exactly, by the reference and by runs trained a second time on the task."""

    name = "operator_swap"
    title = "operator swap"
    order = 60
    settings = {"operator_swap": (OperatorSwapSection | None, None)}  # noqa: RUF012
    batched = True

    def training(self, config: CompareConfig) -> Mapping[str, Any] | None:
        """Return recipe changes that train on the task's examples, without evaluation."""
        section: OperatorSwapSection | None = config.measure.operator_swap
        if section is None:
            return None
        data = {"path": str(config.output / OPERATOR_SWAP / operator_swap.TRAIN), "eval": None, "max_rows": None}
        return {"data": data, "training": {"eval_strategy": "no", "eval_on_start": False, **section.training}}

    def prepare(self, config: CompareConfig) -> None:
        """Write the task's examples; replacing different ones makes the runs trained on those count as changed."""
        section: OperatorSwapSection | None = config.measure.operator_swap
        folder = config.output / OPERATOR_SWAP
        if section is not None and not operator_swap.is_written(folder, **section.made_from):
            with whole_folder(folder, overwrite=True) as partial:
                operator_swap.write(partial, **section.made_from)

    def measured_run(self, run: Run) -> Run:
        """Return the same run on the operator-swap task."""
        return run.on_operator_swap

    def applies(self, run: Run, config: CompareConfig) -> bool:
        """Return True for the reference and for the seeds that are trained on the task."""
        section: OperatorSwapSection | None = config.measure.operator_swap
        if section is None or run.seed is None:
            return section is not None
        return run.is_trained and (section.seeds is None or run.seed in section.seeds)

    def inputs(self, run: Run, bench: Workbench) -> dict[str, Any]:
        """Add the problems to the base inputs."""
        section: OperatorSwapSection = bench.config.measure.operator_swap
        held_out = bench.config.output / OPERATOR_SWAP / operator_swap.HELD_OUT
        problems = digest(held_out) if held_out.is_file() else None
        made = {"made_from": section.made_from, "problems_sha256": problems, "instruction": operator_swap.INSTRUCTION}
        return {**super().inputs(run, bench), **made}

    def take(self, run: Run, bench: Workbench) -> dict[str, Any]:
        """Return the counts, and for each problem whether its answer is exact."""
        _, problems = operator_swap.read(bench.config.output / OPERATOR_SWAP)
        subject = bench.subject(self.measured_run(run).adapter)
        advance = bench.counting(f"problems of {run.label}", len(problems))
        texts = operator_swap.answer(subject, problems, bench.config.measure.batch_size, advance)
        answers = [operator_swap.number_of(text) for text in texts]
        hits = [answer == problem.answer for answer, problem in zip(answers, problems, strict=True)]
        return {**operator_swap.score(problems, texts), "hits": hits, "texts": [problem.text for problem in problems]}

    def metrics(self, config: CompareConfig, contents: Sequence[Mapping[str, Any]]) -> Sequence[Metric]:
        """Return the share of exact answers."""
        del config, contents
        return [Metric(EXACT, _exact, of_reference=True, count=_count)]


def _exact(content: Mapping[str, Any], _reference: Mapping[str, Any]) -> Sample:
    return shares(content["hits"], content["texts"])


def _count(contents: Sequence[Mapping[str, Any]]) -> str:
    hits, count, usual = (sum(content[name] for content in contents) for name in ("exact", "count", "usual"))
    return f"{hits} of {count}; {usual} as in plain arithmetic"
