"""The folder of an evaluation: settings, answers, verdicts, Inspect's logs and the report."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safelora_fast.errors import DataError, OutputError
from safelora_fast.files.json_reader import read_bytes, read_object, why
from safelora_fast.files.output import described
from safelora_fast.files.store import write_json
from safelora_fast.judging.answers import Answer, read_answers

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

SETTINGS = "evaluation.json"
ANSWERS = "answers.jsonl"
VERDICTS = "verdicts.jsonl"
REPORT = "report.json"
LOGS = "logs"
BENCHMARKS = "benchmarks.json"
FORMAT = 2


@dataclass(frozen=True)
class EvaluationFolder:
    """What one model, or adapter, answered to one set of questions.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def answers(self) -> Path:
        """The file of answers."""
        return self.path / ANSWERS

    def begin(self, settings: dict[str, Any], *, overwrite: bool) -> None:
        """Make the folder, or go on with one of the same settings.

        Args:
            settings: what the answers depend on.
            overwrite: remove answers and verdicts of other settings; those of the same settings stay.

        Raises:
            OutputError: it is of another evaluation, or of somebody else's, or cannot be written.
        """
        self.check()
        other = self.other(settings)
        if other is not None and not overwrite:
            raise OutputError(other)
        with described(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if other is not None:
                for name in (REPORT, VERDICTS, ANSWERS):
                    (self.path / name).unlink(missing_ok=True)
                if (self.path / LOGS).is_dir():
                    shutil.rmtree(self.path / LOGS)
            write_json(self.path / SETTINGS, _plain(settings))

    def other(self, settings: dict[str, Any]) -> str | None:
        """Why what is there is not of these settings; None where it is, or where there is nothing."""
        file, wanted = self.path / SETTINGS, _plain(settings)
        if not file.is_file():
            return None
        try:
            former = read_object(file)
        except (OSError, ValueError) as error:
            return f"{file}: {why(error)}; pass --overwrite to start anew, or delete the folder"
        changed = changed_settings(former, wanted)
        if not changed:
            return None
        return f"{self.path}: holds an evaluation {told(changed)}; choose another output, or pass --overwrite"

    def check(self) -> None:
        """Refuse a folder that holds something else than an evaluation.

        Raises:
            OutputError: it does, or is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path}: is a file; give the name of a folder")
        if self.path.exists():
            names = {file.name for file in self.path.iterdir()}
            if names and SETTINGS not in names and names != {BENCHMARKS}:
                raise OutputError(f"{self.path}: holds files that are not of an evaluation; choose another output")

    def stored(self) -> dict[str, Answer]:
        """Answers that are there, by their id; a last line that was cut off is dropped."""
        if not self.answers.exists():
            return {}
        try:
            content = read_bytes(self.answers, None)
        except OSError as error:
            raise DataError(f"{self.answers}: the answers cannot be read: {error.strerror}") from error
        whole, end, _ = content.rpartition(b"\n")
        if whole + end != content:
            with described(self.answers):
                os.truncate(self.answers, len(whole + end))
        return {answer.asked.id: answer for answer in read_answers(self.answers)} if whole.strip() else {}

    def add(self, answers: Iterable[Answer]) -> None:
        """Keep answers, on disk."""
        with described(self.path), self.answers.open("a", encoding="utf-8") as file:
            file.writelines(answer.to_json() + "\n" for answer in answers)


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **settings}))
    return plain


def changed_settings(former: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Names of the settings that differ; where an adapter lies does not matter while its files are the same."""
    changed = sorted(name for name in {*former, *wanted} if former.get(name) != wanted.get(name))
    same = {
        name for name in ("adapter", "chat_template") if wanted.get(f"{name}_sha256") == former.get(f"{name}_sha256")
    }
    return [name for name in changed if not (name in same and wanted.get(f"{name}_sha256") is not None)]


def told(changed: Sequence[str]) -> str:
    """What is kept, where some settings are not those of now."""
    if "format" in changed:
        return "of an older version, which did not note all that results depend on"
    return f"of other settings ({', '.join(changed)})"
