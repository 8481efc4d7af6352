"""Completions of a local model: the most likely tokens, reproducible samples, and their distribution."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from demo_model import save_tiny, tokenizer
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model, tiny_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig

from safelora_fast.errors import DataError, EvaluationError, SettingsError
from safelora_fast.models.generate import SeededSampling, generate, generate_tokens
from safelora_fast.models.load import load_subject
from safelora_fast.models.model_settings import SubjectSettings

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


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_whose_logits_are_nan_is_refused(model, temperature):
    """Its most likely token is token 0, which would look like an ordinary completion."""
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
    """It was added to pad training batches and not saved with the embeddings, because no computation uses it."""
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
    plain = AutoModelForCausalLM.from_pretrained(folder)  # the model that the new adapter does not change
    assert [found[number] for number in range(len(TURNS))] == answers(plain, temperature=0)


PROMPTS = [[5, 6, 7], [9], [4, 8, 15, 16, 23], [42, 3]]
ENDS = [1, 17, 30]
STEPS = 12


def draws():
    return np.random.default_rng(0).random((len(PROMPTS), STEPS))


def plain(model, prompt, numbers, temperature):
    """Generate one completion, running the whole sequence again for every token."""
    ids = list(prompt)
    for number in numbers:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            chances = (logits / temperature).softmax(-1).numpy()
            token = int(np.flatnonzero(chances.cumsum() > number * chances.sum())[0])
        if token in ENDS:
            break
        ids.append(token)
    return tuple(ids[len(prompt) :])


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
def test_answers_are_those_of_a_plain_loop(temperature):
    model = tiny_model(initializer_range=0.3).eval()
    numbers = draws()
    expected = [plain(model, prompt, row, temperature) for prompt, row in zip(PROMPTS, numbers, strict=True)]
    assert len({len(answer) for answer in expected}) > 1
    assert generate_tokens(model, PROMPTS, numbers, temperature=temperature, ends=ENDS, padding=0) == expected
    for index, prompt in enumerate(PROMPTS):
        alone = generate_tokens(
            model, [prompt], numbers[index : index + 1], temperature=temperature, ends=ENDS, padding=2
        )
        assert alone == [expected[index]]


def test_the_models_own_generation_settings_do_not_matter_and_stay():
    model = tiny_model(initializer_range=0.3).eval()
    expected = generate_tokens(model, PROMPTS, draws(), temperature=1.0, ends=ENDS, padding=0)
    theirs = GenerationConfig(
        do_sample=True,
        top_k=1,
        temperature=0.1,
        repetition_penalty=9.0,
        min_new_tokens=11,
        suppress_tokens=[5, 6, 7, 8],
    )
    model.generation_config = theirs
    assert generate_tokens(model, PROMPTS, draws(), temperature=1.0, ends=ENDS, padding=0) == expected
    assert model.generation_config is theirs
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    generate_tokens(model, PROMPTS, draws(), temperature=1.0, ends=ENDS, padding=0)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_the_model_inside_a_wrapper_keeps_its_generation_settings(task):
    model = tiny_peft_model(initializer_range=0.3, lora={"task_type": task}).eval()
    inside = model.get_base_model()
    expected = generate_tokens(model, PROMPTS, draws(), temperature=1.0, ends=ENDS, padding=0)
    theirs = GenerationConfig(repetition_penalty=9.0, suppress_tokens=[5, 6, 7, 8])
    inside.generation_config = theirs
    assert generate_tokens(model, PROMPTS, draws(), temperature=1.0, ends=ENDS, padding=0) == expected
    assert inside.generation_config is theirs
    assert "generation_config" not in vars(model)


def test_tokens_are_drawn_in_proportion_to_their_probability():
    logits = torch.linspace(-2, 2, 5).log_softmax(-1)
    numbers = (torch.arange(10_000, dtype=torch.float64) + 0.5)[:, None] / 10_000
    scores = SeededSampling(numbers, 0.5, width=3)(torch.zeros(10_000, 3, dtype=torch.long), logits.expand(10_000, 5))
    assert torch.equal(scores.isfinite().sum(1), torch.ones(10_000, dtype=torch.long))
    shares = scores.isfinite().double().mean(0)
    assert (shares - (logits.double() / 0.5).softmax(-1)).abs().max() < 2e-4


@pytest.mark.parametrize("top_p", [0.3, 0.6, 0.9, 0.999])
def test_only_the_nucleus_is_drawn(top_p):
    """The fewest most likely tokens whose probabilities sum to top_p, in proportion to them."""
    logits = torch.tensor([[0.3, 2.0, -1.0, 1.2, 2.0]])
    likely = logits.double().softmax(-1)[0]
    order, kept = likely.argsort(descending=True, stable=True), torch.zeros(5, dtype=torch.float64)
    for token in order.tolist():
        if kept.sum() < top_p:
            kept[token] = likely[token]
    numbers = ((torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000)[:, None]
    sampling = SeededSampling(numbers, 1.0, width=0, top_p=top_p)
    shares = sampling(torch.zeros(10_000, 0, dtype=torch.long), logits.expand(10_000, 5)).isfinite().double().mean(0)
    assert (shares - kept / kept.sum()).abs().max() < 2e-4


def test_an_impossible_token_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(4, 5)
    numbers = torch.tensor([[0.0], [0.5], [np.nextafter(0.5, 0)], [np.nextafter(1, 0)]], dtype=torch.float64)
    drawn = SeededSampling(numbers, 1.0, width=0)(torch.zeros(4, 0, dtype=torch.long), logits).argmax(-1)
    assert drawn.tolist() == [1, 3, 1, 3]
