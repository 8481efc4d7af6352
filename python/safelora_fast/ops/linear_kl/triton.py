"""KL, cross-entropy and their gradient for a block of rows of logits by one Triton kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from safelora_fast.ops import triton_runtime
from safelora_fast.ops.linear_kl.chunks import Given, Settings, Wanted
from safelora_fast.ops.triton_runtime import power_of_two

if TYPE_CHECKING:
    from safelora_fast.ops.linear_kl.chunks import Head

TILE, WARPS = 4096, 8


class Backend(triton_runtime.TritonBackend):
    """Processes the logits in the buffers that the product wrote."""

    def passes(self, head: Head, settings: Settings, rows: int, exact: torch.dtype) -> Passes:
        """Return the passes over the blocks of a chunk (chunks.py)."""
        return Passes(head, settings, rows, exact)


class Passes:
    """One launch per block."""

    def __init__(self, head: Head, settings: Settings, rows: int, exact: torch.dtype) -> None:
        self._head, self._settings, self.rows, self._exact = head, settings, rows, exact
        self._bias = None if head.bias is None else head.bias.to(head.weight.device).contiguous()

    def block(self, raw: torch.Tensor, delta: torch.Tensor, wanted: Wanted) -> Given:
        """Return the metrics of a block, and overwrite `delta` with the gradient with respect to it."""
        from safelora_fast.ops.linear_kl import triton_kernels

        count, vocabulary = raw.shape
        figures = torch.empty(4, count, dtype=self._exact, device=raw.device)
        of_divergence = wanted.divergence_factor
        if of_divergence is None:  # a student that is its reference
            of_divergence = raw.new_zeros(count, dtype=self._exact)
            delta.zero_()
        labeled = wanted.labels is not None
        with triton_runtime.on(raw.device):
            triton_kernels.linear_loss[count,](
                raw,
                delta,
                raw if self._bias is None else self._bias,
                of_divergence.contiguous(),
                wanted.labels.contiguous() if wanted.labels is not None else raw,
                wanted.label_factor.contiguous() if wanted.label_factor is not None else raw,
                figures,
                count,
                vocabulary,
                raw.stride(0),
                delta.stride(0),
                float(self._head.scale),
                float(self._head.softcap or 1.0),
                float(self._settings.temperature),
                HAS_BIAS=self._bias is not None,
                CAPPED=self._head.softcap is not None,
                TEMPERED=self._settings.temperature != 1.0,
                FORWARD=self._settings.forward,
                LABELED=labeled,
                TILE=min(power_of_two(vocabulary), TILE),
                num_warps=WARPS,
                **triton_runtime.OPTIONS,
            )
        divergence, nll, entropy, is_top1 = figures.unbind()
        if not labeled:
            return Given(divergence)
        return Given(divergence, nll, entropy, is_top1) if wanted.figures else Given(divergence, nll)
