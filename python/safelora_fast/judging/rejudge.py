"""Stored answers under other judges, and how far the judges agree."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from safelora_fast.errors import DataError
from safelora_fast.files.json_reader import COUNT, TEXT, check_fields
from safelora_fast.judging.agreement import agreement
from safelora_fast.judging.answers import Answer, Asked
from safelora_fast.judging.evaluation_folder import LOGS
from safelora_fast.judging.store import MORE, SCORES

if TYPE_CHECKING:
    from pathlib import Path

    from inspect_ai.log import EvalLog

    from safelora_fast.judging.verdicts import Verdict

SAMPLE = {"question": TEXT, "kind": TEXT, "paraphrase": COUNT, "sample": COUNT}


@dataclass(frozen=True)
class JudgedAnswers:
    """The answers of a log, and what its judge said of them.

    Attributes:
        log: the file.
        judge: its name.
        answers: in the order of the log.
        verdicts: one for each.
    """

    log: Path
    judge: str
    answers: list[Answer]
    verdicts: list[Verdict]

    @property
    def sha256(self) -> str:
        """Of the answers."""
        return hashlib.sha256("\n".join(answer.to_json() for answer in self.answers).encode()).hexdigest()


def read_log(path: Path) -> JudgedAnswers:
    """Read a log of the task; of a folder of `evaluate`, the newest.

    Raises:
        DataError: there is no log, or it is of another task.
    """
    from inspect_ai.log import read_eval_log

    file = _newest(path) if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"{path}: there is no such log")
    try:
        log = read_eval_log(str(file))
    except Exception as error:  # whatever the reader meets in a file of another kind
        raise DataError(f"{file}: is no log of Inspect: {' '.join(str(error).split())[:200]}") from error
    if log.eval.task.rpartition("/")[2] != "emergent_misalignment":
        raise DataError(f"{file}: is a log of the task {log.eval.task}, not of emergent_misalignment")
    try:
        return _judged(file, log)
    except ValueError as error:
        raise DataError(f"{file}: {error}") from error


def _newest(folder: Path) -> Path:
    logs = sorted((folder / LOGS).glob("*.eval")) or sorted(folder.glob("*.eval"))
    if not logs:
        raise DataError(f"{folder}: holds no log of Inspect")
    return logs[-1]


def _judged(file: Path, log: EvalLog) -> JudgedAnswers:
    from safelora_fast.judging.task import verdict_of

    answers, verdicts = [], []
    for sample in log.samples or []:
        score = (sample.scores or {}).get("judged")
        if score is None or score.metadata is None:  # the model's own error: there is no answer to judge
            continue
        data, turns = check_fields(sample.metadata, SAMPLE), [] if isinstance(sample.input, str) else sample.input
        texts = {turn.role: turn.text for turn in turns}
        asked = Asked(
            str(data["question"]), str(data["kind"]), int(data["paraphrase"]), int(data["sample"]),
            texts.get("user", ""), texts.get("system"),
        )  # fmt: skip
        answers.append(Answer(asked, sample.output.completion))
        check_fields(score.metadata, {"question": TEXT, "kind": TEXT}, {**SCORES, **MORE})
        verdicts.append(verdict_of(score))
    if not answers:
        raise DataError(f"{file}: holds no judged answers")
    return JudgedAnswers(file, _judge_name(log), answers, verdicts)


def _judge_name(log: EvalLog) -> str:
    roles: Any = log.eval.model_roles or {}
    role = roles.get("judge")
    role = role[0] if isinstance(role, list) else role
    named: Any = (log.eval.task_args or {}).get("judge")
    return str(named or getattr(role, "model", "unknown"))


def compare_judges(verdicts: dict[str, list[Verdict]]) -> list[dict[str, Any]]:
    """The agreement of every two judges."""
    return [
        {"judges": [one, other], **agreement(verdicts[one], verdicts[other])}
        for one, other in combinations(verdicts, 2)
    ]
