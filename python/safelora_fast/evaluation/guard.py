"""Keeping credentials out of what Inspect records of a model's endpoint."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from safelora_fast.evaluation.secrets import redact, redact_error

if TYPE_CHECKING:
    from inspect_ai.model import Model


def guard(model: Model) -> Model:
    """The model, whose errors and error replies have no credentials in them by the time that Inspect sees them."""
    asked = model.api.generate
    if getattr(asked, "guarded", False):
        return model

    async def generate(*words: Any, **settings: Any) -> Any:
        try:
            result = await asked(*words, **settings)
        except Exception as error:
            redact_error(error)
            raise
        if not isinstance(result, tuple):
            return result
        output, call = result
        if isinstance(output, Exception):
            redact_error(output)
        elif output.error is not None:
            output.error = redact(output.error)
        if call is not None and call.error:
            call.response = json.loads(redact(json.dumps(call.response, default=str)))
        return output, call

    generate.guarded = True  # type: ignore[attr-defined]
    model.api.generate = generate  # type: ignore[method-assign]
    return model
