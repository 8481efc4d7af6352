"""Likelihoods of scored examples, one a line, so that a run that is killed resumes."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safelora_fast.errors import SettingsError
from safelora_fast.files.json_reader import COUNT, LIST, NUMBER, OBJECT, TEXT, check_fields
from safelora_fast.files.store import Changed, JsonlStore, changed_settings, plain, settings_message

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

FORMAT = 1
LEAST, MOST = -0.001, 1e6  # nats per token: below 0 by rounding only, and no float32 logits give more


@dataclass(frozen=True)
class Entry:
    """One example that is done.

    Attributes:
        index: of the example.
        fingerprint: of its text.
        nll: mean negative log-likelihood of a completion token: of the aligned model, then of each misaligned one.
        skipped: why it has none.
    """

    index: int
    fingerprint: str
    nll: tuple[float, ...] = ()
    skipped: str | None = None


class Journal:
    """A JSONL file: first the settings, then one line for each example.

    Args:
        path: the file; made if there is none.
        settings: what the likelihoods depend on.

    Attributes:
        entries: by the example's index.

    Raises:
        SettingsError: the file was made with other settings; they are named.
        DataError: it is no journal, or damaged.
        OutputError: it cannot be written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._settings = plain(settings)
        self._changed: Changed | None = None
        self._store = JsonlStore(path, "line of a selection's journal")
        entries = [entry for entry in self._store.read(self._parse) if entry is not None]
        self.entries = {entry.index: entry for entry in entries}
        if not entries:  # nothing is scored yet: any settings will do
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
        values = check_fields(line, {"row": COUNT, "of": TEXT}, {"nll": LIST, "skipped": TEXT})
        nll, skipped = values.get("nll") or [], values.get("skipped")
        models = 0 if skipped else 1 + len(self._settings["adapters"])
        if len(nll) != models or not all(NUMBER.fits(value) and LEAST < value < MOST for value in nll):
            raise ValueError(f"nll must be {models} numbers of nats from 0, not {reprlib.repr(nll)}")
        return Entry(values["row"], values["of"], tuple(map(float, nll)), skipped)

    def add(self, entries: Iterable[Entry]) -> None:
        """Add examples; they are on the disk when this returns.

        Raises:
            OutputError: the system refuses to write. Earlier lines stay.
        """
        added = {entry.index: entry for entry in entries}
        self.entries.update(added)
        self._store.append(
            {
                "row": entry.index,
                "of": entry.fingerprint,
                **({"skipped": entry.skipped} if entry.skipped else {"nll": list(entry.nll)}),
            }
            for entry in added.values()
        )
