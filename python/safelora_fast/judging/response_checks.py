"""What an endpoint must not answer: a redirect to another host, which would see what a request holds, and floods of tags.

Inspect looks for the end of every tag that opens thoughts, each time to the end of the reply: a reply of nothing but such tags
would hold it up for hours.
"""

from __future__ import annotations

import json
import re
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

if TYPE_CHECKING:
    from inspect_ai.model import Model


MOST_BYTES = 1 << 26
PAGE = re.compile(rb"\s*<(?:!doctype\s+html|html)\b", re.IGNORECASE)
MOST_WORDS = 1500
ERRORS = range(400, 600)
TAGS = (b"<think", b"<content-internal", b"<summary")
MOST_TAGS = 256


class RedirectError(Exception):
    """An endpoint sends one to another host; the message names it, and nothing else of the address."""


class PageError(Exception):
    """A web page came where a reply should be: the address is another one's, or wants somebody to log in."""


class FloodError(Exception):
    """An endpoint sent more than a reply of a chat model can hold."""


def check_responses(model: Model) -> None:
    """Have the client of a model's provider raise an error of this module before anybody reads a response.

    An error that came with a status of success gets one of failure.

    The clients of OpenAI's and Anthropic's packages, and of all that are made like them; those of other providers stay as
    they are. A client that is made anew is changed anew.
    """
    client: Any = getattr(getattr(model.api, "client", None), "_client", None)
    hooks = getattr(client, "event_hooks", None)
    if isinstance(hooks, dict) and _check not in hooks.get("response", []):
        hooks["response"] = [_check, *hooks.get("response", [])]
        client.event_hooks = hooks


async def _check(response: Any) -> None:
    location = response.headers.get("location")
    if not 300 <= response.status_code < 400:
        content = await response.aread()
        if _is_flood(content):
            raise FloodError("it sent more than a reply of a chat model can hold")
        if response.is_success and PAGE.match(content):
            raise PageError("it sends a web page; the address of an API often ends in /v1")
        if response.is_success and (status := _status_of_error(content)) is not None:
            response.status_code = status
        return
    if location is None:
        return
    try:
        here, there = urlsplit(str(response.url)), urlsplit(urljoin(str(response.url), location))
        same = here.hostname == there.hostname and there.scheme in {here.scheme, "https"}
        same = same and (here.port == there.port or here.scheme != there.scheme)
        host = there.hostname
    except ValueError:
        same, host = False, None
    if not same:
        raise RedirectError(f"it redirects to another host, {host or 'of an odd name'}, which is not followed")


def tell_body(error: Exception) -> None:
    """Put what an endpoint sent into the words of a provider's error that leaves it out.

    OpenAI's client takes nothing but a message in OpenAI's own form; others say {"error": "…"} or {"detail": […]}.
    """
    body: Any = getattr(error, "body", None)
    if not body or not isinstance(body, str | dict | list) or (isinstance(body, dict) and "message" in body):
        return
    words, said = str(error), body if isinstance(body, str) else json.dumps(body, ensure_ascii=False, default=str)
    if said[:MOST_WORDS] not in words:
        error.args = (f"{words} - {said[:MOST_WORDS]}",)


def _status_of_error(content: bytes) -> int | None:
    """The status that an error should have had which came as if all were well: LM Studio and gateways send such replies."""
    if b'"error"' not in content:
        return None
    try:
        said = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict) or not said.get("error") or said.get("choices"):
        return None
    code = said["error"].get("code") if isinstance(said["error"], dict) else None
    return code if type(code) is int and code in ERRORS else HTTPStatus.BAD_REQUEST


def _is_flood(content: bytes) -> bool:
    if len(content) > MOST_BYTES:
        return True
    if b"\\u" in content:  # signs may be written as escapes
        try:
            content = json.dumps(json.loads(content), ensure_ascii=False).encode(errors="replace")
        except (ValueError, RecursionError):
            return False  # no reply either
    return sum(content.count(tag) for tag in TAGS) > MOST_TAGS
