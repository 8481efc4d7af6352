"""Why a run came to nothing, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safelora_fast.compare.failed_measurements import FAILURE

if TYPE_CHECKING:
    from safelora_fast.compare.columns import Measured
    from safelora_fast.compare.measurement_files import Contents
    from safelora_fast.compare.paths import Place


def gap(contents: Contents, one: Measured, place: Place, content: dict[str, Any] | None = None) -> str:
    """Why a run that has no sample in a column has none.

    Args:
        contents: of the comparison.
        one: the column.
        place: of the run.
        content: in the place of the run's own measurement.
    """
    found = contents.of(one.measure, place) if content is None else content
    reference = contents.of(one.measure, contents.reference)
    if FAILURE in found:
        return str(found[FAILURE])
    if FAILURE in reference and not one.of_reference:
        return f"the reference: {reference[FAILURE]}"
    return one.gap(found, reference)
