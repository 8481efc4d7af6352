"""What a comparison needs beside its recipes, looked at before the first step: hours later would be too late."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from safelora_fast.checkpoints.resolver import adapter_folder, find_model
from safelora_fast.checkpoints.sources import open_checkpoint
from safelora_fast.data.rows import read_rows
from safelora_fast.errors import MissingDependencyError, how_to_install
from safelora_fast.judging.benchmarks import check_tasks
from safelora_fast.judging.questions import builtin_questions, choose, read_questions
from safelora_fast.models.adapters import fit_adapter
from safelora_fast.models.load import ModelSection, SubjectSettings, bare_outline, load_config
from safelora_fast.recipe.yaml_section import read_section

if TYPE_CHECKING:
    from safelora_fast.compare.config import CompareConfig


def check_inputs(config: CompareConfig) -> None:
    """Refuse rows, adapters, checkpoints, judges, benchmarks and packages that are not there.

    Raises:
        SafeLoraFastError: the first that is missing, in one line.
    """
    missing = [package for package in ("jinja2", "matplotlib") if find_spec(package) is None]
    if missing:
        raise MissingDependencyError(f"the report needs {', '.join(missing)}: {how_to_install('eval')}")
    measure = config.measure
    for rows in (measure.narrow, measure.general):
        if rows is not None:
            read_rows(rows)
    _check_adapters(config)
    if any(not run.adapters for run in config.runs):
        path = config.recipe.get("data", {}).get("path")
        if isinstance(path, str):
            read_rows(path)
    find_model(config.recipe["model"]["path"])
    SubjectSettings(config.recipe["model"]["path"], measure.dtype, measure.device).resolved()
    if measure.sweep is not None:
        open_checkpoint(measure.sweep.aligned or config.recipe["model"]["path"], role="aligned")
        open_checkpoint(measure.sweep.base, role="base")
    if measure.tasks is not None:
        check_tasks(measure.tasks.names, measure.tasks.path)
    if measure.judge is not None:
        _check_judge(config)


def _check_adapters(config: CompareConfig) -> None:
    """Adapters that were trained elsewhere must fit the model, whose shapes are enough to tell."""
    adapters = [adapter_folder(adapter, tokenizer=True) for run in config.runs for adapter in run.adapters.values()]
    if adapters:
        section = read_section(config.document, ("recipe", "model"), ModelSection)
        model = bare_outline(section, load_config(section))
        for adapter in adapters:
            fit_adapter(adapter, model)


def _check_judge(config: CompareConfig) -> None:
    from safelora_fast.judging.judge_names import check_inspect, find_judge

    judge = config.measure.judge
    assert judge is not None  # noqa: S101
    check_inspect()
    choose(builtin_questions() if judge.questions is None else read_questions(judge.questions), judge.kinds)
    find_judge(judge.model, judge.url)
