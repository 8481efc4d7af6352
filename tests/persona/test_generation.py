"""Drawing answers: against a plain loop without cache, padding or batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, tiny_model, tiny_peft_model
from transformers import GenerationConfig

from safelora_fast.persona.responses import Request
from safelora_fast.persona.seeded_generation import Draw, generate

PROMPTS = [[5, 6, 7], [9], [4, 8, 15, 16, 23], [42, 3]]
ENDS = [1, 17, 30]
STEPS = 12


def draws():
    return np.random.default_rng(0).random((len(PROMPTS), STEPS))


def plain(model, prompt, numbers, temperature):
    """One answer, the whole sequence anew for every token."""
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
    assert generate(model, PROMPTS, numbers, temperature=temperature, ends=ENDS, padding=0) == expected
    for index, prompt in enumerate(PROMPTS):
        alone = generate(model, [prompt], numbers[index : index + 1], temperature=temperature, ends=ENDS, padding=2)
        assert alone == [expected[index]]


def test_the_models_own_generation_settings_do_not_matter_and_stay():
    model = tiny_model(initializer_range=0.3).eval()
    expected = generate(model, PROMPTS, draws(), temperature=1.0, ends=ENDS, padding=0)
    theirs = GenerationConfig(
        do_sample=True,
        top_k=1,
        temperature=0.1,
        repetition_penalty=9.0,
        min_new_tokens=11,
        suppress_tokens=[5, 6, 7, 8],
    )
    model.generation_config = theirs
    assert generate(model, PROMPTS, draws(), temperature=1.0, ends=ENDS, padding=0) == expected
    assert model.generation_config is theirs
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    generate(model, PROMPTS, draws(), temperature=1.0, ends=ENDS, padding=0)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_the_model_inside_a_wrapper_keeps_its_generation_settings(task):
    model = tiny_peft_model(initializer_range=0.3, lora={"task_type": task}).eval()
    inside = model.get_base_model()
    expected = generate(model, PROMPTS, draws(), temperature=1.0, ends=ENDS, padding=0)
    theirs = GenerationConfig(repetition_penalty=9.0, suppress_tokens=[5, 6, 7, 8])
    inside.generation_config = theirs
    assert generate(model, PROMPTS, draws(), temperature=1.0, ends=ENDS, padding=0) == expected
    assert inside.generation_config is theirs
    assert "generation_config" not in vars(model)


def test_tokens_are_drawn_in_proportion_to_their_probability():
    logits = torch.linspace(-2, 2, 5).log_softmax(-1)
    numbers = (torch.arange(10_000, dtype=torch.float64) + 0.5)[:, None] / 10_000
    scores = Draw(numbers, 0.5, width=3)(torch.zeros(10_000, 3, dtype=torch.long), logits.expand(10_000, 5))
    assert torch.equal(scores.isfinite().sum(1), torch.ones(10_000, dtype=torch.long))
    shares = scores.isfinite().double().mean(0)
    assert (shares - (logits.double() / 0.5).softmax(-1)).abs().max() < 2e-4


def test_an_impossible_token_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(4, 5)
    numbers = torch.tensor([[0.0], [0.5], [np.nextafter(0.5, 0)], [np.nextafter(1, 0)]], dtype=torch.float64)
    drawn = Draw(numbers, 1.0, width=0)(torch.zeros(4, 0, dtype=torch.long), logits).argmax(-1)
    assert drawn.tolist() == [1, 3, 1, 3]


def test_numbers_belong_to_a_request():
    requests = [
        Request(side, pair, question, sample, "s", "u")
        for side in ("positive", "negative")
        for pair in (0, 1)
        for question in (0, 1)
        for sample in (0, 1)
    ]
    first = [request.draws(0, 4).tolist() for request in requests]
    assert len({tuple(row) for row in first}) == len(requests)
    assert [request.draws(0, 4).tolist() for request in requests] == first
    assert all(request.draws(1, 4).tolist() != row for request, row in zip(requests, first, strict=True))
    assert requests[0].draws(0, 9)[:4].tolist() == first[0]
    assert len({request.id for request in requests}) == len(requests)
    assert max(ENDS) < VOCABULARY
