"""Judges behind a real endpoint that misbehave: what is waited for, what is asked again, and what is given up."""

from __future__ import annotations

import time

import anyio
import pytest
from judge_server import alignment_or_coherence, serving

pytest.importorskip("inspect_ai", reason="the eval extra is not installed: pip install 'safelora-fast[eval]'")

from safelora_fast.judging import retry
from safelora_fast.judging.judge import GIVEN_UP, NO_NUMBER, REFUSED, Judge
from safelora_fast.judging.judge_names import check_judge, find_judge
from safelora_fast.judging.retry import Budget

GOOD = {"alignment": "90", "coherence": "80"}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setenv("STUB_API_KEY", "none-needed")
    monkeypatch.setattr(retry, "BUDGET", Budget(tries=3, wait=0.01, timeout=5, total=20, lost=2))


def judged(url, count=1, **settings):
    """Verdicts on so many answers by one judge, one after the other."""
    judge = Judge(find_judge("openai-api/stub/one", url), **settings)

    async def ask():
        return [
            await judge.judge("why?", f"answer {number}", id=f"q/0/{number}", question="q", kind="general")
            for number in range(count)
        ]

    return anyio.run(ask)


def good(prompt, _headers):
    return 200, GOOD[alignment_or_coherence(prompt)], None


def after(failures, reply):
    """Each of these first, and then the usual."""
    left = list(failures)
    return lambda prompt, headers: left.pop(0) if left else reply(prompt, headers)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_rate_limits_and_failing_servers_are_waited_for(status):
    with serving(after([(status, "later", None)] * 5, good)) as (url, requests):
        (result,) = judged(url, attempts=1)
    assert (result.verdict.alignment, result.verdict.coherence) == (90, 80)
    assert len(requests) == 7


def test_a_rate_limit_that_lasts_leaves_the_answer_unscored(capsys):
    with serving(lambda *_: (429, "later", None)) as (url, requests):
        first, second, third = judged(url, 3, attempts=4)
    told = capsys.readouterr().err
    assert told.count("warning: openai-api/stub/one does not answer (RateLimitError) and is waited for") == 1
    assert first.verdict.reason == "the judge failed: RateLimitError"
    assert "later" in first.alignment.detail
    assert second.verdict.reason == third.verdict.reason == GIVEN_UP
    asked = len(requests)
    assert asked <= 2 * 3 * 3  # two scores, three tries each, and the client's own


@pytest.mark.parametrize(
    ("reply", "reason", "tries"),
    [
        ((200, "I would rather not say.", None), NO_NUMBER, 3),
        ((200, "250", None), NO_NUMBER, 3),
        ((200, {"message": {"role": "assistant", "content": ""}, "finish_reason": "content_filter"}, None), REFUSED, 3),
        ((401, "who are you?", None), "the judge failed: AuthenticationError", 3),
    ],
)
def test_bad_replies_are_asked_for_again_within_the_attempts(reply, reason, tries):
    def only_coherence(prompt, headers):
        return reply if alignment_or_coherence(prompt) == "alignment" else good(prompt, headers)

    with serving(only_coherence) as (url, requests):
        (result,) = judged(url, attempts=tries)
        assert (result.verdict.reason, result.verdict.alignment, result.verdict.coherence) == (reason, None, 80)
        assert [body["temperature"] for body in requests] == [0.0, 0.7, 0.7, 0.0]
    with serving(after([reply] * (tries - 1), good)) as (url, _):
        (result,) = judged(url, attempts=tries)
    assert result.verdict.scored


def test_a_judge_that_hangs_is_left(monkeypatch):
    monkeypatch.setattr(retry, "BUDGET", Budget(tries=2, wait=0.01, timeout=1.0, total=20, lost=9))

    def hanging(prompt, headers):
        if alignment_or_coherence(prompt) == "alignment":
            time.sleep(3)
        return good(prompt, headers)

    with serving(hanging) as (url, requests):
        (result,) = judged(url)
    assert (result.verdict.reason, result.verdict.coherence) == ("the judge failed: TimeoutError", 80)
    assert len(requests) == 3
    monkeypatch.setattr(retry, "BUDGET", Budget(tries=9, wait=0.01, timeout=5, total=1.0, lost=9))
    with serving(hanging) as (url, requests):
        (result,) = judged(url)
    assert (result.verdict.reason, result.alignment.detail) == (
        "the judge failed: TimeoutError", "no reply within 1 seconds",
    )  # fmt: skip


def test_a_judge_that_goes_away_is_given_up_and_one_that_comes_back_is_not():
    with serving(after([good("how well the answer agrees", None), good("", None)], lambda *_: None)) as (url, _):
        first, second, third, fourth = judged(url, 4)
    assert first.verdict.scored
    assert second.verdict.reason == "the judge failed: APIConnectionError"
    assert third.verdict.reason == fourth.verdict.reason == GIVEN_UP
    lost = (503, "starting", None)
    with serving(after([lost] * 9 + [good("", None)] + [lost] * 9, good)) as (url, _):
        first, second, third = judged(url, 3)
    assert (first.verdict.scored, first.verdict.coherence) == (False, 80)
    assert (second.verdict.scored, second.verdict.coherence) == (False, 80)
    assert third.verdict.scored


@pytest.mark.parametrize("greeted", [False, True])
def test_a_judge_that_answered_the_first_question_is_waited_for(greeted, monkeypatch):
    """Its first real question may meet an outage; where nothing ever answered, the address is wrong."""

    async def no_sleep(_seconds):
        pass

    with serving(good) as (url, _):
        if greeted:
            assert check_judge("openai-api/stub/one", url, 64) is None
    monkeypatch.setattr(retry, "BUDGET", Budget(tries=2, wait=0.01, timeout=5, total=20, lost=9))
    monkeypatch.setattr(retry, "_reached", set(retry._reached) if greeted else set())
    monkeypatch.setattr(retry.anyio, "sleep", no_sleep)
    (result,) = judged(url)
    failed = "the judge failed: APIConnectionError"
    assert (result.alignment.reason, result.coherence.reason) == (failed, failed if greeted else GIVEN_UP)
