"""Emergent misalignment of a model on this machine: its answers, and a judge's verdicts on them."""

from __future__ import annotations

import itertools
import sqlite3
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from safelora_fast.data.thoughts import answer_after_thoughts
from safelora_fast.errors import EvaluationError, InterruptedRunError, SettingsError
from safelora_fast.judging.answers import SAMPLES, Answer, ask, read_answers
from safelora_fast.judging.evaluation_folder import LOGS, VERDICTS, EvaluationFolder
from safelora_fast.judging.rates import Figures, by_kind, by_question
from safelora_fast.judging.redact import redact
from safelora_fast.recipe.model_stamp import subject_stamp

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator, Sequence
    from pathlib import Path
    from typing import Protocol

    from inspect_ai.model import Model
    from transformers import PreTrainedTokenizerBase

    from safelora_fast.judging.answers import Asked
    from safelora_fast.judging.questions import Question
    from safelora_fast.judging.verdicts import Verdict
    from safelora_fast.models.load import Subject, SubjectSettings

    class Progress(Protocol):
        """What is told how far the work is."""

        def start(self, what: str, total: int) -> None:
            """So much is to be done."""

        def advance(self, done: int) -> None:
            """So much is done."""


ANSWER_TOKENS = 600


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled.

    Attributes:
        samples: answers to each wording.
        max_tokens: the most tokens of an answer.
        seed: every answer has its own, which follows from this one and its place.
        batch_size: answers at a time; no answer depends on it, but for the last digits.
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
    progress: Progress | None = None,
) -> list[Answer]:
    """Have a model answer, and keep every batch of answers at once: an interrupted run goes on where it stopped.

    With `overwrite`, answers and verdicts of other settings are removed once the model is loaded that answers in their place.
    Where an answer is missing, `before` is called first: it may refuse to go on.

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
    loaded: Subject,
    asked: list[Asked],
    known: Container[str],
    sampling: Sampling,
    progress: Progress | None,
) -> Iterator[list[Answer]]:
    """The answers that are not known, a batch at a time; batches are cut from all, so that going on changes no bit."""
    from safelora_fast.models.generate import generate

    check_system_turns(loaded.tokenizer, asked)
    missing = {number for number, one in enumerate(asked) if one.id not in known}
    if progress is not None:
        progress.start("answers", len(missing))
    batches = generate(
        loaded.model,
        loaded.tokenizer,
        [_turns(one) for one in asked],
        max_tokens=sampling.max_tokens,
        seeds=[sampling.seed * 1_000_003 + number for number in range(len(asked))],
        batch_size=sampling.batch_size,
        known=set(range(len(asked))) - missing,
    )
    done = 0
    for batch in batches:
        new = [Answer(asked[number], text) for number, text in batch.items() if number in missing]
        yield new
        done += len(new)
        if progress is not None:
            progress.advance(done)


def judge_folder(
    folder: EvaluationFolder,
    judge: Model,
    *,
    attempts: int,
    reply_tokens: int,
    before: Callable[[], None] | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Verdict], str]:
    """Have the answers of a folder judged by the Inspect task: verdicts by the answers' ids, and the name of the log.

    What the judge has scored before is not asked again; what it left unscored is. Where a verdict is missing, `before` is
    called first: it may refuse to go on.

    Raises:
        EvaluationError: Inspect could not finish.
        InterruptedRunError: Ctrl-C.
    """
    from inspect_ai import eval as inspect_eval

    from safelora_fast.judging.judge import WATCH
    from safelora_fast.judging.store import KeepingJudge, VerdictStore
    from safelora_fast.judging.task import ROLE, emergent_misalignment, verdict_of

    task = emergent_misalignment(
        answers=str(folder.answers),
        verdicts=str(folder.path / VERDICTS),
        judge_attempts=attempts,
        judge_tokens=reply_tokens,
    )
    kept = KeepingJudge(judge, attempts, reply_tokens, VerdictStore(folder.path / VERDICTS))
    stored = ((one.asked.id, one.asked.prompt, answer_after_thoughts(one.text)) for one in read_answers(folder.answers))
    if before is not None and any((one[2] or "").strip() and kept.known(*one) is None for one in stored):
        before()
    watch = WATCH.set(None if progress is None else _counting(f"verdicts of {judge}", len(task.dataset), progress))
    try:
        logs = inspect_eval(
            task,
            model="none/none",
            model_roles={ROLE: judge},
            log_dir=str(folder.path / LOGS),
            display="none",
            log_level="warning",
        )
    except (OSError, sqlite3.Error) as error:  # Inspect keeps a data base of its own, in the user's folder
        raise EvaluationError(
            f"{folder.path}: judging did not finish, for Inspect cannot keep its log: {redact(str(error))}; verdicts that were "
            "given are kept: the same command goes on"
        ) from error
    finally:
        WATCH.reset(watch)
    if not logs or logs[0].status == "cancelled":
        raise InterruptedRunError("interrupted; verdicts that were given are kept: the same command goes on")
    log = logs[0]
    if log.status != "success":
        reason = "no reason given" if log.error is None else redact(" ".join(log.error.message.split()))
        raise EvaluationError(f"{folder.path}: judging did not finish ({log.status}): {reason}")
    verdicts = {str(sample.id): verdict_of((sample.scores or {})["judged"]) for sample in log.samples or []}
    return verdicts, str(log.location).rpartition("/")[2]


def _counting(what: str, total: int, progress: Progress) -> Callable[[], None]:
    progress.start(what, total)
    numbers = itertools.count(1)
    return lambda: progress.advance(next(numbers))


def report_of(judge: str, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """What one judge's verdicts amount to: overall, by kind of question, and by question."""
    return {
        "judge": judge,
        "left_out": sorted({name for verdict in verdicts for name in verdict.left_out}),
        **Figures.of(verdicts).to_dict(),
        "kinds": {kind: figures.to_dict() for kind, figures in by_kind(verdicts).items()},
        "questions": {question: figures.to_dict() for question, figures in by_question(verdicts).items()},
    }


def check_system_turns(tokenizer: PreTrainedTokenizerBase, asked: Sequence[Asked]) -> None:
    """Refuse questions with a system prompt where the chat template takes none, before the first of all is answered.

    Raises:
        SettingsError: with their names, and the kinds of question that can be asked.
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
        f"the chat template {reason}; these questions have a system prompt: {', '.join(named)}; {without}, or give a template that "
        "takes one with --chat-template"
    )


def _turns(asked: Asked) -> list[dict[str, str]]:
    system = [] if asked.system is None else [{"role": "system", "content": asked.system}]
    return [*system, {"role": "user", "content": asked.prompt}]
