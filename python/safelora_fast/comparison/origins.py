"""Which run and file each figure came from, and why some have none."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from safelora_fast.comparison.report import Cell, Column, ComparisonReport, Row, SeedValue


@dataclass(frozen=True)
class Origin:
    """What several measures of one run share.

    Attributes:
        place: the row's name, or the threshold of the sweep.
        seed: of the run.
        what: the file, or the reason of the failure.
        measures: titles of the columns.
        whole: whether the run has no other measures.
    """

    place: str
    seed: int
    what: str
    measures: tuple[str, ...]
    whole: bool

    @property
    def scope(self) -> str:
        """The measures in words."""
        return "all measures" if self.whole and len(self.measures) > 1 else ", ".join(self.measures)


def failures(report: ComparisonReport) -> list[Origin]:
    """The reason of every failure, once for each run."""
    return _grouped(report, lambda seed: seed.failure)


def files(report: ComparisonReport) -> list[Origin]:
    """Every source file, once for each run."""
    return _grouped(report, lambda seed: seed.source or None)


def link(source: str) -> str:
    """The address of a source file, relative to the report; whatever the text is, it names no other scheme or host."""
    path = quote(source.lstrip("/") if source.startswith("//") else source, errors="surrogateescape")
    return path if path.startswith(("/", "./", "../")) else f"./{path}"


def runs(row: Row) -> dict[int, dict[str, SeedValue]]:
    """The figures of a row by seed, then by the column's key."""
    found: dict[int, dict[str, SeedValue]] = {}
    for key, cell in row.cells.items():
        for seed in cell.seeds:
            found.setdefault(seed.seed, {})[key] = seed
    return dict(sorted(found.items()))


def rows_with(rows: Iterable[Row], columns: Sequence[Column]) -> list[Row]:
    """The rows that have at least one of these measures."""
    return [row for row in rows if any(column.key in row.cells for column in columns)]


def sweep_columns(report: ComparisonReport) -> list[Column]:
    """The measures that the threshold sweep has."""
    return [column for column in report.columns if any(column.key in point.cells for point in report.sweep)]


def sweep_place(threshold: float) -> str:
    """What a threshold of the sweep is called where it stands beside rows."""
    return f"SafeLoRA sweep, τ = {threshold:g}"


def _grouped(report: ComparisonReport, what: Callable[[SeedValue], str | None]) -> list[Origin]:
    measures: dict[tuple[str, int, str], list[str]] = {}
    totals: Counter[tuple[str, int]] = Counter()
    for place, cells in _places(report):
        for column in report.columns:
            for seed in cells[column.key].seeds if column.key in cells else ():
                totals[place, seed.seed] += 1
                shared = what(seed)
                if shared is not None:
                    measures.setdefault((place, seed.seed, shared), []).append(column.title)
    return [
        Origin(place, seed, shared, tuple(titles), len(titles) == totals[place, seed])
        for (place, seed, shared), titles in measures.items()
    ]


def _places(report: ComparisonReport) -> Iterator[tuple[str, Mapping[str, Cell]]]:
    yield from ((row.name, row.cells) for row in report.rows)
    yield from ((sweep_place(point.threshold), point.cells) for point in report.sweep)
