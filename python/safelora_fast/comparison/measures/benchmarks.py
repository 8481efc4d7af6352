"""Tasks of lm-evaluation-harness on a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from safelora_fast.comparison.digests import tasks_digest
from safelora_fast.comparison.measures.base import OfTheRun, folder_of
from safelora_fast.comparison.measures.margin import model_of
from safelora_fast.evaluation.benchmarks import benchmark, harness_version

if TYPE_CHECKING:
    from safelora_fast.comparison.places import Place
    from safelora_fast.comparison.sections import TasksSection
    from safelora_fast.comparison.workbench import Workbench


@dataclass(frozen=True)
class BenchmarksMeasure(OfTheRun):
    """What the model still can; a folder beside the file holds the tasks that are done."""

    name: str = "tasks"

    def applies(self, _place: Place, bench: Workbench) -> bool:
        """Every run, where the configuration names tasks."""
        return bench.config.measure.tasks is not None

    def of(self, place: Place, bench: Workbench) -> dict[str, Any]:
        """The model, the adapter, the tasks, and the harness that they are run by."""
        section = _section(bench)
        tasks = {"tasks": asdict(section), "tasks_sha256": tasks_digest(section.path), "lm_eval": harness_version()}
        return {**model_of(place, bench), "strings": bench.strings, **tasks}

    def take(self, place: Place, bench: Workbench) -> dict[str, Any]:
        """The harness's figures, by task."""
        section, settings = _section(bench), bench.settings
        report = benchmark(
            settings.model,
            None if place.adapter is None else str(place.adapter),
            section.names,
            folder_of(self, place, bench),
            task_path=section.path,
            limit=section.limit,
            batch_size=bench.config.measure.batch_size,
            dtype=settings.dtype,
            device=settings.device,
            strings=bench.strings,
            chat_template=settings.chat_template,
            trust_remote_code=settings.trust_remote_code,
            progress=bench.progress,
        )
        return report.to_dict()


def _section(bench: Workbench) -> TasksSection:
    section = bench.config.measure.tasks
    assert section is not None  # noqa: S101
    return section
