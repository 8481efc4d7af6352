"""Which tokens the loss computes: those that count, picked out, or all of them where the host must not ask which these are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from safelora_fast.ops.linear_kl.passes import Settings, Wanted

IGNORED_LABEL = -100


@dataclass(frozen=True)
class Rows:
    """The tokens that are computed, in the order of their flat positions.

    Attributes:
        positions: of the tokens that count; None: every token is computed, those that do not count from zeros.
        counts: [tokens] bool, which tokens count.
        in_mask: whether the divergence counts, of each token that is computed.
        labels: likewise its label; None without cross-entropy.
        settings: of the divergence.
        figures: whether figures of each token are wanted.
    """

    positions: torch.Tensor | None
    counts: torch.Tensor
    in_mask: torch.Tensor
    labels: torch.Tensor | None
    settings: Settings
    figures: bool

    @classmethod
    def of(cls, mask: torch.Tensor, labels: torch.Tensor | None, settings: Settings, *, figures: bool = False) -> Rows:
        """The tokens in a flat mask or with a label.

        How many these are decides the size of the products with the head, so the host waits for the number: on a GPU that costs
        microseconds, and tokens that do not count would cost their share of three products. While a CUDA graph is captured
        nobody may wait, and the graph serves any mask: then every token is computed.
        """
        counts = mask if labels is None else mask | (labels != IGNORED_LABEL)
        if is_captured(mask.device):
            return cls(None, counts, mask, labels, settings, figures)
        positions = counts.nonzero().squeeze(-1)
        return cls(positions, counts, mask[positions], None if labels is None else labels[positions], settings, figures)

    def __len__(self) -> int:
        """How many tokens are computed."""
        return len(self.in_mask)

    def take(self, states: torch.Tensor, part: slice) -> torch.Tensor:
        """States [tokens, hidden] of some of the rows; zeros where a token does not count, which may hold anything."""
        if self.positions is None:
            return states[part].masked_fill(~self.counts[part, None], 0)
        return states[self.positions[part]]

    def put(self, whole: torch.Tensor, part: slice, values: torch.Tensor) -> None:
        """Write what belongs to some of the rows to where it belongs among all tokens."""
        if self.positions is None:
            whole[part] = values
        else:
            whole.index_copy_(0, self.positions[part], values)

    def wanted(self, part: slice, divergence: torch.Tensor, label: torch.Tensor) -> Wanted:
        """What the rows of `part` are asked for, with the factors that both losses have in the gradient."""
        of_divergence = (self.in_mask[part] * divergence)[:, None]
        if self.labels is None:
            return Wanted(of_divergence)
        labels = self.labels[part]
        of_label = ((labels != IGNORED_LABEL) * label)[:, None]
        return Wanted(of_divergence, labels.clamp(min=0), of_label, self.figures)


def is_captured(device: torch.device) -> bool:
    """Whether work on this device goes into a CUDA graph."""
    return device.type == "cuda" and bool(torch.cuda.is_current_stream_capturing())
