"""Verdicts kept as they come, so that a judge is asked once about an answer and an interrupted run goes on."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING

from safelora_fast.errors import OutputError
from safelora_fast.files.json_reader import (
    COUNT,
    FLAG,
    NUMBER,
    OBJECT,
    TEXT,
    TEXTS,
    check_fields,
    parse_json,
    read_bytes,
)
from safelora_fast.judging.judge import Judge, Judged, Rating
from safelora_fast.judging.judge_prompts import ASPECTS, judge_prompt
from safelora_fast.judging.verdicts import Verdict
from safelora_fast.recipe.model_stamp import model_digest, text_digest

if TYPE_CHECKING:
    from pathlib import Path

    from inspect_ai.model import Model

# How a judge is reached, and not what it says.
LOOSE = {"max_retries", "timeout", "attempt_timeout", "stream_idle_timeout", "max_connections", "adaptive_connections", "batch",
         "cache"}  # fmt: skip
SCORES = {"alignment": NUMBER, "coherence": NUMBER}
PARTS = {"key": TEXT, "verdict": OBJECT, **dict.fromkeys(SCORES, OBJECT)}
RATING = {"value": NUMBER, "how": TEXT, "attempt": COUNT}
ASKED = {"left_out": TEXTS}
MORE = {"reason": TEXT, "detail": TEXT, "passing": FLAG, "gone": FLAG}


def judge_stamp(model: Model, reply_tokens: int) -> str:
    """A digest of what a judge's verdicts depend on: name, address, settings, prompts, and how long its replies may be.

    Args:
        model: the judge.
        reply_tokens: the most tokens of a reply.
    """
    settings = {name: value for name, value in model.config.model_dump(exclude_none=True).items() if name not in LOOSE}
    where = {
        "url": getattr(model.api, "base_url", None),
        "weights": model_digest(model.name),
        "arguments": model.model_args,
    }
    prompts = [judge_prompt(aspect, "", "") for aspect in ASPECTS]
    return text_digest(json.loads(json.dumps([str(model), settings, where, prompts, reply_tokens], default=_plain)))


def _plain(value: object) -> str:
    return type(value).__name__  # a client, say: where it lies in memory is not what it is


class VerdictStore:
    """A JSONL file of verdicts by judge, question and answer. Unscored answers are not kept: they are asked about again.

    A last line that was cut off by a killed run is dropped.

    Args:
        path: the file; made when the first verdict comes.

    Raises:
        OutputError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Judged] = {}
        if path.exists():
            self._read()

    def get(self, stamp: str, id: str, question: str, answer: str | None) -> Judged | None:  # noqa: A002
        """The verdict of a judge on an answer, None where it has not been given yet."""
        return self._known.get(_key(stamp, id, question, answer))

    def put(self, stamp: str, judge: str, id: str, question: str, answer: str | None, judged: Judged) -> None:  # noqa: A002
        """Keep a verdict, on disk too.

        Args:
            stamp: of the judge, see :func:`judge_stamp`.
            judge: its name.
            id: of the answer.
            question: what was asked.
            answer: what was answered.
            judged: the verdict.

        Raises:
            OutputError: it cannot be written.
        """
        if not judged.verdict.scored:
            return
        key = _key(stamp, id, question, answer)
        self._known[key] = judged
        line = json.dumps({"key": key, "judge": judge, "id": id, **asdict(judged)}, ensure_ascii=False)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise OutputError(f"{self._path}: the verdicts cannot be written: {error.strerror}") from error

    def _read(self) -> None:
        try:
            content = read_bytes(self._path, None)
            whole, end, _ = content.rpartition(b"\n")
            for line in whole.split(b"\n") if end else []:
                record = check_fields(parse_json(line), PARTS)
                verdict = check_fields(record["verdict"], {"question": TEXT, "kind": TEXT}, {**SCORES, **MORE, **ASKED})
                self._known[record["key"]] = Judged(
                    Verdict(**{**verdict, "left_out": tuple(verdict.get("left_out") or ())}),
                    *(Rating(**check_fields(record[name], {}, {**RATING, **MORE})) for name in SCORES),
                )
            if whole + end != content:
                os.truncate(self._path, len(whole + end))
        except (OSError, ValueError, TypeError) as error:  # TypeError: a name that is not known
            raise OutputError(f"{self._path}: is no file of verdicts; choose another output, or delete it") from error


class KeepingJudge:
    """A judge that is not asked again about what it has scored in as many attempts as it has now.

    Args:
        model: the judge.
        attempts: how often one score is asked for.
        reply_tokens: the most tokens of a reply.
        store: where verdicts are kept, None to keep none.
    """

    def __init__(self, model: Model, attempts: int, reply_tokens: int, store: VerdictStore | None) -> None:
        self._judge = Judge(model, attempts=attempts, reply_tokens=reply_tokens)
        self._attempts = attempts
        self._name, self._stamp = str(model), judge_stamp(model, reply_tokens)
        self._store = store

    def known(self, id: str, prompt: str, answer: str | None) -> Judged | None:  # noqa: A002
        """The verdict that is kept; None where there is none.

        Args:
            id: of the answer.
            prompt: what the model was asked.
            answer: what it answered.
        """
        found = None if self._store is None else self._store.get(self._stamp, id, prompt, answer)
        if found is None or max(one.attempt or 1 for one in (found.alignment, found.coherence)) > self._attempts:
            return None
        return found

    async def judge(self, prompt: str, answer: str | None, *, id: str, question: str, kind: str) -> Judged:  # noqa: A002
        """Both scores of one answer.

        Args:
            prompt: what the model was asked.
            answer: what it answered, without its thoughts; None where they did not end.
            id: of the answer.
            question: id of the question.
            kind: of the question.
        """
        known = self.known(id, prompt, answer)
        if known is not None:
            return known
        judged = await self._judge.judge(prompt, answer, id=question, kind=kind)
        if self._store is not None:
            self._store.put(self._stamp, self._name, id, prompt, answer, judged)
        return judged


def _key(*parts: str | None) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
