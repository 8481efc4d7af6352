"""Files that survive a kill: JSON that is replaced atomically, and JSONL that grows line by line.

When a call that writes returns, the content is on the disk (fsync). A JSON file is written under a temporary name and
then renamed, so a kill leaves either the old content or the new. A kill during an append can leave half a line: reading
skips it, and the next append cuts it off.

Many files record the settings that they were made with. :func:`changed_settings` compares them with the current
settings, and :func:`settings_message` is the one message for settings that differ.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from safelora_fast.errors import DataError
from safelora_fast.files.json_reader import parse_json, read_bytes
from safelora_fast.files.output import described, sync, whole_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

Row = TypeVar("Row")
Changed: TypeAlias = "dict[str, tuple[Any, Any]]"
MOST_TOLD = 4
GROWS = "what is stored stays: make room, and run the same command again"
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 100


def to_json(content: Mapping[str, Any]) -> str:
    """Return JSON for people and programs. NaN and infinity, which JSON lacks, become null."""
    return json.dumps(without_nan(content), indent=2, ensure_ascii=False, default=str)


def without_nan(value: Any) -> Any:
    """Return plain values with None for NaN and infinity, and with lists for tuples."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write or replace a JSON file atomically. Missing folders are made.

    Raises:
        OutputError: the file cannot be written.
    """
    with whole_file(path) as partial:
        partial.write_text(to_json(content) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class JsonlStore:
    """A JSONL file that grows while work is done.

    Attributes:
        path: the file. The first append creates it.
        row: what a line contains, for messages, e.g. "response of persona extract".
    """

    path: Path
    row: str

    def read(self, parse: Callable[[Any], Row]) -> list[Row]:
        """Return the rows of the file; none if the file does not exist. Half a line at the end is skipped.

        Args:
            parse: makes a row from the JSON value of a line. Raises ValueError if the value is invalid.

        Raises:
            DataError: the file cannot be read, or a line is invalid; the message names the line.
        """
        try:
            content = read_bytes(self.path, None) if self.path.exists() else b""
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from error
        *lines, half = content.split(b"\n")
        if not half.startswith(b"{"):  # not the start of a row, so another program wrote the file
            lines.append(half)
        rows = []
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    rows.append(parse(parse_json(line)))
                except ValueError as error:
                    raise DataError(
                        f"{self.path}:{number}: is not a valid {self.row} ({error}); choose another name, or delete the file"
                    ) from error
        return rows

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows. Call :meth:`read` first, because half a line at the end of the file is cut off.

        Raises:
            OutputError: the file cannot be written. Earlier rows stay.
        """
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        with described(self.path, kept=GROWS):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                end = file.seek(0, os.SEEK_END)
                file.seek(max(end - 1, 0))
                if file.read() not in {b"", b"\n"}:
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if not end:
                sync(self.path.parent)

    def remove(self) -> None:
        """Delete the file if it exists.

        Raises:
            OutputError: the file cannot be deleted.
        """
        with described(self.path):
            self.path.unlink(missing_ok=True)


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values as JSON returns them: tuples become lists, and keys become text."""
    result: dict[str, Any] = json.loads(json.dumps(values))
    return result


def changed_settings(former: Mapping[str, Any], now: Mapping[str, Any]) -> Changed:
    """Return each setting that differs, by its dotted name, with its former and its current value.

    A missing setting counts as None. Both sides are plain values (:func:`plain`).
    """
    before, after = dict(_flat(former)), dict(_flat(now))
    names = sorted(before.keys() | after.keys())
    return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def changes_text(changed: Changed) -> str:
    """Return the changes in words: `seed was 0, is 1; top_p was 1.0, is 0.9 and 2 more`."""
    told = [f"{name} was {_short.repr(was)}, is {_short.repr(now)}" for name, (was, now) in changed.items()]
    more = len(told) - MOST_TOLD
    return "; ".join(told[:MOST_TOLD]) + (f" and {more} more" if more > 0 else "")


def settings_message(where: object, changed: Changed, remedy: str) -> str | None:
    """Return the message for a file that was made with other settings; None if nothing changed.

    If `format` changed, another version wrote the file, and the message leaves out the other settings.

    Args:
        where: the file or folder.
        changed: from :func:`changed_settings`.
        remedy: what the user can do, e.g. "choose another output, or pass --overwrite".
    """
    if "format" in changed:
        was, now = changed["format"]
        return f"{where}: was written by another version of safelora-fast (format {was}, now {now}); {remedy}"
    return f"{where}: settings have changed: {changes_text(changed)}; {remedy}" if changed else None
