"""Stored answers: they belong to the files and settings that produced them, and a killed run resumes exactly."""

from __future__ import annotations

import json
import random

import pytest
import torch
from demo_model import save_tiny
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from safelora_fast.errors import OutputError
from safelora_fast.judging.evaluate import Sampling, collect_answers
from safelora_fast.judging.evaluation_folder import EvaluationFolder
from safelora_fast.judging.questions import Question
from safelora_fast.models import load
from safelora_fast.models.load import load_subject
from safelora_fast.models.model_settings import SubjectSettings


class Case:
    """A tiny model with an adapter and a template, whose answers can be collected."""

    def __init__(self, path):
        self.path = path
        self.model = save_tiny(path / "model")
        torch.manual_seed(0)
        config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(self.model), config).save_pretrained(path / "adapter")
        (path / "t.jinja").write_text((path / "model" / "chat_template.jinja").read_text())

    def collect(self, output, adapter="adapter", template="t.jinja", **settings):
        subject = SubjectSettings(str(self.model), device="cpu", chat_template=str(self.path / template))
        folder, questions = EvaluationFolder(self.path / output), [Question("one", "general", ("Hello",))]
        found = collect_answers(folder, subject, self.path / adapter, questions, Sampling(2, 8), **settings)
        return [answer.text for answer in found]

    def rewrite(self, name, old, new):
        file = self.path / name
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))


@pytest.fixture
def case(tmp_path):
    return Case(tmp_path)


CHANGES = {
    "adapter_sha256": ("adapter/adapter_config.json", '"lora_alpha": 8', '"lora_alpha": 800'),
    "chat_template_sha256": ("t.jinja", "<", "["),
    "model_sha256": ("model/config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-02'),
}


def test_answers_of_other_bytes_under_the_same_names_are_refused(case):
    first = case.collect("out")
    for setting, (name, old, new) in CHANGES.items():
        case.rewrite(name, old, new)
        with pytest.raises(OutputError, match=rf"out: settings have changed: {setting} was .*--overwrite"):
            case.collect("out")
        case.rewrite(name, new, old)
    assert case.collect("out") == first
    case.rewrite(*CHANGES["adapter_sha256"])
    assert case.collect("out", overwrite=True) == case.collect("anew") != first


def test_the_same_bytes_may_lie_elsewhere(case, tmp_path):
    first = case.collect("out")
    for old, new in (("adapter", "moved"), ("t.jinja", "u.jinja")):
        (tmp_path / old).rename(tmp_path / new)
    assert case.collect("out", adapter="moved", template="u.jinja") == first


def test_answers_of_an_older_format_are_refused(case, tmp_path):
    case.collect("out")
    file = tmp_path / "out" / "evaluation.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 1, "adapter_sha256": "of the weights alone"}))
    with pytest.raises(OutputError, match=r"written by another version of safelora-fast \(format 1, now 2\)"):
        case.collect("out")


def test_a_killed_run_goes_on_with_the_batches_and_bytes_of_an_unbroken_one(tmp_path, monkeypatch):
    settings = SubjectSettings(str(save_tiny(tmp_path / "model")), "float32", "cpu")
    subject, batches = load_subject(settings), []
    real = subject.model.generate

    def generate(**arguments):
        batches.append(arguments["input_ids"].tolist())
        return real(**arguments)

    monkeypatch.setattr(subject.model, "generate", generate)
    monkeypatch.setattr(load, "load_subject", lambda *_: subject)
    questions = [Question(f"q{n}", "general", ("why" + "?" * n, "how" + "!" * (3 * n))) for n in range(3)]

    def answer(folder):
        batches.clear()
        collect_answers(folder, settings, None, questions, Sampling(samples=2, max_tokens=5, batch_size=3))
        return folder.answers.read_bytes(), list(batches)

    whole, unbroken = answer(EvaluationFolder(tmp_path / "whole"))
    assert (len(unbroken), whole.count(b"\n")) == (4, 12)
    folder = EvaluationFolder(tmp_path / "killed")
    answer(folder)
    for cut in [0, *random.Random(1).sample(range(len(whole)), 8), len(whole) - 1, len(whole)]:
        folder.answers.write_bytes(whole[:cut])
        again, asked = answer(folder)
        assert again == whole, f"killed after {cut} bytes"
        assert asked == unbroken[whole[:cut].count(b"\n") // 3 :], f"killed after {cut} bytes"
