"""Benign utility: tasks of lm-evaluation-harness, kept task by task in one file."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast.checkpoints.resolver import adapter_folder
from safelora_fast.errors import EvaluationError, MissingDependencyError, OutputError, SettingsError, how_to_install
from safelora_fast.files.json_reader import COUNT, FLAG, LIST, NUMBER, OBJECT, TEXT, check_fields, read_json, why
from safelora_fast.files.output import described, resolved
from safelora_fast.files.store import write_json
from safelora_fast.judging.evaluation_folder import BENCHMARKS, changed_settings, told
from safelora_fast.recipe.model_stamp import subject_stamp

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.judging.evaluate import Progress
    from safelora_fast.models.load import SubjectSettings
    from safelora_fast.scoring.margin import Strings

FORMAT = 2
TASK = {"task": TEXT, "metrics": LIST, "version": TEXT, "chat": FLAG, "lm_eval": TEXT, "definition": TEXT}
METRIC = {"name": TEXT, "filter": TEXT, "count": COUNT}
FIGURES = {
    "value": NUMBER,
    "stderr": NUMBER,
    "higher_is_better": FLAG,
}  # null where there is none, or none that is finite
BATCH_SIZE = 16
TASK_FILES = (".yaml", ".yml", ".py", ".json", ".jsonl", ".csv", ".parquet", ".txt")


@dataclass(frozen=True)
class Metric:
    """One figure of a task.

    Attributes:
        name: of the metric, e.g. "exact_match".
        filter: how answers were taken from what the model wrote, e.g. "strict-match"; "none" as they stand.
        value: the figure.
        stderr: its standard error, None where the harness gives none.
        count: documents that it is over.
        higher_is_better: None where the task does not say.
    """

    name: str
    filter: str
    value: float
    stderr: float | None
    count: int
    higher_is_better: bool | None

    @property
    def label(self) -> str:
        """The name, with the filter where there is one."""
        return self.name if self.filter == "none" else f"{self.name}, {self.filter}"


@dataclass(frozen=True)
class TaskResult:
    """What one task, or one group of tasks, measured.

    Attributes:
        task: its name.
        metrics: in the order of the task's own.
        version: of the task.
        shots: examples before each question; None for a group whose tasks differ.
        chat: whether prompts went through the chat template.
        lm_eval: version of the harness.
        definition: SHA-256 of how the task is defined.
    """

    task: str
    metrics: tuple[Metric, ...]
    version: str
    shots: int | None
    chat: bool
    lm_eval: str
    definition: str

    @property
    def main(self) -> Metric:
        """The first of the metrics."""
        return self.metrics[0]


@dataclass(frozen=True)
class BenchmarkReport:
    """What tasks say of one model, or adapter.

    Attributes:
        path: the file that it stands in.
        settings: what the figures belong to.
        tasks: in the order in which they were asked for; tags are taken apart into their tasks.
    """

    path: Path
    settings: dict[str, Any]
    tasks: tuple[TaskResult, ...]

    def __repr__(self) -> str:
        return f"BenchmarkReport({[result.task for result in self.tasks]}, path={str(self.path)!r})"

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {"settings": self.settings, "tasks": {result.task: asdict(result) for result in self.tasks}}


def check_harness() -> None:
    """Refuse to go on without lm-evaluation-harness.

    Raises:
        MissingDependencyError: with how to install it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingDependencyError(f"tasks need lm-eval: {how_to_install('eval')}")


def harness_version() -> str | None:
    """The version of lm-evaluation-harness; None where it is not installed."""
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        return None


def check_tasks(names: Sequence[str], path: str | Path | None = None) -> None:
    """Refuse tasks that are not there, before a model is trained or loaded for them.

    Args:
        names: of tasks, groups or tags.
        path: a folder of YAML files that define tasks.

    Raises:
        SettingsError: one is not known, or there is no such folder.
        MissingDependencyError: lm-eval is not installed.
    """
    check_harness()
    folder = None if path is None else _task_folder(Path(path))
    from safelora_fast.judging.harness import Tasks

    Tasks(folder, names)


