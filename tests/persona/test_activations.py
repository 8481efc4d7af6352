"""Mean activations of responses, compared with a float64 model that runs one unpadded sequence at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from personas import plain_means, plain_states
from tiny_models import VOCABULARY, tiny_model

from safelora_fast.errors import SettingsError
from safelora_fast.models.anatomy import dissect
from safelora_fast.persona.activations import response_means


def rows(seed=5):
    generator = torch.Generator().manual_seed(seed)

    def some(length):
        return torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()

    return [some(length) for length in (3, 7, 2, 5, 4)], [some(length) for length in (6, 1, 9, 3, 2)]


def measured(model, batch_size=3, padding=0):
    prompts, answers = rows()
    done = []
    means = response_means(
        dissect(model), prompts, answers, batch_size=batch_size, padding=padding, advance=done.append
    )
    assert done[-1] == len(answers)
    return means


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_they_are_the_plain_ones(dtype):
    truth = np.stack([plain_means(tiny_model().double(), *row).numpy() for row in zip(*rows(), strict=True)])
    model = tiny_model().to(dtype)
    means = measured(model)
    assert (means.shape, means.dtype) == ((5, 3, 32), np.float32)
    bound = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert np.linalg.norm(means - truth) <= bound * np.linalg.norm(truth)
    assert not any(block._forward_hooks for block in model.modules())


def test_blocks_that_give_several_states_for_each_token():
    model = tiny_model()
    model.config.altup_num_inputs = 4  # as in Gemma 3n
    with pytest.raises(SettingsError, match="persona vectors: the layers of LlamaForCausalLM give 4 hidden states"):
        response_means(dissect(model), [[3]], [[5]], batch_size=1, padding=0, advance=lambda _: None)


def test_padding_and_batches_do_not_matter():
    means = measured(tiny_model())
    for batch_size, padding in ((1, 0), (2, 5), (5, VOCABULARY - 1)):
        assert np.abs(measured(tiny_model(), batch_size, padding) - means).max() < 1e-6


def test_the_last_block_is_read_before_the_final_norm_as_steering_writes_it():
    model = tiny_model().double()
    with torch.no_grad():
        model.model.norm.weight.mul_(100)
    prompts, answers = rows()
    states = plain_states(model, [*prompts[0], *answers[0]])
    assert len(states) == 3
    expected = states[2][len(prompts[0]) :].mean(0).numpy()
    assert np.allclose(measured(model)[0, 2], expected, rtol=1e-5, atol=1e-6)
