"""Mean outputs of layers over chosen tokens of each sequence in a batch."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from safelora_fast.models.capture import layer_states

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from safelora_fast.models.anatomy import Anatomy


def token_means(
    anatomy: Anatomy,
    sequences: Sequence[Sequence[int]],
    places: Sequence[Sequence[int]],
    layers: Sequence[int],
    padding: int,
) -> torch.Tensor:
    """Return the mean output of some layers over the tokens at some places of each sequence: [sequences, layers, hidden].

    The sequences run as one batch. Means are float32, or float64 for a float64 model.

    Args:
        anatomy: the model's parts; the model is in evaluation mode.
        sequences: tokens.
        places: positions of the tokens to average, at least one for each sequence.
        layers: indices of layers.
        padding: the padding token.
    """
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), padding)  # [B, T], padded on the right
    mask = torch.zeros_like(ids)
    weights = torch.zeros(ids.shape, dtype=torch.float64)
    for row, (tokens, chosen) in enumerate(zip(sequences, places, strict=True)):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        weights[row, list(chosen)] = 1 / len(chosen)
    device = anatomy.model.get_input_embeddings().weight.device
    found: dict[int, torch.Tensor] = {}  # by layer: [B, H]

    def averaging(layer: int) -> Callable[[Any, Any, Any], None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            states = layer_states(output)
            states = states.to(torch.promote_types(states.dtype, torch.float32))
            found[layer] = torch.einsum("bt,bth->bh", weights.to(states), states)

        return hook

    with torch.no_grad(), ExitStack() as stack:
        for layer in layers:
            stack.callback(anatomy.layers[layer].register_forward_hook(averaging(layer)).remove)
        anatomy.decoder(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
    return torch.stack([found[layer].to(device) for layer in layers], dim=1)
