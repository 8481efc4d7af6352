"""A store of projected adapters that fills itself: an adapter is projected when it is first asked for.

An entry's name is a digest of what it is made from (adapter, pair of models, settings), so a retrained adapter or other
settings never find an old projection. Entries are written whole. Any number of processes can share a store.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast.checkpoints.adapter import load_adapter, read_config
from safelora_fast.checkpoints.lora_config import CONFIG
from safelora_fast.errors import AdapterError, OutputError, SafeLoraFastError
from safelora_fast.files.digest import text_digest
from safelora_fast.files.json_reader import read_object
from safelora_fast.files.output import resolved
from safelora_fast.files.progress import log_warning
from safelora_fast.projection.batch import REPORT, Item, project_batch
from safelora_fast.projection.made_from import MARKER, adapter_digest, differences, made_from
from safelora_fast.projection.model_pair import Vectors, open_pair, settings_and_pair
from safelora_fast.projection.report import alike

if TYPE_CHECKING:
    from collections.abc import Callable


class ProjectedStore:
    """Projected adapters of one model.

    Args:
        adapters: the folder with the adapters as they were trained, each in a folder below it.
        store: the folder for projected adapters; nothing else should be in it.
        aligned: path or Hub id of the model that is served and that the adapters were trained on.
        base: path or Hub id of the model before alignment.
        subspace: a subspace of the two instead of them, for operator "orthogonal" and select "all".
        served: the name or path that adapters must name as their base model; None accepts all.
        warn: called with the warnings of each projection, one line each; by default, they are logged.
        settings: as of :func:`~safelora_fast.project_adapter`.

    Raises:
        SafeLoraFastError: a setting is wrong, or a model cannot be read.
    """

    def __init__(
        self,
        adapters: str | Path,
        store: str | Path,
        *,
        aligned: str | Path | None = None,
        base: str | Path | None = None,
        subspace: Vectors | None = None,
        served: str | None = None,
        warn: Callable[[str], None] = log_warning,
        **settings: Any,
    ) -> None:
        self._adapters, self._store, self._warn = Path(adapters), Path(store), warn
        self._served = served
        self._settings, pair = settings_and_pair(subspace, aligned, base, settings)
        self._pair = pair or open_pair(aligned, base)
        self._identity = self._pair.identity()
        self._one_at_a_time = threading.Lock()
        if not self._adapters.is_dir():
            raise AdapterError(f"{adapters}: is no folder; name the one that holds the adapters")
        if resolved(self._store).is_relative_to(resolved(self._adapters)):
            raise OutputError(f"{store}: lies in the adapters' folder; projected adapters must be apart from it")

    def find(self, name: str) -> Path | None:
        """Return the folder of the projected adapter, which is projected if it is not there yet.

        Args:
            name: the adapter's path below the adapters' folder.

        Returns:
            None if there is no such adapter. Names that lead out of the folder, also by links, name none.

        Raises:
            SafeLoraFastError: the adapter cannot be projected.
        """
        place = self._adapters / name
        parts = name.split("/")
        outside = any(not part or part.startswith(".") or "\0" in part for part in parts)
        if outside or not resolved(place).is_relative_to(resolved(self._adapters)) or not (place / CONFIG).is_file():
            return None
        if self._served is not None:
            trained_on = read_config(place).get("base_model_name_or_path")
            if not isinstance(trained_on, str) or not alike(trained_on, self._served):
                raise AdapterError(f"{place}: was trained on {trained_on}, and {self._served} is served")
        content = adapter_digest(place)
        document = made_from(self._identity, self._settings, content)
        target = self._store / text_digest({key: document[key] for key in ("format", "pair", "settings", "adapter")})
        if not self._holds(target, document):
            with self._one_at_a_time:
                if not self._holds(target, document):
                    self._project(place, target, content, document)
        return target

    def _holds(self, target: Path, document: dict[str, Any]) -> bool:
        try:
            return (target / REPORT).is_file() and not differences(read_object(target / MARKER), document)
        except (OSError, ValueError):
            return False

    def _project(self, place: Path, target: Path, content: str, document: dict[str, Any]) -> None:
        if target.exists():
            raise OutputError(f"{target}: is not a whole entry of the store; delete it, and ask again")

        def unchanged() -> None:
            if adapter_digest(place) != content:
                raise AdapterError(f"{place}: changed while it was read; ask for it again")

        item = Item(load_adapter(place, self._settings.exclude), target, made_from=document, check=unchanged)
        (found,) = project_batch([item], self._pair, self._settings)
        if isinstance(found, SafeLoraFastError):
            if isinstance(found, OutputError) and self._holds(target, document):
                return  # another process was faster
            raise found
        for warning in found.warnings:
            self._warn(warning)
