"""Tasks of lm-evaluation-harness on a run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast.compare.failed_measurements import FAILURE, NOT_FINITE, UNFINISHED
from safelora_fast.compare.measures.base import OfTheRun, folder_of
from safelora_fast.compare.measures.margin import model_of
from safelora_fast.files.store import to_json
from safelora_fast.judging.benchmarks import TASK_FILES, benchmark, harness_version
from safelora_fast.recipe.model_stamp import files_digest

if TYPE_CHECKING:
    from safelora_fast.compare.measure_sections import TasksSection
    from safelora_fast.compare.paths import Place
    from safelora_fast.compare.shared_models import Workbench


@dataclass(frozen=True)
class BenchmarksMeasure(OfTheRun):
    """What the model still can; a folder beside the file holds the tasks that are done."""

    name: str = "tasks"
    batched: bool = True

    def applies(self, _place: Place, bench: Workbench) -> bool:
        """Every run, where the configuration names tasks."""
        return bench.config.measure.tasks is not None

    def of(self, place: Place, bench: Workbench) -> dict[str, Any]:
        """The model, the adapter, the tasks, and the harness that they are run by."""
        section = _section(bench)
        files = files_digest(None if section.path is None else Path(section.path).expanduser(), TASK_FILES)
        tasks = {"tasks": section.model_dump(), "tasks_sha256": files, "lm_eval": harness_version()}
        return {**model_of(place, bench), "strings": bench.strings, **tasks}

    def take(self, place: Place, bench: Workbench) -> dict[str, Any]:
        """The harness's figures, by task; a task that fails takes no other with it."""
        section = _section(bench)
        bench.release(reference=True)
        failures: dict[str, str] = {}
        report = benchmark(
            bench.settings,
            None if place.adapter is None else str(place.adapter),
            section.names,
            folder_of(self, place, bench),
            task_path=section.path,
            limit=section.limit,
            batch_size=bench.config.measure.batch_size,
            strings=bench.strings,
            failures=failures,
            progress=bench.progress,
        )
        content = _plain(report.to_dict())
        tasks = {task: _checked(result) for task, result in content["tasks"].items()}
        content["tasks"] = {**tasks, **{task: {FAILURE: reason} for task, reason in failures.items()}}
        return {**content, UNFINISHED: "; ".join(failures.values())} if failures else content


def _section(bench: Workbench) -> TasksSection:
    section = bench.config.measure.tasks
    assert section is not None  # noqa: S101
    return section


def _checked(result: dict[str, Any]) -> dict[str, Any]:
    """What a task came to, or that the metric that is shown is not finite; the others are for people who look for them."""
    metric = result["metrics"][0]
    return result if metric["value"] is not None else {FAILURE: f"{NOT_FINITE}: {metric['name']}"}


def _plain(content: dict[str, Any]) -> Any:
    """As it is in a file: what is not finite is null, in results that the folder held and in new ones."""
    return json.loads(to_json(content))
