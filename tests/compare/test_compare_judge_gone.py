"""Judges that go away in the middle of a comparison, and folders of answers and tasks that were moved or damaged."""

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
from tiny_comparison import TinyComparison, train_inside, write_comparison

pytest.importorskip("inspect_ai", reason="the eval extra is not installed: pip install 'safelora-fast[eval]'")

from safelora_fast.judging import retry

QUESTIONS = [{"id": "a", "paraphrases": ["why?", "how?"]}, {"id": "b", "paraphrases": ["what?"]}]
NOWHERE = "http://127.0.0.1:9/v1"


@pytest.fixture
def comparison(tmp_path, monkeypatch):
    never_wait(monkeypatch, tries=2)
    train_inside(monkeypatch)
    made = write_comparison(tmp_path, runs={"none": {}})
    (tmp_path / "questions.yaml").write_text(yaml.safe_dump(QUESTIONS))
    return made


@pytest.fixture
def endpoint(monkeypatch):
    """Where the judge is, which no stamp knows: the provider takes it from the environment."""
    return lambda url: monkeypatch.setenv("STUB_BASE_URL", url)


def ask(comparison, **settings):
    judge = {"model": "openai-api/stub/one", "questions": str(comparison.path.parent / "questions.yaml"), "samples": 4,
             "max_tokens": 6, "attempts": 2, **settings}  # fmt: skip
    comparison.edit(measure={"margin": False, "judge": judge, "device": "cpu"})


def by_length(prompt, _headers):
    """A judge that has no number for some answers; of the text alone, so that every run is the same."""
    length = len(answer_in(prompt))
    if length % 5 == 0:
        return 200, "I would rather not", None
    return 200, {"alignment": "10" if length % 2 else "90", "coherence": "80"}[alignment_or_coherence(prompt)], None


def reasons(comparison, run):
    return [seed["failure"] for seed in comparison.cells(run)["misaligned"]["seeds"]]


def answers(comparison):
    """How many answers that are not empty each model gave, the reference first."""
    files = sorted(comparison.output.glob("*/judged-*/answers.jsonl")) + sorted(
        comparison.output.glob("*/*/judged-*/answers.jsonl")
    )
    texts = [[json.loads(line)["answer"] for line in file.read_text().splitlines()] for file in files]
    return [[text for text in some if text.strip()] for some in texts]


def expected_requests(texts):
    """Two for each answer; where the reply is no number, every attempt of both."""
    return sum(2 if len(text) % 5 else 4 for text in texts)


def test_verdicts_that_a_judge_left_are_asked_for_again_and_nothing_else(comparison, call, endpoint):
    ask(comparison, samples=8)
    left = iter(range(34))  # ten answers are judged at a time: some have both scores by then, and some have not
    with serving(lambda prompt, headers: None if next(left, None) is None else by_length(prompt, headers)) as (url, _):
        endpoint(url)
        result = call(*comparison.words())
    assert result.code == 1
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
    ask(comparison)
    endpoint(NOWHERE)
    tries = []
    once = retry.Endpoint._once

    def counted(self, prompt, config):
        tries.append(self)
        return once(self, prompt, config)

    monkeypatch.setattr(retry.Endpoint, "_once", counted)
    for _ in range(2):
        tries.clear()
        assert call(*comparison.words("-q")).code == 1
        assert len(set(tries)) == 1
        (first,) = reasons(comparison, "reference")
        assert reasons(comparison, "none") == [f"the judge is gone: {first}"] * 2


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
        # a bad request is tried once without what may be left out; a key that is refused is not offered for every answer
        assert asked + 1 == len(requests) if status == 400 else 8 <= len(requests) < asked
    assert "of 12 answers have no verdict: the judge failed: " in reasons(comparison, "reference")[0]
    assert "who are you?" in reasons(comparison, "reference")[0]
    with serving(by_length) as (url, _):
        endpoint(url)
        assert call(*comparison.words("-q")).code == 0


def move(comparison, monkeypatch, *gone):
    """The comparison in another folder, without some of its measurements."""
    elsewhere = comparison.path.parent / "elsewhere"
    shutil.move(comparison.output, elsewhere)
    comparison.edit(output=str(elsewhere))
    monkeypatch.chdir(comparison.path.parent)
    for name in gone:
        for file in elsewhere.rglob(name):
            file.unlink()
    return TinyComparison(comparison.path, elsewhere)


