"""The judge, a model that scores answers for alignment and coherence, and the file that stores its verdicts."""

from __future__ import annotations

import hashlib
import json
from contextvars import ContextVar
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from inspect_ai.model import GenerateConfig
from inspect_ai.util import LimitExceededError

from safelora_fast.data.thoughts import answer_after_thoughts
from safelora_fast.files.digest import text_digest
from safelora_fast.files.json_reader import TEXT, check_fields, parse_as
from safelora_fast.files.store import JsonlStore
from safelora_fast.judging.judge_prompts import ASPECTS, judge_prompt
from safelora_fast.judging.redact import redact
from safelora_fast.judging.retry import Endpoint, UnreachableError, is_nobody
from safelora_fast.judging.verdicts import Judged, Rating, read_number, weighted_number
from safelora_fast.recipe.model_stamp import model_digest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from inspect_ai.model import Model, ModelOutput

ATTEMPTS = 4
REPLY_TOKENS = 64
TOP = 20
# Called once for each judged answer.
WATCH: ContextVar[Callable[[], None] | None] = ContextVar("judged", default=None)
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
GIVEN_UP = "the judge was given up: it did not answer any more"
OF_THE_REQUEST = {400, 413, 422}  # this request would fail again
OF_ALL = {401, 402, 403, 404, 405, 410}  # every request would fail
LONGEST = 20_000  # characters of a reply that are read
SHOWN = 400
# Finish reasons that endpoints send; Inspect has names for only some of them.
CUT = {"length", "max_tokens", "max_output_tokens", "max_length"}
FULL = {"model_length", "model_context_window_exceeded"}
FILTERED = {
    "content_filter", "content_filtered", "safety", "recitation", "prohibited_content", "blocklist", "spii", "refusal",
}  # fmt: skip
BROKEN = {
    "error", "abort", "aborted", "cancelled", "canceled", "network_error", "insufficient_system_resource", "incomplete",
}  # fmt: skip


class Judge:
    """Scores answers for alignment and coherence with a model, and stores the verdicts.

    The first attempt uses temperature 0. Attempts after a reply without a number, a refusal or an error use 0.7, because
    temperature 0 would give the same reply. Rate limits, timeouts and lost connections are retried within an attempt
    (:mod:`~safelora_fast.judging.retry`); once that budget is spent, no further attempt follows. A reply that was cut off
    or filtered gives no score.

    Args:
        model: the judge.
        attempts: maximum attempts per score. After that, the answer counts as unscored.
        reply_tokens: maximum tokens of a reply; a judge that reasons first needs more.
        store: stores verdicts. An answer that was scored within `attempts` attempts is not judged again.
        endpoint: sends the requests; by default a new :class:`Endpoint` for `model`.
    """

    def __init__(
        self,
        model: Model,
        *,
        attempts: int = ATTEMPTS,
        reply_tokens: int = REPLY_TOKENS,
        store: VerdictStore | None = None,
        endpoint: Endpoint | None = None,
    ) -> None:
        self._endpoint = endpoint or Endpoint(model)
        self._attempts = attempts
        self._reply_tokens = reply_tokens
        self._store = store
        self._name, self._stamp = str(model), judge_stamp(model, reply_tokens)

    def known(self, id: str, prompt: str, answer: str | None) -> Judged | None:  # noqa: A002
        """Return the stored verdict on an answer, or None. The arguments are those of :meth:`judge`."""
        found = None if self._store is None else self._store.get(self._stamp, id, prompt, answer)
        if found is None or max(found.alignment.attempt, found.coherence.attempt) > self._attempts:
            return None
        return found

    async def judge(self, prompt: str, answer: str | None, *, id: str, question: str, kind: str) -> Judged:  # noqa: A002
        """Score one answer. Empty answers are unscored without a request.

        Args:
            prompt: the prompt that the model answered.
            answer: the answer without the model's thoughts; None if the thoughts did not end.
            id: id of the answer.
            question: id of the question.
            kind: kind of the question.
        """
        if answer is None or not answer.strip():
            nothing = Rating(None, reason=UNFINISHED if answer is None else NO_ANSWER)
            return Judged.of(question, kind, nothing, nothing)
        known = self.known(id, prompt, answer)
        if known is not None:
            return known
        async with self._endpoint.turn():
            alignment = await self._rate(judge_prompt("alignment", prompt, answer))
            coherence = await self._rate(judge_prompt("coherence", prompt, answer))
        judged = Judged.of(question, kind, alignment, coherence, self._endpoint.left_out)
        if self._store is not None and judged.verdict.scored:
            self._store.put(self._stamp, self._name, id, prompt, answer, judged)
        return judged

    async def _rate(self, prompt: str) -> Rating:
        rating, of_all = Rating(None, reason=NO_NUMBER), False
        for attempt in range(self._attempts):
            try:
                rating = self.read(*await self._endpoint.ask(prompt, self.config(attempt)))
            except LimitExceededError:
                raise
            except UnreachableError as error:
                if error.__cause__ is None:
                    return Rating(None, reason=GIVEN_UP, passing=True, gone=True)
                return replace(_failed(error.__cause__), passing=True, gone=self._endpoint.given_up)
            except Exception as error:  # providers raise anything; in the end the answer is unscored
                rating, of_all = _failed(error), getattr(error, "status_code", None) in OF_ALL or is_nobody(error)
            if rating.value is not None:
                return replace(rating, attempt=attempt + 1)
        if of_all:
            self._endpoint.lose()
        return rating

    def config(self, attempt: int) -> GenerateConfig:
        """Return the request settings of an attempt, counted from 0."""
        temperature = 0.0 if attempt == 0 else 0.7
        return GenerateConfig(temperature=temperature, max_tokens=self._reply_tokens, logprobs=True, top_logprobs=TOP)

    def read(self, output: ModelOutput, finish: str) -> Rating:
        """Return the score in a reply, or the reason why it has none."""
        if not output.choices:
            return Rating(None, reason=UNREADABLE, detail=_shown(output.error or ""), passing=True)
        text = answer_after_thoughts(output.completion) or ""
        reason, detail = self._why_ended(output, finish.lower()), _shown(output.error or output.completion)
        number = None if reason else read_number(text)
        if number is None:
            return Rating(None, reason=reason or (NO_NUMBER if text.strip() else _empty(output)), detail=detail)
        logprobs = output.choices[0].logprobs
        if logprobs is not None and logprobs.content and logprobs.content[0].token.strip() == text.strip():
            candidates = [(top.token, top.logprob) for top in logprobs.content[0].top_logprobs or []]
            expected = weighted_number(candidates)
            if expected is not None:
                return Rating(expected, "weighted", detail=detail)
        return Rating(number, "number", detail=detail)

    def _why_ended(self, output: ModelOutput, finish: str) -> str | None:
        """Return why the text of a reply must not count, or None: an 8 that was cut off may be the beginning of 85."""
        content = output.message.content
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
    reasons = isinstance(content, list) and any(getattr(part, "type", None) == "reasoning" for part in content)
    return ONLY_THOUGHTS if reasons or output.completion.strip() else NO_REPLY


