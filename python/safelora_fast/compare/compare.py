"""Run a comparison: train what is missing, measure what is missing, and write the report."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from safelora_fast.checkpoints.resolver import adapter_folder, find_model
from safelora_fast.compare.comparison import all_runs
from safelora_fast.compare.measurements import RunCheck
from safelora_fast.compare.measures import MEASURES
from safelora_fast.compare.runs import CONFIGURATION, check_folder
from safelora_fast.compare.time_estimate import estimate_time
from safelora_fast.compare.train_runs import trainings_of
from safelora_fast.configuration.yaml_section import read_section
from safelora_fast.data.rows import read_rows
from safelora_fast.errors import (
    InterruptedRunError,
    MissingDependencyError,
    OutputError,
    SafeLoraFastError,
    how_to_install,
)
from safelora_fast.files.output import alone, described
from safelora_fast.files.store import write_json
from safelora_fast.files.yaml_reader import dump_yaml
from safelora_fast.models.adapters import fit_adapter
from safelora_fast.models.load import bare_outline, load_config
from safelora_fast.models.model_settings import ModelSection, SubjectSettings

if TYPE_CHECKING:
    from collections.abc import Callable

    from safelora_fast.compare.comparison import CompareConfig
    from safelora_fast.compare.report import ComparisonReport
    from safelora_fast.compare.runs import Run
    from safelora_fast.compare.train_runs import Training
    from safelora_fast.compare.workbench import Workbench
    from safelora_fast.recipe.prepare import Prepared


def compare(
    config: CompareConfig,
    *,
    overwrite: bool = False,
    talk: bool = True,
    progress: Any = None,
    announce: Callable[[str], None] = lambda _line: None,
) -> ComparisonReport:
    """Run what is missing, and write report.html, report.md and report.json.

    A failed run or measurement is marked in its cells, and the next call retries it.

    Args:
        config: the comparison.
        overwrite: retrain runs whose recipe, data, model or files have changed, instead of raising.
        talk: show training progress on standard error.
        progress: progress bar of the measurements; None shows nothing.
        announce: called with a line of text when a step begins or fails.

    Raises:
        OutputError: the folder holds something else, or runs of another configuration, or cannot be written.
        SafeLoraFastError: the data or the reference model cannot be read.
        InterruptedRunError: Ctrl-C; all finished work is kept.
    """
    check_folder(config.output)
    check_inputs(config)
    with alone(config.output):
        with described(config.output):
            config.output.mkdir(parents=True, exist_ok=True)
        if not (config.output / CONFIGURATION).is_file():  # marks the folder as a comparison's, even if this call fails
            _keep_configuration(config)
        for measure in MEASURES:
            measure.prepare(config)
        trainings = list(trainings_of(config))
        for training in trainings:
            training.check_folder(overwrite=overwrite)
        due = _due(config, trainings)
        estimate = estimate_time(config, due, _rehearse(due) or {})
        _keep_configuration(config)
        if estimate is not None:
            announce(str(estimate))
        try:
            return _run_all(
                config, trainings, due, overwrite=overwrite, talk=talk, progress=progress, announce=announce
            )
        except KeyboardInterrupt:
            raise InterruptedRunError("interrupted; what is finished is kept: the same command goes on") from None


def report_only(config: CompareConfig) -> ComparisonReport:
    """Write the report of the existing results, without running anything.

    Raises:
        OutputError: the folder holds no comparison, or the report cannot be written.
    """
    from safelora_fast.compare.workbench import Workbench

    check_folder(config.output)
    if not (config.output / CONFIGURATION).is_file():
        raise OutputError(f"{config.output}: holds no comparison yet")
    return _write_report(Workbench(config))


def check_inputs(config: CompareConfig) -> None:
    """Check before the first step that all data, adapters, checkpoints, judges, tasks and packages exist.

    Raises:
        SafeLoraFastError: the first one that is missing, in one line.
    """
    missing = [package for package in ("jinja2", "matplotlib") if find_spec(package) is None]
    if missing:
        raise MissingDependencyError(f"the report needs {', '.join(missing)}: {how_to_install('eval')}")
    section = read_section(config.document, ("recipe", "model"), ModelSection)
    find_model(section.path)
    SubjectSettings(section.path, config.measure.dtype, config.measure.device).resolved()
    adapters = [adapter_folder(adapter, tokenizer=True) for spec in config.runs for adapter in spec.adapters.values()]
    if adapters:  # trained elsewhere, so check their shapes against the model's
        model = bare_outline(section, load_config(section))
        for adapter in adapters:
            fit_adapter(adapter, model)
    rows = config.recipe.get("data", {}).get("path")
    if isinstance(rows, str) and any(not spec.adapters for spec in config.runs):
        read_rows(rows)
    for measure in MEASURES:
        measure.check_inputs(config)


def _keep_configuration(config: CompareConfig) -> None:
    with described(config.output):
        (config.output / CONFIGURATION).write_text(dump_yaml(config.document.values), encoding="utf-8")


def _due(config: CompareConfig, trainings: list[Training]) -> list[Training]:
    """Return the trainings to run: the unfinished ones, and those without weights that a missing measurement needs."""
    from safelora_fast.compare.workbench import Workbench

    bench, runs = Workbench(config), all_runs(config)
    wanted = {
        measure.measured_run(run)
        for measure in MEASURES
        for run in runs
        if measure.applies(run, config) and not measure.is_taken(run, bench)
    }
    return [
        training
        for training in trainings
        if not training.is_finished() and (training.run in wanted or not training.is_recorded())
    ]


def _rehearse(trainings: list[Training]) -> dict[tuple[str, bool], Prepared]:
    """Check every run's data, model and defenses before the first training; one seed per run is enough.

    Returns:
        What was prepared, by :attr:`Training.kind`.
    """
    rehearsed: dict[tuple[str, bool], Prepared] = {}
    for training in trainings:
        if training.kind in rehearsed:
            continue
        from safelora_fast.recipe.prepare import prepare

        try:
            rehearsed[training.kind] = prepare(training.recipe)
        except SafeLoraFastError as error:
            raise type(error)(f"{training.title}: {error}") from error
    return rehearsed


def _run_all(
    config: CompareConfig,
    trainings: list[Training],
    due: list[Training],
    *,
    overwrite: bool,
    talk: bool,
    progress: Any,
    announce: Callable[[str], None],
) -> ComparisonReport:
    """Train and measure run by run, all runs of the first seed first, so that a comparison of days shows results early."""
    from safelora_fast.compare.workbench import Workbench

    bench, check = Workbench(config, progress), RunCheck(config)
    runs = sorted(all_runs(config), key=lambda run: -1 if run.seed is None else run.seed)
    for number, run in enumerate(runs, start=1):
        own = {run, *(measure.measured_run(run) for measure in MEASURES)}
        for training in (one for one in trainings if one.run in own):
            if training in due:
                bench.release(reference=True)  # a training has the memory for itself
                announce(f"training {due.index(training) + 1} of {len(due)}: {training.title}")
            elif training.is_recorded():
                continue
            failure = training.train(overwrite=overwrite, talk=talk)
            if failure is not None:
                announce(f"{training.title}: failed: {failure}")
        _measure(run, f"{number} of {len(runs)}", bench, check, announce)
    return _write_report(bench)


def _measure(run: Run, place: str, bench: Workbench, check: RunCheck, announce: Callable[[str], None]) -> None:
    """Take the missing measurements of a run, and write the report; `place` is its number among the runs."""
    wanted = [
        measure
        for measure in MEASURES
        if measure.applies(run, bench.config)
        and check.missing(measure.measured_run(run)) is None
        and not measure.is_taken(run, bench)
    ]
    if not wanted:
        return
    announce(f"measuring {place}: {run.label}: {', '.join(measure.title for measure in wanted)}")
    for measure in wanted:
        failure = measure.take_and_keep(run, bench)
        if failure is not None:
            announce(f"{run.label}, {measure.title}: failed: {failure}")
    _write_report(bench)


def _write_report(bench: Workbench) -> ComparisonReport:
    from safelora_fast.compare.assemble import make_report
    from safelora_fast.compare.page import render_markdown, render_page

    report, output = make_report(bench), bench.config.output
    for measure in MEASURES:
        runs = [run for run in all_runs(bench.config) if measure.applies(run, bench.config)]
        if runs:
            measure.publish(bench.config, [measure.kept(run, bench) for run in runs])
    with described(output):
        write_json(output / "report.json", report.to_dict())
        (output / "report.md").write_text(render_markdown(report), encoding="utf-8")
        (output / "report.html").write_text(render_page(report), encoding="utf-8")
    return report
