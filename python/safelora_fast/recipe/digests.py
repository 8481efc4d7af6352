"""SHA-256 of files, each read once for as long as it stays as it is."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from safelora_fast.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BLOCK = 1 << 20
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


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            found.update(block)
    return found.hexdigest()