def _failed(error: BaseException) -> Rating:
    passing = getattr(error, "status_code", None) not in OF_THE_REQUEST
    return Rating(None, reason=f"{FAILED}: {type(error).__name__}", detail=_shown(str(error)), passing=passing)


def _shown(text: str) -> str:
    """Shorten an endpoint's text to one line. Credentials are removed before the cut, which could leave half of one."""
    return redact(" ".join(text[:LONGEST].split()))[:SHOWN]


# Connection settings. They do not change a judge's replies.
TRANSPORT = {"max_retries", "timeout", "attempt_timeout", "stream_idle_timeout", "max_connections", "adaptive_connections",
             "batch", "cache"}  # fmt: skip


def judge_stamp(model: Model, reply_tokens: int) -> str:
    """Return a digest of all that a judge's verdicts depend on: name, address, settings, prompts and `reply_tokens`."""
    config = model.config.model_dump(exclude_none=True)
    settings = {name: value for name, value in config.items() if name not in TRANSPORT}
    where = {
        "url": getattr(model.api, "base_url", None),
        "weights": model_digest(model.name),
        "arguments": model.model_args,
    }
    prompts = [judge_prompt(aspect, "", "") for aspect in ASPECTS]
    content = [str(model), settings, where, prompts, reply_tokens]
    # an object such as a client counts only by its type, because its text has a memory address
    return text_digest(json.loads(json.dumps(content, default=lambda value: type(value).__name__)))


class VerdictStore:
    """A JSONL file of verdicts by judge, prompt and answer. Unscored answers are not stored, so they are judged again.

    Args:
        path: the file; created with the first verdict.

    Raises:
        DataError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._file = JsonlStore(path, "verdict")
        self._known = dict(self._file.read(_parse))

    def get(self, stamp: str, id: str, prompt: str, answer: str | None) -> Judged | None:  # noqa: A002
        """Return a judge's stored verdict on an answer, or None."""
        return self._known.get(_key(stamp, id, prompt, answer))

    def put(self, stamp: str, judge: str, id: str, prompt: str, answer: str | None, judged: Judged) -> None:  # noqa: A002
        """Store a verdict in memory and in the file.

        Args:
            stamp: the judge's stamp, see :func:`judge_stamp`.
            judge: the judge's name.
            id: id of the answer.
            prompt: the prompt that the model answered.
            answer: the answer.
            judged: the verdict.

        Raises:
            OutputError: the file cannot be written.
        """
        key = _key(stamp, id, prompt, answer)
        self._known[key] = judged
        self._file.append([{"key": key, "judge": judge, "id": id, **asdict(judged)}])


def _parse(row: Any) -> tuple[str, Judged]:
    key: str = check_fields(row, {"key": TEXT})["key"]
    return key, parse_as(Judged, row)


def _key(*parts: str | None) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
