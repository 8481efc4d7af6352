"""Benchmarks: runs tasks of lm-evaluation-harness and stores all results in one file."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast.checkpoints.resolver import adapter_folder
from safelora_fast.errors import EvaluationError, MissingDependencyError, OutputError, SettingsError, how_to_install
from safelora_fast.files.json_reader import OBJECT, check_fields, parse_as, read_json, why
from safelora_fast.files.output import resolved
from safelora_fast.files.store import write_json
from safelora_fast.judging.evaluation_folder import BENCHMARKS, START_ANEW, other_settings
from safelora_fast.recipe.model_stamp import subject_stamp

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.files.progress import ProgressBar
    from safelora_fast.models.load import SubjectSettings
    from safelora_fast.scoring.margin import Strings

FORMAT = 2
BATCH_SIZE = 16
TASK_FILES = (".yaml", ".yml", ".py", ".json", ".jsonl", ".csv", ".parquet", ".txt")


@dataclass(frozen=True)
class Metric:
    """One metric of a task.

    Attributes:
        name: e.g. "exact_match".
        filter: how the answer was extracted from the model's text, e.g. "strict-match"; "none" for the whole text.
        value: None if it is not finite.
        stderr: standard error of the value; None if the harness gives none.
        count: number of documents.
        higher_is_better: None if the task does not define it.
    """

    name: str
    filter: str
    value: float | None
    stderr: float | None
    count: int
    higher_is_better: bool | None

    @property
    def label(self) -> str:
        """The name, followed by the filter if there is one."""
        return self.name if self.filter == "none" else f"{self.name}, {self.filter}"


@dataclass(frozen=True)
class TaskResult:
    """The result of one task or one group of tasks.

    Attributes:
        task: name of the task or group.
        metrics: in the order that the task defines.
        version: version of the task.
        shots: number of few-shot examples; None for a group whose tasks differ.
        chat: whether prompts went through the chat template.
        lm_eval: version of the harness.
        definition: SHA-256 of the task's definition.
    """

    task: str
    metrics: tuple[Metric, ...]
    version: str
    shots: int | None
    chat: bool
    lm_eval: str
    definition: str

    def __post_init__(self) -> None:
        if not self.metrics:
            raise ValueError("there is no metric")

    @property
    def main(self) -> Metric:
        """The first metric."""
        return self.metrics[0]


@dataclass(frozen=True)
class BenchmarkReport:
    """The benchmark results of one model or adapter.

    Attributes:
        path: the file that stores the results.
        settings: the settings that the results depend on.
        tasks: in the order in which they were named; each tag is replaced by its tasks.
    """

    path: Path
    settings: dict[str, Any]
    tasks: tuple[TaskResult, ...]

    def __repr__(self) -> str:
        return f"BenchmarkReport({[result.task for result in self.tasks]}, path={str(self.path)!r})"

    def to_dict(self) -> dict[str, Any]:
        """Return the settings and results as plain values."""
        return {"settings": self.settings, "tasks": {result.task: asdict(result) for result in self.tasks}}


def check_harness() -> None:
    """Check that lm-evaluation-harness is installed.

    Raises:
        MissingDependencyError: it is not; the message says how to install it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingDependencyError(f"tasks need lm-eval: {how_to_install('eval')}")


def harness_version() -> str | None:
    """Return the version of lm-evaluation-harness, or None if it is not installed."""
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        return None


def check_tasks(names: Sequence[str], path: str | Path | None = None) -> None:
    """Check that all tasks exist, before a model is trained or loaded.

    Args:
        names: names of tasks, groups or tags.
        path: a folder of YAML files that define tasks.

    Raises:
        SettingsError: a task is unknown, or the folder does not exist.
        MissingDependencyError: lm-eval is not installed.
    """
    check_harness()
    folder = None if path is None else _task_folder(Path(path))
    from safelora_fast.judging.harness import Tasks

    Tasks(folder, names)


