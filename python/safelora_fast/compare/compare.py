"""A comparison from its configuration to its report: train what is not trained, measure what is not measured, write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safelora_fast.compare.config import OPERATOR_SWAP
from safelora_fast.compare.input_checks import check_inputs
from safelora_fast.compare.paths import CONFIGURATION, check_place, places_of, reference_of
from safelora_fast.compare.runs import Runs, trainings_of
from safelora_fast.compare.train_runs import check_folder, is_finished, train
from safelora_fast.errors import InterruptedRunError, OutputError, SafeLoraFastError
from safelora_fast.files.output import alone, described, whole_folder
from safelora_fast.files.store import write_json
from safelora_fast.files.yaml_reader import dump_yaml
from safelora_fast.judging import operator_swap

if TYPE_CHECKING:
    from collections.abc import Callable

    from safelora_fast.compare.config import CompareConfig
    from safelora_fast.compare.measures import Measure
    from safelora_fast.compare.paths import Place
    from safelora_fast.compare.report import ComparisonReport
    from safelora_fast.compare.runs import Training
    from safelora_fast.compare.shared_models import Workbench


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
        overwrite: train runs anew whose recipe, data, model or files have changed, instead of refusing.
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
        if not (config.output / CONFIGURATION).is_file():  # it says whose the folder is, whatever ends this call
            _keep_configuration(config)
        _make_swap_data(config)
        trainings = list(trainings_of(config))
        _refuse_changed(trainings, overwrite=overwrite)
        _try_recipes(trainings)
        _keep_configuration(config)
        try:
            for number, training in enumerate(trainings, start=1):
                if not is_finished(training.recipe):
                    announce(f"training {number} of {len(trainings)}: {training.title}")
                failure = train(training.place, training.recipe, overwrite=overwrite, talk=talk)
                if failure is not None:
                    announce(f"{training.title}: failed: {failure}")
            return _measure(config, progress, announce)
        except KeyboardInterrupt:
            raise InterruptedRunError("interrupted; what is finished is kept: the same command goes on") from None


def report_only(config: CompareConfig) -> ComparisonReport:
    """Write the report of what is there, and run nothing.

    Raises:
        OutputError: there is no comparison, or the report cannot be written.
    """
    from safelora_fast.compare.shared_models import Workbench

    check_place(config.output)
    if not (config.output / CONFIGURATION).is_file():
        raise OutputError(f"{config.output}: holds no comparison yet")
    return _write(config, Workbench(config))


def _keep_configuration(config: CompareConfig) -> None:
    with described(config.output):
        text = dump_yaml(config.document.values)
        (config.output / CONFIGURATION).write_text(text, encoding="utf-8")


def _measure(config: CompareConfig, progress: Any, announce: Callable[[str], None]) -> ComparisonReport:
    from safelora_fast.compare.measures import MEASURES, take
    from safelora_fast.compare.measures.margin import label
    from safelora_fast.compare.shared_models import Workbench

    bench, runs = Workbench(config, progress), Runs(config)
    places = [reference_of(config), *(place for run in config.runs for place in places_of(config, run))]
    for number, place in enumerate(places, start=1):
        wanted = [measure for measure in MEASURES if _is_wanted(measure, place, bench, runs)]
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


def _is_wanted(measure: Measure, place: Place, bench: Workbench, runs: Runs) -> bool:
    """Whether a measurement is asked for, can be taken, and has not been taken."""
    from safelora_fast.compare.measures import is_taken

    if not measure.applies(place, bench) or runs.missing(measure.place(place)) is not None:
        return False
    return not is_taken(measure, place, bench)


def _write(config: CompareConfig, bench: Workbench) -> ComparisonReport:
    from safelora_fast.compare.assemble import Assembly
    from safelora_fast.compare.page import render_markdown, render_page

    report = Assembly(config, bench).report()
    with described(config.output):
        write_json(config.output / "report.json", report.to_dict())
        (config.output / "report.md").write_text(render_markdown(report), encoding="utf-8")
        (config.output / "report.html").write_text(render_page(report), encoding="utf-8")
    return report


def _refuse_changed(trainings: list[Training], *, overwrite: bool) -> None:
    for training in trainings:
        check_folder(training.recipe, overwrite=overwrite)


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
    """The rows of the operator-swap task; any others are replaced, and then runs on those count as changed."""
    swap = config.measure.operator_swap
    if swap is None:
        return
    folder = config.output / OPERATOR_SWAP
    if not operator_swap.is_written(folder, **swap.made_from):
        with whole_folder(folder, overwrite=True) as partial:
            operator_swap.write(partial, **swap.made_from)
