"""Sums of KL and cross-entropy, computed one chunk of tokens at a time together with the gradient, without autograd.

This file computes the products with the head. A backend does the elementwise passes over a block of rows of logits. Its
`passes(head, settings, rows, exact)` returns an object with `rows`, the most rows it takes at once, and

    block(raw, delta, wanted) -> Given

`raw` is h₀·Wᵀ and `delta` is (h − h₀)·Wᵀ of some rows, in the dtype of the head. `block` overwrites `delta` with the
gradient with respect to it, and may overwrite `raw`. Its results have the dtype `exact`.

Rows that have a label, but are not in the mask of the divergence, take one product: there `raw` is h·Wᵀ, and `delta` holds
anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from safelora_fast.ops import cuda_runtime

if TYPE_CHECKING:
    from collections.abc import Iterator

IGNORED_LABEL = -100
# Logits of one model in a chunk: large enough for an efficient matrix product.
CHUNK_ELEMENTS = {"cpu": 1 << 23, "other": 1 << 26}
# Elements from one row of logits to the next are a multiple of this. On a GPU every row then starts at a multiple of 128
# bytes whatever the vocabulary: all loads are wide, and one compiled kernel serves every number of rows.
ROW_MULTIPLE = {"cpu": 1, "other": 64}
# Logits in a block of a chunk: small enough to stay in cache for the elementwise passes.
BLOCK_ELEMENTS = {"cpu": 1 << 20, "other": 1 << 24}


class Settings(NamedTuple):
    """Settings of the divergence: KL(q‖p) (`forward`) or KL(p‖q), and its temperature; cross-entropy has none."""

    forward: bool
    temperature: float


@dataclass(frozen=True)
class Wanted:
    """What to compute for a block of rows.

    Attributes:
        divergence_factor: [rows, 1], factor of the divergence in the gradient; None for rows with a label alone.
        labels: [rows], the class of each row; None without cross-entropy.
        label_factor: [rows, 1], factor of the cross-entropy in the gradient, zero for a row without a label.
        figures: whether to compute the student's entropy and top-1 hits.
    """

    divergence_factor: torch.Tensor | None
    labels: torch.Tensor | None = None
    label_factor: torch.Tensor | None = None
    figures: bool = False


class Given(NamedTuple):
    """Metrics of a block, [rows] each: KL, the label's negative log-likelihood, the student's entropy, top-1 hits."""

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
        """Return the logits of hidden states."""
        raw = states @ self.weight.T
        raw = (raw if self.bias is None else raw + self.bias) * self.scale
        return raw if self.softcap is None else self.softcap * (raw / self.softcap).tanh()

    def bend(self, raw: torch.Tensor, delta: torch.Tensor | None) -> torch.Tensor | None:
        """Turn h₀·Wᵀ and (h − h₀)·Wᵀ, in place, into the reference's logits and the student's difference from them.

        Without `delta`, `raw` is h·Wᵀ and becomes the student's logits.

        Returns:
            Slope of the soft-cap at the student's logits, or None without a soft-cap.
        """
        if self.bias is not None:
            raw.add_(self.bias.to(raw))
        if self.scale != 1.0:
            raw.mul_(self.scale)
            if delta is not None:
                delta.mul_(self.scale)
        if self.softcap is None:
            return None
        bent = (raw.clone() if delta is None else raw.add(delta)).div_(self.softcap).tanh_()
        raw.div_(self.softcap).tanh_()
        if delta is not None:  # tanh a − tanh b = tanh(a − b)·(1 − tanh a·tanh b)
            delta.div_(self.softcap).tanh_().mul_(self.softcap).mul_(1 - raw * bent)
        raw.mul_(self.softcap)
        return bent.square_().neg_().add_(1)


@dataclass(frozen=True)
class Rows:
    """The tokens to compute: first those whose divergence counts, then those with a label alone.

    Attributes:
        positions: flat positions of the tokens that count. None: compute every token, with zeros for the others.
        counts: [tokens] bool, which tokens count.
        in_mask: for each computed token, whether its divergence counts.
        compared: number of tokens, from the first, of which the reference's logits are computed.
        labels: the label of each computed token; None without cross-entropy.
        settings: settings of the divergence.
        figures: whether to compute metrics of each token.
        weights: for each computed token, the factor of its divergence; None for 1.
    """

    positions: torch.Tensor | None
    counts: torch.Tensor
    in_mask: torch.Tensor
    compared: int
    labels: torch.Tensor | None
    settings: Settings
    figures: bool
    weights: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        mask: torch.Tensor,
        labels: torch.Tensor | None,
        settings: Settings,
        *,
        figures: bool,
        weights: torch.Tensor | None = None,
    ) -> Rows:
        """Return the tokens that are in a flat mask or have a label.

        Their number sets the size of the products with the head, so the host waits for it. On a GPU that takes
        microseconds, while computing every token would enlarge three products. During CUDA graph capture the host may
        not wait, and the graph must serve any mask: then every token is computed.
        """
        counts = mask if labels is None else mask | (labels != IGNORED_LABEL)
        if cuda_runtime.is_captured(mask.device):
            return cls(None, counts, mask, len(mask), labels, settings, figures, weights)
        positions = mask.nonzero().squeeze(-1)
        compared = len(positions)
        if labels is not None:
            positions = torch.cat([positions, (counts & ~mask).nonzero().squeeze(-1)])
        labels, weights = (None if values is None else values[positions] for values in (labels, weights))
        return cls(positions, counts, mask[positions], compared, labels, settings, figures, weights)

    def __len__(self) -> int:
        """Return the number of computed tokens."""
        return len(self.in_mask)

    def chunks(self, size: int) -> Iterator[tuple[slice, bool]]:
        """Yield slices of at most `size` tokens, and whether the reference's logits are computed there."""
        for begin, end in ((0, self.compared), (self.compared, len(self))):
            for start in range(begin, end, size):
                yield slice(start, min(start + size, end)), end == self.compared

    def take(self, states: torch.Tensor, part: slice) -> torch.Tensor:
        """Select rows of states [tokens, hidden]; zeros for tokens that do not count, whatever values they hold."""
        if self.positions is None:
            return states[part].masked_fill(~self.counts[part, None], 0)
        return states[self.positions[part]]

    def put(self, whole: torch.Tensor, part: slice, values: torch.Tensor) -> None:
        """Write the values of some rows to their positions among all tokens."""
        if self.positions is None:
            whole[part] = values
        else:
            whole.index_copy_(0, self.positions[part], values)

    def wanted(self, part: slice, divergence: torch.Tensor, label: torch.Tensor) -> Wanted:
        """Return what to compute for the rows of `part`, with the factors of both losses in the gradient."""
        of_divergence = None
        if part.start < self.compared:
            of_divergence = self.in_mask[part] * divergence
            of_divergence = (of_divergence if self.weights is None else of_divergence * self.weights[part])[:, None]
        if self.labels is None:
            return Wanted(of_divergence)
        labels = self.labels[part]
        of_label = ((labels != IGNORED_LABEL) * label)[:, None]
        return Wanted(of_divergence, labels.clamp(min=0), of_label, self.figures)


