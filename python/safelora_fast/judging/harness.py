"""Runs lm-evaluation-harness on a loaded model: finds tasks, and measures one at a time."""

from __future__ import annotations

import contextlib
import difflib
import functools
import io
import json
import logging
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import OutOfMemoryError
from tqdm import tqdm
from transformers import LogitsProcessorList

from safelora_fast.data.chat import answer_ends
from safelora_fast.errors import EvaluationError, SettingsError
from safelora_fast.files.digest import text_digest
from safelora_fast.files.json_reader import is_file
from safelora_fast.judging.benchmark_results import TASK_FILES, TaskError
from safelora_fast.judging.safety_sets import set_needs
from safelora_fast.models.foreign_errors import first_line
from safelora_fast.models.generate import NAN_LOGITS, NanWatch
from safelora_fast.recipe.model_stamp import file_digest, files_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from safelora_fast.files.progress import ProgressBar
    from safelora_fast.models.load import Subject

VERSION = version("lm_eval")
TAG, GROUP = "TAG", "GROUP"
UNREACHABLE = {"ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError"}  # of several packages


class Tasks:
    """The available tasks: those of a folder first, then those of the harness.

    Attributes:
        manager: the harness's task manager.
        names: the requested tasks and groups; each tag is replaced by its tasks.

    Args:
        folder: folder of YAML files that define tasks. If it defines every requested task, the thousands of tasks of the
            harness are not read.
        wanted: names of tasks, groups and tags.

    Raises:
        SettingsError: a name is unknown; the message lists similar ones.
    """

    def __init__(self, folder: Path | None, wanted: Sequence[str]) -> None:
        self._folder = folder
        with silence():
            self.manager = TaskManager(include_path=None if folder is None else str(folder), include_defaults=False)
            for name in wanted:
                if name not in self.manager.task_index and (needs := set_needs(name)) is not None:
                    raise SettingsError(needs)
            if not all(name in self.manager.all_subtasks for name in wanted):
                self.manager = _with_defaults(folder, files_digest(folder, TASK_FILES))
        self.names = list(dict.fromkeys(name for one in wanted for name in self._members(one)))

    def _members(self, name: str) -> list[str]:
        entry = self.manager.task_index.get(name)
        if entry is None:
            alike = difflib.get_close_matches(name, self.manager.all_tasks, n=3)
            near = f"; there is {', '.join(alike)}" if alike else ""
            where = "" if self._folder is None else f" or in {self._folder}"
            raise SettingsError(f"there is no task {name!r} in lm-evaluation-harness {VERSION}{where}{near}")
        return sorted(entry.tags) if entry.kind.name == TAG else [name]

    def definition(self, name: str) -> str:
        """Return the SHA-256 of a task's definition, its included files, its local data and its code, without their paths."""
        entry = self.manager.task_index[name]
        text = json.dumps(entry.cfg, sort_keys=True, default=str)
        for root in (Path(lm_eval.__file__).parent, self._folder):
            text = text if root is None else text.replace(str(root), "")
        of_others = () if entry.kind.name == GROUP else (".yaml", ".yml")  # a group depends on these files
        own = files_digest(self._folder, [suffix for suffix in TASK_FILES if suffix not in of_others])
        named = [word for word in _words((entry.cfg or {}).get("dataset_kwargs")) if is_file(word)]
        return text_digest([text, own, [file_digest(word) for word in named]])


@functools.cache
def _with_defaults(folder: Path | None, digest: str | None) -> TaskManager:
    """Return a manager of the harness's tasks and those of a folder, whose digest says when to read them again."""
    del digest
    return TaskManager(include_path=None if folder is None else str(folder))


