"""Samples a local model's answers to free-form questions, and has a judge score them."""

from __future__ import annotations

import itertools
import sqlite3
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from safelora_fast.data.thoughts import answer_after_thoughts
from safelora_fast.errors import EvaluationError, InterruptedRunError, SettingsError
from safelora_fast.judging.answers import SAMPLES, Answer, ask, read_answers
from safelora_fast.judging.evaluation_folder import LOGS, VERDICTS, EvaluationFolder
from safelora_fast.judging.rates import report_of
from safelora_fast.judging.redact import redact
from safelora_fast.recipe.model_stamp import subject_stamp

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator, Sequence
    from pathlib import Path

    from inspect_ai.log import EvalLog
    from inspect_ai.model import Model
    from transformers import PreTrainedTokenizerBase

    from safelora_fast.files.progress import ProgressBar
    from safelora_fast.judging.answers import Asked
    from safelora_fast.judging.questions import Question
    from safelora_fast.judging.verdicts import Verdict
    from safelora_fast.models.load import Subject
    from safelora_fast.models.model_settings import SubjectSettings

ANSWER_TOKENS = 600
KEPT = "verdicts that were given are kept: the same command goes on"


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled.

    Attributes:
        samples: answers per paraphrase.
        max_tokens: maximum tokens of an answer.
        seed: every answer has its own seed, derived from this one and the answer's position.
        batch_size: answers per batch. It changes at most the last digits of the logits.
    """

    samples: int = SAMPLES
    max_tokens: int = ANSWER_TOKENS
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name in ("samples", "max_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}, it must be at least 1")


def collect_answers(
    folder: EvaluationFolder,
    subject: SubjectSettings,
    adapter: Path | None,
    questions: Sequence[Question],
    sampling: Sampling,
    *,
    overwrite: bool = False,
    before: Callable[[], None] | None = None,
    progress: ProgressBar | None = None,
) -> list[Answer]:
    """Sample a model's answers to questions. Each batch is stored at once, so an interrupted run resumes where it stopped.

    Args:
        folder: where the answers are stored.
        subject: the model and how to load it.
        adapter: folder of an adapter to add to the model.
        questions: the questions.
        sampling: how answers are sampled.
        overwrite: delete answers and verdicts of other settings, after the new model is loaded.
        before: called before the model is loaded, if an answer is missing. It may raise an error to stop.
        progress: shows the number of answers.

    Returns:
        One answer per sample of each paraphrase of each question, in this order.

    Raises:
        SafeLoraFastError: the folder holds something else, or the model cannot be loaded or cannot answer.
    """
    from safelora_fast.models.load import load_subject

    resolved = subject.resolved()
    asked = ask(questions, sampling.samples)
    settings = {
        **asdict(resolved),
        "adapter": None if adapter is None else str(adapter),
        **subject_stamp(resolved.model, adapter, resolved.chat_template),
        "questions": [asdict(question) for question in questions],
        **{name: value for name, value in asdict(sampling).items() if name != "batch_size"},
    }
    folder.check()

    def load() -> Subject:
        if before is not None:
            before()
        return load_subject(resolved, adapter)

    loaded = load() if overwrite and folder.other(settings) else None
    folder.begin(settings, overwrite=overwrite)
    known = folder.stored()
    if any(one.id not in known for one in asked):
        for answers in _generate(loaded or load(), asked, known, sampling, progress):
            folder.add(answers)
            known.update({answer.asked.id: answer for answer in answers})
    return [known[one.id] for one in asked]


def _generate(
    loaded: Subject, asked: list[Asked], known: Container[str], sampling: Sampling, progress: ProgressBar | None
) -> Iterator[list[Answer]]:
    """Yield the missing answers in batches. Batches match an uninterrupted run, so that resuming changes no bit."""
    from safelora_fast.models.generate import generate

    check_system_turns(loaded.tokenizer, asked)
    missing = {number for number, one in enumerate(asked) if one.id not in known}
    if progress is not None:
        progress.start("answers", len(missing))
    done = 0
    for batch in generate(
        loaded.model,
        loaded.tokenizer,
        [one.turns for one in asked],
        max_tokens=sampling.max_tokens,
        seeds=[sampling.seed * 1_000_003 + number for number in range(len(asked))],
        batch_size=sampling.batch_size,
        known=set(range(len(asked))) - missing,
    ):
        new = [Answer(asked[number], text) for number, text in batch.items() if number in missing]
        yield new
        done += len(new)
        if progress is not None:
            progress.advance(done)


def check_system_turns(tokenizer: PreTrainedTokenizerBase, asked: Sequence[Asked]) -> None:
    """Check that the chat template supports the system prompts of the questions, before any answer is sampled.

    Raises:
        SettingsError: it does not; the message lists these questions, and the kinds that have no system prompt.
    """
    from safelora_fast.data.chat import chat_of, has_template

    named = dict.fromkeys(one.question for one in asked if one.system is not None)
    reason = chat_of(tokenizer).unsupported_reason("system") if named and has_template(tokenizer) else None
    if reason is None:
        return
    kinds = {one.kind for one in asked if one.system is not None}
    others = dict.fromkeys(one.kind for one in asked if one.kind not in kinds)
    without = f"leave them out with --kinds {','.join(others)}" if others else "ask others"
    raise SettingsError(
        f"the chat template {reason}; these questions have a system prompt: {', '.join(named)}; {without}, or give a template "
        "that takes one with --chat-template"
    )


def judge_folder(
    folder: EvaluationFolder,
    judge: Model,
    *,
    attempts: int,
    reply_tokens: int,
    log: EvalLog | None = None,
    before: Callable[[], None] | None = None,
    progress: ProgressBar | None = None,
) -> tuple[dict[str, Verdict], dict[str, Any]]:
    """Judge the answers of a folder with Inspect.

    Answers that this judge has already scored are not judged again; unscored answers are.

    Args:
        folder: the folder.
        judge: the judge.
        attempts: maximum attempts per score.
        reply_tokens: maximum tokens of a reply.
        log: an Inspect log with the same answers. In a copy of it, the judge's scores replace the existing ones.
        before: called before the first request to the judge, if a verdict is missing. It may raise an error to stop.
        progress: shows the number of verdicts.

    Returns:
        The verdicts by answer id, and the judge's report.

    Raises:
        EvaluationError: Inspect could not finish.
        InterruptedRunError: Ctrl-C was pressed.
    """
    from safelora_fast.judging.judge import WATCH, Judge, VerdictStore
    from safelora_fast.judging.task import verdict_of

    answers = [
        (one.asked.id, one.asked.prompt, answer_after_thoughts(one.text)) for one in read_answers(folder.answers)
    ]
    store = VerdictStore(folder.path / VERDICTS)
    kept = Judge(judge, attempts=attempts, reply_tokens=reply_tokens, store=store)
    if before is not None and any((one[2] or "").strip() and kept.known(*one) is None for one in answers):
        before()
    advance = None
    if progress is not None:
        progress.start(f"verdicts of {judge}", len(answers))
        numbers = itertools.count(1)
        advance = lambda: progress.advance(next(numbers))  # noqa: E731
    watch = WATCH.set(advance)
    try:
        log = _score(folder, judge, attempts, reply_tokens, log)
    except (OSError, sqlite3.Error) as error:  # Inspect has its own database in the user's folder
        raise EvaluationError(
            f"{folder.path}: judging did not finish, for Inspect cannot keep its log: {redact(str(error))}; {KEPT}"
        ) from error
    except KeyboardInterrupt:
        raise InterruptedRunError(f"interrupted; {KEPT}") from None
    finally:
        WATCH.reset(watch)
    if log.status != "success":
        reason = "no reason given" if log.error is None else redact(" ".join(log.error.message.split()))
        raise EvaluationError(f"{folder.path}: judging did not finish ({log.status}): {reason}; {KEPT}")
    verdicts = {str(sample.id): verdict_of((sample.scores or {})["judged"]) for sample in log.samples or []}
    where = {"judge_url": getattr(judge.api, "base_url", None), "log": str(log.location).rpartition("/")[2]}
    return verdicts, {**report_of(str(judge), list(verdicts.values())), **where}


def _score(folder: EvaluationFolder, judge: Model, attempts: int, reply_tokens: int, log: EvalLog | None) -> EvalLog:
    """Run the task on the stored answers or, if there is a log, run the task's scorer on the log."""
    import inspect_ai
    from inspect_ai.log import write_eval_log

    from safelora_fast.judging.task import ROLE, emergent_misalignment, judged

    roles, verdicts, logs = {ROLE: judge}, str(folder.path / VERDICTS), folder.path / LOGS
    if log is None:
        task = emergent_misalignment(
            answers=str(folder.answers), verdicts=verdicts, judge_attempts=attempts, judge_tokens=reply_tokens
        )
        found = inspect_ai.eval(
            task, model="none/none", model_roles=roles, log_dir=str(logs), display="none", log_level="warning"
        )
        if not found or found[0].status == "cancelled":
            raise KeyboardInterrupt
        return found[0]
    log = log.model_copy(deep=True)
    log.eval.model_roles, log.eval.task_args = None, {**log.eval.task_args, ROLE: str(judge)}  # not the old judge
    scorer = judged(attempts=attempts, reply_tokens=reply_tokens, verdicts=verdicts)
    log = inspect_ai.score(
        log, scorer, model="none/none", model_roles=roles, action="overwrite", display="none", copy=False
    )
    now = datetime.now(timezone.utc).isoformat().replace(":", "-")
    log.location = str(logs / f"{now}_emergent-misalignment.eval")
    write_eval_log(log, log.location)
    return log
