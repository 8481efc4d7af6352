"""Benchmarks: runs tasks of lm-evaluation-harness and stores all results in one file."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast.checkpoints.resolver import adapter_folder
from safelora_fast.errors import EvaluationError, MissingDependencyError, SettingsError, how_to_install
from safelora_fast.files.output import resolved
from safelora_fast.files.store import write_json
from safelora_fast.judging.benchmark_results import FORMAT, BenchmarkReport, TaskError, read_results, task_result
from safelora_fast.judging.evaluation_folder import BENCHMARKS
from safelora_fast.recipe.model_stamp import subject_stamp

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.files.progress import ProgressBar
    from safelora_fast.models.model_settings import SubjectSettings
    from safelora_fast.scoring.margin import Strings

BATCH_SIZE = 16


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
    from safelora_fast.models.load import load_subject
    from safelora_fast.models.model_settings import SubjectSettings
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
        results = read_results(file, settings, definitions, overwrite=overwrite)
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
                results[name] = task_result(
                    name, found, chat=chat, definition=definitions[name], lm_eval=str(harness_version())
                )
            except TaskError as error:
                failed[name] = str(error)
            else:
                tasks_done = {task: asdict(result) for task, result in results.items()}
                write_json(file, {"settings": {"format": FORMAT, **settings}, "tasks": tasks_done})
    if failed and failures is None:
        raise EvaluationError("; ".join(failed.values()))
    return BenchmarkReport(file, settings, tuple(results[name] for name in known.names if name not in failed))


def _task_folder(path: Path) -> Path:
    if not path.expanduser().is_dir():
        raise SettingsError(f"{path}: there is no such folder of tasks")
    return resolved(path.expanduser())
