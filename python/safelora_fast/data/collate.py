"""A wrapper for any data collator that tags the tokens of safe examples in a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from safelora_fast.data.interleave import SAFE
from safelora_fast.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@dataclass
class TaggedCollator:
    """A collator that wraps another one and adds `safe` [batch, tokens], bool, if examples are tagged.

    A tag is one bool per example, or one per token for packed examples.

    Attributes:
        inner: the collator that pads examples or joins them into one.
    """

    inner: Callable[[list[Any]], Any]

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Any:
        """Return the batch, with tags if any example has one.

        Raises:
            DataError: the batch has more or fewer tokens than the examples, so tags cannot be assigned.
        """
        plain = [{name: value for name, value in example.items() if name != SAFE} for example in examples]
        batch = self.inner(plain)
        if any(SAFE in example for example in examples):
            batch[SAFE] = _tags(examples, batch)
        return batch


def _tags(examples: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]) -> torch.Tensor:
    shape = batch["input_ids"].shape
    tags = [torch.as_tensor(example.get(SAFE, False)) for example in examples]
    if len(tags) == shape[0] and not any(tag.dim() for tag in tags):
        return torch.stack(tags).to(torch.bool)[:, None].expand(shape)
    tokens = torch.cat([tag.expand(len(example["input_ids"])) for tag, example in zip(tags, examples, strict=True)]).to(
        torch.bool
    )
    attention = batch.get("attention_mask")
    places = torch.zeros(shape, dtype=torch.bool)
    if attention is None:  # examples joined into one sequence, padding last
        places.view(-1)[: len(tokens)] = True
    else:
        places |= attention != 0
    if int(places.sum()) != len(tokens):
        raise DataError(
            f"the collator made {int(places.sum())} tokens of {len(tokens)}: tags of tokens have no place in them"
        )
    return torch.zeros(shape, dtype=torch.bool).masked_scatter_(places, tokens)