class _Chunk:
    """Buffers for the logits of one chunk, allocated once and reused for every chunk of `tokens`."""

    def __init__(self, head: Head, tokens: int) -> None:
        self._head = head
        vocabulary, device = len(head.weight), head.weight.device
        kind = "cpu" if device.type == "cpu" else "other"
        self.tokens = max(min(CHUNK_ELEMENTS[kind] // vocabulary, tokens), 1)
        width = -(-vocabulary // ROW_MULTIPLE[kind]) * ROW_MULTIPLE[kind]
        whole = torch.empty(2 * self.tokens, width, dtype=head.weight.dtype, device=device)
        self._stacked = whole[:, :vocabulary]

    def fill(self, hidden: torch.Tensor, reference: torch.Tensor | None) -> None:
        """Compute h₀·Wᵀ and (h − h₀)·Wᵀ in one product; inputs are [tokens, hidden] in the exact dtype.

        Without the reference, compute h·Wᵀ alone.
        """
        states = hidden if reference is None else torch.cat([reference, hidden - reference])
        states = states.to(self._head.weight.dtype)
        self._count = len(hidden)
        torch.mm(states, self._head.weight.T, out=self._stacked[: len(states)])

    def blocks(self, rows: int) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Yield (row slice, raw, delta), at most `rows` rows; `back` multiplies what is left in the last."""
        for start in range(0, self._count, rows):
            part = slice(start, min(start + rows, self._count))
            yield part, self._stacked[part], self._stacked[self._count + part.start : self._count + part.stop]

    def back(self) -> torch.Tensor:
        """Multiply the gradients left in the blocks by W: [tokens, hidden]."""
        return self._stacked[self._count : 2 * self._count] @ self._head.weight


def exact_dtype(hidden: torch.Tensor) -> torch.dtype:
    """Return the dtype of the sums: float32, or float64 for float64 states."""
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
    """Return (size, (loss, Σ KL, Σ NLL, NLL, entropy, hits)), the last three per row or None, without autograd.

    If `gradient` is given, it must be zero and receives the gradient, divided by the larger weight, `size`. This way
    small weights (one over very many tokens) do not underflow in half precision.
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
        for whole, is_compared in rows.chunks(chunk.tokens):
            references = rows.take(reference, whole).to(exact) if is_compared else None
            chunk.fill(rows.take(flat, whole).to(exact), references)
            for block, raw, delta in chunk.blocks(passes.rows):
                part = slice(whole.start + block.start, whole.start + block.stop)
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

    divergence = joined("divergence").masked_fill(~rows.in_mask, 0)
    kl = (divergence if rows.weights is None else divergence * rows.weights).sum()
    loss = kl_weight * kl
    if rows.labels is None:
        return loss, kl, None, None, None, None
    labeled = rows.labels != IGNORED_LABEL
    nll = joined("nll").masked_fill(~labeled, 0)
    cross_entropy = nll.sum()
    loss = loss + cross_entropy_weight * cross_entropy
    if not rows.figures:
        return loss, kl, cross_entropy, None, None, None
    entropy = joined("entropy").masked_fill(~labeled, 0)
    return loss, kl, cross_entropy, nll, entropy, labeled & joined("is_top1").to(torch.bool)
