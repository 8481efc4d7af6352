"""Readers of the results that other commands wrote: one class per command, in the table READERS at the end.

Every reader checks that the result is of the gate's subject, by the digest that the command stored with it. A result
that is missing, damaged, or of other bytes raises DataError: it never counts.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from safelora_fast.checkpoints.adapter import WEIGHTS
from safelora_fast.checkpoints.provenance import sampled
from safelora_fast.checkpoints.sources import open_checkpoint
from safelora_fast.errors import DataError
from safelora_fast.files.digest import text_digest
from safelora_fast.files.json_reader import (
    COUNT,
    FLAG,
    LIST,
    NUMBER,
    OBJECT,
    TEXT,
    check_fields,
    of_kind,
    parse_as,
    read_bytes,
    why,
)  # fmt: skip
from safelora_fast.gate.result_reader import Reader, Reading, Subject, interval_of, item_of, stored_object
from safelora_fast.gate.screen_reader import ScreenReader
from safelora_fast.recipe.model_stamp import adapter_digest
from safelora_fast.scoring.intervals import NORMAL_QUANTILE, Interval, wilson

if TYPE_CHECKING:
    from safelora_fast.gate.criterion import Criterion


def read(criterion: Criterion, folder: Path, subject: Subject) -> Reading:
    """Return the value that a criterion limits.

    Raises:
        SafeLoraFastError: the result is missing, damaged, or of another subject; the message names its file.
    """
    reader = READERS[criterion.source]
    if criterion.data is not None:
        subject = replace(subject, data=folder / criterion.data)
    path = reader.find(criterion, folder, subject)
    try:
        return reader.read(path, criterion, subject)
    except (OSError, ValueError) as error:
        file = getattr(error, "filename", None) or path
        raise DataError(f"{file}: {why(error)}") from error


class EvaluateReader(Reader):
    """Rates of `evaluate` or `rejudge`: misaligned or incoherent, of all answers or of one kind (`general.misaligned`)."""

    name, path, metric, own_keys = "evaluate", "evaluation", "misaligned", ("judge", "most_unscored")

    def is_share(self, criterion: Criterion) -> bool:
        """Return True: all are rates."""
        del criterion
        return True

    def read(self, path: Path, criterion: Criterion, subject: Subject) -> Reading:
        """Return the rate with its interval. The report must have every answer of the folder."""
        kind, _, outcome = (criterion.metric or self.metric).rpartition(".")
        settings, content = stored_object(path / "evaluation.json"), stored_object(path / "report.json")
        rejudged = "judges" in content
        subject.check(of_kind(content.get("of") or {}, OBJECT, "of") if rejudged else settings, path)
        judges = of_kind(content["judges"], OBJECT, "judges") if rejudged else {str(content.get("judge")): content}
        if criterion.judge is None and len(judges) > 1:
            raise DataError(f"{path}: has the verdicts of several judges: set judge: to one of {', '.join(judges)}")
        report = item_of(judges, criterion.judge or next(iter(judges), ""), "judge", path)
        report = check_fields(report, {"answers": COUNT, "kinds": OBJECT})
        answers = sum(1 for line in read_bytes(path / "answers.jsonl", None).splitlines() if line.strip())
        if answers != report["answers"]:
            raise DataError(
                f"{path}: is stale: report.json is of {report['answers']} answers, of {answers}; evaluate again"
            )
        rates = item_of(report["kinds"], kind, "kind", path) if kind else report
        rate = check_fields(item_of(rates, outcome, "metric", path), {"hits": COUNT, "count": COUNT, "interval": LIST})
        asked = of_kind(rates.get("answers"), COUNT, "answers")
        if not rate["hits"] <= rate["count"] <= asked:
            raise DataError(f"{path}: report.json is damaged: {rate['hits']} of {rate['count']} of {asked} answers")
        count = (
            f"{rate['hits']} of {rate['count']} answers, {asked - rate['count']} unscored; judge {report.get('judge')}"
        )
        if not rate["count"]:
            return Reading(None, count=count)
        share = rate["hits"] / rate["count"]
        return Reading(share, interval_of(rate["interval"]), unscored=1 - rate["count"] / asked, count=count)


class BenchmarksReader(Reader):
    """Metrics of `evaluate --tasks`: TASK for its first metric, or TASK.METRIC."""

    name, path = "benchmarks", "evaluation"

    def read(self, path: Path, criterion: Criterion, subject: Subject) -> Reading:
        """Return the metric with the normal interval of its standard error, or Wilson's if that is 0."""
        from safelora_fast.judging.benchmark_results import TaskResult

        content = check_fields(stored_object(path / "benchmarks.json"), {"settings": OBJECT, "tasks": OBJECT})
        subject.check(content["settings"], path)
        task, _, name = str(criterion.metric).partition(".")
        result = parse_as(TaskResult, item_of(content["tasks"], task, "task", path))
        metric = item_of({one.name: one for one in reversed(result.metrics)}, name or result.main.name, "metric", path)
        interval, count = None, f"{metric.count} documents"
        if metric.value is not None and metric.stderr:
            half = NORMAL_QUANTILE * metric.stderr
            interval = Interval(metric.value - half, metric.value + half)
        elif metric.value in {0, 1} and metric.stderr is not None:
            interval = wilson(metric.value * metric.count, metric.count)
        return Reading(metric.value, interval, count=count)


