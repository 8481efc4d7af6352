"""Keeping credentials out of what Inspect records of a model's endpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safelora_fast.judging.redact import each_text, hide, redact, redact_error, redact_logs, remember
from safelora_fast.judging.response_checks import check_responses

if TYPE_CHECKING:
    from inspect_ai.model import Model


def guard(model: Model) -> Model:
    """The model, whose replies and errors have no credentials in them by the time that Inspect sees them."""
    asked = model.api.generate
    if getattr(asked, "guarded", False):
        return model
    remember(getattr(model.api, "api_key", None))

    async def generate(*words: Any, **settings: Any) -> Any:
        redact_logs()
        check_responses(model)
        try:
            result = await asked(*words, **settings)
        except Exception as error:
            redact_error(error)
            raise
        output, call = result if isinstance(result, tuple) else (result, None)
        if isinstance(output, Exception):
            redact_error(output)
        else:
            output.error = None if output.error is None else redact(output.error)
            for choice in output.choices:
                values = choice.message.model_dump()
                hidden = each_text(values, hide)  # no more than the keys themselves: this is what the model answered
                if hidden != values:
                    choice.message = type(choice.message).model_validate(hidden)
        if call is not None:
            call.response = each_text(call.response, redact if call.error else hide)
        return result

    generate.guarded = True  # type: ignore[attr-defined]
    model.api.generate = generate  # type: ignore[method-assign]
    return model
