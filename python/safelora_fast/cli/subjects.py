"""The model and the adapters that a command names, checked before anything heavy is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


def check_subject(command: str, model: str, adapters: Iterable[str] = ()) -> list[Path]:
    """The adapters' folders; those of the Hub are fetched.

    Args:
        command: for messages.
        model: its path or Hub id.
        adapters: their folders or Hub ids.

    Raises:
        MissingDependencyError: a package is missing that loads models.
        CheckpointError: there is no such model.
        AdapterError: there is no such adapter.
    """
    from safelora_fast.checkpoints.resolver import adapter_folder, find_model
    from safelora_fast.recipe.signatures import check_packages

    check_packages(command)
    find_model(model)
    return [adapter_folder(adapter, tokenizer=True) for adapter in adapters]
