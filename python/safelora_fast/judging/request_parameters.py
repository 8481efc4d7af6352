"""Finds the request parameters that a judge's endpoint rejects, and leaves them out."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inspect_ai.model import GenerateConfig

BAD_REQUEST = {400, 422}
FEWER_CANDIDATES = 5  # the maximum of some endpoints
DEFAULT_TEMPERATURE = 1.0  # the only temperature that some reasoning models accept
RENAMED = "max_completion_tokens"
# Names in requests, and the matching fields of Inspect's GenerateConfig.
FIELDS = {
    "temperature": "temperature", "logprobs": "logprobs", "top_logprobs": "top_logprobs", "max_tokens": "max_tokens",
    "top_p": "top_p", "top_k": "top_k", "seed": "seed", "stop": "stop_seqs", "n": "num_choices", "system": "system_message",
    "frequency_penalty": "frequency_penalty", "presence_penalty": "presence_penalty", "logit_bias": "logit_bias",
    "reasoning_effort": "reasoning_effort",
}  # fmt: skip
WORDS = {"seed", "stop", "n", "system"}  # also ordinary words: a message must quote them
OPTIONAL = ("temperature", "logprobs", "top_logprobs")
WORD = re.compile(r"[a-z_]+")
LONGEST = 2000


def without_refused(error: Exception, sent: GenerateConfig, *, guess: bool) -> dict[str, Any]:
    """Return config changes that may make an endpoint accept a request; empty if the error has another cause.

    Args:
        error: the exception of the provider.
        sent: the config of the rejected request.
        guess: if the error names no parameter, leave out every optional one.
    """
    text = str(error)[:LONGEST].lower()
    named = _named(error, text)
    body = sent.extra_body or {}
    too_long = "context" in text or "too long" in text  # for the context: no parameter is the cause
    if RENAMED in body and RENAMED.replace("_", "") in named and not too_long:
        return {"extra_body": {name: value for name, value in body.items() if name != RENAMED}}
    if "logprobs" not in named and "toplogprobs" in named and (sent.top_logprobs or 0) > FEWER_CANDIDATES:
        return {"top_logprobs": FEWER_CANDIDATES}
    found = {field for name, field in FIELDS.items() if name.replace("_", "") in named}
    if too_long:
        found.discard("max_tokens")
    if found & {"logprobs", "top_logprobs"}:
        found |= {"logprobs", "top_logprobs"}
    found = {field for field in found if getattr(sent, field) is not None}
    if not found and guess and not too_long and getattr(error, "status_code", None) in BAD_REQUEST:
        found = {field for field in OPTIONAL if getattr(sent, field) is not None}
    changes: dict[str, Any] = dict.fromkeys(found)
    if found == {"temperature"} and "default" in text and sent.temperature != DEFAULT_TEMPERATURE:
        changes["temperature"] = DEFAULT_TEMPERATURE
    if "max_tokens" in found and RENAMED in text:
        changes["extra_body"] = {**body, RENAMED: sent.max_tokens}
    return changes


def told(changes: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of the parameters that these changes leave out, sorted."""
    words = {name for name, field in FIELDS.items() if changes.get(field, ...) is None}
    if "logprobs" in words:
        words.discard("top_logprobs")
    if changes.get("top_logprobs") is not None:
        words.add(f"top_logprobs above {FEWER_CANDIDATES}")
    if changes.get("temperature") is not None:
        words.add(f"a temperature other than {DEFAULT_TEMPERATURE:g}")
    return tuple(sorted(words))


def _named(error: Exception, text: str) -> set[str]:
    """Return the parameters that an error names, without underscores, because some endpoints write topLogprobs."""
    body: Any = getattr(error, "body", None)
    inner = body.get("error") if isinstance(body, dict) else None
    given = [getattr(error, "param", None), *(part.get("param") for part in (body, inner) if isinstance(part, dict))]
    exact = {str(name).rpartition(".")[2].lower().replace("_", "") for name in given if name}
    if exact:
        return exact
    quoted = {word for word in WORDS if any(f"{mark}{word}{mark}" in text for mark in "'\"`")}
    return {word.replace("_", "") for word in WORD.findall(text)} - WORDS | quoted
