"""Which run and file each value of a report came from, and why some values are missing."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from urllib.parse import quote

from safelora_fast.compare.report import PENDING, SWEEP_TITLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from safelora_fast.compare.report import Cell, Column, ComparisonReport, Failure, Row, SeedValue

SWEEP = "SafeLoRA sweep"


@dataclass(frozen=True)
class Origin:
    """A source file or failure that several measures of one run share.

    Attributes:
        place: name of the row, or threshold of the sweep.
        seed: seed of the run.
        what: the file, or the reason for the failure.
        measures: titles of the columns.
        whole: whether these are all measures of the run.
    """

    place: str
    seed: int
    what: str
    measures: tuple[str, ...]
    whole: bool

    @property
    def pending(self) -> bool:
        """Whether the value is missing only because the work is not done yet."""
        return self.what.endswith(PENDING)

    @property
    def scope(self) -> str:
        """The titles of the measures, or "all measures"."""
        return "all measures" if self.whole and len(self.measures) > 1 else ", ".join(self.measures)


def failures(report: ComparisonReport) -> list[Origin]:
    """Return each reason for missing values once per run; sweep thresholds with the same reason are merged."""
    rows = [(row.name, row.cells) for row in report.rows]
    found = _grouped(rows, report.columns, lambda seed: seed.failure, report.failed)
    told = {(one.seed, one.reason) for one in report.failed if one.what == SWEEP_TITLE}
    alike: dict[Origin, list[float]] = defaultdict(list)
    for point in report.sweep:
        for one in _grouped([(SWEEP, point.cells)], report.columns, lambda seed: seed.failure):
            if (one.seed, one.what) not in told:
                alike[replace(one, whole=False)].append(point.threshold)
    for one, thresholds in alike.items():
        place = SWEEP if len(thresholds) == len(report.sweep) > 1 else sweep_place(*thresholds)
        found.append(replace(one, place=place))
    return found


def files(report: ComparisonReport) -> list[Origin]:
    """Return every source file once per run; files of the sweep once for all thresholds."""
    places = [(row.name, row.cells) for row in report.rows] + [(SWEEP, one.cells) for one in report.sweep]
    return _grouped(places, report.columns, lambda seed: seed.source or None)


def link(source: str) -> str:
    """Return the URL of a source file, relative to the report; it can never name a scheme or a host."""
    path = quote(source.lstrip("/") if source.startswith("//") else source, errors="surrogateescape")
    return path if path.startswith(("/", "./", "../")) else f"./{path}"


def runs(row: Row) -> dict[int, dict[str, SeedValue]]:
    """Return the values of a row by seed, then by column key."""
    found: dict[int, dict[str, SeedValue]] = defaultdict(dict)
    for key, cell in row.cells.items():
        for seed in cell.seeds:
            found[seed.seed][key] = seed
    return dict(sorted(found.items()))


def sweep_columns(report: ComparisonReport) -> list[Column]:
    """Return the columns that the threshold sweep has values for."""
    return [column for column in report.columns if any(column.key in point.cells for point in report.sweep)]


def sweep_place(*thresholds: float) -> str:
    """Return a label for some thresholds of the sweep, used beside the names of rows."""
    return f"{SWEEP}, τ = {', '.join(f'{threshold:g}' for threshold in thresholds)}"


def _grouped(
    places: Iterable[tuple[str, Mapping[str, Cell]]],
    columns: Iterable[Column],
    what: Callable[[SeedValue], str | None],
    failed: Iterable[Failure] = (),
) -> list[Origin]:
    """Merge the measures of a run that share a file or reason; sorted by place in report order, then by seed."""
    measures: dict[tuple[str, int, str], dict[str, None]] = defaultdict(dict)
    asked: dict[tuple[str, int], set[str]] = defaultdict(set)
    order: dict[str, int] = {}
    for place, cells in places:
        order.setdefault(place, len(order))
        for column in columns:
            for seed in cells[column.key].seeds if column.key in cells else ():
                asked[place, seed.seed].add(column.title)
                shared = what(seed)
                if shared is not None:
                    measures[place, seed.seed, shared][column.title] = None
    for one in failed:
        asked[one.row, one.seed].add(one.what)
        measures[one.row, one.seed, one.reason][one.what] = None
    found = [
        Origin(place, seed, shared, tuple(titles), titles.keys() == asked[place, seed])
        for (place, seed, shared), titles in measures.items()
    ]
    return sorted(found, key=lambda one: (order.get(one.place, len(order)), one.seed))
