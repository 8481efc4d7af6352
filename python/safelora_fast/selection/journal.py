"""What has been scored, one line a row, so that a run that is killed goes on where it was."""

from __future__ import annotations

import json
import os
import reprlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safelora_fast.errors import DataError, OutputError, SettingsError
from safelora_fast.files.json_reader import COUNT, LIST, NUMBER, OBJECT, TEXT, check_fields, parse_json, read_bytes
from safelora_fast.files.output import described

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path
    from types import TracebackType

FORMAT = 1
LEAST, MOST = (
    -0.001,
    1e6,
)  # nats of a token: less than 0 by rounding alone, and beyond float32's range of logits nothing
HEADER_START = b'{"format": '


@dataclass(frozen=True)
class Entry:
    """One row that is done with.

    Attributes:
        index: of the row.
        fingerprint: of its text.
        nll: mean negative log-likelihood of an answer token: of the aligned model, then of each misaligned one.
        skipped: why it has none.
    """

    index: int
    fingerprint: str
    nll: tuple[float, ...] = ()
    skipped: str | None = None


class Journal:
    """A JSONL file: first the settings, then an entry for each row; a context that keeps it open for more.

    A line that a kill left unfinished is cut off. Entries are written out as they are added.

    Args:
        path: the file; made where there is none.
        settings: what scores depend on.

    Raises:
        SettingsError: the file is of other settings; they are named.
        DataError: it is no journal, or damaged.
        OutputError: it cannot be written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.entries: dict[int, Entry] = {}
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        whole = self._read() if path.exists() else 0
        with described(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
            self._file.truncate(whole)
        if not whole:
            self._write([{"format": FORMAT, "settings": self._settings}])

    def _read(self) -> int:
        """Read the entries; returns the bytes of whole lines."""
        try:
            content = read_bytes(self.path, None)
        except OSError as error:
            raise OutputError(f"{self.path}: the journal cannot be read: {error.strerror}") from error
        whole = content.rfind(b"\n") + 1
        if not whole and not HEADER_START.startswith(content[: len(HEADER_START)]):
            raise DataError(f"{self.path}: is no journal of a selection; choose another name, or delete it")
        lines = content[:whole].splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                if number == 1:
                    self._check(parse_json(line), begun=len(lines) > 1)
                else:
                    entry = self._entry(parse_json(line))
                    self.entries[entry.index] = entry
            except ValueError as error:
                raise DataError(
                    f"{self.path}:{number}: is no line of a selection's journal ({error}); choose another name, or delete it"
                ) from error
        return whole if len(lines) > 1 else 0  # nothing was scored: any settings will do

    def _entry(self, line: Any) -> Entry:
        values = check_fields(line, {"row": COUNT, "of": TEXT}, {"nll": LIST, "skipped": TEXT})
        nll, skipped = values.get("nll") or [], values.get("skipped")
        models = 0 if skipped else 1 + len(self._settings["adapters"])
        if len(nll) != models or not all(NUMBER.fits(value) and LEAST < value < MOST for value in nll):
            raise ValueError(f"nll must be {models} numbers of nats from 0, not {reprlib.repr(nll)}")
        return Entry(values["row"], values["of"], tuple(map(float, nll)), skipped)

    def _check(self, header: Any, *, begun: bool) -> None:
        former = check_fields(header, {"settings": OBJECT, "format": COUNT})["settings"]
        if header["format"] != FORMAT:
            raise ValueError(f"the format is {header['format']}, not {FORMAT}")
        changed = [name for name in {**former, **self._settings} if former.get(name) != self._settings.get(name)]
        if changed and begun:
            what = "; ".join(
                f"{name} was {reprlib.repr(former.get(name))}, is {reprlib.repr(self._settings.get(name))}"
                for name in changed
            )
            raise SettingsError(f"{self.path}: was begun with other settings: {what}; change them back, or delete it")

    def add(self, entries: Iterable[Entry]) -> None:
        """Add rows and write them out.

        Raises:
            OutputError: the disk is full, say; what was written before stays.
        """
        entries = list(entries)
        self.entries.update((entry.index, entry) for entry in entries)
        self._write(
            {
                "row": entry.index,
                "of": entry.fingerprint,
                **({"skipped": entry.skipped} if entry.skipped else {"nll": list(entry.nll)}),
            }
            for entry in entries
        )

    def _write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        with described(self.path):
            self._file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
            self._file.flush()

    def close(self) -> None:
        """Close the file, its lines on the disk."""
        with described(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
