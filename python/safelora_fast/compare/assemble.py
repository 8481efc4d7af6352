"""From the files of a comparison to its report; nothing is run, so a report can be made at any time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safelora_fast.compare.cells import cell_of, mean_cell
from safelora_fast.compare.columns import COLUMNS, DIVERGENCE, LEARNED, Measured, task_columns
from safelora_fast.compare.conclusions import read_figures
from safelora_fast.compare.config import REFERENCE
from safelora_fast.compare.costs import COSTS
from safelora_fast.compare.curves import curve_failures, sweep_points, weakened_path
from safelora_fast.compare.measurement_files import Contents
from safelora_fast.compare.measures import MEASURES
from safelora_fast.compare.missing_reasons import gap
from safelora_fast.compare.notes import facts_of, setting_of
from safelora_fast.compare.paths import Place, places_of
from safelora_fast.compare.report import Cell, Column, ComparisonReport, Plot, Row, SeedValue
from safelora_fast.recipe.run_folder import RECORD

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from safelora_fast.compare.config import CompareConfig, RunSpec
    from safelora_fast.compare.pooling import Outcome
    from safelora_fast.compare.shared_models import Workbench

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
        self._everything = [self._contents.reference, *(place for places in self._places.values() for place in places)]
        self._columns = [one for one in self._known() if self._is_asked_for(one)]
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
        sweep = sweep_points(self._contents, self._first, self._columns, self._source)
        failed = tuple(curve_failures(self._contents, self._first))
        cells = [cell for row in rows for cell in row.cells.values()]
        cells += [cell for point in sweep for cell in point.cells.values()]
        return ComparisonReport(
            title=config.title,
            facts=facts_of(config, self._bench, self._records()),
            columns=columns,
            rows=tuple(rows),
            plot=plot,
            sweep=sweep,
            failed=failed,
            reading=read_figures(config, columns, self._samples),
            complete=not (failed or self._fails() or any(cell.failures for cell in cells)),
        )

    def _known(self) -> list[Measured]:
        """Every column, those of the benchmarks among the benign ones."""
        asked, tasks = self._config.measure.tasks, []
        if asked is not None:
            tasks = task_columns([self._contents.of("tasks", place) for place in self._everything], asked.names)
        after = next(number for number, one in enumerate(COLUMNS, start=1) if one.column.criterion == "benign")
        return [*COLUMNS[:after], *tasks, *COLUMNS[after:]]

    def _fails(self) -> bool:
        """Whether any measure that is asked for has failed, or has not been taken."""
        return any(
            self._contents.failure(measure.name, place) is not None
            for measure in MEASURES
            for place in self._everything
            if self._contents.applies(measure.name, place)
        )

    def _is_asked_for(self, one: Measured) -> bool:
        rows = one.rows is None or getattr(self._config.measure, one.rows) is not None
        return rows and any(self._contents.applies(one.measure, place) for place in self._everything)

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
            if self._contents.failure(one.measure, place) is None:
                contents.append(self._contents.of(one.measure, place))
            values.append(self._value(one, place, place.seed, samples.get(place.seed)))
        return cell_of(one.column, list(samples.values()), values, one.count(contents) if contents else "")

    def _reference(self) -> Row:
        """The model before the fine-tune, where it has a figure of its own."""
        place, cells = self._contents.reference, {}
        for one in self._columns:
            if not one.of_reference:
                continue
            sample = self._contents.sample(one, place)
            value = self._value(one, place, 0, sample)
            count = "" if value.failure else one.count([self._contents.of(one.measure, place)])
            cells[one.column.key] = cell_of(one.column, [] if sample is None else [sample], [value], count)
        return Row(REFERENCE, "before the fine-tune", cells, "reference")

    def _value(self, one: Measured, place: Place, seed: int, sample: Outcome | None) -> SeedValue:
        """The figure of a sample, or why there is none."""
        source = self._source(place, one.measure)
        if sample is None:
            return SeedValue(seed, None, source, gap(self._contents, one, place))
        return SeedValue(seed, sample.figure, source)

    def _share(self, run: RunSpec) -> dict[str, Cell]:
        """What was learned as a share of what the first run learned with the same seed."""
        column = next((one for one in self._columns if one.column.key == LEARNED), None)
        if column is None:
            return {}
        first = {place.seed: place for place in self._first}
        both = [(place, first[place.seed]) for place in self._places[run.name] if place.seed in first]
        values = [self._share_of(place, other, column) for place, other in both]
        return {SHARE.key: mean_cell(values)} if any(one.value is not None or one.failure for one in values) else {}

    def _share_of(self, place: Place, first: Place, column: Measured) -> SeedValue:
        """No figure where the first run learned nothing, and a failure where one of the two has none."""
        seed, source = place.seed or 0, self._source(place, column.measure)
        own, other = (self._contents.sample(column, one) for one in (place, first))
        if own is None:
            return SeedValue(seed, None, source, gap(self._contents, column, place))
        if other is None:
            return SeedValue(seed, None, source, f"{first.name}: {gap(self._contents, column, first)}")
        return SeedValue(seed, own.figure / other.figure if other.figure > 0 else None, source)

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
        file = self._contents.file(measure, place)
        return "" if file is None else self._relative(file)

    def _relative(self, file: Path) -> str:
        output = self._config.output
        return (file.relative_to(output) if file.is_relative_to(output) else file).as_posix()