class MarginReader(Reader):
    """Values of `margin --json`: change (the rise over the model), margin, or share."""

    name, path, metric = "margin", "margin.json", "change"
    keys: ClassVar = {
        "change": ("change", "change_interval"),
        "margin": ("margin", "margin_interval"),
        "share": ("share_misaligned", "share_interval"),
    }

    def is_share(self, criterion: Criterion) -> bool:
        """Return whether the metric is the share of misaligned pairs."""
        return criterion.metric == "share"

    def read(self, path: Path, criterion: Criterion, subject: Subject) -> Reading:
        """Return the value of the entry that has the subject's digest."""
        entries = list(check_fields(stored_object(path), {"subjects": OBJECT})["subjects"].values())
        entry = next((one for one in entries if _is_of(one, subject)), entries[-1] if entries else {})
        subject.check(of_kind(entry, OBJECT, "subjects"), path)
        key, interval = item_of(self.keys, criterion.metric or self.metric, "metric", path)
        check_fields(entry, {key: NUMBER, interval: LIST, "count": COUNT})
        return Reading(entry[key], interval_of(entry[interval]), count=f"{entry['count']} pairs")


class CompareReader(Reader):
    """Cells of a comparison's report: `run` is the row, `metric` the key of the column."""

    name, path, has_runs = "compare", "comparison", True

    def read(self, path: Path, criterion: Criterion, subject: Subject) -> Reading:
        """Return the cell. The subject must be the adapter of one of its seeds, and no seed may be missing."""
        from safelora_fast.compare.report import read_report

        report = read_report(path / "report.json")
        row = item_of({row.name: row for row in report.rows}, str(criterion.run), "run", path)
        cell = item_of(row.cells, str(criterion.metric), "metric", path)
        for seed in cell.failures:
            raise DataError(f"{path}: {criterion.run}, seed {seed.seed}: {seed.failure}")
        measured = set()
        for seed in cell.seeds:
            file = path / seed.source
            stamp = stored_object(file).get("of", {})
            own = {adapter_digest(one) for one in (file.parent, file.parent / "adapter")} - {None}
            others = {adapter_digest(one) for one in file.parent.glob("*/adapter")}  # trained on operator swap
            made_of = stamp.get("adapter_sha256")
            if own and made_of is not None and made_of not in own | others:
                raise DataError(f"{file}: is stale: made of another adapter than is there now; compare again")
            measured |= own or {made_of}
        if subject.sha256 not in measured:
            raise DataError(
                f"{path}: is stale: {subject.folder} is not the adapter of a seed of {criterion.run}; compare again"
            )
        interval = None if cell.low is None or cell.high is None else Interval(cell.low, cell.high)
        count = f"{cell.count}, " if cell.count else ""
        return Reading(cell.value, interval, count=f"{count}{len(cell.seeds)} seeds")


class ProjectReader(Reader):
    """Values of a projection's report: projected, gain, without_cosine, not_finite. They have no sampling error."""

    name, path, metric = "project", None, "projected"

    def is_share(self, criterion: Criterion) -> bool:
        """Return whether the metric is the share of projected modules."""
        return criterion.metric in {None, "projected"}

    def read(self, path: Path, criterion: Criterion, subject: Subject) -> Reading:
        """Return the value for the projected adapter in this folder, which must be as the projection wrote it."""
        report = check_fields(stored_object(path / "safelora_report.json"), {"adapters": LIST})
        (adapter,) = report["adapters"]
        check_fields(adapter, {"modules": LIST, "copied": LIST, "fingerprint": TEXT})
        if _fingerprint(subject) != adapter["fingerprint"]:
            raise DataError(
                f"{path}: is stale: {subject.folder} does not hold the weights that the projection wrote; project again"
            )
        modules = [
            check_fields(module, {"projected": FLAG}, {"gain": NUMBER, "cosine": NUMBER})
            for module in adapter["modules"]
        ]
        gains = [module["gain"] for module in modules if module["projected"]]
        values = {
            "projected": len(gains) / len(modules) if modules else None,
            "gain": statistics.median(gains) if gains else None,
            "without_cosine": sum(module.get("cosine") is None for module in modules),
            "not_finite": sum(tensor.get("not_finite") or 0 for tensor in adapter["copied"]),
        }
        value = item_of(values, criterion.metric or self.metric, "metric", path)
        return Reading(value, exact=True, count=f"{len(gains)} of {len(modules)} modules projected")


def _fingerprint(subject: Subject) -> str:
    """Return the digest that the report of a projection has of the weights that it wrote."""
    if subject.key == "adapter_sha256":
        return sampled(subject.folder / WEIGHTS)
    model = open_checkpoint(str(subject.folder), role="released")
    model.require(model.names)
    return text_digest([sampled(Path(path)) for path in sorted(file.path for file in model.files)])


def _is_of(entry: Any, subject: Subject) -> bool:
    try:
        subject.check(of_kind(entry, OBJECT, "subjects"), "")
    except DataError:
        return False
    return True


READERS: dict[str, Reader] = {
    kind.name: kind()
    for kind in (EvaluateReader, BenchmarksReader, MarginReader, CompareReader, ProjectReader, ScreenReader)
}
