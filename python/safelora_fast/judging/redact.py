"""Removes credentials from text before it is written.

A credential is removed in plain form, reversed, in base64, base32 or hexadecimal, and percent-encoded. Upper and lower case
count as equal, and other characters may separate its letters and digits. A credential of at least twelve letters and digits is
also removed if it is split into pieces of at least four. Of a partial credential, every run of eight letters and digits that
contains a digit is removed. The time is proportional to the length of the text.
"""

from __future__ import annotations

import base64
import functools
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NAMES = ("KEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL", "CREDENTIALS")
SHORTEST = 6
WORD = 24  # shorter values in one case and without digits are words, such as "workload" or "not-needed"
PART = 8
PIECE = 4
TAKEN_APART = 12  # letters and digits; pieces of shorter credentials may occur in any text
KEY_LIKE = r"(?=[\w.~+/=*-]{0,200}?[\d*])[\w.~+/=*-]{5,200}[\w~+/=*-]"  # contains a digit or an asterisk
PATTERNS = (
    re.compile(rf"(?i)(bearer\s{{1,3}}){KEY_LIKE}"),
    re.compile(rf"(?i)(api[-_ ]?key\W{{1,3}}(?:provided\W{{1,3}})?){KEY_LIKE}"),
    re.compile(r"(://)[^\s@]{1,400}(?=@)"),
    re.compile(r"()\b(?:sk|hf|ghp|xai|gsk)[-_][\w*-]{8,200}"),
)
HIDDEN = "[removed]"
_given: set[str] = set()


def remember(secret: str | None) -> None:
    """Remove this credential from now on, even if no environment variable holds it."""
    if secret:
        _given.add(secret)


def redact(text: str) -> str:
    """Remove known credentials, and anything that looks like one."""
    text = hide(text)
    for pattern in PATTERNS:
        text = pattern.sub(rf"\1{HIDDEN}", text)
    return text


def hide(text: str) -> str:
    """Remove known credentials: those of the environment, and those given to :func:`remember`."""
    named = {value for name, value in os.environ.items() if name.upper().endswith(NAMES)}
    secrets = frozenset(value for value in named | _given if _is_secret(value))
    if not secrets:
        return text
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    whole, parts = _forms(secrets)
    places = [place for place, letter in enumerate(text) if letter.isascii() and letter.isalnum()]
    squeezed = "".join(text[place] for place in places).lower()
    found: set[int] = set()
    for piece in {piece for form in whole for piece in _pieces(form, squeezed)}:
        start = squeezed.find(piece)
        while start >= 0:
            found.update(range(start, start + len(piece)))
            start = squeezed.find(piece, start + len(piece))
    for start in range(len(squeezed) - PART + 1):
        if squeezed[start : start + PART] in parts:
            found.update(range(start, start + PART))
    return _without(text, places, found)


def each_text(values: Any, change: Callable[[str], str]) -> Any:
    """Apply a function to every string in nested lists and mappings."""
    if isinstance(values, str):
        return change(values)
    if isinstance(values, dict):
        return {each_text(key, change): each_text(value, change) for key, value in values.items()}
    return [each_text(value, change) for value in values] if isinstance(values, list | tuple) else values


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and the exceptions that it was raised from."""
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        yield current
        current = current.__cause__ or current.__context__


def redact_error(error: BaseException) -> None:
    """Remove credentials from an exception and its causes: from their messages and from attached response bodies."""
    for one in causes(error):
        one.args = tuple(redact(part) if isinstance(part, str) else part for part in one.args)
        for name in ("message", "body"):
            if isinstance(getattr(one, name, None), str | dict | list):
                setattr(one, name, each_text(getattr(one, name), redact))


class RedactingFilter(logging.Filter):
    """Removes credentials from the message, traceback and attached values of a log record."""

    OWN = frozenset(vars(logging.makeLogRecord({})))

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record in place; always return True."""
        record.msg, record.args = redact(record.getMessage()), ()
        if record.exc_info:
            record.exc_text, record.exc_info = redact(logging.Formatter().formatException(record.exc_info)), None
        for name, value in vars(record).items():
            if name not in self.OWN:
                setattr(record, name, each_text(value, redact))
        return True


def redact_logs() -> None:
    """Add a :class:`RedactingFilter` to Inspect's log and trace handlers, which exist once Inspect has started."""
    for handler in {*logging.getLogger().handlers, *logging.getLogger("inspect_ai").handlers}:
        known = any(isinstance(one, RedactingFilter) for one in handler.filters)
        if type(handler).__module__.startswith("inspect_ai") and not known:
            handler.addFilter(RedactingFilter())


def _is_secret(value: str) -> bool:
    """Return whether a value is a credential, not a placeholder word or the path of a credential file."""
    letters = value.replace("-", "").replace("_", "").replace(" ", "")
    word = letters.isalpha() and len(value) < WORD and value in {value.lower(), value.upper()}
    return len(value) >= SHORTEST and not word and not (value.startswith("/") and Path(value).exists())


@functools.lru_cache(maxsize=8)
def _forms(secrets: frozenset[str]) -> tuple[frozenset[str], frozenset[str]]:
    """Return all forms of the credentials, letters and digits only, and their parts of PART characters with a digit."""
    written = set()
    for secret in secrets:
        for text in (secret, secret[::-1]):
            octets = text.encode()
            written |= {text, quote(text, safe=""), octets.hex(), base64.b32encode(octets).decode().rstrip("=")}
            for before in range(3):  # offset in the encoded text, e.g. after "Bearer " or a user name
                encoded = base64.b64encode(bytes(before) + octets).decode()
                written.add(encoded[(0, 2, 3)[before] : (before + len(octets)) * 8 // 6])
    written |= {text[::-1] for text in written}
    squeezed = {"".join(letter for letter in text if letter.isascii() and letter.isalnum()).lower() for text in written}
    whole = frozenset(text for text in squeezed if len(text) >= SHORTEST)
    parts = {text[start : start + PART] for text in whole for start in range(len(text) - PART + 1)}
    return whole, frozenset(part for part in parts if not part.isalpha())


def _pieces(form: str, text: str) -> list[str]:
    """Split a form into as few pieces as possible that all occur in the text; empty if a piece is missing."""
    if form in text:
        return [form]
    if len(form) < TAKEN_APART:
        return []
    pieces, start = [], 0
    while len(form) - start >= PIECE:
        end = start + PIECE
        if form[start:end] not in text:
            return []
        while end < len(form) and form[start : end + 1] in text:
            end += 1
        pieces.append(form[start:end])
        start = end
    return pieces


def _without(text: str, places: list[int], found: set[int]) -> str:
    """Replace every run of found characters, and all characters in between, by HIDDEN."""
    pieces, end = [], 0
    for number in sorted(found):
        if number - 1 not in found:
            pieces += [text[end : places[number]], HIDDEN]
        end = places[number] + 1
    return "".join([*pieces, text[end:]])
