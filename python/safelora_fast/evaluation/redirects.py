"""Redirects of an endpoint: followed on its own host only, for a request holds what nobody else should see."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

if TYPE_CHECKING:
    from inspect_ai.model import Model


class RedirectError(Exception):
    """An endpoint sends one to another host; the message names it, and nothing else of the address."""


def refuse_redirects(model: Model) -> None:
    """Have the client of a model's provider raise :class:`RedirectError` before it follows a redirect to another host.

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
    if location is None or not 300 <= response.status_code < 400:
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
