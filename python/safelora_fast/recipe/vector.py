"""Reading a steering vector from a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast.errors import SettingsError
from safelora_fast.recipe.loading import first_line

if TYPE_CHECKING:
    import torch


def read_vector(file: str | Path) -> torch.Tensor:
    """The one tensor of a .safetensors, .npy or .pt file (a .pt file is read as weights only: no code in it runs).

    Raises:
        SettingsError: the file cannot be read, or holds anything else.
    """
    import torch

    try:
        found = _read(Path(file))
    except Exception as error:  # a damaged pickle raises whatever it runs into
        raise SettingsError(f"{file}: the vector cannot be read: {first_line(error)}") from error
    if not isinstance(found, torch.Tensor):
        raise SettingsError(f"{file}: holds no single tensor; save the vector alone")
    return found


def _read(path: Path) -> Any:
    import numpy as np
    import torch
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        tensors = list(load_file(path).values())
        return tensors[0] if len(tensors) == 1 else None
    if path.suffix == ".npy":
        return torch.from_numpy(np.load(path, allow_pickle=False))
    if path.suffix in {".pt", ".pth"}:
        return torch.load(path, map_location="cpu", weights_only=True)
    raise ValueError(f"{path.suffix or 'no suffix'}: give .safetensors, .npy or .pt")
