"""Checks of arguments from users: whole numbers, numbers, names and paths. All raise SettingsError."""

from __future__ import annotations

import os
from numbers import Integral, Real

from safelora_fast.errors import SettingsError


def whole_number(name: str, value: object) -> int:
    """Return the value of an argument if it is a whole number. True and False are rejected."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise SettingsError(f"{name} must be a whole number, not {value!r}")
    return int(value)


def number(name: str, value: object) -> float:
    """Return the value of an argument if it is a number. True and False are rejected."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise SettingsError(f"{name} must be a number, not {value!r}")
    return float(value)


def patterns(name: str, value: object) -> tuple[str, ...]:
    """Return names or patterns of modules that are given as text, a list or None."""
    given = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(given, list | tuple) or not all(isinstance(pattern, str) and pattern for pattern in given):
        raise SettingsError(f'{name} must be names or patterns of modules, e.g. ["lm_head"], not {value!r}')
    return tuple(given)


def check_path(name: str, value: object, wanted: str) -> None:
    """Raise SettingsError if a value cannot be a path. In messages, `wanted` says what it should be."""
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(path, str):
        raise SettingsError(f"{name} must be {wanted}, not {value!r}")
    if not path:
        raise SettingsError(f"{name} is empty; give {wanted}")
    if "\0" in path:
        raise SettingsError(f"{name} must be {wanted}; {path!r} holds a zero byte")
