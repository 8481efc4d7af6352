"""The files of a comparison as measurements: what each run came to, or why it came to nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safelora_fast.compare.failed_measurements import FAILURE
from safelora_fast.compare.measures import MEASURES
from safelora_fast.compare.measures.base import kept
from safelora_fast.compare.paths import FAILURE as FAILED
from safelora_fast.compare.paths import reference_of
from safelora_fast.compare.pooling import count_of
from safelora_fast.compare.report import NOT_MEASURED
from safelora_fast.compare.runs import Runs
from safelora_fast.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from safelora_fast.compare.columns import Measured
    from safelora_fast.compare.config import CompareConfig
    from safelora_fast.compare.paths import Place
    from safelora_fast.compare.pooling import Outcome
    from safelora_fast.compare.shared_models import Workbench


class Contents:
    """Measurements, each file read once.

    Args:
        config: the comparison.
        bench: what measurements depend on; those of other settings or adapters do not count.

    Attributes:
        reference: the model before the fine-tune.
        runs: which of them are there; nothing that was measured on another run in the place of one counts.
    """

    def __init__(self, config: CompareConfig, bench: Workbench) -> None:
        self.reference = reference_of(config)
        self.runs = Runs(config)
        self._bench = bench
        self._measures = {measure.name: measure for measure in MEASURES}
        self._known: dict[tuple[str, int | None, str], dict[str, Any]] = {}

    def applies(self, measure: str, place: Place) -> bool:
        """Whether the configuration asks for a measure of a run, or of the reference."""
        return self._measures[measure].applies(place, self._bench)

    def of(self, measure: str, place: Place) -> dict[str, Any]:
        """What a measurement found; `failure` where there is nothing."""
        key = (place.name, place.seed, measure)
        if key not in self._known:
            self._known[key] = self._read(measure, place)
        return self._known[key]

    def failure(self, measure: str, place: Place) -> str | None:
        """Why a measurement found nothing."""
        found: str | None = self.of(measure, place).get(FAILURE)
        return found

    def file(self, measure: str, place: Place) -> Path | None:
        """What says what a measurement found, or why a run that it needs failed; None where there is neither yet."""
        files = (place.file(measure), self._measures[measure].place(place).folder / FAILED)
        return next((file for file in files if file.is_file()), None)

    def record(self, place: Place) -> dict[str, Any]:
        """The record of a run's training; empty where the run is not there, or was not trained here."""
        return place.record() if self.runs.missing(place) is None else {}

    def sample(self, one: Measured, place: Place, content: dict[str, Any] | None = None) -> Outcome | None:
        """What a run came to in a column, item by item; None where it came to nothing.

        Args:
            one: the column.
            place: of the run.
            content: in the place of the run's own measurement.
        """
        found = self.of(one.measure, place) if content is None else content
        reference = self.of(one.measure, self.reference)
        if FAILURE in found or (FAILURE in reference and not one.of_reference):
            return None
        try:
            sample = one.sample(found, reference)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
            files = ", ".join(str(where.file(one.measure)) for where in (place, self.reference))
            raise DataError(
                f"{files}: what was measured is damaged ({error!r}); delete it, to have it measured again"
            ) from error
        return sample if sample is not None and count_of(sample) else None

    def samples(self, one: Measured, places: Sequence[Place]) -> dict[int, Outcome]:
        """By seed, of those that came to something."""
        found = {}
        for place in places:
            sample = self.sample(one, place) if self.applies(one.measure, place) else None
            if sample is not None and place.seed is not None:
                found[place.seed] = sample
        return found

    def _read(self, measure: str, place: Place) -> dict[str, Any]:
        missing = self.runs.missing(self._measures[measure].place(place))
        if missing is not None:
            return {FAILURE: missing}
        return kept(self._measures[measure], place, self._bench) or {FAILURE: NOT_MEASURED}
