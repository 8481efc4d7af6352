"""Reads the measurement files of a comparison: the result of each run, or the reason why there is none."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

from safelora_fast.checkpoints.adapter import WEIGHTS
from safelora_fast.compare.comparison import reference_of, runs_of
from safelora_fast.compare.measures import MEASURES
from safelora_fast.compare.measures.base import FAILURE, NOT_FINITE
from safelora_fast.compare.report import CRITERIA, NOT_MEASURED, Cell, SeedValue
from safelora_fast.compare.runs import TRAINING_FAILURE
from safelora_fast.compare.statistics import pool
from safelora_fast.compare.train_runs import trainings_of
from safelora_fast.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from safelora_fast.compare.comparison import CompareConfig
    from safelora_fast.compare.measures.base import Measure, Metric
    from safelora_fast.compare.runs import Run
    from safelora_fast.compare.statistics import Outcome
    from safelora_fast.compare.workbench import Workbench

NOTHING_SCORED = "nothing was scored"


class RunCheck:
    """Checks, once per run, that its adapter is complete and matches its recipe."""

    def __init__(self, config: CompareConfig) -> None:
        self._trainings = {training.run: training for training in trainings_of(config)}
        self.missing = functools.cache(self._missing)

    def _missing(self, run: Run) -> str | None:
        """Return why a run has no valid adapter; None if it has one, and for the reference."""
        if run.adapter is None:
            return None
        if run in self._trainings:
            return self._trainings[run].missing()
        return None if (run.adapter / WEIGHTS).is_file() else f"{run.adapter}: holds no {WEIGHTS}"


class Measurements:
    """The measurements of a comparison. Files made with other settings, adapters or recipes are ignored.

    Attributes:
        reference: the model before the fine-tune.
        runs: runs by defense.
        first: runs of the first defense, which the others are compared with.
        metrics: columns that the configuration requests, in report order.
    """

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self._check = RunCheck(bench.config)
        self.content = functools.cache(self._content)
        self.reference = reference_of(bench.config)
        self.runs = {spec.name: runs_of(bench.config, spec) for spec in bench.config.runs}
        self.first = self.runs[bench.config.runs[0].name]
        self._measure: dict[str, Measure] = {}
        metrics = []
        for measure in MEASURES:
            contents = [self.content(measure.name, run) for run in self.everything if self.applies(measure.name, run)]
            for metric in measure.metrics(bench.config, contents) if contents else ():
                self._measure[metric.column.key] = measure
                metrics.append(metric)
        order = list(CRITERIA)
        self.metrics = sorted(metrics, key=lambda metric: (order.index(metric.column.criterion), metric.rank))

    @property
    def everything(self) -> list[Run]:
        """All runs, the reference first."""
        return [self.reference, *(run for runs in self.runs.values() for run in runs)]

    def metric(self, key: str) -> Metric | None:
        """Return the metric of a column; None if the configuration does not request it."""
        return next((metric for metric in self.metrics if metric.column.key == key), None)

    def measure_of(self, metric: Metric) -> Measure:
        """Return the measure whose files a metric is read from."""
        return self._measure[metric.column.key]

    def applies(self, measure: str, run: Run) -> bool:
        """Return whether the configuration requests a measure for a run, or for the reference."""
        return _named(measure).applies(run, self._bench.config)

    def _content(self, measure: str, run: Run) -> dict[str, Any]:
        """Return the content of a measurement; if there is none, the reason under `failure`."""
        missing = self._check.missing(_named(measure).measured_run(run))
        if missing is not None:
            return {FAILURE: missing}
        return _named(measure).kept(run, self._bench) or {FAILURE: NOT_MEASURED}

    def record(self, run: Run) -> dict[str, Any]:
        """Return the record of a run's training; empty if the run is missing or was not trained here."""
        return run.record() if self._check.missing(run) is None else {}

    def outcome(self, metric: Metric, run: Run, content: Mapping[str, Any] | None = None) -> Outcome | str:
        """Return the result of a run in a column, or the reason why there is none.

        Args:
            metric: the column.
            run: the run.
            content: measurement to read instead of the run's own file.

        Raises:
            DataError: a measurement file is damaged.
        """
        measure = self.measure_of(metric).name
        if content is None:
            content = self.content(measure, run)
        reference = self.content(measure, self.reference)
        if FAILURE in content:
            return str(content[FAILURE])
        if FAILURE in reference and not metric.of_reference:
            return f"the reference: {reference[FAILURE]}"
        try:
            found = metric.read(content, reference)
            before = None if metric.of_reference else metric.read(reference, reference)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
            files = ", ".join(str(one.file(measure)) for one in (run, self.reference))
            raise DataError(
                f"{files}: what was measured is damaged ({error!r}); delete it, to have it measured again"
            ) from error
        if isinstance(found, str):
            return found
        if found is None or not found.count:
            return NOTHING_SCORED
        if math.isfinite(found.value):
            return found
        is_references = before is not None and not isinstance(before, str) and not math.isfinite(before.value)
        return f"the reference: {NOT_FINITE}" if is_references else NOT_FINITE

    def outcomes(self, metric: Metric, runs: Sequence[Run]) -> dict[int, Outcome]:
        """Return the results by seed; runs without a result are left out."""
        asked = [run for run in runs if self.applies(self.measure_of(metric).name, run)]
        found = {run.seed or 0: self.outcome(metric, run) for run in asked}
        return {seed: outcome for seed, outcome in found.items() if not isinstance(outcome, str)}

    def row_cell(self, metric: Metric, runs: Sequence[Run]) -> Cell | None:
        """Return the cell of some runs of one defense; None if the measure applies to none of them."""
        measure = self.measure_of(metric).name
        contents = {run: self.content(measure, run) for run in runs if self.applies(measure, run)}
        return self.cell(metric, contents, self.source(measure)) if contents else None

    def cell(self, metric: Metric, contents: Mapping[Run, Mapping[str, Any]], source: Callable[[Run], str]) -> Cell:
        """Return the mean and its interval over seeds and items.

        Args:
            metric: the column.
            contents: the measurement of each run.
            source: returns the source file of a run.
        """
        outcomes = {run: self.outcome(metric, run, content) for run, content in contents.items()}
        seeds = tuple(
            SeedValue(run.seed or 0, None, source(run), outcome)
            if isinstance(outcome, str)
            else SeedValue(run.seed or 0, outcome.value, source(run))
            for run, outcome in outcomes.items()
        )
        known = [outcome for outcome in outcomes.values() if not isinstance(outcome, str)]
        pooled = pool(known, share=metric.column.unit == "%", never_negative=metric.never_negative)
        low, high = pooled.interval.to_list()
        whole = [content for content in contents.values() if FAILURE not in content]
        count = metric.count(whole) if whole else ""
        return Cell(None if math.isnan(pooled.value) else pooled.value, low, high, seeds, count)

    def source(self, measure: str) -> Callable[[Run], str]:
        """Return a function that gives the source file of a run's values.

        It is the measurement file, or else the failure file of the training that the measurement needs. If neither
        exists, it is "".
        """

        def source_of(run: Run) -> str:
            files = (run.file(measure), _named(measure).measured_run(run).folder / TRAINING_FAILURE)
            return next((self.relative(file) for file in files if file.is_file()), "")

        return source_of

    def relative(self, file: Path) -> str:
        """Return a file's path relative to the report."""
        output = self._bench.config.output
        return (file.relative_to(output) if file.is_relative_to(output) else file).as_posix()


def _named(name: str) -> Measure:
    return next(measure for measure in MEASURES if measure.name == name)
