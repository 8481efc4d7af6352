"""From the files of a comparison to its report; nothing is run, so a report can be made at any time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safelora_fast.comparison.cells import cell_of, mean_cell
from safelora_fast.comparison.columns import COLUMNS, DIVERGENCE, LEARNED, Measured, task_columns
from safelora_fast.comparison.contents import Contents
from safelora_fast.comparison.costs import COSTS
from safelora_fast.comparison.curves import sweep_points, weakened_path
from safelora_fast.comparison.facts import facts_of, setting_of
from safelora_fast.comparison.places import REFERENCE, Place, places_of
from safelora_fast.comparison.reading import read_figures
from safelora_fast.comparison.report import Cell, Column, ComparisonReport, Plot, Row, SeedValue
from safelora_fast.recipe.folder import RECORD

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from safelora_fast.comparison.config import CompareConfig, RunSpec
    from safelora_fast.comparison.workbench import Workbench

NOTHING_SCORED = "nothing was scored"
SHARE = Column(
    "learned_share",
    "narrow",
    "of the first run's",
    "%",
    "higher",
    "The same, as a share of what the first run learned.",
)


class Assembly:
    """Makes the report of a comparison.

    Args:
        config: the comparison.
        bench: what measurements depend on.
    """

    def __init__(self, config: CompareConfig, bench: Workbench) -> None:
        self._config = config
        self._bench = bench
        self._contents = Contents(config, bench)
        self._places = {run.name: places_of(config, run) for run in config.runs}
        self._first = self._places[config.runs[0].name]
        everything = [self._contents.reference, *(place for places in self._places.values() for place in places)]
        self._columns = [one for one in self._known(everything) if self._is_asked_for(one, everything)]
        self._samples = {
            name: {one.column.key: self._contents.samples(one, places) for one in self._columns}
            for name, places in self._places.items()
        }

    def report(self) -> ComparisonReport:
        """The report of what is there."""
        config = self._config
        rows = [self._reference(), *(self._row(run, first=number == 0) for number, run in enumerate(config.runs))]
        columns = self._shown(rows)
        known = {one.column.key: one for one in self._columns}
        plot = None
        if LEARNED in known and DIVERGENCE in known:
            path = weakened_path(self._contents, self._first, known[LEARNED], known[DIVERGENCE])
            plot = Plot(LEARNED, DIVERGENCE, path)
        return ComparisonReport(
            title=config.title,
            facts=facts_of(config, self._bench, self._records()),
            columns=columns,
            rows=tuple(rows),
            plot=plot,
            sweep=sweep_points(self._contents, self._first, self._columns, self._source),
            reading=read_figures(config, columns, self._samples),
            complete=not any(cell.failures for row in rows for cell in row.cells.values()),
        )

    def _known(self, places: Sequence[Place]) -> list[Measured]:
        """Every column, those of the benchmarks among the benign ones."""
        asked = [place for place in places if self._contents.applies("tasks", place)]
        tasks = task_columns([self._contents.of("tasks", place) for place in asked])
        place = next(number for number, one in enumerate(COLUMNS, start=1) if one.column.criterion == "benign")
        return [*COLUMNS[:place], *tasks, *COLUMNS[place:]]

    def _is_asked_for(self, one: Measured, places: Sequence[Place]) -> bool:
        rows = one.rows is None or getattr(self._config.measure, one.rows) is not None
        return rows and any(self._contents.applies(one.measure, place) for place in places)

    def _row(self, run: RunSpec, *, first: bool) -> Row:
        places = self._places[run.name]
        cells = {
            one.column.key: self._cell(one, places)
            for one in self._columns
            if any(self._contents.applies(one.measure, place) for place in places)
        }
        cells |= self._share(run) | self._costs(places)
        return Row(run.name, setting_of(run), cells, "undefended" if first else "defence")

    def _cell(self, one: Measured, places: Sequence[Place]) -> Cell:
        samples = self._samples[places[0].name][one.column.key]
        values, contents = [], []
        for place in places:
            if place.seed is None or not self._contents.applies(one.measure, place):
                continue
            sample, failure = samples.get(place.seed), self._contents.failure(one.measure, place)
            if failure is None:
                contents.append(self._contents.of(one.measure, place))
                if sample is None:
                    without = self._contents.failure(one.measure, self._contents.reference)
                    failure = NOTHING_SCORED if without is None else f"the reference: {without}"
            figure = None if sample is None else sample.figure
            values.append(SeedValue(place.seed, figure, self._source(place, one.measure), failure))
        return cell_of(one.column, list(samples.values()), values, one.count(contents) if contents else "")

    def _reference(self) -> Row:
        """The model before the fine-tune, where it has a figure of its own."""
        place, cells = self._contents.reference, {}
        for one in self._columns:
            if not one.of_reference:
                continue
            failure, sample = self._contents.failure(one.measure, place), self._contents.sample(one, place)
            if sample is None and failure is None:
                failure = NOTHING_SCORED
            figure = None if sample is None else sample.figure
            value = SeedValue(0, figure, self._source(place, one.measure), failure)
            count = "" if failure else one.count([self._contents.of(one.measure, place)])
            cells[one.column.key] = cell_of(one.column, [] if sample is None else [sample], [value], count)
        return Row(REFERENCE, "before the fine-tune", cells, "reference")

    def _share(self, run: RunSpec) -> dict[str, Cell]:
        """What was learned as a share of what the first run learned with the same seed."""
        own, first = (self._samples[name].get(LEARNED, {}) for name in (run.name, self._config.runs[0].name))
        values = [
            SeedValue(place.seed, own[place.seed].figure / first[place.seed].figure, self._source(place, "drift"))
            for place in self._places[run.name]
            if place.seed is not None and place.seed in own and place.seed in first and first[place.seed].figure > 0
        ]
        return {SHARE.key: mean_cell(values)} if values else {}

    def _records(self) -> list[dict[str, Any]]:
        """What the trainings of the runs that are there left."""
        return [self._contents.record(place) for places in self._places.values() for place in places]

    def _costs(self, places: Sequence[Place]) -> dict[str, Cell]:
        if not self._config.measure.costs:
            return {}
        others = {place.seed: self._contents.record(place) for place in self._first}
        cells = {}
        for column, figure in COSTS:
            values = []
            for place in places:
                value = figure(self._contents.record(place), others.get(place.seed, {}))
                if value is not None and place.seed is not None and place.adapter is not None:
                    values.append(SeedValue(place.seed, value, self._relative(place.adapter / RECORD)))
            if values:
                cells[column.key] = mean_cell(values)
        return cells

    def _shown(self, rows: Sequence[Row]) -> tuple[Column, ...]:
        """The columns, each with what belongs to it."""
        present = {key for row in rows for key in row.cells}
        ordered = []
        for one in self._columns:
            ordered += [one.column, SHARE] if one.column.key == LEARNED and SHARE.key in present else [one.column]
        return (*ordered, *(column for column, _ in COSTS if column.key in present))

    def _source(self, place: Place, measure: str) -> str:
        return self._relative(place.file(measure))

    def _relative(self, file: Path) -> str:
        output = self._config.output
        return (file.relative_to(output) if file.is_relative_to(output) else file).as_posix()
