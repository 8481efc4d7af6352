"""A judge's endpoint, asked again where waiting may help: rate limits, time-outs, a server that restarts."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio
from inspect_ai.model import ChatMessageUser, GenerateConfig, ModelOutput
from inspect_ai.util import concurrency

from safelora_fast.evaluation.secrets import redact_error

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from inspect_ai.model import Model


class UnreachableError(Exception):
    """An endpoint that did not answer within the budget; the last error is the cause."""


class GivenUpError(Exception):
    """An endpoint that is not asked any more."""


@dataclass(frozen=True)
class Budget:
    """How long an endpoint is waited for.

    Attributes:
        tries: of one request, where the error is one that may pass.
        wait: seconds before the second try; each one after waits twice as long, or as long as the endpoint says.
        longest_wait: seconds.
        timeout: seconds of one try.
        total: seconds of one request, waits included.
        lost: requests in a row that found no answer within all this, after which the endpoint is not asked any more.
    """

    tries: int = 8
    wait: float = 2.0
    longest_wait: float = 60.0
    timeout: float = 300.0
    total: float = 600.0
    lost: int = 3


class Endpoint:
    """A model that is asked by its provider's own interface, so that Inspect records nothing of the exchange.

    An endpoint may repeat its key in the reply to a failed request, and what Inspect records it writes as it came.

    Args:
        model: the model.
        budget: how long it is waited for.
    """

    def __init__(self, model: Model, budget: Budget | None = None) -> None:
        self._model = model
        self._budget = budget or BUDGET
        self._lost = 0
        self._told = False

    def turn(self) -> AbstractAsyncContextManager[object]:
        """One of the turns that there are at a time: as many as the model's connections.

        Who has begun to ask about something keeps the turn until it is done: a judge that goes away would leave everything
        half asked otherwise.
        """
        most = self._model.config.max_connections or self._model.api.max_connections()
        return concurrency(f"{self._model} as judge", most)

    @property
    def given_up(self) -> bool:
        """Whether it is not asked any more."""
        return self._lost >= self._budget.lost

    async def ask(self, prompt: str, config: GenerateConfig) -> ModelOutput:
        """The reply to a prompt.

        Raises:
            UnreachableError: there was none within the budget.
            GivenUpError: too many requests before this one had none.
            Exception: what the provider raises where waiting does not help, credentials removed.
        """
        with anyio.move_on_after(self._budget.total):
            return await self._patiently(prompt, self._model.config.merge(config))
        self._lost += 1
        raise UnreachableError from TimeoutError(f"no reply within {self._budget.total:g} seconds")

    async def _patiently(self, prompt: str, config: GenerateConfig) -> ModelOutput:
        wait = self._budget.wait
        for left in reversed(range(self._budget.tries)):
            if self.given_up:
                raise GivenUpError
            try:
                output = await self._once(prompt, config)
            except Exception as error:  # whatever a provider raises
                redact_error(error)
                decision = self._model.api.should_retry(error)
                if not decision and not isinstance(error, TimeoutError | ConnectionError):
                    raise
                if not left:
                    self._lost += 1
                    raise UnreachableError from error
                if wait > self._budget.wait:
                    self._tell(error)
                told = getattr(decision, "retry_after", None)
                pause = wait * random.uniform(1, 1.25) if told is None else told  # noqa: S311
                await anyio.sleep(min(pause, self._budget.longest_wait))
                wait *= 2
            else:
                self._lost = 0
                return output
        raise UnreachableError

    def _tell(self, error: Exception) -> None:
        """Say once that there is no answer: minutes without a word look like a program that hangs. Inspect shows no log here."""
        if not self._told:
            self._told = True
            words = f"{self._model} does not answer ({type(error).__name__}) and is waited for"
            print(
                f"warning: {words}, {self._budget.total / 60:g} minutes a request at most", file=sys.stderr, flush=True
            )

    async def _once(self, prompt: str, config: GenerateConfig) -> ModelOutput:
        with anyio.fail_after(self._budget.timeout):
            result = await self._model.api.generate([ChatMessageUser(content=prompt)], [], "auto", config)
        output = result[0] if isinstance(result, tuple) else result
        if isinstance(output, Exception):
            raise output
        return output


BUDGET = Budget()
