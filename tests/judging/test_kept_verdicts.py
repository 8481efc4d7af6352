"""Verdicts that are kept belong to the judge that gave them: its address, its settings and its limits."""

from __future__ import annotations

import json

import anyio
import pytest
from judge_server import port_of, serving

pytest.importorskip("inspect_ai", reason="the eval extra is not installed: pip install 'safelora-fast[eval]'")

from inspect_ai.model import GenerateConfig, get_model

from safelora_fast.judging.judge import Judge
from safelora_fast.judging.verdict_store import VerdictStore


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """A verdict on one answer, and how often the judge was asked for it."""
    monkeypatch.setenv("STUB_API_KEY", "none-needed")

    def ask(score, port=0, attempts=4, tokens=64, refusals=0, name="one", **config):
        left = [None] * refusals

        def reply(_prompt, _headers):
            return (200, "I would rather not", None) if left and not left.clear() else (200, score, None)

        with serving(reply, port=port) as (url, requests):
            model = get_model(f"openai-api/stub/{name}", base_url=url, memoize=False, config=GenerateConfig(**config))
            judge = Judge(
                model, attempts=attempts, reply_tokens=tokens, store=VerdictStore(tmp_path / "verdicts.jsonl")
            )
            verdict = anyio.run(lambda: judge.judge("why?", "so", id="q/0/0", question="q", kind="general")).verdict
            return verdict.alignment, len(requests), port_of(url)

    return ask


def test_a_verdict_is_not_taken_for_another_judges(judged):
    alignment, asked, port = judged("10")
    assert (alignment, asked) == (10, 2)
    assert judged("20", port)[:2] == (10, 0)
    others = [
        {"name": "two"},
        {"tokens": 65},
        {"top_p": 0.5},
        {"system_message": "be kind"},
        {"reasoning_effort": "low"},
    ]
    for number, other in enumerate(others, start=2):
        assert judged(f"{number}0", port, **other)[:2] == (10 * number, 2), other
        assert judged("90", port, **other)[:2] == (10 * number, 0), other
    assert judged("80")[:2] == (80, 2)  # another port
    assert judged("20", port, max_connections=3, timeout=9)[:2] == (10, 0)  # how it is reached is not what it says


def test_a_verdict_of_more_attempts_than_there_are_now_is_asked_for_again(judged):
    alignment, asked, port = judged("10", attempts=2, refusals=1)
    assert (alignment, asked) == (10, 3)
    assert judged("20", port, attempts=9)[:2] == (10, 0)
    assert judged("20", port, attempts=1)[:2] == (20, 2)


def test_what_was_left_out_is_kept_with_a_verdict(tmp_path, monkeypatch):
    monkeypatch.setenv("STUB_API_KEY", "none-needed")

    def reply(_prompt, _headers):
        return (400, "temperature is not supported", None) if "temperature" in requests[-1] else (200, "50", None)

    found = []
    with serving(reply) as (url, requests):
        for _ in range(2):
            judge = Judge(get_model("openai-api/stub/one", base_url=url, memoize=False), attempts=1,
                                 store=VerdictStore(tmp_path / "verdicts.jsonl"))  # fmt: skip
            found.append(anyio.run(lambda j=judge: j.judge("why?", "so", id="q/0/0", question="q", kind="general")))
    assert found[0] == found[1]
    assert found[0].verdict.left_out == ("temperature",)
    (line,) = (tmp_path / "verdicts.jsonl").read_text().splitlines()
    assert json.loads(line)["verdict"]["left_out"] == ["temperature"]