def benchmark(
    model: str,
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
    progress: Progress | None = None,
) -> BenchmarkReport:
    """Run tasks of lm-evaluation-harness on a model with its adapter, and keep what each of them measures.

    The model is loaded as the other measures of this package load it, once for all tasks. A task that has been run with the
    same settings is not run again.

    Args:
        model: a folder, or a Hub id with an optional `@revision`.
        adapter: a PEFT adapter to put on it: a folder, or a Hub id with an optional `@revision`.
        tasks: names of tasks, groups or tags; a text holds names with commas between.
        output: a folder; `benchmarks.json` in it is renewed after every task.
        task_path: a folder of YAML files that define tasks; they come before the harness's own of the same name.
        limit: documents of each task, the first ones; all by default.
        batch_size: requests at a time; figures depend on it by the last digits of logits only.
        dtype: "auto" is float32 on the CPU, bfloat16 on a GPU.
        device: "auto" is the GPU where there is one.
        seed: of the examples that are drawn, and of sampling where a task samples.
        strings: "chat" puts prompts into the chat template, "text" does not; by default as the tokenizer has one or has not.
        chat_template: a Jinja file in the place of the tokenizer's own template.
        template_args: values of variables that the template reads.
        trust_remote_code: run Python code that comes with the model.
        overwrite: replace results of other settings, and of tasks that were defined otherwise.
        failures: takes tasks that fail, and why, in the place of an error.
        progress: told of every task's requests.

    Raises:
        SettingsError: no task is named, one is unknown, or a setting is out of range.
        OutputError: the file is of other settings, or cannot be written.
        EvaluationError: a task fails. The others are run and kept before that is said, but for want of memory.
        MissingDependencyError: lm-eval is not installed.
        CheckpointError: the model cannot be loaded.
        AdapterError: the adapter cannot be put on it.
    """
    check_harness()
    tasks = [name.strip() for name in tasks.split(",") if name.strip()] if isinstance(tasks, str) else tasks
    if not tasks:
        raise SettingsError("no task is named")
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise SettingsError(f"{name} is {value}, it must be at least 1")
    if strings not in {None, "chat", "text"}:
        raise SettingsError(f"strings is {strings!r}, it must be chat or text")
    folder = None if task_path is None else _task_folder(Path(task_path))
    from safelora_fast.models.load import SubjectSettings
    from safelora_fast.models.quiet_libraries import quiet_libraries

    subject = SubjectSettings(model, dtype, device, chat_template, trust_remote_code, template_args).resolved()
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
        run = _Run(Path(output), subject, given, settings, batch_size, progress)
        return _run(run, list(tasks), folder, failures, overwrite=overwrite)


@dataclass(frozen=True)
class _Run:
    """What is measured, and where it goes."""

    output: Path
    subject: SubjectSettings
    adapter: Path | None
    settings: dict[str, Any]
    batch_size: int
    progress: Progress | None


def _run(
    run: _Run, wanted: list[str], folder: Path | None, failures: dict[str, str] | None, *, overwrite: bool
) -> BenchmarkReport:
    from torch import OutOfMemoryError

    from safelora_fast.judging.harness import VERSION, CountedModel, Tasks, measure
    from safelora_fast.models.load import load_subject

    tasks = Tasks(folder, wanted)
    kept = _Kept(run.output, run.settings, overwrite=overwrite)
    missing = [name for name in tasks.names if not kept.has(name, tasks.definition(name))]
    if missing:
        subject = load_subject(run.subject, run.adapter)
        has_template, strings = bool(getattr(subject.tokenizer, "chat_template", None)), run.settings["strings"]
        if strings == "chat" and not has_template:
            raise SettingsError("the tokenizer has no chat template: run the tasks on text (--task-strings text)")
        chat = has_template if strings is None else strings == "chat"
        model = CountedModel(subject, run.batch_size, run.progress, chat=chat)
        failed = {} if failures is None else failures
        for name in missing:
            try:
                found = measure(model, tasks, name, limit=run.settings["limit"], chat=chat, seed=run.settings["seed"])
                result = _result(name, found, chat, VERSION, tasks.definition(name))
            except EvaluationError as error:
                if isinstance(error.__cause__, OutOfMemoryError):
                    raise
                failed[name] = str(error)
            else:
                kept.add(result)
        if failed and failures is None:
            raise EvaluationError("; ".join(failed.values()))
    done = tuple(kept.results[name] for name in tasks.names if name in kept.results)
    return BenchmarkReport(kept.path, run.settings, done)


