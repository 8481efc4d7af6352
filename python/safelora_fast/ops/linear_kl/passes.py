"""What every backend of the loss is asked for and gives: the elementwise passes over a block of rows of logits.

A backend has a class `Passes(head, settings, rows, exact)` with `rows`, the most rows that it takes at once, and

    block(raw, delta, wanted) -> Given

for h₀·Wᵀ and (h − h₀)·Wᵀ of some rows in the dtype of the head; `delta` becomes the gradient with respect to what it was, and
`raw` may be written over. The products with W are no backend's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Settings:
    """The divergence: KL(q‖p) (`forward`) or KL(p‖q), of logits over the temperature; cross-entropy has none."""

    forward: bool
    temperature: float


@dataclass(frozen=True)
class Wanted:
    """What a block of rows is asked for.

    Attributes:
        divergence_factor: [rows, 1], factor of the divergence in the gradient.
        labels: [rows], the class of each row; None without cross-entropy.
        label_factor: [rows, 1], factor of the cross-entropy in the gradient, zero where a row has no label.
        figures: whether the student's entropy and hits are asked for.
    """

    divergence_factor: torch.Tensor
    labels: torch.Tensor | None = None
    label_factor: torch.Tensor | None = None
    figures: bool = False

    def times(self, scale: float) -> Wanted:
        """The same with the factors multiplied."""
        if scale == 1.0:
            return self
        of_label = None if self.label_factor is None else self.label_factor * scale
        return Wanted(self.divergence_factor * scale, self.labels, of_label, self.figures)


@dataclass(frozen=True)
class Given:
    """Figures of a block, [rows] each.

    Attributes:
        divergence: the KL divergence.
        nll: the label's negative log-likelihood under the student.
        entropy: the student's entropy.
        is_top1: whether the student's first choice is the label.
    """

    divergence: torch.Tensor
    nll: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
