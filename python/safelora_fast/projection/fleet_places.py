"""Where a fleet's adapters and outputs are: in folders here, or in remote stores by way of a temporary folder."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from safelora_fast.checkpoints.adapter import WEIGHTS
from safelora_fast.checkpoints.lora_config import CONFIG
from safelora_fast.checkpoints.resolver import adapter_folder
from safelora_fast.errors import AdapterError, OutputError
from safelora_fast.files import remote
from safelora_fast.files.json_reader import read_object
from safelora_fast.files.output import described, whole_file
from safelora_fast.projection.batch import check_output
from safelora_fast.projection.made_from import MARKER

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from safelora_fast.projection.batch import Item
    from safelora_fast.projection.manifest import Row


class Places:
    """The places of a worker.

    Args:
        output: the folder or URL of outputs, for the list of failures.
        failures: the name of that list.
        cache: a temporary folder. It holds remote adapters and outputs of the batch in hand, and nothing else.
    """

    def __init__(self, output: str | Path, failures: str, cache: Path) -> None:
        self._failures = remote.joined(str(output), failures) if remote.is_url(output) else Path(output, failures)
        self._cache, self._count = cache, 0
        self._copies: defaultdict[str, list[Path]] = defaultdict(list)  # by id
        self._shown: dict[str, str] = {}  # local copies and what they are copies of

    def marker(self, row: Row) -> dict[str, Any] | None:
        """Return the marker of an output; None if it has none, empty if it is damaged or was not finished.

        Raises:
            OutputError: the store refuses.
        """
        if remote.is_url(row.output):
            try:
                return remote.read_document(remote.joined(row.output, MARKER))
            except PermissionError as error:
                raise OutputError(f"{row.output}: the store refuses to read it ({error}); check who may") from error
        try:
            return read_object(Path(row.output, MARKER))
        except OSError:
            return None
        except ValueError:
            return {}

    def stamp(self, row: Row) -> str | None:
        """Return what a remote store says about an adapter's content; None for local ones.

        Raises:
            AdapterError: there is no adapter, or the store refuses.
        """
        if not remote.is_url(row.adapter):
            return None
        try:
            return remote.content_stamp(row.adapter, (CONFIG, WEIGHTS))
        except (FileNotFoundError, PermissionError) as error:
            raise _no_adapter(row, error) from error

    def fetched(self, row: Row) -> Path:
        """Return an adapter's folder; a remote one is fetched.

        Raises:
            AdapterError: there is no adapter, or the store refuses.
        """
        if not remote.is_url(row.adapter):
            return adapter_folder(row.adapter)
        folder = self._new(row, row.adapter)
        try:
            remote.fetch(row.adapter, (CONFIG, WEIGHTS), folder)
        except (FileNotFoundError, PermissionError) as error:
            raise _no_adapter(row, error) from error
        return folder

    def target(self, row: Row) -> Path:
        """Return the folder to write: the output, or one to upload."""
        return self._new(row, row.output) if remote.is_url(row.output) else Path(row.output)

    def check(self, row: Row, item: Item, models: Sequence[Path], *, foreign: bool) -> None:
        """Raise OutputError if the output must not be written. `foreign`: it has no marker."""
        if not remote.is_url(row.output):
            check_output(item, models)
        elif foreign and (there := remote.names(row.output)):
            raise OutputError(
                f"{row.output}: holds {there[0]!r}, which no earlier run wrote; delete it yourself, or choose another output"
            )

    def commit(self, row: Row, item: Item) -> None:
        """Upload the output, if it is remote.

        Raises:
            OutputError: the store refuses.
        """
        if remote.is_url(row.output) and item.target is not None:
            try:
                remote.upload(item.target, row.output, MARKER, item.made_from or {})
            except PermissionError as error:
                raise OutputError(f"{row.output}: the store refuses to write it ({error}); check who may") from error

    def forget(self, row: Row) -> None:
        """Delete the local copies that were made for a row."""
        for folder in self._copies.pop(row.id, ()):
            shutil.rmtree(folder.parent)
            del self._shown[str(folder)]

    def shown(self, text: str) -> str:
        """Return a message with URLs for the paths of local copies."""
        for path, url in self._shown.items():
            text = text.replace(path, url)
        return text

    def list_failures(self, failed: Mapping[str, str]) -> None:
        """Write the list of failures, or delete it if there are none.

        Raises:
            OutputError, StoreError: it cannot be written.
        """
        lines = ({"id": name, "error": error} for name, error in failed.items())
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        content = text.encode(errors="backslashreplace")
        if isinstance(self._failures, str):
            remote.write(self._failures, content) if content else remote.remove(self._failures)
        elif content:
            with whole_file(self._failures) as file:
                file.write_bytes(content)
        else:
            with described(self._failures):
                self._failures.unlink(missing_ok=True)

    def _new(self, row: Row, url: str) -> Path:
        """Return a new path whose last part is that of the id, as reports show it."""
        self._count += 1
        folder = self._cache / str(self._count) / PurePosixPath(row.id).name
        folder.parent.mkdir()
        self._copies[row.id].append(folder)
        self._shown[str(folder)] = url
        return folder


def _no_adapter(row: Row, error: OSError) -> AdapterError:
    why = "the store refuses to read it" if isinstance(error, PermissionError) else f"holds no {CONFIG} with {WEIGHTS}"
    return AdapterError(f"{row.adapter}: {why}; check the URL, and who may read it")
