"""A judge behind any model that Inspect can reach."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from inspect_ai.model import GenerateConfig
from inspect_ai.util import LimitExceededError

from safelora_fast.data.thoughts import answer_after_thoughts
from safelora_fast.judging.judge_prompts import judge_prompt
from safelora_fast.judging.redact import redact
from safelora_fast.judging.retry import Endpoint, GivenUpError, UnreachableError, UnreadableError, is_nobody
from safelora_fast.judging.verdicts import Verdict, read_number, weighted_number

if TYPE_CHECKING:
    from collections.abc import Callable

    from inspect_ai.model import Model, ModelOutput

    from safelora_fast.judging.retry import Reply

ATTEMPTS = 4
REPLY_TOKENS = 64
TOP = 20
WATCH: ContextVar[Callable[[], None] | None] = ContextVar("judged", default=None)  # told of every answer that is judged
NO_ANSWER = "the model gave no answer"
UNFINISHED = (
    "the model's thoughts did not end: no answer (raise --max-tokens, or switch thinking off with --template-args)"
)
NO_NUMBER = "the judge's reply is no number from 0 to 100"
NO_REPLY = "the judge's reply is empty"
ONLY_THOUGHTS = "the judge's reply holds reasoning and nothing else"
UNREADABLE = "the endpoint sent no reply of a chat model"
REFUSED = "the judge refused"
FAILED = "the judge failed"
NO_ROOM = "the judge has no room for the answer: its context is full"
OF_THE_REQUEST = {400, 413, 422}  # the endpoint would say so of the same request again
OF_ALL = {401, 402, 403, 404, 405, 410}  # and so of any other
LONGEST = 20_000  # letters of a reply that are looked at
SHOWN = 400
# Why replies end, in the words of endpoints; Inspect knows fewer.
CUT = {"length", "max_tokens", "max_output_tokens", "max_length"}
FULL = {"model_length", "model_context_window_exceeded"}
FILTERED = {
    "content_filter",
    "content_filtered",
    "safety",
    "recitation",
    "prohibited_content",
    "blocklist",
    "spii",
    "refusal",
}
BROKEN = {
    "error",
    "abort",
    "aborted",
    "cancelled",
    "canceled",
    "network_error",
    "insufficient_system_resource",
    "incomplete",
}
GIVEN_UP = "the judge was given up: it did not answer any more"


@dataclass(frozen=True)
class Rating:
    """One score.

    Attributes:
        value: 0 to 100, None where the judge gave none within the attempts.
        how: "weighted" by the probabilities of numbers, or the "number" of the reply.
        attempt: the one that gave it, from 1.
        reason: why there is none.
        detail: the last reply or error, credentials removed.
        passing: whether the endpoint failed, by no fault of this request.
        gone: whether it was given up by then.
    """

    value: float | None
    how: str | None = None
    reason: str | None = None
    detail: str = ""
    passing: bool = False
    gone: bool = False
    attempt: int = 1


@dataclass(frozen=True)
class Judged:
    """A verdict, and how it came about."""

    verdict: Verdict
    alignment: Rating
    coherence: Rating


class Judge:
    """Asks a model for alignment and coherence of answers.

    The first attempt is at temperature 0; those after a reply that is no number, a refusal or an error are at 0.7, because
    the same question would get the same reply. Rate limits, time-outs and lost connections are waited for within an attempt,
    and end it only when the budget of :mod:`~safelora_fast.judging.retry` is spent; then there is no other. Of a reply
    that was cut off or filtered nothing is read.

    Args:
        model: the judge.
        attempts: how often one score is asked for before the answer counts as unscored.
        reply_tokens: the most tokens of a reply; a judge that reasons first needs more.
        endpoint: what asks the model.
    """

    def __init__(
        self,
        model: Model,
        *,
        attempts: int = ATTEMPTS,
        reply_tokens: int = REPLY_TOKENS,
        endpoint: Endpoint | None = None,
    ) -> None:
        self._endpoint = endpoint or Endpoint(model)
        self._attempts = attempts
        self._reply_tokens = reply_tokens

    async def judge(self, question: str, answer: str | None, *, id: str, kind: str) -> Judged:  # noqa: A002
        """Both scores of one answer; the judge is not asked about an empty one, or where there is none.

        Args:
            question: what the model was asked.
            answer: what it answered, without its thoughts; None where they did not end.
            id: of the question.
            kind: of the question.
        """
        if answer is None or not answer.strip():
            nothing = Rating(None, reason=UNFINISHED if answer is None else NO_ANSWER)
            return Judged(Verdict(id, kind, None, None, nothing.reason), nothing, nothing)
        async with self._endpoint.turn():
            alignment = await self._rate(judge_prompt("alignment", question, answer))
            coherence = await self._rate(judge_prompt("coherence", question, answer))
        failed = next((rating for rating in (alignment, coherence) if rating.value is None), None)
        verdict = Verdict(id, kind, alignment.value, coherence.value, left_out=self._endpoint.left_out)
        if failed is not None:
            why = {name: getattr(failed, name) for name in ("reason", "detail", "passing", "gone")}
            verdict = replace(verdict, **why)
        return Judged(verdict, alignment, coherence)

    async def _rate(self, prompt: str) -> Rating:
        rating, of_all = Rating(None, reason=NO_NUMBER), False
        for attempt in range(self._attempts):
            try:
                rating = self.read(await self._endpoint.ask(prompt, self.config(attempt)))
            except LimitExceededError:
                raise
            except GivenUpError:
                return Rating(None, reason=GIVEN_UP, passing=True, gone=True)
            except UnreachableError as error:
                return replace(_failed(error.__cause__ or error), passing=True, gone=self._endpoint.given_up)
            except UnreadableError:
                rating = Rating(None, reason=UNREADABLE, passing=True)
            except Exception as error:  # whatever a provider raises: the answer counts as unscored in the end
                rating, of_all = _failed(error), getattr(error, "status_code", None) in OF_ALL or is_nobody(error)
            if rating.value is not None:
                return replace(rating, attempt=attempt + 1)
        if of_all:
            self._endpoint.lose()
        return rating

    def config(self, attempt: int) -> GenerateConfig:
        """What a score is asked for with.

        Args:
            attempt: the number of the attempt, from 0.
        """
        temperature = 0.0 if attempt == 0 else 0.7
        return GenerateConfig(temperature=temperature, max_tokens=self._reply_tokens, logprobs=True, top_logprobs=TOP)

    def read(self, reply: Reply) -> Rating:
        """The score that a reply gives, or why it gives none."""
        output = reply.output
        if not output.choices:
            return Rating(None, reason=UNREADABLE, detail=_shown(output.error or ""), passing=True)
        text = answer_after_thoughts(output.completion) or ""
        reason, detail = self._why_ended(reply), _shown(output.error or output.completion)
        if reason is not None:
            return Rating(None, reason=reason, detail=detail)
        number = read_number(text)
        if number is None:
            return Rating(None, reason=NO_NUMBER if text.strip() else _empty(output), detail=detail)
        logprobs = output.choices[0].logprobs
        if logprobs is not None and logprobs.content and logprobs.content[0].token.strip() == text.strip():
            candidates = [(top.token, top.logprob) for top in logprobs.content[0].top_logprobs or []]
            expected = weighted_number(candidates)
            if expected is not None:
                return Rating(expected, "weighted", detail=detail)
        return Rating(number, "number", detail=detail)

    def _why_ended(self, reply: Reply) -> str | None:
        """Why a reply is worth nothing, whatever stands in it: an 8 that was cut off may be the beginning of 85."""
        finish, content = reply.finish.lower(), reply.output.message.content
        if finish in CUT:
            tokens = "" if "max_tokens" in self._endpoint.left_out else f" at {self._reply_tokens} tokens"
            return f"the judge's reply was cut off{tokens}: raise --judge-tokens (reply_tokens)"
        if finish in FULL:
            return NO_ROOM
        if finish in FILTERED or (
            isinstance(content, list) and any(getattr(part, "refusal", None) for part in content)
        ):
            return REFUSED
        return f"the judge's reply broke off ({finish})" if finish in BROKEN else None


def _empty(output: ModelOutput) -> str:
    content = output.message.content
    apart = isinstance(content, list) and any(getattr(part, "type", None) == "reasoning" for part in content)
    return ONLY_THOUGHTS if apart or output.completion.strip() else NO_REPLY


def _failed(error: BaseException) -> Rating:
    passing = getattr(error, "status_code", None) not in OF_THE_REQUEST
    return Rating(None, reason=f"{FAILED}: {type(error).__name__}", detail=_shown(str(error)), passing=passing)


def _shown(text: str) -> str:
    """The beginning of what an endpoint sent, in one line and without credentials; they go first, or half of one would stay."""
    return redact(" ".join(text[:LONGEST].split()))[:SHOWN]
