"""A guard between Inspect and a model's endpoint: it removes credentials and rejects harmful responses.

An endpoint may repeat its key in a reply, and Inspect records replies unchanged. It may redirect to another host, which
would then receive the whole request. A reply that consists of opening thought tags would keep Inspect busy for hours,
because Inspect searches for the end of each one.
"""

from __future__ import annotations

import json
import re
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from safelora_fast.judging.redact import each_text, hide, redact, redact_error, redact_logs, remember

if TYPE_CHECKING:
    from inspect_ai.model import Model

MAX_BYTES = 1 << 26
PAGE = re.compile(rb"(?:\xef\xbb\xbf)?\s*<")  # HTML or XML, which no chat model's endpoint sends
TITLE = re.compile(r"<title[^>]{0,200}>([^<]{1,200})", re.IGNORECASE)
NOT_HERE = {404, 405, 410}
MAX_BODY_SHOWN = 1500
TAGS = (b"<think", b"<content-internal", b"<summary")
MAX_TAGS = 256


class RedirectError(Exception):
    """The endpoint redirects to another host. The message names only the host, not the rest of the address."""


class PageError(Exception):
    """The endpoint sent a web page: the address is wrong, or requires a login."""


class FloodError(Exception):
    """The response is too large, or has too many thought tags, to come from a chat model."""


def guard(model: Model) -> Model:
    """Wrap a model's requests, so that Inspect sees no credentials and no harmful responses. Return the same model."""
    generate = model.api.generate
    if getattr(generate, "guarded", False):
        return model
    remember(getattr(model.api, "api_key", None))

    async def guarded(*args: Any, **settings: Any) -> Any:
        redact_logs()
        _check_responses(model)
        try:
            result = await generate(*args, **settings)
        except Exception as error:
            _clean(error)
            raise
        output, call = result if isinstance(result, tuple) else (result, None)
        if isinstance(output, Exception):
            _clean(output)
        else:
            output.error = None if output.error is None else redact(output.error)
            for choice in output.choices:
                values = choice.message.model_dump()
                hidden = each_text(values, hide)  # only known credentials: the rest is the model's answer
                if hidden != values:
                    choice.message = type(choice.message).model_validate(hidden)
        if call is not None:
            call.response = each_text(call.response, redact if call.error else hide)
        return result

    guarded.guarded = True  # type: ignore[attr-defined]
    model.api.generate = guarded  # type: ignore[method-assign]
    return model


def _clean(error: Exception) -> None:
    """Add the response body to an error message that omits it, and remove credentials.

    OpenAI's client reads only error messages in OpenAI's format; other servers send {"error": "…"} or {"detail": […]}.
    """
    body: Any = getattr(error, "body", None)
    page = next(
        (one for one in (body, str(error)) if isinstance(one, str) and PAGE.match(one.encode(errors="replace"))), None
    )
    if page is not None:  # of a gateway; most of it is layout
        error.args = (f"status {getattr(error, 'status_code', None)}, with a web page{_titled(page)}",)
    elif body and isinstance(body, str | dict | list) and not (isinstance(body, dict) and "message" in body):
        text = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False, default=str)
        if text[:MAX_BODY_SHOWN] not in str(error):
            error.args = (f"{error} - {text[:MAX_BODY_SHOWN]}",)
    redact_error(error)


def _check_responses(model: Model) -> None:
    """Make the provider's HTTP client call :func:`_check` on every response.

    This works for the OpenAI and Anthropic packages and for similar clients. Other providers are not checked. A provider
    may create a new client at any time, so this is called before every request.
    """
    client: Any = getattr(getattr(model.api, "client", None), "_client", None)
    hooks = getattr(client, "event_hooks", None)
    if isinstance(hooks, dict) and _check not in hooks.get("response", []):
        hooks["response"] = [_check, *hooks.get("response", [])]
        client.event_hooks = hooks


async def _check(response: Any) -> None:
    """Reject harmful responses, and give errors that were sent with a success status their real status."""
    if 300 <= response.status_code < 400:
        _check_redirect(str(response.url), response.headers.get("location"))
        return
    content = await response.aread()
    if _is_flood(content):
        raise FloodError("it sent more than a reply of a chat model can hold")
    if PAGE.match(content) and (response.is_success or response.status_code in NOT_HERE):
        raise PageError(
            f"it sends a web page{_titled(content.decode(errors='replace'))}; the address of an API often ends in /v1"
        )
    if response.is_success:
        response.status_code = _real_status(content) or response.status_code


def _titled(page: str) -> str:
    title = TITLE.search(page)
    return f" “{' '.join(title[1].split())}”" if title else ""


def _check_redirect(url: str, location: str | None) -> None:
    if location is None:
        return
    try:
        here, there = urlsplit(url), urlsplit(urljoin(url, location))
        same_port = here.port == there.port or here.scheme != there.scheme
        same = here.hostname == there.hostname and there.scheme in {here.scheme, "https"} and same_port
        host = there.hostname
    except ValueError:
        same, host = False, None
    if not same:
        raise RedirectError(f"it redirects to another host, {host or 'with an invalid name'}, which is not followed")


def _real_status(content: bytes) -> int | None:
    """Return the real status of an error, or None. LM Studio and some gateways send errors with status 200."""
    if b'"error"' not in content:
        return None
    try:
        reply = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(reply, dict) or not reply.get("error") or reply.get("choices"):
        return None
    code = reply["error"].get("code") if isinstance(reply["error"], dict) else None
    return code if type(code) is int and 400 <= code < 600 else HTTPStatus.BAD_REQUEST


def _is_flood(content: bytes) -> bool:
    if len(content) > MAX_BYTES:
        return True
    if b"\\u" in content:  # the tags may be escaped
        try:
            content = json.dumps(json.loads(content), ensure_ascii=False).encode(errors="replace")
        except (ValueError, RecursionError):
            return False  # not JSON, so not a chat completion
    return sum(content.count(tag) for tag in TAGS) > MAX_TAGS
