"""The two curves of the report: the first run's update as it is scaled down, and SafeLoRA's thresholds."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from safelora_fast.compare.cells import cell_of
from safelora_fast.compare.failed_measurements import FAILURE
from safelora_fast.compare.missing_reasons import gap
from safelora_fast.compare.report import SWEEP_TITLE, Failure, SeedValue, SweepPoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from safelora_fast.compare.columns import Measured
    from safelora_fast.compare.measurement_files import Contents
    from safelora_fast.compare.paths import Place

SCALED, SWEEP = "scaled", "sweep"
TITLES = {SCALED: "update scaled down", SWEEP: SWEEP_TITLE}


def weakened_path(
    contents: Contents, places: Sequence[Place], x: Measured, y: Measured
) -> tuple[tuple[float, float, str], ...]:
    """Points of two columns from none of the update to all of it, means over the seeds that have been measured.

    Args:
        contents: of the comparison.
        places: of the first run.
        x: a column of the drift.
        y: another.
    """
    whole = [
        place
        for place in places
        if contents.failure(SCALED, place) is None and all(contents.sample(one, place) is not None for one in (x, y))
    ]
    if not whole:
        return ()

    def point(found: Sequence[tuple[Place, dict[str, Any]]]) -> tuple[float, float]:
        """The means; NaN where a seed has none, whose absence would move the point."""
        samples = [[contents.sample(one, place, content) for place, content in found] for one in (x, y)]
        figures = [[math.nan if sample is None else sample.figure for sample in some] for some in samples]
        return sum(figures[0]) / len(found), sum(figures[1]) / len(found)

    shares = contents.of(SCALED, whole[0])["shares"]
    scaled = [
        (
            *point([(place, contents.of(SCALED, place)["shares"][share]) for place in whole]),
            f"{100 * float(share):g} %",
        )
        for share in shares
    ]
    return ((0.0, 0.0, ""), *scaled, (*point([(place, contents.of(x.measure, place)) for place in whole]), "100 %"))


def sweep_points(
    contents: Contents, places: Sequence[Place], columns: Sequence[Measured], source: Callable[[Place, str], str]
) -> tuple[SweepPoint, ...]:
    """What SafeLoRA makes of the first run at each threshold.

    Args:
        contents: of the comparison.
        places: of the first run.
        columns: those of margin and drift are in the sweep.
        source: the file of a measurement, relative to the report.
    """
    asked = [place for place in places if contents.applies(SWEEP, place)]
    swept = [place for place in asked if contents.failure(SWEEP, place) is None]
    if not swept:
        return ()
    points = []
    for number, first in enumerate(contents.of(SWEEP, swept[0])["points"]):
        found = {place: contents.of(SWEEP, place)["points"][number] for place in swept}
        cells = {}
        for one in columns:
            if one.measure not in first:
                continue
            parts = {
                place: found[place][one.measure] if place in found else contents.of(SWEEP, place) for place in asked
            }
            samples = {place: contents.sample(one, place, part) for place, part in parts.items()}
            values = [
                SeedValue(place.seed or 0, None, source(place, SWEEP), gap(contents, one, place, parts[place]))
                if sample is None
                else SeedValue(place.seed or 0, sample.figure, source(place, SWEEP))
                for place, sample in samples.items()
            ]
            cells[one.column.key] = cell_of(
                one.column, [sample for sample in samples.values() if sample is not None], values
            )
        projected = sum(point["projected"] for point in found.values()) / len(found)
        points.append(SweepPoint(first["threshold"], projected, first["modules"], cells))
    return tuple(points)


def curve_failures(contents: Contents, places: Sequence[Place]) -> Iterator[Failure]:
    """What the curves lack, of which no cell tells: whole files of the sweep, and files and points of the path."""
    for measure in (SCALED, SWEEP):
        for place in places:
            if not contents.applies(measure, place):
                continue
            seed, found, title = place.seed or 0, contents.of(measure, place), TITLES[measure]
            if FAILURE in found:
                yield Failure(place.name, seed, title, found[FAILURE])
            elif measure == SCALED:
                reasons: dict[str, list[str]] = {}
                for share, part in found["shares"].items():
                    if FAILURE in part:
                        reasons.setdefault(part[FAILURE], []).append(f"{100 * float(share):g} %")
                for reason, shares in reasons.items():
                    whole = len(shares) == len(found["shares"])
                    yield Failure(place.name, seed, title if whole else f"{title} to {', '.join(shares)}", reason)
