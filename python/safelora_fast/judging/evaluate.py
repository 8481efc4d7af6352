"""Emergent misalignment of a model on this machine: its answers, and a judge's verdicts on them."""

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
    from safelora_fast.models.load import Subject, SubjectSettings

ANSWER_TOKENS = 600
KEPT = "verdicts that were given are kept: the same command goes on"


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled.

    Attributes:
        samples: answers to each paraphrase.
        max_tokens: the most tokens of an answer.
        seed: every answer has its own seed, which follows from this one and the answer's place.
        batch_size: answers at a time. It changes at most the last digits of logits.
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
    """Have a model answer questions. Every batch of answers is kept at once, so an interrupted run goes on where it stopped.

    Args:
        folder: keeps the answers.
        subject: the model, and how it is loaded.
        adapter: the folder of an adapter to put on it.
        questions: what is asked.
        sampling: how answers are sampled.
        overwrite: remove answers and verdicts of other settings, once the model that answers in their place is loaded.
        before: called before the model is loaded, if an answer is missing; it may refuse to go on.
        progress: told how far the work is.

    Raises:
        SafeLoraFastError: the folder is of something else, or the model cannot be loaded or asked.
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
    """The missing answers, a batch at a time. Batches are those of an unbroken run, so that resuming changes no bit."""
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
    """Refuse questions with a system prompt if the chat template has no system turn, before any question is answered.

    Raises:
        SettingsError: with the questions' names, and the kinds that can be asked.
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
    """Have the answers of a folder judged by Inspect: verdicts by the answers' ids, and the judge's report.

    Answers that this judge has scored before are not judged again; answers that it left unscored are.

    Args:
        folder: the folder.
        judge: the judge.
        attempts: how often one score is asked for.
        reply_tokens: the most tokens of a reply.
        log: a log of Inspect with the same answers. A copy of it gets the judge's scores in place of its own.
        before: called before the judge is asked, if a verdict is missing; it may refuse to go on.
        progress: told how far the work is.

    Raises:
        EvaluationError: Inspect could not finish.
        InterruptedRunError: Ctrl-C.
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
    except (OSError, sqlite3.Error) as error:  # Inspect keeps a database of its own, in the user's folder
        raise EvaluationError(
            f"{folder.path}: judging did not finish, for Inspect cannot keep its log: {redact(str(error))}; {KEPT}"
        ) from error
    except KeyboardInterrupt:
        raise InterruptedRunError(f"interrupted; {KEPT}") from None
    finally:
        WATCH.reset(watch)
    if log.status != "success":
        reason = "no reason given" if log.error is None else redact(" ".join(log.error.message.split()))
        raise EvaluationError(f"{folder.path}: judging did not finish ({log.status}): {reason}")
    verdicts = {str(sample.id): verdict_of((sample.scores or {})["judged"]) for sample in log.samples or []}
    where = {"judge_url": getattr(judge.api, "base_url", None), "log": str(log.location).rpartition("/")[2]}
    return verdicts, {**report_of(str(judge), list(verdicts.values())), **where}


def _score(folder: EvaluationFolder, judge: Model, attempts: int, reply_tokens: int, log: EvalLog | None) -> EvalLog:
    """Run the task on the folder's answers or, with a log, the task's scorer on the log."""
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
    log.eval.model_roles, log.eval.task_args = None, {**log.eval.task_args, ROLE: str(judge)}  # not the former judge's
    scorer = judged(attempts=attempts, reply_tokens=reply_tokens, verdicts=verdicts)
    log = inspect_ai.score(
        log, scorer, model="none/none", model_roles=roles, action="overwrite", display="none", copy=False
    )
    now = datetime.now(timezone.utc).isoformat().replace(":", "-")
    log.location = str(logs / f"{now}_emergent-misalignment.eval")
    write_eval_log(log, log.location)
    return log
