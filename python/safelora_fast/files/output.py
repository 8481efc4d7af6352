"""Write output folders and files that are either complete or absent.

Everything is written under a temporary name next to the target and renamed at the end. A killed run leaves the target
unchanged, and its temporary folder (`.<target>.partial-…`) remains. A run locks its temporary folder, so a later run
can distinguish a leftover from a folder in use. The later run lists leftovers but deletes nothing, because some network
file systems do not share locks between machines.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from safelora_fast.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NOTHING = "nothing of it is left"
RENAME_EXCHANGE = 2
AT_FDCWD = -100


URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # as a path, which has one slash
PARTIAL = len("12345678")  # characters that tempfile adds
LONGEST_NAME = 255 - len(".") - len(".partial-") - PARTIAL  # bytes, with what temporary names add


def _refuse_odd_names(target: Path) -> None:
    """Raise OutputError for a URL, which would become folders here, and for a name that is too long."""
    if URL.match(str(target)):
        raise OutputError(f"{target}: is a URL, but this is written to a disk: give a path")
    if (size := len(os.fsencode(target.name))) > LONGEST_NAME:
        raise OutputError(f"{target}: the name has {size} bytes, at most {LONGEST_NAME} are possible; choose another")


def resolved(path: Path) -> Path:
    """Return `path.resolve()`, but without a RuntimeError for circular links."""
    return Path(os.path.realpath(path))


def check_file(target: Path, inputs: Sequence[Path], *, overwrite: bool) -> None:
    """Raise OutputError if a file exists (without `overwrite`), is inside an input, or cannot be written."""
    _refuse_odd_names(target)
    with described(target):
        own = resolved(target)
        for source in inputs:
            if resolved(source) in (own, *own.parents):
                raise OutputError(f"{target}: the output must not be, or lie in, the input {source}")
        if target.is_dir():
            raise OutputError(f"{target}: is a folder; give the name of a file")
        if not overwrite and os.path.lexists(target):
            raise OutputError(f"{target}: exists already; choose another name, or pass --overwrite")
        _writable_parent(target)


def check_target(
    target: Path, inputs: Sequence[Path], *, overwrite: bool, nbytes: int, mark: str | None = None
) -> None:
    """Raise OutputError if a folder cannot be made, or must not be replaced.

    Causes are an existing folder, a folder that contains or is inside an input, missing permission, and a full disk.

    Args:
        target: the folder to make.
        inputs: the paths that are read.
        overwrite: whether an earlier output may be replaced.
        nbytes: how many bytes will be written.
        mark: a file that marks an earlier output, in the folder or in each of its subfolders. None: the caller checks
            that.
    """
    _refuse_odd_names(target)
    with described(target):
        own = resolved(target)
        if own == Path.cwd():
            raise OutputError(f"{target}: is the current folder; name a folder to make")
        for source in inputs:
            other = resolved(source)
            if own == other or own in other.parents or other in own.parents:
                raise OutputError(f"{target}: the output folder and the input {source} must not contain one another")
        if target.exists() or target.is_symlink():
            if target.is_symlink():
                raise OutputError(
                    f"{target}: is a symbolic link to {target.readlink()}, and a link is not replaced; give another name, or the "
                    "folder itself"
                )
            if not target.is_dir():
                raise OutputError(f"{target}: exists and is not a folder")
            if not overwrite and any(target.iterdir()):
                raise OutputError(f"{target}: exists already; choose another folder, or pass --overwrite")
            if mark is not None and not (target / mark).exists():
                foreign = sorted(path.name for path in target.iterdir() if not (path / mark).exists())
                if foreign:
                    raise OutputError(
                        f"{target}: holds {foreign[0]!r}, which no earlier run wrote; delete the folder yourself, or choose another"
                    )
        parent = _writable_parent(target)
        free = shutil.disk_usage(parent).free
        if free < nbytes:
            raise OutputError(f"{target}: {nbytes:,} bytes are needed, but {parent} has {free:,} left; free some space")


def _writable_parent(target: Path) -> Path:
    """Return the nearest folder above the target that exists."""
    parent = next(folder for folder in resolved(target).parents if folder.exists())
    if not parent.is_dir():
        raise OutputError(f"{target}: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{target}: no permission to write in {parent}")
    return parent


def abandoned(*targets: Path) -> list[Path]:
    """Return temporary folders and files of these targets that no process locks: leftovers of killed runs."""
    names: dict[Path, set[str]] = {}
    for target in targets:
        names.setdefault(target.absolute().parent, set()).add(f".{target.name}.partial-")
    found = []
    for parent, known in names.items():
        with contextlib.suppress(OSError):
            found += [path for path in parent.iterdir() if path.name[:-PARTIAL] in known and _is_free(path)]
    return sorted(found)


def leftovers_note(left: Sequence[Path]) -> list[str]:
    """Return a warning about leftovers of killed runs, if there are any."""
    more = f" and {len(left) - 1} more" if len(left) > 1 else ""
    return [f"a run that was killed has left {left[0]}{more}: nothing reads it, delete it"] if left else []


def _is_free(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(descriptor)
    except OSError:  # locked, deleted meanwhile, or on a file system without locks
        return False
    return True


@contextlib.contextmanager
def temporary_folder(name: str) -> Iterator[tuple[Path, list[Path]]]:
    """Yield a folder for temporary files, deleted at the end, and the ones of this name that killed runs have left."""
    place = Path(tempfile.gettempdir(), name)
    left = abandoned(place)
    with tempfile.TemporaryDirectory(prefix=f".{name}.partial-", dir=place.parent) as folder, _held(Path(folder)):
        yield Path(folder), left


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """Lock a path; the lock ends with this process."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _with_parents(target: Path) -> Iterator[None]:
    """Make the missing folders above a target. Remove them afterward if they are empty."""
    absent = [folder for folder in target.parents if not folder.exists()]
    try:
        with described(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with contextlib.suppress(OSError):
            for folder in absent:
                folder.rmdir()


@contextlib.contextmanager
def alone(target: Path) -> Iterator[None]:
    """Keep other processes from writing to `target`, with a lock file next to it. The lock ends with this process.

    Raises:
        OutputError: another process holds the lock.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_with_parents(target))
        with described(target):
            lock = target.with_name(f".{target.name}.lock")
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        stack.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = os.pread(descriptor, 32, 0).decode(errors="replace") or "?"
            raise OutputError(
                f"{target}: another run (process {other}) is writing there; choose another place"
            ) from None
        except OSError:  # a file system without locks
            pass
        else:
            stack.callback(lock.unlink, missing_ok=True)
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield


@contextlib.contextmanager
def whole_folder(target: Path, *, overwrite: bool = False, keep_others: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` if the block succeeds, and is deleted if it fails.

    Args:
        target: a folder that does not exist, or is empty.
        overwrite: replace an existing folder.
        keep_others: move files that only the replaced folder has into the new one; otherwise they are deleted.

    Raises:
        OutputError: writing failed, or something appeared at the target meanwhile.
    """
    with _with_parents(target), described(target, kept=NOTHING):
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        try:
            with _held(partial):
                yield partial
                for folder, _, files in os.walk(partial):
                    for file in files:
                        sync(Path(folder, file))
                    sync(Path(folder))
                partial.chmod(0o777 & ~_umask())
                if _put(partial, target, overwrite=overwrite) and keep_others:
                    _move_others(partial, target)
                sync(target.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def resumable_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield the folder `.<target>.unfinished`, which becomes `target` if the block succeeds.

    If the block fails, or the process is killed, the folder stays, and the next run gets it with its files. Only one
    process can use it.

    Raises:
        OutputError: another run uses the folder, it cannot be made, or something appeared at the target meanwhile.
    """
    with alone(target):
        unfinished = target.with_name(f".{target.name}.unfinished")
        with described(target):
            unfinished.mkdir(exist_ok=True)
        yield unfinished
        with described(target):
            sync(unfinished)
            if _put(unfinished, target, overwrite=overwrite):
                shutil.rmtree(unfinished)
            sync(target.parent)


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Yield a temporary file that becomes `target` if the block succeeds, and is deleted if it fails.

    Raises:
        OutputError: writing failed.
    """
    with _with_parents(target), described(target, kept=NOTHING):
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.partial-", dir=target.parent)
        os.close(descriptor)
        partial = Path(name)
        try:
            with _held(partial):
                yield partial
                sync(partial)
                partial.chmod(0o666 & ~_umask())
                partial.replace(target)
                sync(target.parent)
        finally:
            partial.unlink(missing_ok=True)


def _put(partial: Path, target: Path, *, overwrite: bool) -> bool:
    """Give the folder its final name in one step. Return True if `partial` now holds the replaced folder."""
    try:
        partial.rename(target)  # onto nothing, or onto an empty folder
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
            raise
    else:
        return False
    if not overwrite:
        raise OutputError(f"{target}: appeared while this ran; choose another folder, or pass --overwrite")
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        done = libc.renameat2(AT_FDCWD, os.fsencode(partial), AT_FDCWD, os.fsencode(target), RENAME_EXCHANGE)
        if done == 0:
            return True
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.replaced-", dir=target.parent))
    target.rename(aside)
    try:
        partial.rename(target)
    except OSError:
        aside.rename(target)
        raise
    aside.rename(partial)
    return True


def _move_others(source: Path, target: Path) -> None:
    for path in source.iterdir():
        if not (target / path.name).exists():
            path.rename(target / path.name)
    sync(target)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    """Write a file or folder to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def described(target: Path, *, kept: str = "make room and try again") -> Iterator[None]:
    """Turn an OSError into an :class:`OutputError` that names the target; `kept` says what a full disk has left of it."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise OutputError(f"{target}: the disk is full ({error.strerror}); {kept}") from error
        where = f" ({error.filename})" if error.filename else ""
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}{where}") from error
