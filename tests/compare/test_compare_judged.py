"""Tests of a judged comparison: counts, unscored answers, unavailable judges, and moved or damaged folders."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import yaml
from judge_server import alignment_or_coherence, answer_in, never_wait, port_of, serving

pytest.importorskip("inspect_ai", reason="the eval extra is not installed: pip install 'safelora-fast[eval]'")

from safelora_fast.judging import retry

QUESTIONS = [{"id": "a", "paraphrases": ["why?", "how?"]}, {"id": "b", "paraphrases": ["what?"]}]
NOWHERE = "http://127.0.0.1:9/v1"


@pytest.fixture
def comparison(unmeasured, monkeypatch):
    never_wait(monkeypatch, tries=2)
    monkeypatch.setenv("STUB_API_KEY", "swordfish-17")
    (unmeasured.path.parent / "questions.yaml").write_text(yaml.safe_dump(QUESTIONS))
    return unmeasured


@pytest.fixture
def endpoint(monkeypatch):
    """A function that sets the judge's URL; the provider reads it from the environment, so no file depends on it."""
    return lambda url: monkeypatch.setenv("STUB_BASE_URL", url)


def ask(comparison, *, others=None, **settings):
    judge = {"model": "openai-api/stub/one", "questions": str(comparison.path.parent / "questions.yaml"), "samples": 4,
             "max_tokens": 6, "attempts": 2, **settings}  # fmt: skip
    comparison.edit(measure={"margin": False, "judge": judge, "device": "cpu", **(others or {})})


def by_length(prompt, _headers):
    """A judge that gives some answers no number; it depends on the text alone, so every run is the same."""
    length = len(answer_in(prompt))
    if length % 5 == 0:
        return 200, "I would rather not", None
    return 200, {"alignment": "10" if length % 2 else "90", "coherence": "80"}[alignment_or_coherence(prompt)], None


def reasons(comparison, run):
    return [seed["failure"] for seed in comparison.cells(run)["misaligned"]["seeds"]]


def answers(comparison):
    """Return the non-empty answers of each model, the reference first."""
    files = sorted(comparison.output.glob("*/judged-*/answers.jsonl"))
    files += sorted(comparison.output.glob("*/*/judged-*/answers.jsonl"))
    texts = [[json.loads(line)["answer"] for line in file.read_text().splitlines()] for file in files]
    return [[text for text in some if text.strip()] for some in texts]


def expected_requests(texts):
    """Return the number of requests: two for each answer, or all attempts of both if the reply is not a number."""
    return sum(2 if len(text) % 5 else 4 for text in texts)


def test_values_counts_and_intervals(comparison, call, endpoint):
    ask(comparison)
    with serving(by_length) as (url, requests):
        endpoint(url)
        assert call(*comparison.words("-q")).code == 0
        asked = len(requests)
        assert call(*comparison.words("-q")).code == 0
        assert len(requests) == asked
    assert comparison.report()["complete"] is True
    for name, texts in (("reference", answers(comparison)[:1]), ("none", answers(comparison)[1:])):
        cell = comparison.cells(name)["misaligned"]
        scored = [[text for text in some if len(text) % 5] for some in texts]
        hits = [[len(text) % 2 == 1 for text in some] for some in scored]
        assert [one["value"] for one in cell["seeds"]] == pytest.approx([sum(some) / len(some) for some in hits])
        counts = sum(map(sum, hits)), sum(map(len, scored))
        assert cell["count"] == f"{counts[0]} of {counts[1]} scored, {12 * len(texts) - counts[1]} unscored"
        assert 0 <= cell["low"] <= cell["value"] <= cell["high"] <= 1
        assert comparison.cells(name)["incoherent"]["value"] == 0 < comparison.cells(name)["incoherent"]["high"]
    written = b"".join(path.read_bytes() for path in comparison.output.rglob("*") if path.is_file())
    assert b"swordfish-17" not in written


def test_kinds_that_no_question_has_are_refused_before_the_first_step(comparison, call):
    ask(comparison, kinds=["general", "jason"], questions=None)
    shutil.rmtree(comparison.output)
    result = call(*comparison.words("-q"))
    assert result.code == 2
    assert "there is no question of kind 'jason', only of general, json" in result.err
    assert not comparison.output.exists()


def test_verdicts_that_a_judge_left_are_asked_for_again_and_nothing_else(comparison, call, endpoint):
    ask(comparison, samples=8)
    left = iter(range(34))  # ten answers are judged at a time, so some have both scores and some do not
    with serving(lambda prompt, headers: None if next(left, None) is None else by_length(prompt, headers)) as (url, _):
        endpoint(url)
        assert call(*comparison.words()).code == 1
    (first,) = reasons(comparison, "reference")
    assert "of 24 answers have no verdict: the judge" in first
    assert reasons(comparison, "none") == [f"the judge is gone: {first}"] * 2
    (file,) = comparison.output.glob("reference/judged-*/verdicts.jsonl")
    known = len(file.read_text().splitlines())
    assert known > 0
    with serving(by_length, port=port_of(url)) as (url, requests):
        endpoint(url)
        assert call(*comparison.words("-q")).code == 0
        scored = [text for text in answers(comparison)[0] if len(text) % 5]
        assert len(requests) == sum(map(expected_requests, answers(comparison))) - 2 * known
        assert len(scored) >= known
        requests.clear()
        assert call(*comparison.words("-q")).code == 0, "replies that are no number are final"
        assert requests == []


