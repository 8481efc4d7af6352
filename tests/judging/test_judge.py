"""Judges behind an endpoint that misbehaves: retries, rejected parameters, scores, and stored verdicts."""

from __future__ import annotations

import json
import threading

import anyio
import pytest
from judge_server import alignment_or_coherence, good, judged, never_wait, port_of, serving

pytest.importorskip("inspect_ai", reason="the eval extra is not installed: pip install 'safelora-fast[eval]'")

from inspect_ai.model import GenerateConfig, get_model
from tenacity import RetryCallState

from safelora_fast.judging import retry
from safelora_fast.judging.endpoint_guard import _is_flood
from safelora_fast.judging.judge import (
    GIVEN_UP,
    NO_NUMBER,
    NO_REPLY,
    ONLY_THOUGHTS,
    REFUSED,
    UNREADABLE,
    VerdictStore,
)
from safelora_fast.judging.judge_names import check_judge
from safelora_fast.judging.rates import report_of
from safelora_fast.judging.request_parameters import without_refused


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    never_wait(monkeypatch)


def after(failures, reply):
    """Each of the failures once, then the usual reply."""
    left = list(failures)
    return lambda prompt, headers: left.pop(0) if left else reply(prompt, headers)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_rate_limits_and_failing_servers_are_waited_for(status):
    with serving(after([(status, "later", None)] * 5, good)) as (url, requests):
        (result,) = judged(url, attempts=1)
    assert (result.verdict.alignment, result.verdict.coherence) == (90, 80)
    assert len(requests) == 7


def test_waits_double_up_to_the_longest_or_are_as_long_as_the_endpoint_says(monkeypatch):
    class Decision:
        retry_after = None

    model = get_model("mockllm/model")
    monkeypatch.setattr(model.api, "should_retry", lambda _error: Decision)
    endpoint, state = retry.Endpoint(model, retry.Budget()), RetryCallState(None, None, (), {})

    def wait(attempt):
        state.attempt_number = attempt
        return endpoint._wait(state)

    for attempt, least in enumerate((2, 4, 8, 16, 32), start=1):
        assert least <= wait(attempt) <= least + 0.5
    assert wait(6) == wait(60) == 60
    for wished in (7, 300):
        Decision.retry_after = wished
        assert wait(1) == wait(9) == wished


def test_a_wait_that_would_outlast_the_budget_is_not_begun(monkeypatch):
    class Decision:
        retry_after = 6

        def __bool__(self):
            return True

    monkeypatch.undo()
    model, asked = get_model("mockllm/model"), []

    async def generate(*_):
        asked.append(1)
        raise ConnectionError("busy")

    monkeypatch.setattr(model.api, "should_retry", lambda _error: Decision())
    monkeypatch.setattr(model.api, "generate", generate)
    with pytest.raises(retry.UnreachableError) as raised:
        anyio.run(retry.Endpoint(model, retry.Budget(total=5)).ask, "why?", GenerateConfig())
    assert (len(asked), str(raised.value.__cause__)) == (1, "busy")


def test_a_rate_limit_that_lasts_leaves_the_answer_unscored(capsys):
    with serving(lambda *_: (429, "later", None)) as (url, requests):
        first, second, third = judged(url, 3, attempts=4)
    warnings = capsys.readouterr().err
    assert warnings.count("warning: openai-api/stub/one does not answer (RateLimitError) and is waited for") == 1
    assert first.verdict.reason == "the judge failed: RateLimitError"
    assert "later" in first.alignment.detail
    assert second.verdict.reason == third.verdict.reason == GIVEN_UP
    assert len(requests) <= 2 * 3 * 3  # two scores, three tries each, and the client's own retries


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ((200, "I would rather not say.", None), NO_NUMBER),
        ((200, "250", None), NO_NUMBER),
        ((200, {"message": {"role": "assistant", "content": ""}, "finish_reason": "content_filter"}, None), REFUSED),
        ((401, "who are you?", None), "the judge failed: AuthenticationError"),
    ],
)
def test_bad_replies_are_asked_for_again_within_the_attempts(reply, reason):
    def only_coherence(prompt, headers):
        return reply if alignment_or_coherence(prompt) == "alignment" else good(prompt, headers)

    with serving(only_coherence) as (url, requests):
        (result,) = judged(url, attempts=3)
        assert (result.verdict.reason, result.verdict.alignment, result.verdict.coherence) == (reason, None, 80)
        assert [body["temperature"] for body in requests] == [0.0, 0.7, 0.7, 0.0]
    with serving(after([reply] * 2, good)) as (url, _):
        (result,) = judged(url, attempts=3)
    assert result.verdict.scored


