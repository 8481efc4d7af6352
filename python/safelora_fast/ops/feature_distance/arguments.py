"""What is compared: the arguments of the operation after they were checked, as every backend takes them.

A backend has two functions:

    forward(comparison) -> (value, factors)
    backward(comparison, factors, gradient) -> one gradient per block, like its features

The value is a scalar of `value_dtype` on the first block's device. The factors, [blocks, batch, tokens, 2] of
`factor_dtype` on that device, are what the gradient of a token is made of: a·(h − h₀) − b·h, times the scalar `gradient`;
(0, 0) where a token does not count, whose gradient is zero whatever it holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

Normalize = Literal["sequence", "token", "none"]


@dataclass(frozen=True)
class Comparison:
    """Hidden states of two models, block by block.

    Attributes:
        features: per block [batch, tokens, hidden].
        references: per block the same shape, without gradient; dtype and device may differ.
        mask: [batch, tokens] bool, on any device.
        normalize: what is scaled to unit length.
        segments: [batch, tokens] integers or None, on any device.
    """

    features: Sequence[torch.Tensor]
    references: Sequence[torch.Tensor]
    mask: torch.Tensor
    normalize: Normalize
    segments: torch.Tensor | None

    def only(self, blocks: Sequence[int]) -> Comparison:
        """The same with these blocks alone."""
        features, references = ([tensors[index] for index in blocks] for tensors in (self.features, self.references))
        return Comparison(features, references, self.mask, self.normalize, self.segments)

    @property
    def device(self) -> torch.device:
        """Where value and factors are."""
        return self.features[0].device

    @property
    def value_dtype(self) -> torch.dtype:
        """float32, or float64 for float64 features."""
        wide = any(block.dtype == torch.float64 for block in self.features)
        return torch.float64 if wide else torch.float32

    @property
    def factor_dtype(self) -> torch.dtype:
        """float64 on the CPU, else as the value."""
        return torch.float64 if self.device.type == "cpu" else self.value_dtype

    def empty_factors(self) -> torch.Tensor:
        """Factors yet to be written."""
        shape = (len(self.features), *self.mask.shape, 2)
        return torch.empty(shape, dtype=self.factor_dtype, device=self.device)
