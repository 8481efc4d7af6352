"""A comparison from its configuration to its report: train what is not trained, measure what is not measured, write."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safelora_fast.comparison.inputs import check_inputs
from safelora_fast.comparison.places import CONFIGURATION, OPERATOR_SWAP, check_place
from safelora_fast.comparison.training import is_changed, is_finished, train
from safelora_fast.errors import DataError, OutputError, SafeLoraFastError
from safelora_fast.evaluation import operator_swap
from safelora_fast.posthoc.output import alone, described, whole_folder
from safelora_fast.recipe.document import dump_document
from safelora_fast.recipe.folder import write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from safelora_fast.comparison.config import CompareConfig
    from safelora_fast.comparison.measures import Measure
    from safelora_fast.comparison.places import Place
    from safelora_fast.comparison.report import ComparisonReport
    from safelora_fast.comparison.workbench import Workbench
    from safelora_fast.recipe.recipe import Recipe


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


def compare(
    config: CompareConfig,
    *,
    overwrite: bool = False,
    talk: bool = True,
    progress: Any = None,
    announce: Callable[[str], None] = lambda _line: None,
) -> ComparisonReport:
    """Run what is missing, and write report.html, report.md and report.json.

    A run or a measurement that fails is a marked cell of the report, and is tried again by the next call.

    Args:
        config: the comparison.
        overwrite: train runs anew whose recipe has changed, instead of refusing.
        talk: show on standard error how far each training is.
        progress: told how far each measurement is; None tells nobody.
        announce: told what begins.

    Raises:
        OutputError: the folder holds something else, or runs of another configuration, or cannot be written.
        SafeLoraFastError: rows, or the model before the fine-tune, cannot be read.
        InterruptedRunError: Ctrl-C; all that is finished is kept.
    """
    check_place(config.output)
    check_inputs(config)
    with alone(config.output):
        with described(config.output):
            config.output.mkdir(parents=True, exist_ok=True)
        _make_swap_data(config)
        trainings = list(_trainings(config))
        _refuse_changed(trainings, overwrite=overwrite)
        _try_recipes(trainings)
        with described(config.output):
            text = dump_document(config.document.values)
            (config.output / CONFIGURATION).write_text(text, encoding="utf-8")
        for number, training in enumerate(trainings, start=1):
            announce(f"training {number} of {len(trainings)}: {training.title}")
            failure = train(training.place, training.recipe, overwrite=overwrite, talk=talk)
            if failure is not None:
                announce(f"{training.title}: failed: {failure}")
        return _measure(config, progress, announce)


def report_only(config: CompareConfig) -> ComparisonReport:
    """Write the report of what is there, and run nothing.

    Raises:
        OutputError: there is no comparison, or the report cannot be written.
    """
    from safelora_fast.comparison.workbench import Workbench

    check_place(config.output)
    if not (config.output / CONFIGURATION).is_file():
        raise OutputError(f"{config.output}: holds no comparison yet")
    return _write(config, Workbench(config))


def _measure(config: CompareConfig, progress: Any, announce: Callable[[str], None]) -> ComparisonReport:
    from safelora_fast.comparison.contents import places_of, reference_of
    from safelora_fast.comparison.measures import MEASURES, take
    from safelora_fast.comparison.measures.margin import label
    from safelora_fast.comparison.workbench import Workbench

    bench = Workbench(config, progress)
    places = [reference_of(config), *(place for run in config.runs for place in places_of(config, run))]
    for number, place in enumerate(places, start=1):
        wanted = [measure for measure in MEASURES if _is_wanted(measure, place, bench)]
        if not wanted:
            continue
        names = ", ".join(measure.title for measure in wanted)
        announce(f"measuring {number} of {len(places)}: {label(place)}: {names}")
        for measure in wanted:
            failure = take(measure, place, bench)
            if failure is not None:
                announce(f"{label(place)}, {measure.title}: failed: {failure}")
        _write(config, bench)
    return _write(config, bench)


def _is_wanted(measure: Measure, place: Place, bench: Workbench) -> bool:
    """Whether a measurement is asked for, can be taken, and has not been taken."""
    from safelora_fast.comparison.measures import is_taken

    ready = place.seed is None or measure.place(place).fingerprint() is not None
    return ready and measure.applies(place, bench) and not is_taken(measure, place, bench)


def _write(config: CompareConfig, bench: Workbench) -> ComparisonReport:
    from safelora_fast.comparison.assemble import Assembly
    from safelora_fast.comparison.markdown import render_markdown
    from safelora_fast.comparison.page import render_page

    report = Assembly(config, bench).report()
    with described(config.output):
        write_json(config.output / "report.json", report.to_dict())
        (config.output / "report.md").write_text(render_markdown(report), encoding="utf-8")
        (config.output / "report.html").write_text(render_page(report), encoding="utf-8")
    return report


def _trainings(config: CompareConfig) -> Iterator[Training]:
    """Every run that is trained here, and again on the operator-swap task; the narrow task first."""
    from safelora_fast.comparison.contents import places_of

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


def _refuse_changed(trainings: list[Training], *, overwrite: bool) -> None:
    for training in trainings:
        changed = is_changed(training.recipe)
        if changed is not None and not overwrite:
            raise OutputError(changed)


def _try_recipes(trainings: list[Training]) -> None:
    """Refuse a run whose data, model or defences do not fit, before the first one is trained; its seeds are alike."""
    tried = set()
    for training in trainings:
        kind = training.place.name, training.place.folder.name
        if is_finished(training.recipe) or kind in tried:
            continue
        tried.add(kind)
        from safelora_fast.recipe.prepare import prepare

        try:
            prepare(training.recipe)
        except SafeLoraFastError as error:
            raise type(error)(f"{training.title}: {error}") from error


def _make_swap_data(config: CompareConfig) -> None:
    """The rows of the operator-swap task; those of other settings are replaced, and then runs on them count as changed."""
    swap = config.measure.operator_swap
    if swap is None:
        return
    folder = config.output / OPERATOR_SWAP
    wanted = {"difficulty": swap.difficulty, "rows": swap.rows, "held_out": swap.held_out, "seed": 0}
    try:
        former, _ = operator_swap.read(folder)
    except DataError:
        former = {}
    if {name: former.get(name) for name in wanted} != json.loads(json.dumps(wanted)):
        with whole_folder(folder, overwrite=True) as partial:
            operator_swap.write(partial, swap.difficulty, swap.rows, swap.held_out, 0)
