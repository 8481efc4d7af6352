"""SHA-256 of files and of plain values."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from safelora_fast.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CHUNK = 1 << 20
_known: dict[tuple[Any, ...], str] = {}


def digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal. An unchanged file is read only once.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return remembered(path, _sha256)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def text_digest(content: Any) -> str:
    """Return the SHA-256 of plain values as JSON with sorted keys. Values that JSON lacks count as their text."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def remembered(path: Path, make: Callable[[Path], str]) -> str:
    """Return `make(path)`, cached until the file's size, time or inode changes.

    Raises:
        OSError: the file cannot be read.
    """
    status = path.stat()
    key = make, str(path), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    if key not in _known:
        _known[key] = make(path)
    return _known[key]


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            found.update(chunk)
    return found.hexdigest()
