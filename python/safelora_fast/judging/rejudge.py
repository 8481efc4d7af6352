"""Reads judged answers from Inspect logs, and compares judges."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from safelora_fast.errors import DataError
from safelora_fast.files.json_reader import OBJECT, check_fields, parse_as, read_object
from safelora_fast.judging.answers import Answer, Asked
from safelora_fast.judging.evaluation_folder import LOGS, REPORT, SETTINGS, EvaluationFolder
from safelora_fast.judging.rates import agreement

if TYPE_CHECKING:
    from pathlib import Path

    from inspect_ai.log import EvalLog

    from safelora_fast.judging.verdicts import Verdict

STAMPED = ("model_sha256", "model_commit", "adapter_sha256", "chat_template_sha256")  # see model_stamp.subject_stamp


@dataclass(frozen=True)
class JudgedAnswers:
    """The answers of a log and the judge's verdicts on them.

    Attributes:
        file: the log file.
        log: the log, without samples that have no answer.
        judge: the judge's name.
        answers: in the order of the log.
        verdicts: one per answer.
        subject: digests of the model and adapter that gave the answers, from the folder of `evaluate` that the log is in;
            empty if there is no such folder, or if its answers are not those of the log.
    """

    file: Path
    log: EvalLog
    judge: str
    answers: list[Answer]
    verdicts: list[Verdict]
    subject: dict[str, Any]

    @property
    def sha256(self) -> str:
        """A digest of the answers."""
        rows = [answer.to_row() for answer in self.answers]
        return hashlib.sha256("\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()).hexdigest()


def read_log(path: Path) -> JudgedAnswers:
    """Read a log of the task `emergent_misalignment`, or the newest log in a folder of `evaluate`.

    Raises:
        DataError: there is no log, or it belongs to another task.
    """
    from inspect_ai.log import read_eval_log

    from safelora_fast.judging.task import verdict_of

    file = path
    if path.is_dir():
        logs = sorted((path / LOGS).glob("*.eval")) or sorted(path.glob("*.eval"))
        if not logs:
            raise DataError(f"{path}: holds no Inspect log")
        file = logs[-1]
    if not file.is_file():
        raise DataError(f"{path}: there is no such log")
    try:
        log = read_eval_log(str(file))
    except Exception as error:  # Inspect's reader raises anything for other kinds of files
        raise DataError(f"{file}: is not an Inspect log: {' '.join(str(error).split())[:200]}") from error
    if log.eval.task.rpartition("/")[2] != "emergent_misalignment":
        raise DataError(f"{file}: is a log of the task {log.eval.task}, not of emergent_misalignment")
    answers, verdicts, samples = [], [], []
    try:
        for sample in log.samples or []:
            score = (sample.scores or {}).get("judged")
            if score is None or score.metadata is None:  # the model failed: there is no answer to judge
                continue
            turns = {} if isinstance(sample.input, str) else {turn.role: turn.text for turn in sample.input}
            prompts = {"prompt": turns.get("user", ""), "system": turns.get("system")}
            answers.append(Answer(parse_as(Asked, {**sample.metadata, **prompts}), sample.output.completion))
            verdicts.append(verdict_of(score))
            samples.append(sample)
    except ValueError as error:
        raise DataError(f"{file}: {error}") from error
    if not answers:
        raise DataError(f"{file}: holds no judged answers")
    log.samples = samples
    return JudgedAnswers(file, log, _judge_name(log), answers, verdicts, _subject(file, answers))


def _subject(file: Path, answers: list[Answer]) -> dict[str, Any]:
    """Return the digests of what gave the answers of a log, if the folder that it is in has the same answers."""
    folder = EvaluationFolder(file.parent.parent if file.parent.name == LOGS else file.parent)
    try:
        stored, stamp = folder.stored(), read_object(folder.path / SETTINGS)
        if STAMPED[0] not in stamp:  # a folder of `rejudge`
            stamp = check_fields(read_object(folder.path / REPORT), {"of": OBJECT})["of"]
    except (OSError, ValueError, DataError):
        return {}
    same = {answer.asked.id: answer for answer in answers} == stored
    return {key: stamp[key] for key in STAMPED if key in stamp} if same else {}


def _judge_name(log: EvalLog) -> str:
    role: Any = (log.eval.model_roles or {}).get("judge")
    role = role[0] if isinstance(role, list) else role
    return str((log.eval.task_args or {}).get("judge") or getattr(role, "model", "unknown"))


def compare_judges(verdicts: dict[str, list[Verdict]]) -> list[dict[str, Any]]:
    """Return the agreement of every pair of judges."""
    return [
        {"judges": [one, other], **agreement(verdicts[one], verdicts[other])}
        for one, other in combinations(verdicts, 2)
    ]
