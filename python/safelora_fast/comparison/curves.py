"""The two curves of the report: the first run's update as it is scaled down, and SafeLoRA's thresholds."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from safelora_fast.comparison.cells import cell_of
from safelora_fast.comparison.report import SeedValue, SweepPoint

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from safelora_fast.comparison.columns import Measured
    from safelora_fast.comparison.contents import Contents
    from safelora_fast.comparison.places import Place


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
    measured = [place for place in places if contents.failure("scaled", place) is None]
    whole = [place for place in measured if contents.failure(x.measure, place) is None]
    if not whole:
        return ()

    def point(found: Sequence[tuple[Place, dict[str, Any]]]) -> tuple[float, float]:
        samples = [[contents.sample(one, place, content) for place, content in found] for one in (x, y)]
        figures = [[sample.figure for sample in some if sample is not None] for some in samples]
        means = [sum(some) / len(some) if some else math.nan for some in figures]
        return means[0], means[1]

    shares = contents.of("scaled", whole[0])["shares"]
    scaled = [
        (
            *point([(place, contents.of("scaled", place)["shares"][share]) for place in whole]),
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
    swept = [place for place in places if contents.applies("sweep", place) and contents.failure("sweep", place) is None]
    if not swept:
        return ()
    points = []
    for number, first in enumerate(contents.of("sweep", swept[0])["points"]):
        found = {place: contents.of("sweep", place)["points"][number] for place in swept}
        cells = {}
        for one in columns:
            if one.measure not in first:
                continue
            samples = {place: contents.sample(one, place, point[one.measure]) for place, point in found.items()}
            known = {place: sample for place, sample in samples.items() if sample is not None}
            values = [
                SeedValue(place.seed or 0, sample.figure, source(place, "sweep")) for place, sample in known.items()
            ]
            cells[one.column.key] = cell_of(one.column, list(known.values()), values)
        projected = sum(point["projected"] for point in found.values()) / len(found)
        points.append(SweepPoint(first["threshold"], projected, first["modules"], cells))
    return tuple(points)
