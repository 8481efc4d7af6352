"""Keeping credentials out of what is written.

A credential is hidden as it stands, backwards, in base64, in hexadecimal and percent-encoded, in upper or lower case, and with
anything but letters and digits between its parts. A credential of at least twelve letters and digits is also hidden when it is
taken apart into pieces of at least four. Of a partial credential, every eight letters and digits in a row with a digit among
them are hidden. All of it takes time in proportion to the text.
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
WORD = 24  # shorter values of letters of one case are words, such as "workload" or "not-needed", and are not hidden
PART = 8
PIECE = 4
TAKEN_APART = 12  # letters and digits; the pieces of a shorter credential may be words of any text
KEY_LIKE = r"(?=[\w.~+/=*-]{0,200}?[\d*])[\w.~+/=*-]{5,200}[\w~+/=*-]"  # with a digit, or starred out
PATTERNS = (
    re.compile(rf"(?i)(bearer\s{{1,3}}){KEY_LIKE}"),
    re.compile(rf"(?i)(api[-_ ]?key\W{{1,3}}(?:provided\W{{1,3}})?){KEY_LIKE}"),
    re.compile(r"(://)[^\s@]{1,400}(?=@)"),
    re.compile(r"()\b(?:sk|hf|ghp|xai|gsk)[-_][\w*-]{8,200}"),
)
HIDDEN = "[removed]"
_given: set[str] = set()


def remember(secret: str | None) -> None:
    """Hide a credential that no environment variable holds, from now on."""
    if secret:
        _given.add(secret)


def redact(text: str) -> str:
    """The text without known credentials, and without what looks like one."""
    text = hide(text)
    for pattern in PATTERNS:
        text = pattern.sub(rf"\1{HIDDEN}", text)
    return text


def hide(text: str) -> str:
    """The text without known credentials: those of the environment, and those given to :func:`remember`."""
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
    """Nested lists and mappings with every text changed."""
    if isinstance(values, str):
        return change(values)
    if isinstance(values, dict):
        return {each_text(key, change): each_text(value, change) for key, value in values.items()}
    return [each_text(value, change) for value in values] if isinstance(values, list | tuple) else values


def causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and the exceptions that it was raised from."""
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        yield current
        current = current.__cause__ or current.__context__


def redact_error(error: BaseException) -> None:
    """Remove credentials from the text of an exception and its causes, and from the replies that they carry."""
    for one in causes(error):
        one.args = tuple(redact(part) if isinstance(part, str) else part for part in one.args)
        for name in ("message", "body"):
            if isinstance(getattr(one, name, None), str | dict | list):
                setattr(one, name, each_text(getattr(one, name), redact))


class RedactingFilter(logging.Filter):
    """Removes credentials from a record before a handler writes it: from message, traceback and attached values."""

    OWN = frozenset(vars(logging.makeLogRecord({})))

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record, and let it pass."""
        record.msg, record.args = redact(record.getMessage()), ()
        if record.exc_info:
            record.exc_text, record.exc_info = redact(logging.Formatter().formatException(record.exc_info)), None
        for name, value in vars(record).items():
            if name not in self.OWN:
                setattr(record, name, each_text(value, redact))
        return True


def redact_logs() -> None:
    """Put a :class:`RedactingFilter` on Inspect's handlers of logs and traces, which exist once Inspect has begun."""
    for handler in {*logging.getLogger().handlers, *logging.getLogger("inspect_ai").handlers}:
        known = any(isinstance(one, RedactingFilter) for one in handler.filters)
        if type(handler).__module__.startswith("inspect_ai") and not known:
            handler.addFilter(RedactingFilter())


def _is_secret(value: str) -> bool:
    """Whether a value is a credential: not a placeholder of a word or two, and not the path of a file that holds one."""
    letters = value.replace("-", "").replace("_", "").replace(" ", "")
    word = letters.isalpha() and len(value) < WORD and value in {value.lower(), value.upper()}
    return len(value) >= SHORTEST and not word and not (value.startswith("/") and Path(value).exists())


@functools.lru_cache(maxsize=8)
def _forms(secrets: frozenset[str]) -> tuple[frozenset[str], frozenset[str]]:
    """Letters and digits of every form of some credentials, and the parts of them that have a digit, unlike words."""
    written = set()
    for secret in secrets:
        for text in (secret, secret[::-1]):
            octets = text.encode()
            written |= {text, quote(text, safe=""), octets.hex(), base64.b32encode(octets).decode().rstrip("=")}
            for before in range(3):  # its place in what is encoded, e.g. after "Bearer " or a user's name
                encoded = base64.b64encode(bytes(before) + octets).decode()
                written.add(encoded[(0, 2, 3)[before] : (before + len(octets)) * 8 // 6])
    written |= {text[::-1] for text in written}
    squeezed = {"".join(letter for letter in text if letter.isascii() and letter.isalnum()).lower() for text in written}
    whole = frozenset(text for text in squeezed if len(text) >= SHORTEST)
    parts = {text[start : start + PART] for text in whole for start in range(len(text) - PART + 1)}
    return whole, frozenset(part for part in parts if not part.isalpha())


def _pieces(form: str, text: str) -> list[str]:
    """The fewest pieces of one form that are all in the text; none if a piece is missing."""
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
    """The text with a sign in place of every run that was found, and of what stands between its letters."""
    pieces, end = [], 0
    for number in sorted(found):
        if number - 1 not in found:
            pieces += [text[end : places[number]], HIDDEN]
        end = places[number] + 1
    return "".join([*pieces, text[end:]])
