"""Which run and file each figure came from, and why some have none."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from urllib.parse import quote

from safelora_fast.compare.report import SWEEP_TITLE, is_pending

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from safelora_fast.compare.report import Cell, Column, ComparisonReport, Failure, Row, SeedValue

    Place = tuple[str, Mapping[str, Cell]]

SWEEP = "SafeLoRA sweep"


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
    def pending(self) -> bool:
        """Whether it is a reason that says that nothing has been done yet."""
        return is_pending(self.what)

    @property
    def scope(self) -> str:
        """The measures in words."""
        return "all measures" if self.whole and len(self.measures) > 1 else ", ".join(self.measures)


def failures(report: ComparisonReport) -> list[Origin]:
    """The reason of every failure, and what is not done yet, once for each run.

    Of the sweep, thresholds that lack the same stand together.
    """
    rows = [(row.name, row.cells) for row in report.rows]
    found = _grouped(rows, report.columns, lambda seed: seed.failure, report.failed)
    told = {(one.seed, one.reason) for one in report.failed if one.what == SWEEP_TITLE}
    alike: dict[tuple[int, str, tuple[str, ...]], list[tuple[float, Origin]]] = {}
    for point in report.sweep:
        for one in _grouped([(SWEEP, point.cells)], report.columns, lambda seed: seed.failure):
            if (one.seed, one.what) not in told:
                alike.setdefault((one.seed, one.what, one.measures), []).append((point.threshold, one))
    for some in alike.values():
        thresholds = [threshold for threshold, _ in some]
        place = SWEEP if len(thresholds) == len(report.sweep) > 1 else sweep_place(*thresholds)
        found.append(replace(some[0][1], place=place))
    return found


def files(report: ComparisonReport) -> list[Origin]:
    """Every source file, once for each run; those of the sweep together, whatever the threshold."""
    places = [(row.name, row.cells) for row in report.rows] + [(SWEEP, one.cells) for one in report.sweep]
    return _grouped(places, report.columns, lambda seed: seed.source or None)


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


def has_any(row: Row, columns: Iterable[Column]) -> bool:
    """Whether the row has at least one of these measures."""
    return any(column.key in row.cells for column in columns)


def sweep_columns(report: ComparisonReport) -> list[Column]:
    """The measures that the threshold sweep has."""
    return [column for column in report.columns if any(column.key in point.cells for point in report.sweep)]


def sweep_place(*thresholds: float) -> str:
    """What thresholds of the sweep are called where they stand beside rows."""
    return f"{SWEEP}, τ = {', '.join(f'{threshold:g}' for threshold in thresholds)}"


def _grouped(
    places: Iterable[Place],
    columns: Sequence[Column],
    what: Callable[[SeedValue], str | None],
    others: Iterable[Failure] = (),
) -> list[Origin]:
    """What measures share, by place, then by seed."""
    measures: dict[tuple[str, int, str], dict[str, None]] = {}
    asked: dict[tuple[str, int], set[str]] = {}
    order: dict[str, int] = {}
    for place, cells in places:
        order.setdefault(place, len(order))
        for column in columns:
            for seed in cells[column.key].seeds if column.key in cells else ():
                asked.setdefault((place, seed.seed), set()).add(column.title)
                shared = what(seed)
                if shared is not None:
                    measures.setdefault((place, seed.seed, shared), {})[column.title] = None
    for one in others:
        order.setdefault(one.row, len(order))
        asked.setdefault((one.row, one.seed), set()).add(one.what)
        measures.setdefault((one.row, one.seed, one.reason), {})[one.what] = None
    return [
        Origin(place, seed, shared, tuple(titles), titles.keys() == asked[place, seed])
        for (place, seed, shared), titles in sorted(measures.items(), key=lambda item: (order[item[0][0]], item[0][1]))
    ]
