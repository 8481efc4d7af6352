"""A comparison under a judge: counts, unscored answers, intervals over seeds, and what failed."""

from __future__ import annotations

import json

import pytest
import yaml
from judge_server import alignment_or_coherence, answer_in, never_wait, serving
from tiny_comparison import train_inside, write_comparison

QUESTIONS = [{"id": "a", "paraphrases": ["why?", "how?"]}, {"id": "b", "paraphrases": ["what?"]}]


@pytest.fixture
def comparison(tmp_path, monkeypatch):
    monkeypatch.setenv("STUB_API_KEY", "swordfish-17")
    train_inside(monkeypatch)
    made = write_comparison(tmp_path, runs={"none": {}})
    (tmp_path / "questions.yaml").write_text(yaml.safe_dump(QUESTIONS))
    return made


def by_length(prompt, _headers):
    """A judge that minds how many characters an answer has, and has nothing to say on some."""
    length = len(answer_in(prompt))
    if length % 5 == 0:
        return 200, "I would rather not", None
    return 200, {"alignment": "10" if length % 2 else "90", "coherence": "80"}[alignment_or_coherence(prompt)], None


def test_a_comparison_under_a_judge(comparison, call):
    pytest.importorskip("inspect_ai", reason="the eval extra is not installed: pip install 'safelora-fast[eval]'")
    folder = comparison.path.parent
    with serving(by_length) as (url, requests):
        judge = {"model": "openai-api/stub/one", "url": url, "questions": str(folder / "questions.yaml"),
                 "samples": 4, "max_tokens": 6, "attempts": 1}  # fmt: skip
        comparison.edit(measure={"margin": False, "judge": judge, "device": "cpu"})
        result = call(*comparison.words("-q"))
        assert result.code == 0, result.err
        asked = len(requests)
        assert call(*comparison.words("-q")).code == 0
        assert len(requests) == asked
    assert comparison.report()["complete"] is True
    for name, seeds in (("reference", [0]), ("none", [0, 1])):
        cells = comparison.cells(name)
        texts = []
        for seed in seeds:
            place = comparison.output / name / ("" if name == "reference" else f"seed-{seed}")
            (file,) = place.glob("judged-*/answers.jsonl")
            texts.append([json.loads(line)["answer"] for line in file.read_text().splitlines()])
        scored = [[text for text in some if len(text) % 5] for some in texts]
        hits = [[len(text) % 2 == 1 for text in some] for some in scored]
        cell = cells["misaligned"]
        assert [one["value"] for one in cell["seeds"]] == pytest.approx([sum(some) / len(some) for some in hits])
        counts = sum(map(sum, hits)), sum(map(len, scored)), sum(map(len, texts)) - sum(map(len, scored))
        assert cell["count"] == f"{counts[0]} of {counts[1]} scored, {counts[2]} unscored"
        assert 0 <= cell["low"] <= cell["value"] <= cell["high"] <= 1
        assert cells["incoherent"]["value"] == 0
        assert cells["incoherent"]["high"] > 0
    written = b"".join(path.read_bytes() for path in comparison.output.rglob("*") if path.is_file())
    assert b"swordfish-17" not in written


def test_kinds_that_no_question_has_are_refused_before_the_first_step(comparison, call):
    pytest.importorskip("inspect_ai", reason="the eval extra is not installed: pip install 'safelora-fast[eval]'")
    judge = {"model": "openai-api/stub/one", "url": "http://127.0.0.1:1/v1", "kinds": ["general", "jason"]}
    comparison.edit(measure={"margin": False, "judge": judge, "device": "cpu"})
    result = call(*comparison.words("-q"))
    assert result.code == 2
    assert "there is no question of kind 'jason', only of general, json" in result.err
    assert not comparison.output.exists()


def test_a_judge_that_is_not_there_is_a_failed_cell(comparison, call, monkeypatch):
    pytest.importorskip("inspect_ai", reason="the eval extra is not installed: pip install 'safelora-fast[eval]'")
    never_wait(monkeypatch, tries=1)
    judge = {"model": "openai-api/stub/one", "url": "http://127.0.0.1:9/v1", "samples": 1, "max_tokens": 2, "attempts": 1,
             "questions": str(comparison.path.parent / "questions.yaml")}  # fmt: skip
    comparison.edit(measure={"judge": judge, "device": "cpu"}, seeds=[0])
    result = call(*comparison.words("-q"))
    cells = comparison.cells("none")
    assert cells["margin_rise"]["value"] is not None
    assert cells["misaligned"]["value"] is None
    assert cells["misaligned"]["seeds"][0]["failure"]
    assert result.code == 1, result.err
