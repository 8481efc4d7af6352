"""Key-value cache for the prefix that all sequences of a batch share, so that it runs through the model once."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from safelora_fast.data.tokens import IGNORED_LABEL
from safelora_fast.models.anatomy import adapter_configs
from safelora_fast.models.reference_pass import CACHES

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn

    from safelora_fast.scoring.sequences import Labelled

# A cache is used if it saves at least this share of the batch's tokens: it costs another model call and a mask.
WORTH = 1 / 16


class Pasts:
    """Keys and values of a batch's common prefix; the last ones are kept in case the next batch starts with it.

    Args:
        model: the model, whose weights and active adapters must not change.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._prefix: list[int] = []
        self._name = ""
        self._past: Any = None

    def shared(self, examples: Sequence[Labelled]) -> int:
        """Return the length of the common prefix to take from the cache; 0 if that saves too little."""
        common, kept = shared_prefix(examples), len(self._prefix)
        tokens = len(examples) * max(len(example.ids) for example in examples)
        alike = kept <= common <= 2 * kept and examples[0].ids[:kept] == self._prefix
        if alike and _worth(kept * len(examples), tokens):
            return kept
        return common if _worth(common * (len(examples) - 1), tokens) else 0

    def pass_over(self, prefix: list[int]) -> None:
        """Set the state that :meth:`of` would leave, without running the model; the cache is computed when needed."""
        if prefix != self._prefix:
            self._prefix, self._past = prefix, None

    def of(self, prefix: torch.Tensor, rows: int, **options: Any) -> dict[str, Any]:
        """Return the model's cache argument for a prefix [1, tokens], repeated for `rows` sequences.

        The options are passed to the model and must not change its keys and values. A model without a cache may raise
        any exception.
        """
        ids = prefix[0].tolist()
        if ids != self._prefix or self._past is None:
            output = self._model(input_ids=prefix, use_cache=True, **options)
            self._name = next(name for name in reversed(CACHES) if getattr(output, name, None) is not None)
            self._past, self._prefix = getattr(output, self._name), ids
        past = copy.deepcopy(self._past)
        past.batch_repeat_interleave(rows)
        return {self._name: past}


def shared_prefix(examples: Sequence[Labelled]) -> int:
    """Return the length of the prefix that all examples share, excluding tokens that predict a completion."""
    sequences = [example.ids for example in examples]
    lowest, highest = min(sequences), max(sequences)  # in lexicographic order: the prefix of these two is common to all
    length = next((place for place, (a, b) in enumerate(zip(lowest, highest, strict=False)) if a != b), len(lowest))
    for example in examples:
        first = next(place for place, label in enumerate(example.labels) if place and label != IGNORED_LABEL)
        length = min(length, first - 1)
    return length


def reads_whole_inputs(model: nn.Module) -> bool:
    """Return whether an adapter needs the whole sequence in one call: learned prompts and aLoRA do.

    PEFT prepends a learned prompt to every input, even after cached tokens, and finds aLoRA's invocation tokens only in
    the input.
    """
    names = ("is_prompt_learning", "alora_invocation_tokens")
    return any(getattr(config, name, None) for config in adapter_configs(model).values() for name in names)


def _worth(saved: int, tokens: int) -> bool:
    return saved > 0 and saved >= WORTH * tokens
