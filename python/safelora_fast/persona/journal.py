"""The file of responses beside a vector: appended to while they are generated, and read to go on, or to score them anew.

Each row says how it was made, so that responses of another model or other settings are noticed. A row that a kill cut short
is dropped; it is the last one.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safelora_fast.errors import DataError, SettingsError
from safelora_fast.files.json_reader import COUNT, parse_json, read_bytes
from safelora_fast.files.output import described
from safelora_fast.persona.responses import Request, Response

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

SUFFIX = ".responses.jsonl"
MODEL = "model"  # in what rows say of how they were made, its name; the fingerprint of its weights is what counts


@dataclass(frozen=True)
class Journal:
    """The responses on disk.

    Attributes:
        path: the JSONL file.
        made: how responses are made now: model, seed and whatever else decides what is generated.
    """

    path: Path
    made: dict[str, Any]

    @classmethod
    def beside(cls, output: Path, made: dict[str, Any]) -> Journal:
        """The journal of a vector's file."""
        return cls(output.with_suffix(SUFFIX), made)

    def read(self, wanted: Sequence[Request]) -> dict[str, Response]:
        """The responses to these requests that are there, by id.

        Raises:
            DataError: a row is no response; file and line are named.
            SettingsError: responses were made in another way, or to other prompts.
        """
        by_id = {request.id: request for request in wanted}
        found: dict[str, Response] = {}
        for place, row in self._rows():
            if not _is_response(row):
                raise DataError(f"{place}: is no response of persona extract")
            self._compare(place, row)
            request = by_id.get(row["id"])
            if request is None or request.id in found:
                continue
            if (row["system"], row["user"]) != (request.system, request.user):
                raise self._refuse(place, f"the trait has changed: {request.id} was another question or system prompt")
            found[request.id] = Response(request, tuple(row["tokens"]), row["answer"])
        return found

    def append(self, responses: Sequence[Response]) -> None:
        """Add responses and have the system write them to the disk.

        Raises:
            OutputError: the system refuses to write.
        """
        rows = (response.to_row(self.made) for response in responses)
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        with described(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())

    def mend(self) -> None:
        """Cut off a last row that is not whole.

        Raises:
            OutputError: the system refuses to write.
        """
        with described(self.path):
            if not self.path.exists():
                return
            content = read_bytes(self.path, None)
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                os.truncate(self.path, whole)

    def remove(self) -> None:
        """Forget the responses."""
        with described(self.path):
            self.path.unlink(missing_ok=True)

    def _rows(self) -> Iterator[tuple[str, Any]]:
        try:
            content = read_bytes(self.path, None) if self.path.exists() else b""
        except OSError as error:
            raise DataError(f"{self.path}: the responses cannot be read: {error.strerror}") from error
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.split(b"\n"), start=1):
            if line.strip():
                place = f"{self.path}:{number}"
                try:
                    yield place, parse_json(line)
                except ValueError as error:
                    raise DataError(f"{place}: {error}") from error

    def _compare(self, place: str, row: dict[str, Any]) -> None:
        former = row["made"] if isinstance(row["made"], dict) else {}
        keys = sorted((former.keys() | self.made.keys()) - {MODEL})
        changed = [key for key in keys if former.get(key) != self.made.get(key)]
        if changed:
            what = "; ".join(f"{key} was {former.get(key)!r}, is {self.made.get(key)!r}" for key in changed)
            raise self._refuse(place, f"was made in another way: {what}")

    def _refuse(self, place: str, what: str) -> SettingsError:
        return SettingsError(f"{place}: {what}; pass --regenerate to start anew, or choose another output")


def _is_response(row: Any) -> bool:
    if not isinstance(row, dict) or not {"id", "system", "user", "answer", "tokens", "made"} <= row.keys():
        return False
    tokens = row["tokens"]
    whole = isinstance(tokens, list) and all(map(COUNT.fits, tokens))
    return whole and isinstance(row["id"], str) and isinstance(row["answer"], str)
