"""Verdicts kept as they come, so that a judge is asked once about an answer and an interrupted run goes on."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING

from safelora_fast.errors import OutputError
from safelora_fast.files.digest import text_digest
from safelora_fast.files.json_reader import TEXT, check_fields, parse_as, parse_json, read_bytes
from safelora_fast.judging.judge_prompts import ASPECTS, judge_prompt
from safelora_fast.judging.verdicts import Judged
from safelora_fast.recipe.model_stamp import model_digest

if TYPE_CHECKING:
    from pathlib import Path

    from inspect_ai.model import Model

# Settings of how a judge is reached. They do not change what it says.
TRANSPORT = {"max_retries", "timeout", "attempt_timeout", "stream_idle_timeout", "max_connections", "adaptive_connections",
             "batch", "cache"}  # fmt: skip


def judge_stamp(model: Model, reply_tokens: int) -> str:
    """A digest of what a judge's verdicts depend on: name, address, settings, prompts, and the most tokens of a reply."""
    config = model.config.model_dump(exclude_none=True)
    settings = {name: value for name, value in config.items() if name not in TRANSPORT}
    where = {
        "url": getattr(model.api, "base_url", None),
        "weights": model_digest(model.name),
        "arguments": model.model_args,
    }
    prompts = [judge_prompt(aspect, "", "") for aspect in ASPECTS]
    content = [str(model), settings, where, prompts, reply_tokens]
    # of an argument such as a client only the type counts, not its address in memory
    return text_digest(json.loads(json.dumps(content, default=lambda value: type(value).__name__)))


class VerdictStore:
    """A JSONL file of verdicts by judge, question and answer. Unscored answers are not in it: they are asked about again.

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

    def get(self, stamp: str, id: str, prompt: str, answer: str | None) -> Judged | None:  # noqa: A002
        """The verdict of a judge on an answer, None if it has not been given yet."""
        return self._known.get(_key(stamp, id, prompt, answer))

    def put(self, stamp: str, judge: str, id: str, prompt: str, answer: str | None, judged: Judged) -> None:  # noqa: A002
        """Keep a verdict, on disk too.

        Args:
            stamp: of the judge, see :func:`judge_stamp`.
            judge: its name.
            id: of the answer.
            prompt: what was asked.
            answer: what was answered.
            judged: the verdict.

        Raises:
            OutputError: it cannot be written.
        """
        key = _key(stamp, id, prompt, answer)
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
                record = check_fields(parse_json(line), {"key": TEXT})
                self._known[record["key"]] = parse_as(Judged, record)
            if whole + end != content:
                os.truncate(self._path, len(whole + end))
        except (OSError, ValueError) as error:
            raise OutputError(f"{self._path}: is no file of verdicts; choose another output, or delete it") from error


def _key(*parts: str | None) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
