"""Answers of a model, drawn with numbers that belong to each request: batches decide nothing but speed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from safelora_fast.models.generate import generation_settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from transformers import PreTrainedModel


class Draw(LogitsProcessor):  # type: ignore[misc]
    """Leaves one token in each row: the one where the cumulated probabilities pass the row's next number.

    Args:
        numbers: uniform in [0, 1), [rows, tokens to draw].
        temperature: divides the logits; above 0.
        width: tokens of the prompts, padding included.
    """

    def __init__(self, numbers: torch.Tensor, temperature: float, width: int) -> None:
        self._numbers = numbers
        self._temperature = temperature
        self._width = width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [rows, vocabulary] that are 0 at the drawn token and -inf elsewhere."""
        step = input_ids.shape[1] - self._width
        cumulated = (scores.float() / self._temperature).softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
        height = self._numbers[:, step : step + 1].to(cumulated) * cumulated[:, -1:]
        drawn = torch.searchsorted(cumulated, height, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    draws: np.ndarray,
    *,
    temperature: float,
    ends: Sequence[int],
    padding: int,
) -> list[tuple[int, ...]]:
    """Answers to prompts of any length; what the model's own generation settings say does not matter.

    Args:
        model: a causal language model in evaluation mode.
        prompts: token ids.
        draws: uniform numbers [prompts, most new tokens].
        temperature: 0 takes the likeliest token.
        ends: tokens that end an answer.
        padding: the token to pad with.

    Returns:
        The tokens of each answer, without the one that ends it.
    """
    device = model.get_input_embeddings().weight.device
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), padding)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    processors = LogitsProcessorList()
    if temperature > 0:
        processors.append(Draw(torch.from_numpy(draws).to(device), temperature, width))
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=draws.shape[1], eos_token_id=list(ends), pad_token_id=padding, use_cache=True
    )
    with torch.no_grad(), generation_settings(model, settings):
        output: Any = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=settings,
            logits_processor=processors,
        )
    return [_until_end(row, set(ends)) for row in output[:, width:].tolist()]


def _until_end(tokens: list[int], ends: set[int]) -> tuple[int, ...]:
    first = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    return tuple(tokens[:first])
