"""Tensors under keys, in append-only files that several processes write and read at the same time.

Each process appends to a file of its own and reads those of the others. A record is a header and its tensors, each with
a CRC-32. What is incomplete or damaged counts as absent, so nothing is synced: what a crash loses is absent, too.

Files are read, not mapped: if another program truncates a mapped file, or its disk fails, SIGBUS ends the process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import uuid
import weakref
import zlib
from typing import TYPE_CHECKING, NamedTuple

from safelora_fast.files.output import described

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

SUFFIX = ".records"
MAGIC = b"slf-rec1"
HEAD = struct.Struct("<8s16sII")  # magic, key, number of tensors, CRC-32 of the key and the table of tensors
ENTRY = struct.Struct("<i12sIIQI")  # number, dtype, rows, columns, bytes, CRC-32
MOST_TENSORS = 4096
logger = logging.getLogger(__name__)


class RawTensor(NamedTuple):
    """A matrix as bytes.

    Attributes:
        dtype: name of the dtype, at most 12 ASCII characters.
        shape: (rows, columns).
        data: the values, by rows.
    """

    dtype: str
    shape: tuple[int, int]
    data: bytearray | memoryview


class TensorRecords:
    """The records of one folder, which is made if it does not exist.

    Memory: about 200 bytes per record.

    Args:
        folder: holds the files of all processes, `*.records`.

    Raises:
        OutputError: the folder cannot be made or read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptors: dict[str, int] = {}
        self._names: list[str] = []  # of files, by number
        self._read_to: list[int] = []  # where each file's next record begins
        self._complaints: set[str] = set()  # names of files that were warned about
        self._where: dict[bytes, tuple[tuple[int, int], ...]] = {}  # (file, offset) of the records of each key
        self._own: int | None = None
        weakref.finalize(self, _close, self._descriptors)
        with described(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.refresh()

    def refresh(self) -> None:
        """Find the records that other processes have written since. A file that cannot be opened counts as absent.

        Raises:
            OutputError: the folder cannot be read.
        """
        with described(self.folder):
            for path in sorted(self.folder.glob(f"*{SUFFIX}")):
                if path.name not in self._descriptors and path.name not in self._complaints:
                    try:
                        self._add(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would keep it waiting
                    except OSError as error:
                        self._complaints.add(path.name)
                        logger.warning("%s: cannot be opened (%s), so its records are not used", path, error.strerror)
            for number, name in enumerate(self._names):
                if number != self._own:
                    self._scan(number, self._descriptors[name])

    def is_own(self, key: bytes) -> bool:
        """Return whether this process wrote every record of a key."""
        return all(number == self._own for number, _ in self._where.get(key, ()))

    def read(self, key: bytes, wanted: Collection[int]) -> dict[int, RawTensor]:
        """Return the intact tensors of a key, those of the wanted numbers."""
        found: dict[int, RawTensor] = {}
        for file, begin in self._where.get(key, ()):
            descriptor = self._descriptors[self._names[file]]
            header = _header(descriptor, begin)
            if header is None:
                self._complain(file)
                continue
            offset = begin + HEAD.size + len(header.entries) * ENTRY.size
            for number, dtype, rows, columns, nbytes, checksum in header.entries:
                if number in wanted and number not in found:
                    data = bytearray(nbytes)
                    if _read(descriptor, data, offset) and zlib.crc32(data) == checksum:
                        found[number] = RawTensor(dtype.rstrip(b"\0").decode(), (rows, columns), data)
                    else:
                        self._complain(file)
                offset += nbytes
        return found

    def append(self, key: bytes, tensors: Mapping[int, RawTensor]) -> None:
        """Add a record of a key of 16 bytes.

        Raises:
            OutputError: it cannot be written; nothing of it was kept.
        """
        table = b"".join(
            ENTRY.pack(number, raw.dtype.encode(), *raw.shape, len(raw.data), zlib.crc32(raw.data))
            for number, raw in tensors.items()
        )
        head = HEAD.pack(MAGIC, key, len(tensors), zlib.crc32(key + table))
        with described(self.folder):
            if self._own is None:
                path = self.folder / f"{uuid.uuid4().hex}{SUFFIX}"
                self._own = self._add(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND)
            descriptor, begin = self._descriptors[self._names[self._own]], self._read_to[self._own]
            try:
                for piece in (head + table, *(raw.data for raw in tensors.values())):
                    view = memoryview(piece)
                    while view:
                        view = view[os.write(descriptor, view) :]
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, begin)
                raise
        self._read_to[self._own] = os.fstat(descriptor).st_size
        self._remember(key, self._own, begin)

    def _add(self, path: Path, flags: int) -> int:
        self._descriptors[path.name] = os.open(path, flags | os.O_CLOEXEC, 0o666)
        self._names.append(path.name)
        self._read_to.append(0)
        return len(self._names) - 1

    def _scan(self, number: int, descriptor: int) -> None:
        """Index the records of a file from where it was read to, up to one that is incomplete or damaged."""
        begin, size = self._read_to[number], os.fstat(descriptor).st_size
        while begin + HEAD.size <= size:
            header = _header(descriptor, begin)
            if header is None:
                break
            end = begin + HEAD.size + sum(ENTRY.size + entry[4] for entry in header.entries)
            if end > size:
                break
            self._remember(header.key, number, begin)
            begin = end
        self._read_to[number] = begin

    def _remember(self, key: bytes, file: int, begin: int) -> None:
        self._where[key] = (*self._where.get(key, ()), (file, begin))

    def _complain(self, number: int) -> None:
        if self._names[number] not in self._complaints:
            self._complaints.add(self._names[number])
            logger.warning("%s: has damaged records, which are not used", self.folder / self._names[number])


class _Header(NamedTuple):
    key: bytes
    entries: list[tuple[int, bytes, int, int, int, int]]


def _header(descriptor: int, offset: int) -> _Header | None:
    """Return the header at an offset; None if it is damaged or incomplete."""
    head = bytearray(HEAD.size)
    if not _read(descriptor, head, offset):
        return None
    magic, key, count, checksum = HEAD.unpack(head)
    table = bytearray(ENTRY.size * min(count, MOST_TENSORS))
    if magic != MAGIC or not _read(descriptor, table, offset + HEAD.size) or zlib.crc32(key + table) != checksum:
        return None
    return _Header(key, list(ENTRY.iter_unpack(table)))


def _read(descriptor: int, buffer: bytearray, offset: int) -> bool:
    """Fill a buffer from an offset of a file; return whether that worked."""
    view = memoryview(buffer)
    try:
        while view:
            count = os.preadv(descriptor, [view], offset)
            if count == 0:
                return False
            view, offset = view[count:], offset + count
    except OSError:
        return False
    return True


def _close(descriptors: dict[str, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)
