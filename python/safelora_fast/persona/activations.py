"""Mean block outputs over the tokens of responses, of every block in one pass."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from safelora_fast.models.capture import block_states

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from safelora_fast.models.anatomy import Anatomy


def response_means(
    anatomy: Anatomy,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    batch_size: int,
    padding: int,
    advance: Callable[[int], None],
) -> np.ndarray:
    """Mean output of every block over the tokens of each answer: [answers, blocks, hidden] float32.

    Blocks are counted, and their outputs read, as Steering and the other defences do. Each block's output is reduced as it
    passes; nothing of [rows, tokens, hidden] is kept.

    Args:
        anatomy: the model's parts; in evaluation mode.
        prompts: tokens before each answer.
        answers: tokens of each answer, at least one.
        batch_size: rows at once, of similar length.
        padding: the token to pad with.
        advance: told how many answers are done.

    Raises:
        SettingsError: the blocks give several hidden states for each token.
    """
    anatomy.check_outputs(owner="persona vectors")
    means = np.empty((len(answers), anatomy.depth, anatomy.config.hidden_size), np.float32)
    order = sorted(range(len(answers)), key=lambda index: len(prompts[index]) + len(answers[index]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = _batch_means(anatomy, [prompts[i] for i in chosen], [answers[i] for i in chosen], padding)
        means[chosen] = batch.float().cpu().numpy()
        advance(start + len(chosen))
    return means


def _batch_means(
    anatomy: Anatomy, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], padding: int
) -> torch.Tensor:
    """[rows, blocks, hidden], padded on the right."""
    width = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    ids = torch.full((len(prompts), width), padding)
    mask = torch.zeros_like(ids)
    weights = torch.zeros(ids.shape, dtype=torch.float64)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        length = len(prompt) + len(answer)
        ids[row, :length] = torch.tensor([*prompt, *answer])
        mask[row, :length] = 1
        weights[row, len(prompt) : length] = 1 / len(answer)
    device = anatomy.model.get_input_embeddings().weight.device
    found: dict[int, torch.Tensor] = {}

    def reduce(index: int) -> Callable[[Any, Any, Any], None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            states = block_states(output)
            states = states.to(torch.promote_types(states.dtype, torch.float32))
            found[index] = torch.einsum("rt,rth->rh", weights.to(states), states)

        return hook

    with torch.no_grad(), ExitStack() as stack:
        for index, block in enumerate(anatomy.blocks):
            stack.callback(block.register_forward_hook(reduce(index)).remove)
        anatomy.decoder(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
    return torch.stack([found[index].to(device) for index in range(anatomy.depth)], dim=1)
