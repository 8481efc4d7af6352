"""A judge's endpoint: retries after temporary errors, and leaves out parameters that the endpoint rejects."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio
from inspect_ai.model import ChatMessageUser, GenerateConfig, ModelOutput
from inspect_ai.util import concurrency
from tenacity import (
    AsyncRetrying,
    RetryError,
    retry_if_exception,
    stop_after_attempt,
    stop_before_delay,
    wait_exponential,
    wait_random,
)

from safelora_fast.judging.endpoint_guard import FloodError, PageError, RedirectError, guard
from safelora_fast.judging.redact import causes
from safelora_fast.judging.request_parameters import told, without_refused
from safelora_fast.printable import one_line

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from inspect_ai.model import Model
    from tenacity import RetryCallState

# Errors which mean that no server is at the address, by name, because HTTP libraries differ.
NOBODY = ("ConnectError", "ConnectTimeout", "gaierror", "InvalidURL", "UnsupportedProtocol")
# Exceptions of providers for a reply in an unexpected format.
MALFORMED = (TypeError, AttributeError, KeyError, IndexError, FloodError)
_reached: set[str] = set()  # addresses that have replied in this process


class UnreachableError(Exception):
    """No reply within the budget. The last error is the cause; without a cause, the endpoint had been given up before."""


@dataclass(frozen=True)
class Budget:
    """How long to wait for an endpoint. All times are in seconds.

    Attributes:
        tries: maximum tries of a request that fails with a temporary error.
        wait: wait before the second try. Each later wait is twice as long, or as long as the endpoint requests.
        longest_wait: maximum of one wait whose length the endpoint does not request.
        timeout: maximum of one try.
        total: maximum of one request, including waits. A wait that would end later is not begun.
        lost: the endpoint is given up after this many failures in a row. A failure is a request without a reply, or a score
            refused for a reason that applies to every request.
    """

    tries: int = 8
    wait: float = 2.0
    longest_wait: float = 60.0
    timeout: float = 300.0
    total: float = 600.0
    lost: int = 3


BUDGET = Budget()


class Endpoint:
    """Sends prompts straight to a model's provider, so that Inspect does not record the requests.

    Args:
        model: the model.
        budget: how long to wait for replies.
        quiet: print no warnings.
    """

    def __init__(self, model: Model, budget: Budget | None = None, *, quiet: bool = False) -> None:
        self._model = guard(model)
        self._budget = budget or BUDGET
        self._lost = 0
        self._answered = self._guessed = False
        self._changes: dict[str, Any] = {}
        self._warned: set[str] = set()
        self._quiet = quiet
        self._address = str(getattr(model.api, "base_url", None) or model)

    def turn(self) -> AbstractAsyncContextManager[object]:
        """Return a context manager that limits the answers judged at a time to the model's number of connections.

        One turn covers both scores of an answer. Otherwise a judge that becomes unreachable would leave every answer with
        only one score.
        """
        most = self._model.config.max_connections or self._model.api.max_connections()
        return concurrency(f"{self._model} as judge", most)

    @property
    def given_up(self) -> bool:
        """Whether no more requests are sent."""
        return self._lost >= self._budget.lost

    @property
    def left_out(self) -> tuple[str, ...]:
        """The parameters that are not sent, because the endpoint rejects them."""
        return told(self._changes)

    def lose(self) -> None:
        """Count a score that the endpoint refused for a reason that applies to every request."""
        self._lost += 1

    async def ask(self, prompt: str, config: GenerateConfig) -> tuple[ModelOutput, str]:
        """Send a prompt and return the reply. A request with a rejected parameter is sent again without the parameter.

        Returns:
            The output, which has no choices if the reply is not a chat completion; and the endpoint's finish reason, or
            Inspect's if the endpoint gives none.

        Raises:
            UnreachableError: no reply within the budget, or the endpoint has been given up.
            Exception: a permanent error of the provider, without credentials.
        """
        wanted, changes = self._model.config.merge(config), dict(self._changes)
        while True:
            sent = wanted.model_copy(update=changes)
            try:
                reply = await self._within_budget(prompt, sent)
            except UnreachableError:
                raise
            except Exception as error:
                more = without_refused(error, sent, guess=not self._answered and not self._guessed)
                if not more:
                    raise
                self._guessed = True
                changes |= more
            else:
                self._answered = True
                if told(changes) != self.left_out:
                    self._changes = changes
                    self._warn(f"{self._model} refuses {', '.join(self.left_out)}, and is asked without")
                return reply

    async def _within_budget(self, prompt: str, config: GenerateConfig) -> tuple[ModelOutput, str]:
        retrying = AsyncRetrying(
            retry=retry_if_exception(self._may_pass),
            stop=stop_after_attempt(self._budget.tries) | stop_before_delay(self._budget.total),
            wait=self._wait,
            before_sleep=self._warn_of_wait,
            sleep=anyio.sleep,
        )
        cause: BaseException | None
        try:
            with anyio.fail_after(self._budget.total):
                reply: tuple[ModelOutput, str] = await retrying(self._once, prompt, config)
                return reply
        except RetryError as error:
            cause = error.last_attempt.exception()
        except TimeoutError:
            cause = TimeoutError(f"no reply within {self._budget.total:g} seconds")
        self._lost += 1
        raise UnreachableError from cause

    def _may_pass(self, error: BaseException) -> bool:
        passing = isinstance(error, TimeoutError | ConnectionError)
        return passing or (isinstance(error, Exception) and bool(self._model.api.should_retry(error)))

    def _wait(self, state: RetryCallState) -> float:
        error: Any = state.outcome and state.outcome.exception()
        wished = getattr(self._model.api.should_retry(error), "retry_after", None)
        growing = wait_exponential(self._budget.wait) + wait_random(0, self._budget.wait / 4)
        return min(growing(state), self._budget.longest_wait) if wished is None else float(wished)

    def _warn_of_wait(self, state: RetryCallState) -> None:
        if state.attempt_number > 1 and state.outcome:
            name, minutes = type(state.outcome.exception()).__name__, self._budget.total / 60
            self._warn(
                f"{self._model} does not answer ({name}) and is waited for, {minutes:g} minutes a request at most"
            )

    def _warn(self, text: str) -> None:
        """Print a warning once. Inspect shows no log here, and a long silence would look like a hang."""
        if text not in self._warned and not self._quiet:
            self._warned.add(text)
            print(f"warning: {one_line(text)}", file=sys.stderr, flush=True)

    async def _once(self, prompt: str, config: GenerateConfig) -> tuple[ModelOutput, str]:
        if self.given_up:
            raise UnreachableError
        output, call = None, None
        try:
            with anyio.fail_after(self._budget.timeout):
                result = await self._model.api.generate([ChatMessageUser(content=prompt)], [], "auto", config)
            output, call = result if isinstance(result, tuple) else (result, None)
            if isinstance(output, Exception):
                raise output
        except MALFORMED:
            output = ModelOutput(model=str(self._model))
        except Exception as error:
            if not is_nobody(error):
                if getattr(error, "status_code", None) is not None:
                    _reached.add(self._address)
            elif self._address not in _reached:  # the address is wrong: waiting does not help
                self._lost = self._budget.lost
                raise UnreachableError from error
            raise
        self._lost = 0
        _reached.add(self._address)
        return output, _finish(output, call)


def is_nobody(error: BaseException) -> bool:
    """Return whether no judge is at the address: nothing listens there, or it redirects elsewhere or sends a web page."""
    return any(type(one).__name__ in NOBODY or isinstance(one, RedirectError | PageError) for one in causes(error))


def _finish(output: ModelOutput, call: Any) -> str:
    response = getattr(call, "response", None)
    choices = response.get("choices") if isinstance(response, dict) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    finish = first.get("finish_reason") if isinstance(first, dict) else None
    if isinstance(finish, str):
        return finish
    return output.stop_reason if output.choices else ""
