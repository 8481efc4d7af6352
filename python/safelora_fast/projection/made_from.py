"""What an output or a part of one was made from: adapter, pair of models and settings, the same on every machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safelora_fast import _core
from safelora_fast.checkpoints.adapter import WEIGHTS
from safelora_fast.checkpoints.lora_config import CONFIG
from safelora_fast.checkpoints.resolver import adapter_folder
from safelora_fast.files.digest import digest, text_digest
from safelora_fast.files.store import changed_settings, plain

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from safelora_fast.projection.settings import Settings

MARKER = "safelora_made_from.json"
FORMAT = 1
VERSION, STAMP = "safelora-fast", "stamp"  # recorded, not compared


def made_from(pair: Mapping[str, str], settings: Settings, adapter: str, stamp: str | None = None) -> dict[str, Any]:
    """Return the document of an output.

    Args:
        pair: from :meth:`~safelora_fast.projection.model_pair.ModelPair.identity`.
        settings: the settings; the number of threads does not count.
        adapter: the adapter's digest.
        stamp: what a remote store says about the adapter's content, so that it need not be read again.
    """
    effective = {name: value for name, value in settings.effective().items() if name != "threads"}
    if settings.safe_adapter is None:
        del effective["safe_adapter"]
    else:
        effective["safe_adapter"] = adapter_digest(adapter_folder(settings.safe_adapter))
    return {
        "format": FORMAT,
        "pair": dict(pair),
        "settings": effective,
        "adapter": adapter,
        STAMP: stamp,
        VERSION: _core.__version__,
    }


def adapter_digest(folder: Path) -> str:
    """Return a digest of an adapter's weights and configuration.

    Raises:
        DataError: a file cannot be read.
    """
    return text_digest([digest(folder / name) for name in (WEIGHTS, CONFIG) if (folder / name).exists()])


def differences(former: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what differs between two documents, by dotted name."""
    return changed_settings(
        *({key: value for key, value in plain(one).items() if key not in {VERSION, STAMP}} for one in (former, now))
    )
