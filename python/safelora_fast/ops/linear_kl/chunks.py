"""Sums of KL and cross-entropy, a chunk of tokens at a time, with the gradient on the way and without autograd.

The products with the head are made here. A backend does the elementwise passes over a block of rows of logits: its
`passes(head, settings, rows, exact)` gives an object with `rows`, the most rows that it takes at once, and

    block(raw, delta, wanted) -> Given

for h₀·Wᵀ and (h − h₀)·Wᵀ of some rows in the dtype of the head; `delta` becomes the gradient with respect to what it was, and
`raw` may be written over. Its results are in the dtype `exact`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from safelora_fast.ops import cuda_runtime

if TYPE_CHECKING:
    from collections.abc import Iterator

IGNORED_LABEL = -100
# Logits of one model that a chunk may have: large enough for the matrix product to be efficient.
CHUNK_ELEMENTS = {"cpu": 1 << 23, "other": 1 << 26}
# Those of a block of a chunk, which the elementwise passes go over while they are in cache.
BLOCK_ELEMENTS = {"cpu": 1 << 20, "other": 1 << 24}


class Settings(NamedTuple):
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


class Given(NamedTuple):
    """Metrics of a block, [rows] each: KL, the label's negative log-likelihood, the student's entropy, and hits."""

    divergence: torch.Tensor
    nll: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None


@dataclass(frozen=True)
class Head:
    """An output head, softcap(scale · (h·Wᵀ + bias)), in the dtype of `weight`; student and reference share it."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    softcap: float | None

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """The logits of hidden states."""
        raw = states @ self.weight.T
        raw = (raw if self.bias is None else raw + self.bias) * self.scale
        return raw if self.softcap is None else self.softcap * (raw / self.softcap).tanh()

    def bend(self, raw: torch.Tensor, delta: torch.Tensor) -> torch.Tensor | None:
        """Turn h₀·Wᵀ and (h − h₀)·Wᵀ into the reference's logits and the student's distance to them, in place.

        Returns:
            Slope of the soft-cap at the student's logits, None where there is none.
        """
        if self.bias is not None:
            raw.add_(self.bias.to(raw))
        if self.scale != 1.0:
            raw.mul_(self.scale)
            delta.mul_(self.scale)
        if self.softcap is None:
            return None
        bent = raw.add(delta).div_(self.softcap).tanh_()
        raw.div_(self.softcap).tanh_()
        # tanh a − tanh b = tanh(a − b)·(1 − tanh a·tanh b)
        delta.div_(self.softcap).tanh_().mul_(self.softcap).mul_(1 - raw * bent)
        raw.mul_(self.softcap)
        return bent.square_().neg_().add_(1)


@dataclass(frozen=True)
class Rows:
    """The tokens that are computed, in the order of their flat positions.

    Attributes:
        positions: of the tokens that count; None: every token is computed, those that do not count from zeros.
        counts: [tokens] bool, which tokens count.
        in_mask: whether the divergence counts, of each token that is computed.
        labels: likewise its label; None without cross-entropy.
        settings: of the divergence.
        figures: whether metrics of each token are wanted.
    """

    positions: torch.Tensor | None
    counts: torch.Tensor
    in_mask: torch.Tensor
    labels: torch.Tensor | None
    settings: Settings
    figures: bool

    @classmethod
    def of(cls, mask: torch.Tensor, labels: torch.Tensor | None, settings: Settings, *, figures: bool) -> Rows:
        """The tokens in a flat mask or with a label.

        Their number decides the size of the products with the head, so the host waits for it: on a GPU that costs
        microseconds, and tokens that do not count would cost their share of three products. While a CUDA graph is captured
        nobody may wait, and the graph serves any mask: then every token is computed.
        """
        counts = mask if labels is None else mask | (labels != IGNORED_LABEL)
        if cuda_runtime.is_captured(mask.device):
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
        """Write the values of some of the rows to their places among all tokens."""
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