def benchmark(
    model: str | SubjectSettings,
    adapter: str | None,
    tasks: str | Sequence[str],
    output: Path,
    *,
    task_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    dtype: str = "auto",
    device: str = "auto",
    seed: int = 0,
    strings: Strings | None = None,
    chat_template: str | None = None,
    template_args: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    failures: dict[str, str] | None = None,
    progress: ProgressBar | None = None,
) -> BenchmarkReport:
    """Run tasks of lm-evaluation-harness on a model with its adapter, and store the result of each.

    The model is loaded once for all tasks, in the same way as for the other measurements of this package. Tasks that
    already have a result with the same settings are skipped.

    Args:
        model: a folder, a Hub id with an optional `@revision`, or the settings that it is loaded with. With settings, the
            arguments `dtype`, `device`, `chat_template`, `template_args` and `trust_remote_code` are ignored.
        adapter: a PEFT adapter to add to the model: a folder, or a Hub id with an optional `@revision`.
        tasks: names of tasks, groups or tags, as a list or separated by commas.
        output: a folder; `benchmarks.json` in it is rewritten after every task.
        task_path: a folder of YAML files that define tasks; they override the harness's tasks of the same name.
        limit: use only the first `limit` documents of each task; all by default.
        batch_size: requests per batch. It changes at most the last digits of the logits.
        dtype: "auto" is float32 on the CPU, bfloat16 on a GPU.
        device: "auto" is the GPU if there is one.
        seed: seed of the few-shot examples and of sampling.
        strings: "chat" puts prompts into the chat template, "text" does not. The default is chat if there is a template.
        chat_template: a Jinja file that replaces the tokenizer's template.
        template_args: values of variables that the template reads.
        trust_remote_code: run Python code that comes with the model.
        overwrite: replace results of other settings, and of tasks that were defined differently.
        failures: collects failed tasks with their reasons. If it is given, a failed task raises no error.
        progress: shows the requests of each task.

    Raises:
        SettingsError: no task is named, a task is unknown, or a setting is out of range.
        OutputError: the file holds results of other settings, or cannot be written.
        EvaluationError: a task failed (after the other tasks were run and stored), or memory ran out.
        MissingDependencyError: lm-eval is not installed.
        CheckpointError: the model cannot be loaded.
        AdapterError: the adapter does not fit the model.
    """
    check_harness()
    wanted = [name.strip() for name in tasks.split(",") if name.strip()] if isinstance(tasks, str) else list(tasks)
    if not wanted:
        raise SettingsError("no task is named")
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise SettingsError(f"{name} is {value}, it must be at least 1")
    if strings not in {None, "chat", "text"}:
        raise SettingsError(f"strings is {strings!r}, it must be chat or text")
    folder = None if task_path is None else _task_folder(Path(task_path))
    from safelora_fast.models.load import SubjectSettings, load_subject
    from safelora_fast.models.quiet_libraries import quiet_libraries

    if not isinstance(model, SubjectSettings):
        model = SubjectSettings(model, dtype, device, chat_template, trust_remote_code, template_args)
    subject = model.resolved()
    given = None if adapter is None else adapter_folder(adapter, tokenizer=True)
    settings = {
        **asdict(subject),
        "adapter": None if given is None else str(given),
        **subject_stamp(subject.model, given, subject.chat_template),
        "limit": limit,
        "seed": seed,
        "strings": strings,
        "lm_eval": harness_version(),
    }
    with quiet_libraries():
        from safelora_fast.judging.harness import CountedModel, Tasks, measure

        known = Tasks(folder, wanted)
        definitions = {name: known.definition(name) for name in known.names}
        file = Path(output) / BENCHMARKS
        results = _read_results(file, settings, definitions, overwrite=overwrite)
        missing = [name for name in known.names if name not in results or results[name].definition != definitions[name]]
        failed = {} if failures is None else failures
        if missing:
            loaded = load_subject(subject, given)
            has_template = bool(getattr(loaded.tokenizer, "chat_template", None))
            if strings == "chat" and not has_template:
                raise SettingsError("the tokenizer has no chat template: run the tasks on text (--task-strings text)")
            chat = has_template if strings is None else strings == "chat"
            counted = CountedModel(loaded, batch_size, progress, chat=chat)
        for name in missing:
            try:
                found = measure(counted, known, name, limit=limit, chat=chat, seed=seed)
                results[name] = _result(name, found, chat, definitions[name])
            except TaskError as error:
                failed[name] = str(error)
            else:
                tasks_done = {task: asdict(result) for task, result in results.items()}
                write_json(file, {"settings": {"format": FORMAT, **settings}, "tasks": tasks_done})
    if failed and failures is None:
        raise EvaluationError("; ".join(failed.values()))
    return BenchmarkReport(file, settings, tuple(results[name] for name in known.names if name not in failed))


class TaskError(EvaluationError):
    """One task failed; the others can still run."""


def _task_folder(path: Path) -> Path:
    if not path.expanduser().is_dir():
        raise SettingsError(f"{path}: there is no such folder of tasks")
    return resolved(path.expanduser())


def _result(name: str, results: dict[str, Any], chat: bool, definition: str) -> TaskResult:
    """Collect the metrics of one task. The harness names them `metric,filter` and `metric_stderr,filter`."""
    values = results["results"][name]
    counts, better = values.get("sample_count", {}), results["higher_is_better"].get(name, {})
    metrics = []
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr") and not isinstance(value, str | dict | list):
            count = int(counts.get(key, values.get("sample_len", 0)))
            stderr = _finite(values.get(f"{metric}_stderr,{kind}"))
            metrics.append(Metric(metric, kind, _finite(value), stderr, count, better.get(metric)))
    if not metrics:
        raise TaskError(f"task {name}: it gives no metric; name the tasks that it is made of")
    version, shots = str(results["versions"].get(name)), results["n-shot"].get(name)
    return TaskResult(name, tuple(metrics), version, shots, chat, str(harness_version()), definition)


def _finite(value: Any) -> float | None:
    return None if value is None or isinstance(value, str) or not math.isfinite(value) else float(value)


def _read_results(
    file: Path, settings: dict[str, Any], definitions: dict[str, str], *, overwrite: bool
) -> dict[str, TaskResult]:
    """Read stored results. With `overwrite`, results of other settings are dropped.

    Raises:
        OutputError: the file cannot be read, or holds results of other settings or of a task that was defined differently.
    """
    if not file.exists():
        return {}
    try:
        content = check_fields(read_json(file), {"settings": OBJECT, "tasks": OBJECT})
        results = {name: parse_as(TaskResult, values) for name, values in content["tasks"].items()}
        problem = other_settings(file, content["settings"], {"format": FORMAT, **settings})
    except (OSError, ValueError) as error:
        problem = f"{file}: {why(error)}; {START_ANEW}"
    if problem is not None:
        if not overwrite:
            raise OutputError(problem)
        return {}
    other = [name for name, known in definitions.items() if name in results and results[name].definition != known]
    if other and not overwrite:
        raise OutputError(
            f"{file}: holds results of a task {other[0]} that was defined differently; choose another output, or pass --overwrite"
        )
    return results
