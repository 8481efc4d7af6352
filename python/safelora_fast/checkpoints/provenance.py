"""Describe a checkpoint at the time it was read, to find it again and to detect changes.

A checkpoint on the Hub is identified by repository and commit. One on disk is identified by its absolute path and by
the name, size and fingerprint of each file. The fingerprint is a SHA-256 of the header (every tensor's name, dtype,
shape and offset) and of 512 pieces of 4 KiB. The pieces are spread evenly over the data; smaller data is hashed
completely. Training changes nearly every weight, so the pieces detect it within a few milliseconds. An edit of single
weights between two pieces is not detected.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast.checkpoints.sources import Checkpoint, open_checkpoint
from safelora_fast.errors import CheckpointError
from safelora_fast.files.json_reader import COUNT, LIST, TEXT, check_fields

if TYPE_CHECKING:
    from collections.abc import Mapping

FILE = {"name": TEXT, "size": COUNT, "fingerprint": TEXT}
PIECE = 4096
PIECES = 512


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return `source` (absolute path or Hub id), `revision` (commit on the Hub, or None) and `files`, ready for JSON.

    Raises:
        CheckpointError: a file cannot be read.
    """
    if checkpoint.remote:
        return {"source": checkpoint.description, "revision": checkpoint.revision, "files": []}
    checkpoint.require(checkpoint.names)
    files = [
        {"name": Path(file.path).name, "size": file.size, "fingerprint": sampled(Path(file.path), file.data_start)}
        for file in checkpoint.files
    ]
    files.sort(key=lambda file: (str(file["name"]), str(file["fingerprint"])))
    return {"source": str(Path(checkpoint.description).absolute()), "revision": None, "files": files}


def check_source(role: str, described: Any) -> None:
    """Raise ValueError if `described` does not have the form that :func:`describe` returns."""
    try:
        for file in check_fields(described, {}, {"source": TEXT, "revision": TEXT, "files": LIST}).get("files") or []:
            check_fields(file, FILE)
    except ValueError as error:
        raise ValueError(f"the {role} source: {error}") from error


def same_content(aligned: Mapping[str, Any], base: Mapping[str, Any]) -> bool:
    """Return whether two descriptions have the same weights: one Hub commit, or files with the same fingerprints."""
    if aligned["revision"] is not None or base["revision"] is not None:
        return (aligned["source"], aligned["revision"]) == (base["source"], base["revision"])
    files = [sorted(str(file["fingerprint"]) for file in described["files"]) for described in (aligned, base)]
    return files[0] == files[1]


def sampled(path: Path, start: int = 0) -> str:
    """Return the SHA-256, in hexadecimal, of the first `start` bytes of a file and of pieces of the rest.

    Raises:
        CheckpointError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            room = os.fstat(stream.fileno()).st_size - start
            digest.update(stream.read(start))
            if room <= PIECES * PIECE:
                digest.update(stream.read())
            else:
                for index in range(PIECES):
                    stream.seek(start + index * (room - PIECE) // (PIECES - 1))
                    digest.update(stream.read(PIECE))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def locator(described: Mapping[str, Any]) -> str | Path:
    """Return the path, or the Hub id with the commit, that opens a described checkpoint again.

    Raises:
        CheckpointError: the description names no source.
    """
    source, revision = described.get("source"), described.get("revision")
    if not isinstance(source, str) or not source:
        raise CheckpointError("the subspace does not say what it was built from: build it with SafeSubspace.build")
    return f"{source}@{revision}" if revision else Path(source)


def reopen(described: Mapping[str, Any], *, role: str) -> Checkpoint:
    """Open a described checkpoint again.

    Raises:
        CheckpointError: the checkpoint is missing or has changed.
    """
    where = locator(described)
    if isinstance(where, Path) and not os.path.lexists(where):
        raise CheckpointError(f"{where}: the {role} model that the subspace was built from is gone")
    checkpoint = open_checkpoint(where, role=role)
    if not checkpoint.remote:
        former, now = (
            {tuple(file[name] for name in FILE) for file in files}
            for files in (described.get("files") or [], describe(checkpoint)["files"])
        )
        differing = sorted(str(name) for name, *_ in former ^ now)
        if differing:
            raise CheckpointError(
                f"{where}: the {role} model has changed since the subspace was built from it ({differing[0]} differs): "
                "build the subspace again"
            )
    return checkpoint
