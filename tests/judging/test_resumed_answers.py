"""Answers of a run that was killed: the same batches go through the model, and the same bytes come out."""

from __future__ import annotations

import random

import pytest
from demo_model import save_tiny

from safelora_fast.judging.evaluate import Sampling, collect_answers
from safelora_fast.judging.evaluation_folder import EvaluationFolder
from safelora_fast.judging.questions import Question
from safelora_fast.models import load
from safelora_fast.models.load import SubjectSettings, load_subject

QUESTIONS = [
    Question(f"q{number}", "general", ("why" + "?" * number, "how" + "!" * (3 * number))) for number in range(3)
]
SAMPLING = Sampling(samples=2, max_tokens=5, batch_size=3)


@pytest.fixture
def answer(tmp_path, monkeypatch):
    """Answers into a folder; returns the file's bytes and the batches that the model was given."""
    settings = SubjectSettings(str(save_tiny(tmp_path / "model")), "float32", "cpu")
    subject, batches = load_subject(settings), []
    real = subject.model.generate

    def generate(**arguments):
        batches.append(arguments["input_ids"].tolist())
        return real(**arguments)

    monkeypatch.setattr(subject.model, "generate", generate)
    monkeypatch.setattr(load, "load_subject", lambda *_: subject)

    def run(folder):
        batches.clear()
        collect_answers(folder, settings, None, QUESTIONS, SAMPLING)
        return folder.answers.read_bytes(), list(batches)

    return run


def test_batches_are_those_of_an_unbroken_run(answer, tmp_path):
    whole, batches = answer(EvaluationFolder(tmp_path / "whole"))
    assert len(batches) == 4
    lines = whole.splitlines(keepends=True)
    folder = EvaluationFolder(tmp_path / "killed")
    answer(folder)
    for cut in [0, *random.Random(1).sample(range(len(whole)), 12), len(whole) - 1, len(whole)]:
        folder.answers.write_bytes(whole[:cut])
        again, asked = answer(folder)
        done = whole[:cut].count(b"\n")
        assert again == whole, f"killed after {cut} bytes"
        assert asked == batches[done // 3 :], f"killed after {cut} bytes"
    assert len(lines) == 12