class _Chunk:
    """Buffers for the logits of a chunk of tokens, made once and used for every chunk of `tokens`."""

    def __init__(self, head: Head, tokens: int) -> None:
        self._head = head
        vocabulary, device = len(head.weight), head.weight.device
        kind = "cpu" if device.type == "cpu" else "other"
        self.tokens = max(min(CHUNK_ELEMENTS[kind] // vocabulary, tokens), 1)
        self._stacked = torch.empty(2 * self.tokens, vocabulary, dtype=head.weight.dtype, device=device)

    def fill(self, hidden: torch.Tensor, reference: torch.Tensor) -> None:
        """Make h₀·Wᵀ and (h − h₀)·Wᵀ by one product; both are [tokens, hidden] in the exact dtype."""
        states = torch.cat([reference, hidden - reference]).to(self._head.weight.dtype)
        self._count = len(hidden)
        torch.mm(states, self._head.weight.T, out=self._stacked[: len(states)])

    def blocks(self, rows: int) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """(which rows, h₀·Wᵀ, (h − h₀)·Wᵀ), at most so many at once; what the caller leaves in the last one is kept."""
        for start in range(0, self._count, rows):
            part = slice(start, min(start + rows, self._count))
            yield part, self._stacked[part], self._stacked[self._count + part.start : self._count + part.stop]

    def back(self) -> torch.Tensor:
        """Gradients with respect to the logits, left in the blocks, times W: [tokens, hidden]."""
        return self._stacked[self._count : 2 * self._count] @ self._head.weight


def exact_dtype(hidden: torch.Tensor) -> torch.dtype:
    """What sums are made in: float32, or float64 for float64 states."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def weighted_sums(
    backend: Any,
    hidden: torch.Tensor,
    reference: torch.Tensor,
    head: Head,
    rows: Rows,
    weights: tuple[torch.Tensor, torch.Tensor],
    gradient: torch.Tensor | None,
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """(size, (loss, Σ KL, Σ NLL, NLL, entropy, hits)), the last three by row or None, without autograd.

    The gradient goes into `gradient`, which is zero, where there is one. It is divided by the larger weight, `size`, so
    that small weights (one over very many tokens) do not underflow in half precision.
    """
    exact = exact_dtype(hidden)
    flat, reference = hidden.flatten(0, -2), reference.to(hidden.device).flatten(0, -2)
    kl_weight, cross_entropy_weight = weights
    size = torch.maximum(kl_weight.abs(), cross_entropy_weight.abs())
    size = torch.where(size > 0, size, torch.ones_like(size))
    given: list[Given] = []
    with torch.autocast(hidden.device.type, enabled=False):
        chunk = _Chunk(head, len(rows))
        passes = backend.passes(head, rows.settings, chunk.tokens, exact)
        for start in range(0, len(rows), chunk.tokens):
            whole = slice(start, min(start + chunk.tokens, len(rows)))
            chunk.fill(rows.take(flat, whole).to(exact), rows.take(reference, whole).to(exact))
            for block, raw, delta in chunk.blocks(passes.rows):
                part = slice(start + block.start, start + block.stop)
                given.append(passes.block(raw, delta, rows.wanted(part, kl_weight / size, cross_entropy_weight / size)))
            if gradient is not None:
                rows.put(gradient.view(flat.shape), whole, chunk.back().to(gradient.dtype))
    return size, _summed(given, rows, kl_weight, cross_entropy_weight)


def _summed(
    given: list[Given], rows: Rows, kl_weight: torch.Tensor, cross_entropy_weight: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    def joined(name: str) -> torch.Tensor:
        parts = [getattr(block, name) for block in given]
        return torch.cat(parts) if parts else kl_weight.new_zeros(0)

    kl = joined("divergence").masked_fill(~rows.in_mask, 0).sum()
    loss = kl_weight * kl
    if rows.labels is None:
        return loss, kl, None, None, None, None
    labelled = rows.labels != IGNORED_LABEL
    nll = joined("nll").masked_fill(~labelled, 0)
    cross_entropy = nll.sum()
    loss = loss + cross_entropy_weight * cross_entropy
    if not rows.figures:
        return loss, kl, cross_entropy, None, None, None
    entropy = joined("entropy").masked_fill(~labelled, 0)
    return loss, kl, cross_entropy, nll, entropy, labelled & joined("is_top1").to(torch.bool)
