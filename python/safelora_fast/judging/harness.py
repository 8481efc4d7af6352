"""lm-evaluation-harness on a model that is loaded already: which tasks there are, and what one of them measures."""

from __future__ import annotations

import contextlib
import difflib
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
from transformers import LogitsProcessorList, set_seed

from safelora_fast.data.chat import answer_ends
from safelora_fast.errors import EvaluationError, SettingsError
from safelora_fast.files.digest import text_digest
from safelora_fast.files.json_reader import is_file
from safelora_fast.judging.benchmarks import TASK_FILES
from safelora_fast.models.foreign_errors import first_line
from safelora_fast.models.generate import NAN_LOGITS, NanWatch
from safelora_fast.recipe.model_stamp import file_digest, files_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from safelora_fast.judging.evaluate import Progress
    from safelora_fast.models.load import Subject

VERSION = version("lm_eval")
TAG, GROUP = "TAG", "GROUP"


class Tasks:
    """The tasks that there are: those of a folder first, then the harness's own.

    Args:
        folder: of YAML files that define tasks. Where it defines all that is wanted, the harness's own are not looked at:
            there are thousands.
        wanted: names of tasks, groups and tags.

    Raises:
        SettingsError: one of them is not known; names that are alike are shown.
    """

    def __init__(self, folder: Path | None, wanted: Sequence[str]) -> None:
        self._folder = folder
        with silence():
            self.manager = TaskManager(include_path=None if folder is None else str(folder), include_defaults=False)
            if not all(self._is_task(name) for name in wanted):
                self.manager = TaskManager(include_path=None if folder is None else str(folder))
        self.names = list(dict.fromkeys(name for one in wanted for name in self._members(one)))

    def _is_task(self, name: str) -> bool:
        return name in self.manager.all_subtasks

    def _members(self, name: str) -> list[str]:
        entry = self.manager.task_index.get(name)
        if entry is None:
            alike = difflib.get_close_matches(name, self.manager.all_tasks, n=3)
            near = f"; there is {', '.join(alike)}" if alike else ""
            where = "" if self._folder is None else f" or in {self._folder}"
            raise SettingsError(f"there is no task {name!r} in lm-evaluation-harness {VERSION}{where}{near}")
        return sorted(entry.tags) if entry.kind.name == TAG else [name]

    def definition(self, name: str) -> str:
        """SHA-256 of how a task is defined: what it includes, local rows and code along with it; where they lie does not matter."""
        entry = self.manager.task_index[name]
        text = json.dumps(entry.cfg, sort_keys=True, default=str)
        for root in (Path(lm_eval.__file__).parent, self._folder):
            text = text if root is None else text.replace(str(root), "")
        of_others = () if entry.kind.name == GROUP else (".yaml", ".yml")  # a group is made of what they define
        own = files_digest(self._folder, [suffix for suffix in TASK_FILES if suffix not in of_others])
        named = [word for word in _words((entry.cfg or {}).get("dataset_kwargs")) if is_file(word)]
        return text_digest([text, own, [file_digest(word) for word in named]])


def _words(value: Any) -> Iterator[str]:
    """All texts in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _words(item)


class CountedModel(HFLM):  # type: ignore[misc]
    """The harness's Hugging Face model, which tells how many requests it has answered.

    Args:
        subject: the model, with its adapter on it.
        batch_size: requests at a time.
        progress: what is told.
        chat: whether prompts go through the chat template, which alone writes what stands before a text then. Answers end
            where `evaluate` ends them.
    """

    def __init__(self, subject: Subject, batch_size: int, progress: Progress | None, *, chat: bool) -> None:
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

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        """Log-likelihoods of continuations."""
        del disable_tqdm
        return self._counted(requests, super().loglikelihood)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        """Log-likelihoods of whole texts."""
        del disable_tqdm
        return self._counted(requests, super().loglikelihood_rolling)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        """What the model goes on with."""
        del disable_tqdm
        return self._counted(requests, super().generate_until)

    def _counted(self, requests: list[Any], answer: Callable[..., Any]) -> Any:
        if self._progress is None:
            return answer(requests, disable_tqdm=True)
        self._done, self._total = 0, len(requests)
        self._progress.start(self.task, self._total)
        results = answer(requests, disable_tqdm=True)
        if self._done < self._total:  # requests that share their context are answered by one pass
            self._progress.advance(self._total)
        return results

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

    def _count(self, rows: int) -> None:
        if self._progress is not None:
            self._done = min(self._done + rows, self._total)
            self._progress.advance(self._done)


def measure(
    model: CountedModel, tasks: Tasks, name: str, *, limit: int | None, chat: bool, seed: int
) -> dict[str, Any]:
    """What the harness says of one task or group, as it says it.

    Raises:
        EvaluationError: whatever goes wrong within: a data set that cannot be had, a metric that needs a package.
    """
    model.task = name
    try:
        with silence():
            set_seed(seed)
            loaded = tasks.manager.load([name])
            for task in loaded["tasks"].values():
                if task.get_config("num_fewshot") is None:
                    task.set_config("num_fewshot", 0)
                task.set_fewshot_seed(seed)
            # simple_evaluate does the same, and asks pip and git about this machine besides
            results = lm_eval.evaluate(
                lm=model,
                task_dict=loaded,
                limit=limit,
                apply_chat_template=chat,
                fewshot_as_multiturn=True,
                log_samples=False,
            )
    except EvaluationError as error:
        raise EvaluationError(f"task {name}: {error}") from error
    except OutOfMemoryError as error:
        raise EvaluationError(
            f"task {name}: out of memory with {model.batch_size} requests at a time: lower the batch size"
        ) from error
    except Exception as error:  # tasks bring code, data sets and metrics of their own: anything can be raised
        raise EvaluationError(f"task {name}: {type(error).__name__}: {first_line(error)}") from error
    found: dict[str, Any] = results
    return found


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Neither words nor bars of the harness: its figures come back, and its errors are raised."""
    logger = logging.getLogger("lm_eval")
    level, start = logger.level, tqdm.__init__

    def hidden(self: Any, *words: Any, **settings: Any) -> None:
        start(self, *words, **{**settings, "disable": True})

    logger.setLevel(logging.CRITICAL)
    tqdm.__init__ = hidden  # some of its bars cannot be turned off
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        tqdm.__init__ = start