@pytest.mark.parametrize(
    ("budget", "detail"),
    [({"tries": 2, "timeout": 1.0}, ""), ({"tries": 9, "total": 1.0}, "no reply within 1 seconds")],
)
def test_a_judge_that_hangs_is_left(monkeypatch, budget, detail):
    never_wait(monkeypatch, lost=9, **budget)
    end = threading.Event()

    def hanging(prompt, headers):
        if alignment_or_coherence(prompt) == "alignment":
            end.wait(30)
        return good(prompt, headers)

    with serving(hanging) as (url, requests):
        (result,) = judged(url)
        end.set()
    assert (result.verdict.reason, result.verdict.coherence) == ("the judge failed: TimeoutError", 80)
    assert result.alignment.detail == detail
    assert len(requests) == (2 if detail else 3)


def test_a_judge_that_goes_away_is_given_up_and_one_that_comes_back_is_not():
    with serving(after([good("how well the answer agrees"), good("")], lambda *_: None)) as (url, _):
        first, second, third, fourth = judged(url, 4)
    assert first.verdict.scored
    assert second.verdict.reason == "the judge failed: APIConnectionError"
    assert third.verdict.reason == fourth.verdict.reason == GIVEN_UP
    lost = (503, "starting", None)
    with serving(after([lost] * 9 + [good("")] + [lost] * 9, good)) as (url, _):
        results = judged(url, 3)
    assert [(one.verdict.scored, one.verdict.coherence) for one in results] == [(False, 80), (False, 80), (True, 80)]


@pytest.mark.parametrize("greeted", [False, True])
def test_a_judge_that_answered_the_first_question_is_waited_for(greeted, monkeypatch):
    """An outage may follow the first question. If nothing ever answered, the address is wrong."""
    with serving(good) as (url, _):
        if greeted:
            assert check_judge("openai-api/stub/one", url, 64) is None
    never_wait(monkeypatch, tries=2, lost=9)
    monkeypatch.setattr(retry, "_reached", set(retry._reached) if greeted else set())
    (result,) = judged(url)
    failed = "the judge failed: APIConnectionError"
    assert (result.alignment.reason, result.coherence.reason) == (failed, failed if greeted else GIVEN_UP)


def test_a_port_where_nobody_ever_answered_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(retry.Endpoint, "_wait", None)
    results = judged("http://127.0.0.1:9/v1", 5)
    assert results[0].verdict.reason == "the judge failed: APIConnectionError"
    assert {one.verdict.reason for one in results[1:]} == {GIVEN_UP}


def test_a_key_that_is_refused_is_not_offered_for_every_answer():
    with serving(lambda *_: (401, "who are you?", None)) as (url, requests):
        results = judged(url, 9, attempts=2)
    assert results[0].verdict.reason == "the judge failed: AuthenticationError"
    assert {one.verdict.reason for one in results[2:]} == {GIVEN_UP}
    assert len(requests) == 4  # two scores in two attempts


def ask(refuse, count=1, config=None, **settings):
    """Verdicts of an endpoint, all requests, and the accepted ones. `refuse(request)` returns an error message or None."""

    def reply(prompt, _headers):
        words = refuse(requests[-1])
        return good(prompt) if words is None else (400, words, None)

    with serving(reply) as (url, requests):
        model = get_model("openai-api/stub/one", base_url=url, memoize=False, config=config or GenerateConfig())
        results = judged(url, count, model, **settings)
    return results, requests, [request for request in requests if refuse(request) is None]


def unless(condition, words):
    return lambda request: None if condition(request) else words


