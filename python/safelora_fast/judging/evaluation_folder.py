"""The folder of an evaluation: settings, answers, verdicts, Inspect's logs and the report."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safelora_fast.errors import OutputError
from safelora_fast.files.json_reader import read_object, why
from safelora_fast.files.output import described
from safelora_fast.files.store import JsonlStore, changed_settings, plain, settings_message, write_json
from safelora_fast.judging.answers import Answer

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

SETTINGS = "evaluation.json"
ANSWERS = "answers.jsonl"
VERDICTS = "verdicts.jsonl"
REPORT = "report.json"
LOGS = "logs"
BENCHMARKS = "benchmarks.json"
FORMAT = 2
START_ANEW = "pass --overwrite to start anew, or delete it"


@dataclass(frozen=True)
class EvaluationFolder:
    """The evaluation of one model or adapter on one set of questions.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def answers(self) -> Path:
        """The file of answers."""
        return self.path / ANSWERS

    @property
    def _store(self) -> JsonlStore:
        return JsonlStore(self.answers, "answer")

    def begin(self, settings: dict[str, Any], *, overwrite: bool) -> None:
        """Create the folder, or continue one that has the same settings.

        Args:
            settings: the settings that the answers depend on.
            overwrite: delete answers and verdicts of other settings; those of the same settings stay.

        Raises:
            OutputError: the folder holds another evaluation or other files, or cannot be written.
        """
        self.check()
        other = self.other(settings)
        if other is not None and not overwrite:
            raise OutputError(other)
        with described(self.path):
            if other is not None:
                for name in (REPORT, VERDICTS, ANSWERS):
                    (self.path / name).unlink(missing_ok=True)
                if (self.path / LOGS).is_dir():
                    shutil.rmtree(self.path / LOGS)
        write_json(self.path / SETTINGS, {"format": FORMAT, **settings})

    def other(self, settings: dict[str, Any]) -> str | None:
        """Return why the stored settings differ from these; None if they match or nothing is stored."""
        file = self.path / SETTINGS
        if not file.is_file():
            return None
        try:
            return other_settings(self.path, read_object(file), {"format": FORMAT, **settings})
        except (OSError, ValueError) as error:
            return f"{file}: {why(error)}; {START_ANEW}"

    def check(self) -> None:
        """Check that the folder is free, or holds an evaluation.

        Raises:
            OutputError: it holds other files, or the path is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path}: is a file; give the name of a folder")
        if self.path.exists():
            names = {file.name for file in self.path.iterdir()}
            if names and SETTINGS not in names and names != {BENCHMARKS}:
                raise OutputError(f"{self.path}: holds files that are not of an evaluation; choose another output")

    def stored(self) -> dict[str, Answer]:
        """Return the stored answers by id. An incomplete last line, from a run that was killed, is ignored."""
        return {answer.asked.id: answer for answer in self._store.read(Answer.from_row)}

    def add(self, answers: Iterable[Answer]) -> None:
        """Append answers to the file."""
        self._store.append(answer.to_row() for answer in answers)


def other_settings(where: Path, former: Mapping[str, Any], now: dict[str, Any]) -> str | None:
    """Return the error message for changed settings, or None. An adapter or template may move if its bytes are the same."""
    now = plain(now)
    places = {name for name in ("adapter", "chat_template") if now.get(f"{name}_sha256") is not None}
    changed = changed_settings(former, now)
    changed = {name: values for name, values in changed.items() if name not in places or f"{name}_sha256" in changed}
    return settings_message(where, changed, "choose another output, or pass --overwrite")
