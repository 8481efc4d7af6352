"""SHA-256 of files, each read once for as long as it stays as it is, and of a model's weights."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from safelora_fast.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn

BLOCK = 1 << 20
VALUES = 64
_known: dict[tuple[Callable[[Path], str], str, int, int, int], str] = {}


def digest(path: Path) -> str:
    """SHA-256 of a file in hexadecimal.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return remembered(path, _sha256)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def remembered(path: Path, make: Callable[[Path], str]) -> str:
    """What is made of a file; made again when the file's size, time or inode is another.

    Raises:
        OSError: it cannot be read.
    """
    status = path.stat()
    key = make, str(path), status.st_ino, status.st_size, status.st_mtime_ns
    if key not in _known:
        _known[key] = make(path)
    return _known[key]


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over name, shape, dtype and up to 64 evenly spaced values of every parameter.

    Training changes nearly every weight, so that it notices a model that was trained on, at the price of milliseconds.
    """
    import torch

    found = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().flatten()
        some = values[:: max(len(values) // VALUES, 1)][:VALUES].cpu().contiguous()
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} ".encode())
        found.update(some.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            found.update(block)
    return found.hexdigest()
