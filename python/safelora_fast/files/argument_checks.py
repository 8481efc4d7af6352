"""Checks of arguments that come from users: whole numbers, numbers and paths."""

from __future__ import annotations

import os
from numbers import Integral, Real

from safelora_fast.errors import SettingsError


def whole_number(name: str, value: object) -> int:
    """The value, if it is a whole number; True and False are not.

    Raises:
        SettingsError: when it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise SettingsError(f"{name} must be a whole number, not {value!r}")
    return int(value)


def patterns(name: str, value: object) -> tuple[str, ...]:
    """Names or patterns of modules, of which there may be one, several or none.

    Raises:
        SettingsError: when it is anything else.
    """
    given = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(given, list | tuple) or not all(isinstance(pattern, str) and pattern for pattern in given):
        raise SettingsError(f'{name} must be names or patterns of modules, e.g. ["lm_head"], not {value!r}')
    return tuple(given)


def number(name: str, value: object) -> float:
    """The value, if it is a number; True and False are not.

    Raises:
        SettingsError: when it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise SettingsError(f"{name} must be a number, not {value!r}")
    return float(value)


def check_path(name: str, value: object, wanted: str) -> None:
    """Refuse what cannot be a path.

    Args:
        name: of the argument.
        value: what was given.
        wanted: what it should be, in words.

    Raises:
        SettingsError: when it is neither text nor a path, or is empty.
    """
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(path, str):
        raise SettingsError(f"{name} must be {wanted}, not {value!r}")
    if not path:
        raise SettingsError(f"{name} is empty; give {wanted}")
    if "\0" in path:
        raise SettingsError(f"{name} must be {wanted}; {path!r} holds a zero byte")
