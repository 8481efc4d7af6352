"""The files of a comparison as measurements: what each run came to, or why it came to nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safelora_fast.comparison.flaws import FAILURE
from safelora_fast.comparison.measures import MEASURES, is_taken
from safelora_fast.comparison.places import REFERENCE, Place, read
from safelora_fast.comparison.pooling import count_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.comparison.columns import Measured
    from safelora_fast.comparison.config import CompareConfig, RunSpec
    from safelora_fast.comparison.pooling import Outcome
    from safelora_fast.comparison.workbench import Workbench

NOT_YET = "not measured yet"
NOT_TRAINED = "not trained yet"


class Contents:
    """Measurements, each file read once.

    Args:
        config: the comparison.
        bench: what measurements depend on; those of other settings or adapters do not count.
    """

    def __init__(self, config: CompareConfig, bench: Workbench) -> None:
        self.reference = reference_of(config)
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
        sample = one.sample(found, reference)
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
        own = self._measures[measure].place(place)
        if place.seed is not None and own.fingerprint() is None:
            return {FAILURE: own.failure() or NOT_TRAINED}
        content = read(place.file(measure))
        if FAILURE not in content and not is_taken(self._measures[measure], place, self._bench):
            return {FAILURE: NOT_YET}
        return content


def places_of(config: CompareConfig, run: RunSpec) -> list[Place]:
    """Where a run's seeds lie."""
    found = []
    for seed in config.seeds_of(run):
        folder = config.output / run.folder / f"seed-{seed}"
        found.append(Place(run.name, seed, folder, run.adapters.get(seed, folder / "adapter")))
    return found


def reference_of(config: CompareConfig) -> Place:
    """Where the measurements of the model before the fine-tune lie."""
    return Place(REFERENCE, None, config.output / REFERENCE, None)
