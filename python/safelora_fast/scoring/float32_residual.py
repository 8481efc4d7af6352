"""Hidden states in float32 between products of 16 bits: what is added from block to block is not rounded each time."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

NARROW = {torch.bfloat16, torch.float16}


@contextmanager
def wide_hidden_states(model: PreTrainedModel) -> Iterator[None]:
    """Start from embeddings in float32, and let autocast round the inputs of products; a model in float32 stays as it is."""
    embeddings = model.get_input_embeddings()
    weight = embeddings.weight
    if weight.dtype not in NARROW:
        yield
        return
    handle = embeddings.register_forward_hook(lambda _module, _inputs, output: output.float())
    try:
        with torch.autocast(weight.device.type, dtype=weight.dtype):
            yield
    finally:
        handle.remove()
