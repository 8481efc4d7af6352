"""Endpoints that refuse a parameter of the request are asked without it; why a reply ended decides whether it is read."""

from __future__ import annotations

import anyio
import pytest
from judge_server import alignment_or_coherence, serving

pytest.importorskip("inspect_ai", reason="the eval extra is not installed: pip install 'safelora-fast[eval]'")

from inspect_ai.model import GenerateConfig, get_model

from safelora_fast.judging import retry
from safelora_fast.judging.endpoint_guard import _is_flood
from safelora_fast.judging.judge import GIVEN_UP, NO_REPLY, ONLY_THOUGHTS, REFUSED, UNREADABLE, Judge
from safelora_fast.judging.judge_names import find_judge
from safelora_fast.judging.rates import report_of
from safelora_fast.judging.request_parameters import without_refused
from safelora_fast.judging.retry import Budget

GOOD = {"alignment": "90", "coherence": "80"}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setenv("STUB_API_KEY", "none-needed")
    monkeypatch.setattr(retry, "BUDGET", Budget(tries=3, wait=0.01, timeout=5, total=20, lost=2))


def judged(url, count=1, judge=None, **settings):
    judge = Judge(judge or find_judge("openai-api/stub/one", url), **settings)

    async def ask():
        return [
            await judge.judge("why?", f"answer {number}", id=f"q/0/{number}", question="q", kind="general")
            for number in range(count)
        ]

    return anyio.run(ask)


def ask(refuse, count=1, config=None, **settings):
    """Verdicts of an endpoint, the requests that came, and those that were taken; `refuse(request)` is what it says against one."""

    def reply(prompt, _headers):
        words = refuse(requests[-1])
        return (200, GOOD[alignment_or_coherence(prompt)], None) if words is None else (400, words, None)

    with serving(reply) as (url, requests):
        model = get_model("openai-api/stub/one", base_url=url, memoize=False, config=config or GenerateConfig())
        results = judged(url, count, judge=model, **settings)
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
    assert len(requests) - len(taken) <= 2  # found out once, and not for every answer
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
    """One request is refused for what stands in it; those before and after are as they were."""

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
    "cut": ({"finish_reason": "length"}, "8", CUT),  # of 85
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
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_a_reply_that_did_not_come_to_its_end_is_no_score(name):
    choice, content, reason = ENDS[name]
    message = {} if content is None else {"message": {"role": "assistant", "content": content}}
    with serving(lambda *_: (200, {"finish_reason": "stop", **message, **choice}, None)) as (url, requests):
        (result,) = judged(url, attempts=2)
    assert (result.verdict.alignment, result.verdict.coherence, result.verdict.reason) == (None, None, reason)
    assert len(requests) == 4
    assert result.verdict.detail != NO_REPLY


@pytest.mark.parametrize("tag", ["<think>", "<think ", "<content-internal>", "</think><think>"])
def test_a_reply_that_would_hold_up_its_readers_is_not_read(tag):
    with serving(lambda *_: (200, tag * 100_000, None)) as (url, requests):
        (result,) = judged(url, attempts=2)
    assert (result.verdict.reason, len(requests)) == (UNREADABLE, 4)


def test_a_flood_is_noticed_in_escapes_too():
    assert _is_flood(rb'{"content": "' + rb"\u003cth\u0069nk" * 300 + rb'"}')
    assert not _is_flood(rb'{"content": "' + rb"\u003c <thing>" * 3000 + rb'"}')


def test_what_follows_a_judges_thoughts_is_its_reply():
    for text in ("<think>Hmm, 50?</think>85", "[THINK]Hmm, 50?[/THINK] 85"):
        with serving(lambda *_, said=text: (200, said, None)) as (url, _):
            (result,) = judged(url, attempts=1)
        assert result.verdict.alignment == 85, text


@pytest.mark.parametrize("finish", ["stop", "eos", "eos_token", "stop_sequence", "end_turn", "STOP"])
def test_a_reply_that_ended_is_read(finish):
    with serving(
        lambda *_: (200, {"finish_reason": finish, "message": {"role": "assistant", "content": "85"}}, None)
    ) as (url, _):
        (result,) = judged(url)
    assert (result.verdict.alignment, result.verdict.coherence) == (85, 85)


def test_a_limit_that_the_endpoint_refused_is_not_blamed():
    choice = {"finish_reason": "length", "message": {"role": "assistant", "content": ""}}
    taken = unless(lambda r: "max_tokens" not in r, "max_tokens is not supported")
    with serving(lambda *_: (400, taken(requests[-1]), None) if taken(requests[-1]) else (200, choice, None)) as (
        url,
        requests,
    ):
        (result,) = judged(url, attempts=1)
    assert result.verdict.reason == "the judge's reply was cut off: raise --judge-tokens (reply_tokens)"


@pytest.mark.parametrize("choices", [None, [], [None]])
def test_a_reply_without_choices_is_told_in_plain_words(choices, monkeypatch):
    monkeypatch.setattr("judge_server._completion", lambda *_: {"id": "x", "object": "chat.completion", "created": 1, "model": "m",
                                                               "choices": choices})  # fmt: skip
    with serving(lambda *_: (200, "5", None)) as (url, _):
        (result,) = judged(url, attempts=1)
    assert result.verdict.reason == UNREADABLE
    assert "NoneType" not in f"{result.verdict.reason} {result.verdict.detail}"


def test_a_key_that_is_refused_is_not_offered_for_every_answer():
    with serving(lambda *_: (401, "who are you?", None)) as (url, requests):
        results = judged(url, 9, attempts=2)
    assert results[0].verdict.reason == "the judge failed: AuthenticationError"
    assert {one.verdict.reason for one in results[2:]} == {GIVEN_UP}
    assert len(requests) == 4  # two scores in two attempts


def test_a_port_where_nobody_ever_answered_is_not_waited_for(monkeypatch):
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    monkeypatch.setattr("safelora_fast.judging.retry.anyio.sleep", sleep)
    results = judged("http://127.0.0.1:9/v1", 5)
    assert results[0].verdict.reason == "the judge failed: APIConnectionError"
    assert {one.verdict.reason for one in results[1:]} == {GIVEN_UP}
    assert [
        pause for pause in slept if 0 < pause < 0.1
    ] == []  # none of this package's own; the client of OpenAI's has its own