ENDPOINTS = {
    "a temperature but the default": (
        unless(lambda r: r.get("temperature", 1) == 1,
               "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported."),
        ("a temperature other than 1",),
    ),
    "any temperature": (
        unless(lambda r: "temperature" not in r, "Unsupported parameter: 'temperature' is not supported with this model."),
        ("temperature",),
    ),
    "max_tokens": (
        unless(lambda r: "max_tokens" not in r and r.get("max_completion_tokens") == 64,
               "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."),
        ("max_tokens",),
    ),
    "logprobs": (
        unless(lambda r: "logprobs" not in r and "top_logprobs" not in r, "logprobs are not supported with reasoning models"),
        ("logprobs",),
    ),
    "logprobs, as Gemini writes them": (
        unless(lambda r: "logprobs" not in r and "top_logprobs" not in r, "Unknown name 'logprobs', 'topLogprobs'"),
        ("logprobs",),
    ),
    "so many candidates": (
        unless(lambda r: r.get("top_logprobs", 0) <= 5, "top_logprobs must be between 0 and 5"),
        ("top_logprobs above 5",),
    ),
    "candidates at all": (unless(lambda r: "top_logprobs" not in r, "top_logprobs: Extra inputs are not permitted"), ("logprobs",)),
    "one after the other": (
        lambda r: "temperature is not supported" if "temperature" in r else "unknown field logprobs" if "logprobs" in r else None,
        ("logprobs", "temperature"),
    ),
    "something, and does not say what": (
        unless(lambda r: "temperature" not in r and "logprobs" not in r, "Bad request"),
        ("logprobs", "temperature"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDPOINTS)
def test_what_an_endpoint_refuses_is_left_out(name, capsys):
    refuse, left_out = ENDPOINTS[name]
    results, requests, taken = ask(refuse, 3, attempts=1)
    assert [(one.verdict.alignment, one.verdict.coherence) for one in results] == [(90, 80)] * 3
    assert len(taken) == 6
    assert len(requests) - len(taken) <= 2  # found out once, not for every answer
    assert {one.verdict.left_out for one in results} == {left_out}
    assert capsys.readouterr().err.count("warning: openai-api/stub/one refuses") == 1
    assert report_of("j", [one.verdict for one in results])["left_out"] == list(left_out)


def test_parameters_of_a_users_own_are_left_out_too():
    refuse = unless(
        lambda r: not {"seed", "stop", "n"} & r.keys(), "parameters 'seed', 'stop' and 'n' are not supported"
    )
    (result,), requests, _ = ask(refuse, config=GenerateConfig(seed=3, top_p=0.5, stop_seqs=["x"]))
    assert (result.verdict.scored, result.verdict.left_out) == (True, ("seed", "stop"))
    assert requests[-1]["top_p"] == 0.5


@pytest.mark.parametrize(
    "words",
    [
        "max_tokens is too large: 64. This model's maximum context length is 4096 tokens and your request has 4090",
        "the prompt is too long",
        "your prompt violates our usage policy",
    ],
)
def test_what_is_no_parameters_fault_changes_nothing(words):
    """One request is refused for its content. The requests before and after it stay the same."""

    def refuse(request):
        return words if "answer 1\n" in str(request["messages"][0]["content"]).replace("\\n", "\n") else None

    results, requests, _ = ask(refuse, 3, attempts=2)
    assert [one.verdict.scored for one in results] == [True, False, True]
    assert words[:20] in results[1].verdict.detail
    assert {one.verdict.left_out for one in results} == {()}
    assert all(request["max_tokens"] == 64 and request["logprobs"] for request in requests)


def test_a_named_parameter_counts_more_than_words():
    class RefusalError(Exception):
        status_code = 400
        param = "generation_config.temperature"

    sent = GenerateConfig(temperature=0, logprobs=True, max_tokens=9)
    assert without_refused(RefusalError("logprobs and seed are fine"), sent, guess=True) == {"temperature": None}
    assert without_refused(RuntimeError("the line is dead"), sent, guess=True) == {}
    assert without_refused(RefusalError("temperature"), GenerateConfig(), guess=False) == {}


CUT = "the judge's reply was cut off at 64 tokens: raise --judge-tokens (reply_tokens)"
ENDS = {
    "cut": ({"finish_reason": "length"}, "8", CUT),  # the beginning of 85
    "cut in its thoughts": ({"finish_reason": "length"}, "", CUT),
    "cut, in other words": ({"finish_reason": "MAX_TOKENS"}, "8", CUT),
    "filtered": ({"finish_reason": "content_filter"}, "5", REFUSED),
    "filtered, in other words": ({"finish_reason": "SAFETY"}, "5", REFUSED),
    "broken off": ({"finish_reason": "error"}, "8", "the judge's reply broke off (error)"),
    "empty": ({}, "", NO_REPLY),
    "thoughts alone": ({"message": {"role": "assistant", "content": "", "reasoning_content": "Hmm, 50?"}}, None, ONLY_THOUGHTS),
    "thoughts in tags": ({}, "[THINK]Hmm, 50?[/THINK]", ONLY_THOUGHTS),
    "thoughts without an end": ({}, "[THINK]Hmm, 50?", ONLY_THOUGHTS),
    "a refusal": ({"message": {"role": "assistant", "content": None, "refusal": "5"}}, None, REFUSED),
    **{f"thoughts, then {text}": ({}, text, None) for text in ("<think>Hmm, 50?</think>85", "[THINK]Hmm, 50?[/THINK] 85")},
    **{end: ({"finish_reason": end}, "85", None) for end in ("stop", "eos", "eos_token", "stop_sequence", "end_turn", "STOP")},
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_only_a_reply_that_came_to_its_end_is_a_score(name):
    choice, content, reason = ENDS[name]
    message = {} if content is None else {"message": {"role": "assistant", "content": content}}
    with serving(lambda *_: (200, {"finish_reason": "stop", **message, **choice}, None)) as (url, requests):
        (result,) = judged(url, attempts=2)
    score = None if reason else 85
    assert (result.verdict.alignment, result.verdict.coherence, result.verdict.reason) == (score, score, reason)
    assert len(requests) == (4 if reason else 2)


def test_a_limit_that_the_endpoint_refused_is_not_blamed():
    choice = {"finish_reason": "length", "message": {"role": "assistant", "content": ""}}
    taken = unless(lambda r: "max_tokens" not in r, "max_tokens is not supported")
    with serving(lambda *_: (400, taken(requests[-1]), None) if taken(requests[-1]) else (200, choice, None)) as (
        url,
        requests,
    ):
        (result,) = judged(url, attempts=1)
    assert result.verdict.reason == "the judge's reply was cut off: raise --judge-tokens (reply_tokens)"


@pytest.mark.parametrize("tag", ["<think>", "<think ", "<content-internal>", "</think><think>"])
def test_a_reply_that_would_hold_up_its_readers_is_not_read(tag):
    with serving(lambda *_: (200, tag * 100_000, None)) as (url, requests):
        (result,) = judged(url, attempts=2)
    assert (result.verdict.reason, len(requests)) == (UNREADABLE, 4)


def test_a_flood_is_noticed_in_escapes_too():
    assert _is_flood(rb'{"content": "' + rb"\u003cth\u0069nk" * 300 + rb'"}')
    assert not _is_flood(rb'{"content": "' + rb"\u003c <thing>" * 3000 + rb'"}')


@pytest.mark.parametrize("choices", [None, [], [None]])
def test_a_reply_without_choices_is_told_in_plain_words(choices):
    body = json.dumps({"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": choices})
    with serving(lambda *_: (200, body.encode(), None)) as (url, _):
        (result,) = judged(url, attempts=1)
    assert result.verdict.reason == UNREADABLE
    assert "NoneType" not in f"{result.verdict.reason} {result.verdict.detail}"


@pytest.fixture
def kept(tmp_path):
    """The score of one answer from a judge that stores verdicts, the number of requests, and the judge's port."""

    def ask(score, port=0, attempts=4, tokens=64, refusals=0, name="one", **config):
        left = [None] * refusals

        def reply(_prompt, _headers):
            return (200, "I would rather not", None) if left and not left.clear() else (200, score, None)

        with serving(reply, port=port) as (url, requests):
            model = get_model(f"openai-api/stub/{name}", base_url=url, memoize=False, config=GenerateConfig(**config))
            store = VerdictStore(tmp_path / "verdicts.jsonl")
            (result,) = judged(url, model=model, attempts=attempts, reply_tokens=tokens, store=store)
            return result.verdict.alignment, len(requests), port_of(url)

    return ask


def test_a_verdict_is_not_taken_for_another_judges(kept):
    alignment, asked, port = kept("10")
    assert (alignment, asked) == (10, 2)
    assert kept("20", port)[:2] == (10, 0)
    others = [
        {"name": "two"}, {"tokens": 65}, {"top_p": 0.5}, {"system_message": "be kind"}, {"reasoning_effort": "low"},
    ]  # fmt: skip
    for number, other in enumerate(others, start=2):
        assert kept(f"{number}0", port, **other)[:2] == (10 * number, 2), other
        assert kept("90", port, **other)[:2] == (10 * number, 0), other
    assert kept("80")[:2] == (80, 2)  # another port
    assert kept("20", port, max_connections=3, timeout=9)[:2] == (10, 0)  # connection settings do not change a verdict


def test_a_verdict_of_more_attempts_than_there_are_now_is_asked_for_again(kept):
    alignment, asked, port = kept("10", attempts=2, refusals=1)
    assert (alignment, asked) == (10, 3)
    assert kept("20", port, attempts=9)[:2] == (10, 0)
    assert kept("20", port, attempts=1)[:2] == (20, 2)


def test_what_was_left_out_is_kept_with_a_verdict(tmp_path):
    file = tmp_path / "verdicts.jsonl"

    def reply(_prompt, _headers):
        return (400, "temperature is not supported", None) if "temperature" in requests[-1] else (200, "50", None)

    with serving(reply) as (url, requests):
        first, second = (judged(url, attempts=1, store=VerdictStore(file)) for _ in range(2))
    assert first == second
    (line,) = file.read_text().splitlines()
    assert json.loads(line)["verdict"]["left_out"] == ["temperature"]