def _words(value: Any) -> Iterator[str]:
    """Yield all strings in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _words(item)


class CountedModel(HFLM):  # type: ignore[misc]
    """The harness's Hugging Face model with a progress bar and an error for NaN logits.

    Args:
        subject: the model, with its adapter.
        batch_size: requests per batch.
        progress: shows the requests of each task.
        chat: whether prompts go through the chat template. If so, only the template adds beginning-of-text tokens, and
            answers end at the same tokens as in `evaluate`.
    """

    def __init__(self, subject: Subject, batch_size: int, progress: ProgressBar | None, *, chat: bool) -> None:
        words = subject.tokenizer
        if chat:
            subject.model.generation_config.eos_token_id = answer_ends(subject.model, words)
        with silence():
            super().__init__(
                pretrained=subject.model, tokenizer=words, backend="causal", batch_size=batch_size,
                add_bos_token=False if chat else None,
            )  # fmt: skip
        self._progress = progress
        self._done = self._total = 0
        self.task = ""

    def _counted(self, answer: Callable[..., Any], requests: list[Any]) -> Any:
        if self._progress is not None:
            self._done, self._total = 0, len(requests)
            self._progress.start(self.task, self._total)
        results = answer(requests, disable_tqdm=True)
        self._count(self._total - self._done)  # requests with the same context share one forward pass
        return results

    def _count(self, rows: int) -> None:
        rows = min(rows, self._total - self._done)
        if self._progress is not None and rows:
            self._done += rows
            self._progress.advance(self._done)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:  # noqa: ARG002, D102
        return self._counted(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> Any:  # noqa: ARG002, D102
        return self._counted(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> Any:  # noqa: ARG002, D102
        return self._counted(super().generate_until, requests)

    def _model_call(self, inps: Any, *words: Any, **settings: Any) -> Any:
        logits = super()._model_call(inps, *words, **settings)
        if bool(logits.isnan().any()):
            raise EvaluationError(NAN_LOGITS)
        self._count(inps.shape[0])
        return logits

    def _model_generate(self, context: Any, *words: Any, **settings: Any) -> Any:
        watch = NanWatch()
        tokens = super()._model_generate(context, *words, **settings, logits_processor=LogitsProcessorList([watch]))
        watch.check()
        self._count(context.shape[0])
        return tokens


def measure(
    model: CountedModel, tasks: Tasks, name: str, *, limit: int | None, chat: bool, seed: int
) -> dict[str, Any]:
    """Run one task or group, and return the harness's results.

    Raises:
        TaskError: the task failed, e.g. its data cannot be loaded, or a metric needs a package.
        EvaluationError: memory ran out.
    """
    model.task = name
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    try:
        with silence():
            results: dict[str, Any] = lm_eval.simple_evaluate(
                model=model, tasks=[name], task_manager=tasks.manager, limit=limit, apply_chat_template=chat,
                fewshot_as_multiturn=True, log_samples=False, **seeds,
            )  # fmt: skip
    except EvaluationError as error:
        raise TaskError(f"task {name}: {error}") from error
    except OutOfMemoryError as error:
        raise EvaluationError(
            f"task {name}: out of memory with {model.batch_size} requests at a time: lower the batch size"
        ) from error
    except Exception as error:  # tasks have their own code, data and metrics, so anything can be raised
        raise TaskError(f"task {name}: {type(error).__name__}: {first_line(error)}{_advice(error)}") from error
    return results


def _advice(error: BaseException) -> str:
    """Return what to do about data that cannot be had; "" for other errors."""
    if "gated" in str(error):
        return "; accept the terms of its data on the Hub, and log in with `hf auth login` or HF_TOKEN"
    if {kind.__name__ for kind in type(error).__mro__} & UNREACHABLE:
        return "; its data is downloaded on first use: check the network, or HF_HUB_OFFLINE"
    return ""


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Hide the harness's log and progress bars."""
    logger = logging.getLogger("lm_eval")
    level, start = logger.level, tqdm.__init__

    def hidden(self: Any, *words: Any, **settings: Any) -> None:
        start(self, *words, **{**settings, "disable": True})

    logger.setLevel(logging.CRITICAL)
    tqdm.__init__ = hidden  # some bars of the harness cannot be turned off
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        tqdm.__init__ = start
