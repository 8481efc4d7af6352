"""A judge's endpoint, asked again where waiting may help, or where it refuses no more than a parameter of the request."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio
from inspect_ai.model import ChatMessageUser, GenerateConfig, ModelOutput
from inspect_ai.util import concurrency

from safelora_fast.judging.redact import redact_error, redact_logs, remember
from safelora_fast.judging.request_parameters import told, without_refused
from safelora_fast.judging.response_checks import FloodError, PageError, RedirectError, check_responses, tell_body
from safelora_fast.printable import one_line

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractAsyncContextManager

    from inspect_ai.model import Model

NOBODY = ("ConnectError", "ConnectTimeout", "gaierror", "InvalidURL", "UnsupportedProtocol")  # by whichever library
SHAPES = (TypeError, AttributeError, KeyError, IndexError)
_heard: set[str] = set()  # addresses that anything has come from in this process, by whichever Endpoint


class UnreachableError(Exception):
    """An endpoint that did not answer within the budget; the last error is the cause."""


class GivenUpError(Exception):
    """An endpoint that is not asked any more."""


class UnreadableError(Exception):
    """What an endpoint sent is no reply of a chat model."""


@dataclass(frozen=True)
class Budget:
    """How long an endpoint is waited for.

    Attributes:
        tries: of one request, where the error is one that may pass.
        wait: seconds before the second try; each one after waits twice as long, or as long as the endpoint says.
        longest_wait: seconds.
        timeout: seconds of one try.
        total: seconds of one request, waits included.
        lost: requests in a row that found no answer within all this, or scores in a row that it refused to everybody, after
            which the endpoint is not asked any more.
    """

    tries: int = 8
    wait: float = 2.0
    longest_wait: float = 60.0
    timeout: float = 300.0
    total: float = 600.0
    lost: int = 3


@dataclass(frozen=True)
class Reply:
    """What an endpoint answered.

    Attributes:
        output: as Inspect reads it.
        finish: why the reply ended, in the endpoint's own word where it is known.
    """

    output: ModelOutput
    finish: str


class Endpoint:
    """A model that is asked by its provider's own interface, so that Inspect records nothing of the exchange.

    An endpoint may repeat its key in the reply to a failed request, and what Inspect records it writes as it came.

    Args:
        model: the model.
        budget: how long it is waited for.
        quiet: say nothing of what it refuses, or that it is waited for.
    """

    def __init__(self, model: Model, budget: Budget | None = None, *, quiet: bool = False) -> None:
        self._model = model
        self._budget = budget or BUDGET
        self._lost = 0
        self._answered = self._guessed = False
        self._changes: dict[str, Any] = {}
        self._told: set[str] = set()
        self._quiet = quiet
        self._address = str(getattr(model.api, "base_url", None) or model)
        remember(getattr(model.api, "api_key", None))

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

    @property
    def left_out(self) -> tuple[str, ...]:
        """The parameters that it is asked without, because it refuses them."""
        return told(self._changes)

    def lose(self) -> None:
        """Count a score that the endpoint refused in a way that has nothing to do with what it was asked."""
        self._lost += 1

    async def ask(self, prompt: str, config: GenerateConfig) -> Reply:
        """The reply to a prompt; where the endpoint refuses a parameter, to the same request without it.

        Raises:
            UnreachableError: there was none within the budget.
            GivenUpError: too many requests before this one had none.
            Exception: what the provider raises where waiting does not help, credentials removed.
        """
        wanted, changes = self._model.config.merge(config), dict(self._changes)
        while True:
            sent = wanted.model_copy(update=changes)
            try:
                reply = await self._within_budget(prompt, sent)
            except (UnreachableError, GivenUpError, UnreadableError):
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
                    self._tell(f"{self._model} refuses {', '.join(self.left_out)}, and is asked without")
                return reply

    async def _within_budget(self, prompt: str, config: GenerateConfig) -> Reply:
        with anyio.move_on_after(self._budget.total):
            return await self._patiently(prompt, config)
        self._lost += 1
        raise UnreachableError from TimeoutError(f"no reply within {self._budget.total:g} seconds")

    async def _patiently(self, prompt: str, config: GenerateConfig) -> Reply:
        wait = self._budget.wait
        for left in reversed(range(self._budget.tries)):
            if self.given_up:
                raise GivenUpError
            try:
                reply = await self._once(prompt, config)
            except UnreadableError:
                raise
            except Exception as error:  # whatever a provider raises
                tell_body(error)
                redact_error(error)
                if getattr(error, "status_code", None) is not None and not is_nobody(error):
                    _heard.add(self._address)
                decision = self._model.api.should_retry(error)
                if not decision and not isinstance(error, TimeoutError | ConnectionError):
                    raise
                if is_nobody(error) and self._address not in _heard:  # a wrong URL: waiting does not help
                    self._lost = self._budget.lost
                    raise UnreachableError from error
                if not left:
                    self._lost += 1
                    raise UnreachableError from error
                if wait > self._budget.wait:
                    minutes = f"{self._budget.total / 60:g} minutes a request at most"
                    self._tell(f"{self._model} does not answer ({type(error).__name__}) and is waited for, {minutes}")
                after = getattr(decision, "retry_after", None)
                pause = wait * random.uniform(1, 1.25) if after is None else after  # noqa: S311
                await anyio.sleep(min(pause, self._budget.longest_wait))
                wait *= 2
            else:
                self._lost = 0
                _heard.add(self._address)
                return reply
        raise UnreachableError

    def _tell(self, words: str) -> None:
        """Say something once. Inspect shows no log here, and minutes without a word look like a program that hangs."""
        if words not in self._told and not self._quiet:
            self._told.add(words)
            print(f"warning: {one_line(words)}", file=sys.stderr, flush=True)

    async def _once(self, prompt: str, config: GenerateConfig) -> Reply:
        redact_logs()
        check_responses(self._model)
        with anyio.fail_after(self._budget.timeout):
            try:
                result = await self._model.api.generate([ChatMessageUser(content=prompt)], [], "auto", config)
            except (*SHAPES, FloodError) as error:
                raise UnreadableError from error
        output, call = result if isinstance(result, tuple) else (result, None)
        if isinstance(output, Exception):
            raise output
        return Reply(output, _finish(output, call))


def causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and what it was raised from."""
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        yield current
        current = current.__cause__ or current.__context__


def is_nobody(error: BaseException) -> bool:
    """Whether no judge is at an address: nothing listens, the host is not known, it sends one elsewhere or sends a page."""
    return any(type(one).__name__ in NOBODY or isinstance(one, RedirectError | PageError) for one in causes(error))


def _finish(output: ModelOutput, call: Any) -> str:
    response = getattr(call, "response", None)
    choices = response.get("choices") if isinstance(response, dict) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    said = first.get("finish_reason") if isinstance(first, dict) else None
    if isinstance(said, str):
        return said
    return output.stop_reason if output.choices else ""


BUDGET = Budget()
