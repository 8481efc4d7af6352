"""Results of benchmark tasks: what they hold, and the file that stores them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from safelora_fast.errors import EvaluationError, OutputError
from safelora_fast.files.json_reader import OBJECT, check_fields, parse_as, read_json, why
from safelora_fast.judging.evaluation_folder import START_ANEW, other_settings

if TYPE_CHECKING:
    from pathlib import Path

FORMAT = 2
# Suffixes of the files that define tasks, on which results depend.
TASK_FILES = (".yaml", ".yml", ".py", ".json", ".jsonl", ".csv", ".parquet", ".txt")


class TaskError(EvaluationError):
    """One task failed; the others can still run."""


@dataclass(frozen=True)
class Metric:
    """One metric of a task.

    Attributes:
        name: e.g. "exact_match".
        filter: how the answer was extracted from the model's text, e.g. "strict-match"; "none" for the whole text.
        value: None if it is not finite.
        stderr: standard error of the value; None if the harness gives none.
        count: number of documents.
        higher_is_better: None if the task does not define it.
    """

    name: str
    filter: str
    value: float | None
    stderr: float | None
    count: int
    higher_is_better: bool | None

    @property
    def label(self) -> str:
        """The name, followed by the filter if there is one."""
        return self.name if self.filter == "none" else f"{self.name}, {self.filter}"


@dataclass(frozen=True)
class TaskResult:
    """The result of one task or one group of tasks.

    Attributes:
        task: name of the task or group.
        metrics: in the order that the task defines.
        version: version of the task.
        shots: number of few-shot examples; None for a group whose tasks differ.
        chat: whether prompts went through the chat template.
        lm_eval: version of the harness.
        definition: SHA-256 of the task's definition.
    """

    task: str
    metrics: tuple[Metric, ...]
    version: str
    shots: int | None
    chat: bool
    lm_eval: str
    definition: str

    def __post_init__(self) -> None:
        if not self.metrics:
            raise ValueError("there is no metric")

    @property
    def main(self) -> Metric:
        """The first metric."""
        return self.metrics[0]


@dataclass(frozen=True)
class BenchmarkReport:
    """The benchmark results of one model or adapter.

    Attributes:
        path: the file that stores the results.
        settings: the settings that the results depend on.
        tasks: in the order in which they were named; each tag is replaced by its tasks.
    """

    path: Path
    settings: dict[str, Any]
    tasks: tuple[TaskResult, ...]

    def __repr__(self) -> str:
        return f"BenchmarkReport({[result.task for result in self.tasks]}, path={str(self.path)!r})"

    def to_dict(self) -> dict[str, Any]:
        """Return the settings and results as plain values."""
        return {"settings": self.settings, "tasks": {result.task: asdict(result) for result in self.tasks}}


def task_result(name: str, results: dict[str, Any], *, chat: bool, definition: str, lm_eval: str) -> TaskResult:
    """Collect the metrics of one task. The harness names them `metric,filter` and `metric_stderr,filter`."""
    values = results["results"][name]
    counts, better = values.get("sample_count", {}), results["higher_is_better"].get(name, {})
    metrics = []
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr") and not isinstance(value, str | dict | list):
            count = int(counts.get(key, values.get("sample_len", 0)))
            stderr = _finite(values.get(f"{metric}_stderr,{kind}"))
            metrics.append(Metric(metric, kind, _finite(value), stderr, count, better.get(metric)))
    if not metrics:
        raise TaskError(f"task {name}: it gives no metric; name the tasks that it is made of")
    version, shots = str(results["versions"].get(name)), results["n-shot"].get(name)
    return TaskResult(name, tuple(metrics), version, shots, chat, lm_eval, definition)


def _finite(value: Any) -> float | None:
    return None if value is None or isinstance(value, str) or not math.isfinite(value) else float(value)


def read_results(
    file: Path, settings: dict[str, Any], definitions: dict[str, str], *, overwrite: bool
) -> dict[str, TaskResult]:
    """Read stored results. With `overwrite`, results of other settings are dropped.

    Raises:
        OutputError: the file cannot be read, or holds results of other settings or of a task that was defined differently.
    """
    if not file.exists():
        return {}
    try:
        content = check_fields(read_json(file), {"settings": OBJECT, "tasks": OBJECT})
        results = {name: parse_as(TaskResult, values) for name, values in content["tasks"].items()}
        problem = other_settings(file, content["settings"], {"format": FORMAT, **settings})
    except (OSError, ValueError) as error:
        problem = f"{file}: {why(error)}; {START_ANEW}"
    if problem is not None:
        if not overwrite:
            raise OutputError(problem)
        return {}
    other = [name for name, known in definitions.items() if name in results and results[name].definition != known]
    if other and not overwrite:
        raise OutputError(
            f"{file}: holds results of a task {other[0]} that was defined differently; choose another output, or pass --overwrite"
        )
    return results
