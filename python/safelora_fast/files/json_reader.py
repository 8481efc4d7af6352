"""Read JSON from outside, with limits on size and nesting, and check its types.

An unreadable file raises :class:`OSError`, and wrong content raises :class:`ValueError`, each with a message of one
line. Callers put the file's name before :func:`why` and raise their own error class.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import math
import os
import reprlib
import select
import stat
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from safelora_fast.errors import SafeLoraFastError

T = TypeVar("T")
MOST_BYTES = 1 << 26  # of one document; the parsed value may take twenty times as much memory
MOST_DEPTH = 100  # deeper values would cause a RecursionError in code that walks over them
MOST_WHOLE = 2**63
SECONDS_FOR_A_WRITER = 5
_TOO_DEEP = f"is nested too deeply, in more than {MOST_DEPTH} levels"


class Kind(NamedTuple):
    """A type of values: its name in messages, and a test for it."""

    words: str
    fits: Callable[[Any], bool]


def _is_whole(value: Any) -> bool:
    return type(value) is int and -MOST_WHOLE <= value < MOST_WHOLE


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _is_token(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


TEXT = Kind("text", lambda value: isinstance(value, str))
WHOLE = Kind("a whole number of 64 bits", _is_whole)
COUNT = Kind("a whole number from 0", lambda value: _is_whole(value) and value >= 0)
NUMBER = Kind("a finite number", _is_number)
REAL = Kind("a number", lambda value: isinstance(value, float) or _is_whole(value))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TOKENS = Kind(
    "a token or a list of tokens", lambda value: all(map(_is_token, value if isinstance(value, list) else [value]))
)
NAMES = Kind("text or a list of texts", lambda value: isinstance(value, str) or _is_texts(value))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
LIST = Kind("a list", lambda value: isinstance(value, list))
TEXTS = Kind("a list of texts", _is_texts)


def read_bytes(path: str | Path, most: int | None = MOST_BYTES) -> bytes:
    """Return the content of a file, or of a pipe that has a writer. Never wait for anything else.

    Args:
        path: the file.
        most: the maximum number of bytes; None for no limit.

    Raises:
        OSError: the file cannot be read, is too large, or is a folder, a device or a socket.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a zero byte, or a lone surrogate
        raise OSError(errno.EINVAL, f"is not a path: {error}", str(path)) from error
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        is_pipe = stat.S_ISFIFO(os.fstat(descriptor).st_mode)
        if not is_pipe:
            check_regular(path)
        written = is_pipe and _is_written(descriptor)
        os.set_blocking(descriptor, True)  # wait for the pipe's writer; without one, reading ends at once
        content = _read(file, most)
    if is_pipe and not content and not written:
        raise OSError(errno.EINVAL, "Is a pipe that nothing writes to", str(path))
    if most is not None and len(content) > most:
        raise OSError(errno.EFBIG, f"Holds more than {most:,} bytes, the most that are read", str(path))
    return content


def _is_written(pipe: int) -> bool:
    """Return whether a pipe has a writer, or gets one within a few seconds."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN | select.POLLHUP)
    return bool(poll.poll(SECONDS_FOR_A_WRITER * 1000))


def _read(file: Any, most: int | None) -> bytes:
    """Return the content of a file, up to one byte more than the limit."""
    if most is None:
        whole: bytes = file.read()
        return whole
    parts: list[bytes] = []
    left = most + 1
    while left and (part := file.read(left)):  # a pipe can return less than requested
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


@contextlib.contextmanager
def readable(name: object, error: type[SafeLoraFastError]) -> Iterator[None]:
    """Turn an OSError, e.g. for a path that is too long, into `error` with the file's name."""
    try:
        yield
    except OSError as refused:
        raise error(f"{name}: cannot be read: {refused.strerror or refused}") from refused


def is_file(path: str | Path) -> bool:
    """`Path.is_file` without its OSError for paths that are too long or inaccessible (before Python 3.14)."""
    return os.path.isfile(path)  # noqa: PTH113


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise OSError if a path is not a regular file. Opening a pipe could wait forever."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 - the path may be text
    except ValueError as error:
        raise OSError(errno.EINVAL, f"is not a path: {error}", str(path)) from error
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "Is a pipe or a device, not a file", str(path))


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: the text is not JSON, not UTF-8, or nested too deeply.
    """
    try:
        value = json.loads(text if isinstance(text, str) else text.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except UnicodeDecodeError as error:
        raise ValueError("is not UTF-8 text") from error
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from error
    brackets = text.count("[") + text.count("{") if isinstance(text, str) else text.count(b"[") + text.count(b"{")
    if brackets > MOST_DEPTH and _is_deep(value):
        raise ValueError(_TOO_DEEP)
    return value


def read_json(path: str | Path) -> Any:
    """Return the value of a JSON file.

    Raises:
        OSError, ValueError: see :func:`read_bytes` and :func:`parse_json`.
    """
    return parse_json(read_bytes(path))


def read_object(path: str | Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        OSError, ValueError: see :func:`read_json`. Any other value than an object raises ValueError too.
    """
    return check_fields(read_json(path), {})


def why(error: Exception) -> str:
    """Return what a message says after the file's name."""
    return f"cannot be read: {error.strerror or error}" if isinstance(error, OSError) else str(error)


def of_kind(value: Any, kind: Kind, name: str) -> Any:
    """Return the value. Raise ValueError with its name if it is of another kind."""
    if not kind.fits(value):
        raise ValueError(f"{name} must be {kind.words}, not {reprlib.repr(value)}".lstrip())
    return value


def check_fields(
    record: Any, required: Mapping[str, Kind], optional: Mapping[str, Kind] | None = None
) -> dict[str, Any]:
    """Return the record if the named values have these kinds. Optional values may be null or missing.

    Raises:
        ValueError: the record is not an object, lacks a value, or has one of another kind; the message names the key.
    """
    fields: dict[str, Any] = of_kind(record, OBJECT, "")
    for name, kind in required.items():
        if name not in fields:
            raise ValueError(f"{name} is missing")
        of_kind(fields[name], kind, name)
    for name, kind in (optional or {}).items():
        if fields.get(name) is not None:
            of_kind(fields[name], kind, name)
    return fields


def parse_as(kind: type[T], value: Any) -> T:
    """Return a JSON value as a dataclass, validated by pydantic. Keys that the dataclass lacks are ignored.

    Raises:
        ValueError: the value does not fit; the message names the first wrong key.
    """
    from pydantic import ValidationError

    try:
        checked: T = _adapter(kind).validate_python(value)  # type: ignore[arg-type]
        return checked
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


@functools.cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _is_deep(value: Any) -> bool:
    """Return whether a value has more than MOST_DEPTH levels."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MOST_DEPTH):
        level = [
            item
            for outer in level
            for item in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True
