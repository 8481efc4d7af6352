"""SHA-256 of files, each read once for as long as it stays as it is."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

BLOCK = 1 << 20
_known: dict[tuple[str, int, int, int], str] = {}


def digest(path: Path) -> str:
    """SHA-256 of a file in hexadecimal; it is read again when its size, time or inode is another.

    Raises:
        OSError: it cannot be read.
    """
    status = path.stat()
    key = str(path), status.st_ino, status.st_size, status.st_mtime_ns
    if key not in _known:
        _known[key] = _sha256(path)
    return _known[key]


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            found.update(block)
    return found.hexdigest()
