"""The runs of a comparison: how each is trained, and whether it is there as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from safelora_fast.checkpoints.adapter import WEIGHTS
from safelora_fast.compare.paths import places_of
from safelora_fast.compare.report import NOT_TRAINED
from safelora_fast.compare.train_runs import changes, failure_of, has_ended, is_finished

if TYPE_CHECKING:
    from collections.abc import Iterator

    from safelora_fast.compare.config import CompareConfig
    from safelora_fast.compare.paths import Place
    from safelora_fast.recipe.recipe import Recipe

DAMAGED = "the adapter of this run is gone or damaged"


@dataclass(frozen=True)
class Training:
    """A run to train.

    Attributes:
        place: where it lies.
        recipe: of it.
        title: for people.
    """

    place: Place
    recipe: Recipe
    title: str


def trainings_of(config: CompareConfig) -> Iterator[Training]:
    """Every run that is trained here, and again on the operator-swap task; the narrow task first."""
    swap = config.measure.operator_swap
    runs = [(run, place) for run in config.runs if not run.adapters for place in places_of(config, run)]
    for run, place in runs:
        assert place.seed is not None  # noqa: S101
        assert place.adapter is not None  # noqa: S101
        recipe = config.recipe_for(run, place.seed, place.adapter)
        yield Training(place, recipe, f"{run.name}, seed {place.seed}")
    for run, place in runs:
        assert place.seed is not None  # noqa: S101
        if swap is None or (swap.seeds is not None and place.seed not in swap.seeds):
            continue
        trained = place.trained
        assert trained.adapter is not None  # noqa: S101
        recipe = config.recipe_for(run, place.seed, trained.adapter, config.swap_changes())
        yield Training(trained, recipe, f"{run.name}, seed {place.seed}, on operator swap")


class Runs:
    """Whether each run of a comparison is there as a whole; each is looked at once.

    Args:
        config: the comparison.
    """

    def __init__(self, config: CompareConfig) -> None:
        self._recipes = {training.place: training.recipe for training in trainings_of(config)}
        self._known: dict[Place, str | None] = {}

    def missing(self, place: Place) -> str | None:
        """Why a run is not there as its recipe has it now, or has no weights; None where it is, and for the reference."""
        if place not in self._known:
            self._known[place] = self._look(place)
        return self._known[place]

    def _look(self, place: Place) -> str | None:
        if place.adapter is None:
            return None
        recipe = self._recipes.get(place)
        if recipe is None:
            return None if (place.adapter / WEIGHTS).is_file() else f"{place.adapter}: holds no {WEIGHTS}"
        if is_finished(recipe):
            return None
        return failure_of(place, recipe) or changes(recipe) or (DAMAGED if has_ended(recipe) else NOT_TRAINED)
