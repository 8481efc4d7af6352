"""What an endpoint must not answer: a redirect to another host, which would see what a request holds, and floods of tags.

Inspect looks for the end of every tag that opens thoughts, each time to the end of the reply: a reply of nothing but such tags
would hold it up for hours.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

if TYPE_CHECKING:
    from inspect_ai.model import Model


MOST_BYTES = 1 << 26
TAGS = (b"<think", b"<content-internal", b"<summary")
MOST_TAGS = 256


class RedirectError(Exception):
    """An endpoint sends one to another host; the message names it, and nothing else of the address."""


class FloodError(Exception):
    """An endpoint sent more than a reply of a chat model can hold."""


def check_responses(model: Model) -> None:
    """Have the client of a model's provider raise :class:`RedirectError` or :class:`FloodError` before anybody reads a response.

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
        if _is_flood(await response.aread()):
            raise FloodError("it sent more than a reply of a chat model can hold")
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


def _is_flood(content: bytes) -> bool:
    if len(content) > MOST_BYTES:
        return True
    if b"\\u" in content:  # signs may be written as escapes
        try:
            content = json.dumps(json.loads(content), ensure_ascii=False).encode(errors="replace")
        except (ValueError, RecursionError):
            return False  # no reply either
    return sum(content.count(tag) for tag in TAGS) > MOST_TAGS
