"""Keeping credentials out of what is written."""

from __future__ import annotations

import json
import os
import re

NAMES = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS?)$", re.IGNORECASE)
SHORTEST = 6
PATTERNS = (
    re.compile(r"(?i)(bearer\s+)[\w.~+/=-]+"),
    re.compile(r"(?i)(api[-_ ]?key\W{1,3}(?:provided\W{1,3})?)(?!defined in )[\w.~+/=*-]{5,}[\w~+/=*-]"),
    re.compile(r"(://)[^/\s:@]+:[^/\s@]+(?=@)"),
    re.compile(r"()\b(?:sk|hf|ghp|xai|gsk)[-_][\w*-]{8,}"),
)
HIDDEN = "[removed]"


def redact(text: str) -> str:
    """The text without values of environment variables that hold credentials, and without what looks like one."""
    for name, value in os.environ.items():
        if NAMES.search(name) and len(value) >= SHORTEST:
            text = text.replace(value, HIDDEN)
    for pattern in PATTERNS:
        text = pattern.sub(rf"\1{HIDDEN}", text)
    return text


def redact_error(error: BaseException) -> None:
    """Take credentials out of an exception's words, and out of the reply of an endpoint that it carries."""
    error.args = tuple(redact(part) if isinstance(part, str) else part for part in error.args)
    for name in ("message", "body"):
        value = getattr(error, name, None)
        if isinstance(value, str):
            setattr(error, name, redact(value))
        elif isinstance(value, dict | list):
            setattr(error, name, json.loads(redact(json.dumps(value, default=str))))