def test_a_judge_that_is_not_there_is_waited_for_once_in_a_call(comparison, call, endpoint, monkeypatch):
    """Its cells fail; the cells of other measures do not."""
    ask(comparison, others={"narrow": str(comparison.path.parent / "rows.jsonl")})
    (comparison.path.parent / "rows.jsonl").write_text('{"prompt": "why?", "completion": "no"}\n' * 2)
    endpoint(NOWHERE)
    tries = []
    once = retry.Endpoint._once

    async def counted(self, prompt, config):
        tries.append(self)
        return await once(self, prompt, config)

    monkeypatch.setattr(retry.Endpoint, "_once", counted)
    for _ in range(2):
        tries.clear()
        assert call(*comparison.words("-q")).code == 1
        assert len(set(tries)) == 1
        (first,) = reasons(comparison, "reference")
        assert reasons(comparison, "none") == [f"the judge is gone: {first}"] * 2
        assert comparison.cells("none")["learned"]["value"] is not None


def test_one_answer_that_the_endpoint_refuses_is_unscored_for_good(comparison, call, endpoint):
    ask(comparison)
    refused = []

    def choosy(prompt, headers):
        if not refused:
            refused.append(answer_in(prompt))
        if answer_in(prompt) == refused[0]:
            return 400, "the prompt is too long", None
        return by_length(prompt, headers)

    with serving(choosy) as (url, requests):
        endpoint(url)
        assert call(*comparison.words("-q")).code == 0
        assert comparison.cells("none")["misaligned"]["value"] is not None
        requests.clear()
        assert call(*comparison.words("-q")).code == 0
        assert requests == []


@pytest.mark.parametrize("status", [400, 401])
def test_an_endpoint_that_refuses_everything_has_judged_nothing(comparison, call, endpoint, status):
    ask(comparison)
    with serving(lambda _prompt, _headers: (status, "who are you?", None)) as (url, requests):
        endpoint(url)
        assert call(*comparison.words("-q")).code == 1
        asked = 4 * len(answers(comparison)[0])
        # a bad request is retried once without optional settings; a rejected key is not sent again for every answer
        assert asked + 1 == len(requests) if status == 400 else 8 <= len(requests) < asked
    assert "of 12 answers have no verdict: the judge failed: " in reasons(comparison, "reference")[0]
    assert "who are you?" in reasons(comparison, "reference")[0]
    with serving(by_length) as (url, _):
        endpoint(url)
        assert call(*comparison.words("-q")).code == 0


def test_a_comparison_that_was_moved_goes_on(comparison, call, endpoint, move):
    ask(comparison)
    with serving(by_length) as (url, requests):
        endpoint(url)
        assert call(*comparison.words("-q")).code == 0
        rows, asked = comparison.report()["rows"], len(requests)
        moved = move(comparison, "judged.json")
        result = call(*moved.words("-q"))
        assert result.code == 0, result.err
        unscored = sum(4 for some in answers(moved) for text in some if len(text) % 5 == 0)
        assert len(requests) == asked + unscored
    assert moved.report()["rows"] == rows


def test_a_damaged_folder_of_answers_is_that_cells_failure(comparison, call, endpoint):
    ask(comparison)
    with serving(by_length) as (url, _):
        endpoint(url)
        assert call(*comparison.words("-q")).code == 0
        (folder,) = comparison.output.glob("none/seed-0/judged-*")
        for name in ("evaluation.json", "verdicts.jsonl", "answers.jsonl"):
            before = (folder / name).read_bytes()
            (comparison.output / "none" / "seed-0" / "judged.json").unlink()
            (folder / name).write_text("{\n")
            assert call(*comparison.words("-q")).code == 1
            first, second = reasons(comparison, "none")
            assert str(folder / name) in first
            assert second is None
            (folder / name).write_bytes(before)
        shutil.rmtree(folder)
        assert call(*comparison.words("-q")).code == 0


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_who_ends_a_comparison_while_a_judge_is_asked_ends_all_of_it(comparison, number, code):
    """Starts a real process."""
    ask(comparison, samples=1, max_tokens=2)
    asked, ended = threading.Event(), threading.Event()

    def silent(_prompt, _headers):
        asked.set()
        ended.wait(60)
        return 200, "80", None

    with serving(silent) as (url, _):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "STUB_BASE_URL": url}
        command = [sys.executable, "-m", "safelora_fast", *comparison.words()]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
            assert asked.wait(240)
            process.send_signal(number)
            said = process.communicate(timeout=120)[1]
        ended.set()
    assert process.returncode == code, said
    assert ("the same command goes on" in said) == (number == signal.SIGINT)
    assert "measuring 2 of" not in said
    assert "Traceback" not in said