def _task_folder(path: Path) -> Path:
    if not path.expanduser().is_dir():
        raise SettingsError(f"{path}: there is no such folder of tasks")
    return resolved(path.expanduser())


def _result(name: str, results: dict[str, Any], chat: bool, version: str, definition: str) -> TaskResult:
    """The figures of one task among what the harness says, where they stand as `metric,filter` and `metric_stderr,filter`."""
    figures = results["results"][name]
    counts, better = figures.get("sample_count", {}), results["higher_is_better"].get(name, {})
    metrics = []
    for key, value in figures.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or isinstance(value, str | dict | list):
            continue
        error = figures.get(f"{metric}_stderr,{kind}")
        stderr = None if error is None or isinstance(error, str) or not math.isfinite(error) else float(error)
        count = int(counts.get(key, figures.get("sample_len", 0)))
        metrics.append(Metric(metric, kind, float(value), stderr, count, better.get(metric)))
    if not metrics:
        raise EvaluationError(f"task {name}: it gives no figure; name the tasks that it is made of")
    shots = results["n-shot"].get(name)
    return TaskResult(
        name,
        tuple(metrics),
        str(results["versions"].get(name)),
        shots,
        chat,
        version,
        definition,
    )


class _Kept:
    """The file of results; it is written when a task is done, and until then holds what it held.

    Raises:
        OutputError: it is of other settings, or cannot be read, and must not be overwritten.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], *, overwrite: bool) -> None:
        self.path = folder / BENCHMARKS
        self._settings = json.loads(json.dumps({"format": FORMAT, **settings}))
        self._overwrite = overwrite
        self.results: dict[str, TaskResult] = {}
        if self.path.exists():
            try:
                self.results = self._read()
            except OutputError:
                if not overwrite:
                    raise

    def _read(self) -> dict[str, TaskResult]:
        try:
            content = check_fields(read_json(self.path), {"settings": OBJECT, "tasks": OBJECT})
            former = content["settings"]
            results = {name: _read_result(values) for name, values in content["tasks"].items()}
        except (OSError, ValueError) as error:
            raise OutputError(f"{self.path}: {why(error)}; pass --overwrite to start anew, or delete it") from error
        changed = changed_settings(former, self._settings)
        if changed:
            raise OutputError(f"{self.path}: holds results {told(changed)}; choose another output, or pass --overwrite")
        return results

    def has(self, name: str, definition: str) -> bool:
        """Whether a task is there already."""
        known = self.results.get(name)
        if known is not None and known.definition != definition:
            if self._overwrite:
                return False
            raise OutputError(
                f"{self.path}: holds results of a task {name} that was defined otherwise; choose another output, or pass "
                "--overwrite"
            )
        return known is not None

    def add(self, result: TaskResult) -> None:
        """Keep what a task measured, on disk."""
        self.results[result.task] = result
        with described(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            tasks = {name: asdict(one) for name, one in self.results.items()}
            write_json(self.path, {"settings": self._settings, "tasks": tasks})


def _read_result(values: dict[str, Any]) -> TaskResult:
    """A task's result from plain values; names that are not known belong to a later version and are left out."""
    check_fields(values, TASK, {"shots": COUNT})
    for metric in values["metrics"]:
        check_fields(metric, METRIC, FIGURES)
    metrics = tuple(Metric(**{name: metric.get(name) for name in (*METRIC, *FIGURES)}) for metric in values["metrics"])
    if not metrics:
        raise ValueError("metrics are none")
    found: dict[str, Any] = {name: values.get(name) for name in (*TASK, "shots")}
    return TaskResult(**{**found, "metrics": metrics})
