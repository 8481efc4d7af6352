"""Digests of loaded models and tokenizers change if and only if the computed result can change."""

from __future__ import annotations

import datetime

import pytest
import torch
from demo_model import save_tiny, tokenizer
from peft import LoraConfig, get_peft_model
from tiny_models import fill_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer

from safelora_fast.errors import DataError
from safelora_fast.models import digests
from safelora_fast.models.digests import template_digest, tokenizer_digest, weights_digest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("digests") / "tiny")


@pytest.fixture
def adapted(folder):
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    model = get_peft_model(base, LoraConfig(**settings), adapter_name="A")
    model.add_adapter("B", LoraConfig(**settings))
    for seed, name in enumerate("AB"):
        fill_adapter(model, seed=seed, adapter=name, scale=0.3)
    return model


def edit_one_weight(model):
    # a digest of 64 evenly spaced values per tensor, as in an early version, would miss this one
    with torch.no_grad():
        model.get_base_model().model.layers[1].mlp.up_proj.weight[5, 3] += 1e-3


def rescale(model):
    model.get_base_model().model.layers[0].self_attn.q_proj.scaling["A"] *= 2


CHANGES = {
    "another adapter": lambda model: model.set_adapter("B"),
    "both adapters": lambda model: model.base_model.set_adapter(["A", "B"]),
    "switched off": lambda model: model.base_model.disable_adapter_layers(),
    "merged": lambda model: model.merge_adapter(["A"]),
    "one weight": edit_one_weight,
    "scaling": rescale,
    "configuration": lambda model: setattr(model.config, "rms_norm_eps", 0.5),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_models_state_is_in_its_digest(adapted, change):
    before = weights_digest(adapted.get_base_model())
    assert weights_digest(adapted.get_base_model()) == before
    change(adapted)
    assert weights_digest(adapted.get_base_model()) != before


def test_going_back_gives_the_digest_back(adapted):
    before = weights_digest(adapted.get_base_model())
    with adapted.disable_adapter():
        assert weights_digest(adapted.get_base_model()) != before
    adapted.set_adapter("B")
    adapted.set_adapter("A")
    assert weights_digest(adapted.get_base_model()) == before


def test_a_half_precision_model_and_chunks(folder, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    whole = weights_digest(model)
    monkeypatch.setattr(digests, "VALUES", 100)
    assert weights_digest(model) == whole


def test_a_tokenizers_digest(folder):
    words = tokenizer()
    before = tokenizer_digest(words)
    words(["a", "bcd"], padding=True, truncation=True, max_length=2)  # the backend stores these settings
    words.chat_template = None
    assert tokenizer_digest(words) == tokenizer_digest(AutoTokenizer.from_pretrained(folder)) == before
    words.eos_token = "<user>"
    ended_otherwise = tokenizer_digest(words)
    words.add_tokens(["<new>"])
    assert len({before, ended_otherwise, tokenizer_digest(words)}) == 3


def test_a_templates_digest_knows_the_day_where_the_template_does(monkeypatch):
    words = tokenizer()
    plain, words.chat_template = template_digest(words), "{{ strftime_now('%Y-%m-%d') }}" + words.chat_template
    dated = template_digest(words)
    assert plain != dated == template_digest(words)

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return super().now(tz) + datetime.timedelta(days=1)

    monkeypatch.setattr(datetime, "datetime", Tomorrow)
    assert template_digest(words) != dated
    assert template_digest(tokenizer()) == plain
    words.chat_template = None
    assert template_digest(words) is None


@pytest.mark.parametrize(
    "template", ["", "{{ raise_exception('no') }}", "{{ strftime_now('%Y') }}{{ raise_exception('no') }}"]
)
def test_a_template_that_cannot_be_used_has_a_digest(template):
    """Plain text needs no template."""
    words = tokenizer()
    plain, words.chat_template = template_digest(words), template
    assert template_digest(words) not in {plain, None}


def test_a_template_that_is_refused_outright_has_a_digest(monkeypatch):
    def refuse(_):
        raise DataError("no")

    words = tokenizer()
    words.chat_template = "{{ strftime_now('%Y') }}"
    monkeypatch.setattr(digests, "chat_of", refuse)
    assert template_digest(words) is not None