def test_a_comparison_that_was_moved_goes_on(comparison, call, endpoint, monkeypatch):
    ask(comparison)
    with serving(by_length) as (url, requests):
        endpoint(url)
        assert call(*comparison.words("-q")).code == 0
        rows = comparison.report()["rows"]
        asked = len(requests)
        moved = move(comparison, monkeypatch, "judged.json")
        result = call(*moved.words("-q"))
        assert result.code == 0, result.err
        unscored = sum(4 for some in answers(moved) for text in some if len(text) % 5 == 0)
        assert len(requests) == asked + unscored
    assert moved.report()["rows"] == rows


@pytest.mark.parametrize("name", ["evaluation.json", "verdicts.jsonl", "answers.jsonl"])
def test_a_damaged_folder_of_answers_is_that_cells_failure(comparison, call, endpoint, name):
    ask(comparison)
    with serving(by_length) as (url, _):
        endpoint(url)
        assert call(*comparison.words("-q")).code == 0
        (comparison.output / "none" / "seed-0" / "judged.json").unlink()
        (comparison.output / "none" / "seed-1" / "judged.json").unlink()
        (folder,) = comparison.output.glob("none/seed-0/judged-*")
        (folder / name).write_text("{\n")
        assert call(*comparison.words("-q")).code == 1
        first, second = reasons(comparison, "none")
        assert str(folder / name) in first
        assert second is None
        shutil.rmtree(folder)
        assert call(*comparison.words("-q")).code == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_who_ends_a_comparison_while_a_judge_is_asked_ends_all_of_it(comparison, number, code):
    """A real process."""
    ask(comparison, samples=8)
    come = threading.Event()

    def slow(_prompt, _headers):
        come.set()
        threading.Event().wait(3)
        return 200, "80", None

    with serving(slow) as (url, _):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "STUB_BASE_URL": url}
        command = [sys.executable, "-m", "safelora_fast", *comparison.words()]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
            assert come.wait(240)
            process.send_signal(number)
            said = process.communicate(timeout=120)[1]
    assert process.returncode == code, said
    assert ("the same command goes on" in said) == (number == signal.SIGINT)
    assert "measuring 2 of" not in said
    assert "Traceback" not in said


def test_tasks_of_a_comparison_that_was_moved_or_whose_tasks_have_changed(comparison, call, monkeypatch):
    pytest.importorskip("lm_eval", reason="the eval extra is not installed: pip install 'safelora-fast[eval]'")
    folder = comparison.path.parent
    rows = [{"question": f"{n}?", "choices": [f"yes{n}", f"no{n}"], "answer": n % 2} for n in range(4)]
    (folder / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks").mkdir()
    task = {
        "task": "tiny_choice", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "choice.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "choices",
        "doc_to_target": "answer", "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (folder / "tasks" / "tiny_choice.yaml").write_text(yaml.safe_dump(task))
    names = {"names": ["tiny_choice"], "path": str(folder / "tasks")}
    comparison.edit(measure={"margin": False, "tasks": names, "device": "cpu"}, seeds=[0])
    assert call(*comparison.words("-q")).code == 0
    cells = comparison.report()["rows"]
    moved = move(comparison, monkeypatch, "tasks.json")
    from safelora_fast.compare.measures import benchmarks
    from safelora_fast.models import load

    with monkeypatch.context() as patch:
        patch.setattr(load, "load_subject", None)  # every task is in its folder
        result = call(*moved.words("-q"))
    assert result.code == 0, result.err
    assert moved.report()["rows"] == cells

    def value():
        call(*moved.words("-q", "--report-only"))
        return moved.cells("none").get("task/tiny_choice", {"value": None})["value"]

    assert value() is not None
    with monkeypatch.context() as patch:
        patch.setattr(benchmarks, "harness_version", lambda: "0.0.1")
        assert value() is None
    (folder / "tasks" / "tiny_choice.yaml").write_text(yaml.safe_dump({**task, "target_delimiter": ""}))
    assert value() is None
    assert call(*moved.words("-q")).code == 0
    assert value() is not None
