"""Verdicts kept as they come, so that a judge is asked once about an answer and an interrupted run goes on."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING

from safelora_fast.errors import OutputError
from safelora_fast.evaluation.judge import Judged, Rating
from safelora_fast.evaluation.verdicts import Verdict
from safelora_fast.json_reading import FLAG, NUMBER, OBJECT, TEXT, check_fields, parse_json, read_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from safelora_fast.evaluation.judge import Judge

SCORES = {"alignment": NUMBER, "coherence": NUMBER}
PARTS = {"key": TEXT, "verdict": OBJECT, **dict.fromkeys(SCORES, OBJECT)}
RATING = {"value": NUMBER, "how": TEXT}
MORE = {"reason": TEXT, "detail": TEXT, "passing": FLAG, "gone": FLAG}


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

    def get(self, judge: str, id: str, question: str, answer: str | None) -> Judged | None:  # noqa: A002
        """The verdict of a judge on an answer, None where it has not been given yet."""
        return self._known.get(_key(judge, id, question, answer))

    def put(self, judge: str, id: str, question: str, answer: str | None, judged: Judged) -> None:  # noqa: A002
        """Keep a verdict, on disk too.

        Raises:
            OutputError: it cannot be written.
        """
        if not judged.verdict.scored:
            return
        key = _key(judge, id, question, answer)
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
                self._known[record["key"]] = Judged(
                    Verdict(**check_fields(record["verdict"], {"question": TEXT, "kind": TEXT}, {**SCORES, **MORE})),
                    *(Rating(**check_fields(record[name], {}, {**RATING, **MORE})) for name in SCORES),
                )
            if whole + end != content:
                os.truncate(self._path, len(whole + end))
        except (OSError, ValueError, TypeError) as error:  # TypeError: a name that is not known
            raise OutputError(f"{self._path}: is no file of verdicts; choose another output, or delete it") from error


class KeepingJudge:
    """A judge that is not asked again about what it has scored.

    Args:
        judge: the judge.
        name: of the judge, in the store.
        store: where verdicts are kept, None to keep none.
    """

    def __init__(self, judge: Judge, name: str, store: VerdictStore | None) -> None:
        self._judge = judge
        self._name = name
        self._store = store

    async def judge(self, prompt: str, answer: str | None, *, id: str, question: str, kind: str) -> Judged:  # noqa: A002
        """Both scores of one answer.

        Args:
            prompt: what the model was asked.
            answer: what it answered, without its thoughts; None where they did not end.
            id: of the answer.
            question: id of the question.
            kind: of the question.
        """
        known = None if self._store is None else self._store.get(self._name, id, prompt, answer)
        if known is not None:
            return known
        judged = await self._judge.judge(prompt, answer, id=question, kind=kind)
        if self._store is not None:
            self._store.put(self._name, id, prompt, answer, judged)
        return judged


def _key(*parts: str | None) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
