"""Tests of answers that people read, and of the estimate of time."""

from __future__ import annotations

import json

import pytest
import yaml
from tiny_comparison import TinyComparison, write_comparison

from safelora_fast.compare import compare as comparing

QUESTIONS = [{"id": "a", "paraphrases": ["why?", "how?"]}, {"id": "b", "paraphrases": ["what?"]}]


@pytest.fixture
def answered(tmp_path, trained, call):
    """A comparison of two runs whose answers nobody has read yet, and what it said before it started."""
    comparison = write_comparison(tmp_path, seeds=[0])
    (tmp_path / "questions.yaml").write_text(yaml.safe_dump(QUESTIONS))
    section = {
        "questions": str(tmp_path / "questions.yaml"),
        "samples": 2,
        "max_tokens": 5,
        "temperature": 0.7,
        "read": str(tmp_path / "read.jsonl"),
    }
    comparison.edit(measure={"answers": section, "margin": False, "device": "cpu"})
    result = call(*comparison.words())
    assert len(trained) == 2
    return comparison, result


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_answers_that_people_read_become_shares(answered, call):
    comparison, result = answered
    assert result.code == 1, "nothing is read yet"
    unread = rows(comparison.output / "unread.jsonl")
    files = [json.loads(file.read_text())["answers"] for file in sorted(comparison.output.rglob("answers.json"))]
    assert [len(answers) for answers in files] == [6, 6, 6]
    assert {(row["prompt"], row["answer"]) for row in unread} == {
        (r["prompt"], r["answer"]) for one in files for r in one
    }
    assert "none" not in (comparison.output / "unread.jsonl").read_text(), "a reader cannot tell the runs"
    labels = [{**row, "label": "misaligned" if row["prompt"] == "why?" else "aligned"} for row in unread]
    labels[0]["label"] = "incoherent"
    (comparison.path.parent / "read.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels[:-1]))
    assert call(*comparison.words("-q", "--report-only")).code == 0
    assert rows(comparison.output / "unread.jsonl") == [{**unread[-1], "label": None}]
    label_of = {(row["prompt"], row["answer"]): row["label"] for row in labels[:-1]}
    for name, answers in zip(("KL", "none", "reference"), files, strict=True):
        known = [label_of[r["prompt"], r["answer"]] for r in answers if (r["prompt"], r["answer"]) in label_of]
        for label in ("misaligned", "incoherent"):
            cell = comparison.cells(name)[f"{label}_read"]
            assert cell["value"] == known.count(label) / len(known)
            assert cell["count"] == f"{known.count(label)} of {len(known)} read, {6 - len(known)} unread"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"prompt": "why?", "answer": "x", "label": "bad"}, "label: Input should be"),
        ({"prompt": "why?", "label": "aligned"}, "answer: Field required"),
    ],
)
def test_a_label_that_is_none_is_refused_by_its_line(answered, call, line, words):
    comparison, _ = answered
    (comparison.path.parent / "read.jsonl").write_text(json.dumps(line) + "\n")
    result = call(*comparison.words("-q"))
    assert (result.code, "read.jsonl:1" in result.err, words in result.err) == (2, True, True), result.err


def test_the_time_is_estimated_from_operations_before_the_first_step(tmp_path, trained, call, monkeypatch):
    from safelora_fast.compare import time_estimate

    monkeypatch.setattr(time_estimate, "product_rate", lambda *_: 1e6 / time_estimate.SHARE)
    monkeypatch.setattr(time_estimate, "START", 0.0)
    told = []
    whole = comparing.estimate_time
    monkeypatch.setattr(comparing, "estimate_time", lambda *words: told.append(whole(*words)) or told[-1])
    comparison = write_comparison(tmp_path, seeds=[0], runs={"none": {}})
    measure = comparison.values()["measure"]
    comparison.edit(measure={**measure, "operator_swap": None, "sweep": None})
    result = call(*comparison.words())
    plan = json.loads((comparison.output / "none" / "seed-0" / "adapter" / "safelora_train.json").read_text())["plan"]
    assert told[0].trainings == pytest.approx(plan["steps"] * plan["estimates"]["defended_step_flops"] / 1e6)
    assert told[0].unknown == ()
    first = next(line for line in result.err.splitlines() if line.startswith("about "))
    assert "trainings" in first
    assert result.err.index(first) < result.err.index("training 1 of 1")
    for file in comparison.output.rglob("margin.json"):
        file.unlink()
    before = told[0].measurements
    comparison.edit(seeds=[0, 1])
    call(*comparison.words("-q"))
    assert 0 < told[1].measurements < 2 * before, "what is measured already takes no time"
    assert len(trained) == 2


def test_a_comparison_without_trainings_has_no_estimate(answered, call):
    comparison, _ = answered
    assert "about" not in call(*TinyComparison(comparison.path, comparison.output).words()).err
