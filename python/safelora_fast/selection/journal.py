"""A journal of scored examples, one per line, from which an interrupted run resumes."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safelora_fast.errors import SettingsError
from safelora_fast.files.json_reader import COUNT, LIST, NUMBER, OBJECT, TEXT, Kind, check_fields
from safelora_fast.files.store import Changed, JsonlStore, changed_settings, plain, settings_message

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

FORMAT = 1
LEAST, MOST = -0.001, 1e6  # nats per token: below 0 only by rounding, and above any value of float32 logits


@dataclass(frozen=True)
class Entry:
    """The result of one example.

    Attributes:
        index: the example's index in the candidates file.
        fingerprint: digest of the example's text.
        nll: mean negative log-likelihoods per completion token, in nats: the aligned model's, then each misaligned
            one's; in the journal of a screen, its values.
        skipped: the reason if the example was not scored.
    """

    index: int
    fingerprint: str
    nll: tuple[float, ...] = ()
    skipped: str | None = None


class Journal:
    """A JSONL file with the settings on its first line and one line per example after it.

    A subclass may keep other values than likelihoods, with another `key`, `kind` and `count`.

    Args:
        path: the file; created if it does not exist.
        settings: all settings that the likelihoods depend on.

    Attributes:
        entries: the entries by example index.

    Raises:
        SettingsError: the file has other settings; the message names them.
        DataError: the file is not a journal, or is damaged.
        OutputError: the file cannot be written.
    """

    key = "nll"
    kind = Kind("nats from 0", lambda value: NUMBER.fits(value) and LEAST < value < MOST)

    @property
    def count(self) -> int:
        """Number of values of one example."""
        return 1 + len(self._settings["adapters"])

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._settings = plain(settings)
        self._changed: Changed | None = None
        self._store = JsonlStore(path, "line of a selection's journal")
        entries = [entry for entry in self._store.read(self._parse) if entry is not None]
        self.entries = {entry.index: entry for entry in entries}
        if not entries:  # nothing is scored yet, so the settings may change
            self._store.remove()
            self._store.append([{"format": FORMAT, "settings": self._settings}])

    def _parse(self, line: Any) -> Entry | None:
        if self._changed is None:
            header = check_fields(line, {"settings": OBJECT, "format": COUNT})
            if header["format"] != FORMAT:
                raise ValueError(f"the format is {header['format']}, not {FORMAT}")
            self._changed = changed_settings(header["settings"], self._settings)
            return None
        if message := settings_message(self.path, self._changed, "change them back, or delete it"):
            raise SettingsError(message)
        return self._entry(line)

    def _entry(self, line: Any) -> Entry:
        """Return the entry of a line.

        Raises:
            ValueError: the line is invalid.
        """
        values = check_fields(line, {"row": COUNT, "of": TEXT}, {self.key: LIST, "skipped": TEXT})
        nll, skipped = values.get(self.key) or [], values.get("skipped")
        count = 0 if skipped else self.count
        if len(nll) != count or not all(map(self.kind.fits, nll)):
            raise ValueError(f"{self.key} must be {count} numbers of {self.kind.words}, not {reprlib.repr(nll)}")
        return Entry(values["row"], values["of"], tuple(map(float, nll)), skipped)

    def add(self, entries: Iterable[Entry]) -> None:
        """Add entries; they are on disk when this returns.

        Raises:
            OutputError: writing failed. Earlier lines are kept.
        """
        added = {entry.index: entry for entry in entries}
        self.entries.update(added)
        self._store.append(
            {
                "row": entry.index,
                "of": entry.fingerprint,
                **({"skipped": entry.skipped} if entry.skipped else self._values(entry)),
            }
            for entry in added.values()
        )

    def _values(self, entry: Entry) -> dict[str, Any]:
        """Return the values of an entry's line."""
        return {self.key: list(entry.nll)}
