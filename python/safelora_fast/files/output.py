"""Output folders and files that are either whole or absent.

Everything is written under a temporary name beside the target and renamed at the end. A run that is killed leaves what
it had written (named `.<target>.partial-…`) and the target as it was. A run holds a lock on its temporary folder, so that a
later one can tell what was left from what is being written; it names what was left and deletes nothing, as locks do not reach
other machines on every network file system.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from safelora_fast.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

RENAME_EXCHANGE = 2
AT_FDCWD = -100


def resolved(path: Path) -> Path:
    """`path.resolve()`, which raises no RuntimeError where links lead in a circle."""
    return Path(os.path.realpath(path))


def check_file(target: Path, inputs: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse a file that exists, lies in an input, or cannot be written.

    Raises:
        OutputError: with the reason.
    """
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
    """Refuse a target that exists, holds or lies in an input, cannot be written, or has no room for `nbytes` bytes.

    Args:
        target: the folder to make.
        inputs: what is read.
        overwrite: whether an earlier output may be replaced.
        nbytes: how much will be written.
        mark: the file that tells an earlier output, or each of its sub-folders, from a folder of somebody else's; None
            leaves that to the caller.

    Raises:
        OutputError: with the reason.
    """
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
    """The nearest folder above the target that exists."""
    parent = next(folder for folder in resolved(target).parents if folder.exists())
    if not parent.is_dir():
        raise OutputError(f"{target}: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{target}: no permission to write in {parent}")
    return parent


def abandoned(target: Path) -> list[Path]:
    """Temporary folders and files of this target that no process holds: what killed runs have left."""
    try:
        beside = sorted(target.absolute().parent.iterdir())
    except OSError:
        return []
    return [path for path in beside if path.name.startswith(f".{target.name}.partial-") and _is_free(path)]


def _is_free(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(descriptor)
    except OSError:  # held, gone meanwhile, or on a file system without locks
        return False
    return True


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """A lock that ends with this process, however that ends."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def alone(target: Path) -> Iterator[None]:
    """Keep other processes from writing to `target` meanwhile; a lock beside it that ends with this process.

    Raises:
        OutputError: another process has it.
    """
    absent = [folder for folder in target.parents if not folder.exists()]
    with described(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = target.with_name(f".{target.name}.lock")
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = os.pread(descriptor, 32, 0).decode(errors="replace") or "?"
            raise OutputError(
                f"{target}: another run (process {other}) is writing there; choose another place"
            ) from None
        except OSError:  # a file system without locks
            yield
            return
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
    finally:
        os.close(descriptor)
        with contextlib.suppress(OSError):
            for made in absent:
                made.rmdir()


@contextlib.contextmanager
def whole_folder(target: Path, *, overwrite: bool = False, keep_others: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends well, and vanishes when it does not.

    Args:
        target: a folder that does not exist, or is empty.
        overwrite: replace what stands there.
        keep_others: what a replaced folder holds under other names moves into the new one; else it is deleted.

    Raises:
        OutputError: when the system refuses to write, or something appeared under the name meanwhile.
    """
    absent = [folder for folder in target.parents if not folder.exists()]
    with described(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        with described(target), _held(partial):
            yield partial
            for folder, _, files in os.walk(partial):
                for file in files:
                    sync(Path(folder, file))
                sync(Path(folder))
            partial.chmod(0o777 & ~_umask())
            replaced = _put(partial, target, overwrite=overwrite)
            if replaced and keep_others:
                _move_others(partial, target)
            sync(target.parent)
        if replaced:
            shutil.rmtree(partial, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            for made in absent:
                made.rmdir()
        raise


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A temporary file that becomes `target` when the block ends well, and vanishes when it does not.

    Raises:
        OutputError: when the system refuses to write.
    """
    absent = [folder for folder in target.parents if not folder.exists()]
    with described(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.partial-", dir=target.parent)
        os.close(descriptor)
    partial = Path(name)
    try:
        with described(target), _held(partial):
            yield partial
            sync(partial)
            partial.chmod(0o666 & ~_umask())
            partial.replace(target)
            sync(target.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            for made in absent:
                made.rmdir()
        raise


def _put(partial: Path, target: Path, *, overwrite: bool) -> bool:
    """Give the folder its final name in one step; True when `partial` now holds what stood there before."""
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
    """Have the system write a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def described(target: Path) -> Iterator[None]:
    """Turn what the system refuses into an :class:`OutputError` that names the target."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise OutputError(f"{target}: the disk is full ({error.strerror}); nothing was kept") from error
        where = f" ({error.filename})" if error.filename else ""
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}{where}") from error
