"""Benchmarks of lm-evaluation-harness, which show what a run can still do."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from safelora_fast.compare.measures.base import FAILURE, NOT_FINITE, UNFINISHED, Measure, Metric, number
from safelora_fast.compare.report import Column
from safelora_fast.compare.statistics import Summary
from safelora_fast.configuration.yaml_section import Section
from safelora_fast.files.store import to_json
from safelora_fast.recipe.model_stamp import files_digest
from safelora_fast.recipe.sections import Count

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from safelora_fast.compare.comparison import CompareConfig
    from safelora_fast.compare.runs import Run
    from safelora_fast.compare.workbench import Workbench


class TasksSection(Section):
    """The `tasks:` section.

    Attributes:
        names: task names in the harness.
        path: folder of custom task files.
        limit: maximum number of documents per task; all by default.
    """

    names: Annotated[list[str], Field(min_length=1)]
    path: str | None = None
    limit: Count | None = None


class Tasks(Measure):
    """Values of lm-evaluation-harness; a folder beside the file keeps the finished tasks."""

    name = title = "tasks"
    order = 70
    settings = {"tasks": (TasksSection | None, None)}  # noqa: RUF012
    batched = True

    def check_inputs(self, config: CompareConfig) -> None:
        """Check that the harness has the tasks."""
        from safelora_fast.judging.benchmarks import check_tasks

        if config.measure.tasks is not None:
            check_tasks(config.measure.tasks.names, config.measure.tasks.path)

    def applies(self, run: Run, config: CompareConfig) -> bool:
        """Return whether tasks are configured; the same for every run."""
        del run
        return config.measure.tasks is not None

    def inputs(self, run: Run, bench: Workbench) -> dict[str, Any]:
        """Add the tasks and the harness version to the base inputs."""
        from safelora_fast.judging.benchmark_results import TASK_FILES
        from safelora_fast.judging.benchmarks import harness_version

        section: TasksSection = bench.config.measure.tasks
        folder = None if section.path is None else Path(section.path).expanduser()
        return {
            **super().inputs(run, bench),
            "strings": bench.strings,
            "tasks": section.model_dump(),
            "tasks_sha256": files_digest(folder, TASK_FILES),
            "lm_eval": harness_version(),
        }

    def take(self, run: Run, bench: Workbench) -> dict[str, Any]:
        """Return the harness's values by task; a failed task does not affect the others."""
        from safelora_fast.judging.benchmarks import benchmark

        section: TasksSection = bench.config.measure.tasks
        bench.release(reference=True)
        failures: dict[str, str] = {}
        report = benchmark(
            bench.settings,
            None if run.adapter is None else str(run.adapter),
            section.names,
            self.folder(run, bench),
            task_path=section.path,
            limit=section.limit,
            batch_size=bench.config.measure.batch_size,
            strings=bench.strings,
            failures=failures,
            progress=bench.progress,
        )
        content = json.loads(to_json(report.to_dict()))  # NaN and infinity become null, in stored and in new results
        tasks = {task: _checked(result) for task, result in content["tasks"].items()}
        content["tasks"] = {**tasks, **{task: {FAILURE: reason} for task, reason in failures.items()}}
        return {**content, UNFINISHED: "; ".join(failures.values())} if failures else content

    def metrics(self, config: CompareConfig, contents: Sequence[Mapping[str, Any]]) -> Sequence[Metric]:
        """Return the first metric of every benchmark."""
        found: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for content in contents:
            for task, result in content.get("tasks", {}).items():
                found[task].extend(result.get("metrics", [])[:1])
        return [task_metric(task, found[task]) for task in found or dict.fromkeys(config.measure.tasks.names)]


def _checked(result: dict[str, Any]) -> dict[str, Any]:
    """Return a task's result, or a failure if its first metric, the only one shown, is not finite."""
    metric = result["metrics"][0]
    return result if metric["value"] is not None else {FAILURE: f"{NOT_FINITE}: {metric['name']}"}


def task_metric(task: str, metrics: Sequence[Mapping[str, Any]]) -> Metric:
    """Return the column of a benchmark. Its values are shares only if they are between 0 and 1 in every run.

    Args:
        task: name of the task.
        metrics: the task's first metric in each run that has one.
    """
    unit, better, note = "", None, f"The benchmark {task} of lm-evaluation-harness."
    if metrics:
        first, values = metrics[0], [value for metric in metrics if math.isfinite(value := number(metric["value"]))]
        better = {True: "higher", False: "lower"}.get(first["higher_is_better"])
        unit = "%" if better == "higher" and values and all(0 <= value <= 1 for value in values) else ""
        measured = f"as lm-evaluation-harness measures it ({first['count']} documents)"
        note = f"{first['name']} of the benchmark {task}, {measured}."

    def read(content: Mapping[str, Any], _reference: Mapping[str, Any]) -> Summary | str | None:
        result = content.get("tasks", {}).get(task, {})
        if FAILURE in result or not result:
            failure: str | None = result.get(FAILURE)
            return failure
        metric = result["metrics"][0]
        return Summary(number(metric["value"]), number(metric["stderr"]), metric["count"])

    column = Column(f"task/{task}", "benign", task, unit, better, note)  # type: ignore[arg-type]
    return Metric(column, read, of_reference=True, rank=1)
