"""Answers of a model on this machine: the likeliest tokens, samples that only their seeds decide, and their distribution."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from demo_model import save_tiny, tokenizer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from safelora_fast.errors import DataError, EvaluationError, SettingsError
from safelora_fast.models.generate import SeededSampling, generate
from safelora_fast.models.load import SubjectSettings, load_subject

TURNS = [[{"role": "user", "content": text}] for text in ("why?", "a much longer question than the first", "no", "so")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path_factory.mktemp("generation") / "model"))


def answers(model, **settings):
    found = {}
    for batch in generate(model, tokenizer(), TURNS, max_tokens=8, **settings):
        found.update(batch)
    return [found[number] for number in range(len(TURNS))]


def test_the_likeliest_tokens(model):
    words, expected = tokenizer(), []
    for (turn,) in TURNS:
        ids = words(f"<user>{turn['content']}<assistant>")["input_ids"]
        start = len(ids)
        while len(ids) < start + 8:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == words.eos_token_id:
                break
        expected.append(words.decode(ids[start:], skip_special_tokens=True))
    for batch_size in (1, 4):
        assert answers(model, temperature=0, batch_size=batch_size) == expected


def test_seeds_decide_and_batches_do_not(model):
    alone = answers(model, seeds=[5, 6, 7, 8], batch_size=1)
    assert answers(model, seeds=[5, 6, 7, 8], batch_size=4) == alone
    assert answers(model, seeds=[5, 6, 7, 9], batch_size=3)[:3] == alone[:3]
    assert answers(model, seeds=[1, 2, 3, 4]) != alone


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_have_the_distribution_of_the_logits(temperature):
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    expected = (logits / temperature).softmax(dim=0)
    sampling = SeededSampling(range(4000), temperature, torch.device("cpu"))
    scores = sampling(torch.zeros(4000, 1, dtype=torch.long), logits.expand(4000, 4))
    counts = torch.bincount(scores.argmax(dim=1), minlength=4) / 4000
    assert torch.allclose(counts, expected, atol=4 * 0.5 / 4000**0.5)
    assert logits.tolist() == [0.0, 1.0, 2.0, -1.0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_whose_logits_are_nan_is_refused(model, temperature):
    """Its likeliest token is token 0, which would be an answer like any other."""
    odd = copy.deepcopy(model)
    with torch.no_grad():
        odd.model.norm.weight.fill_(math.nan)
    with pytest.raises(EvaluationError, match="logits are NaN"):
        answers(odd, temperature=temperature)


def test_what_is_refused(model):
    words = tokenizer()
    words.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        list(generate(model, words, TURNS, max_tokens=2))
    with pytest.raises(SettingsError, match="at least 1"):
        list(generate(model, tokenizer(), TURNS, max_tokens=0))


def test_a_padding_token_that_only_the_adapters_tokenizer_has(tmp_path):
    """Added for training on padded rows, and never saved with the embeddings, since nothing looks at it."""
    folder = save_tiny(tmp_path / "model")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    words = tokenizer()
    words.add_special_tokens({"pad_token": "<padding>"})
    assert words.pad_token_id >= len(tokenizer())
    words.save_pretrained(tmp_path / "adapter")
    subject = load_subject(SubjectSettings(str(folder), device="cpu"), tmp_path / "adapter")
    found = {}
    for batch in generate(subject.model, subject.tokenizer, TURNS, max_tokens=8, temperature=0, batch_size=4):
        found.update(batch)
    plain = AutoModelForCausalLM.from_pretrained(folder)  # what the new adapter leaves as it is
    assert [found[number] for number in range(len(TURNS))] == answers(plain, temperature=0)
