"""Answers that are kept belong to the bytes and settings that they were made with; any others are refused."""

from __future__ import annotations

import json

import pytest
import torch
from demo_model import save_tiny
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from safelora_fast.errors import OutputError
from safelora_fast.judging.evaluate import Sampling, collect_answers
from safelora_fast.judging.evaluation_folder import EvaluationFolder
from safelora_fast.judging.questions import Question
from safelora_fast.models.load import SubjectSettings

QUESTIONS = [Question("one", "general", ("Hello",))]


class Case:
    """A tiny model with an adapter and a template, and a folder of what it answers."""

    def __init__(self, path):
        self.path = path
        self.model = save_tiny(path / "model")
        torch.manual_seed(0)
        config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(self.model), config).save_pretrained(path / "adapter")
        (path / "t.jinja").write_text((path / "model" / "chat_template.jinja").read_text())

    def collect(self, output, adapter="adapter", template="t.jinja", **settings):
        subject = SubjectSettings(str(self.model), device="cpu", chat_template=str(self.path / template))
        found = collect_answers(
            EvaluationFolder(self.path / output), subject, self.path / adapter, QUESTIONS, Sampling(2, 8), **settings
        )
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
        with pytest.raises(OutputError, match=rf"holds an evaluation of other settings \({setting}\)") as raised:
            case.collect("out")
        assert "--overwrite" in str(raised.value)
        case.rewrite(name, new, old)
    assert case.collect("out") == first
    case.rewrite(*CHANGES["adapter_sha256"])
    assert case.collect("out", overwrite=True) == case.collect("anew") != first


def test_the_same_bytes_may_lie_elsewhere(case, tmp_path):
    first = case.collect("out")
    for old, new in (("adapter", "moved"), ("t.jinja", "u.jinja")):
        (tmp_path / old).rename(tmp_path / new)
    assert case.collect("out", adapter="moved", template="u.jinja") == first


def test_answers_of_an_older_version_are_refused(case, tmp_path):
    case.collect("out")
    file = tmp_path / "out" / "evaluation.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "format": 1, "adapter_sha256": "of the weights alone"}))
    with pytest.raises(OutputError, match="of an older version, which did not note all that results depend on"):
        case.collect("out")
