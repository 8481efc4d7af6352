"""KL, cross-entropy and their gradient for a block of rows of logits, by torch operations on any device.

With q the reference, δ = z − z₀ less its mean under q, A = Σ q·δ·(e^δ − 1) and N = Σ q·(e^δ − 1 − δ), all terms of both
sums are non-negative, and KL(q‖p) = log(1 + N), KL(p‖q) = A/(1 + N) − log(1 + N), p = q·e^δ/(1 + N). So nothing cancels
while p is close to q, and each element takes two exponentials.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from safelora_fast.ops.base import Backend
from safelora_fast.ops.linear_kl.chunks import BLOCK_ELEMENTS, Given, Settings, Wanted

if TYPE_CHECKING:
    from safelora_fast.ops.linear_kl.chunks import Head

# Above this, Σ q·e^δ is computed with logarithms: products with q would lose precision or overflow.
LARGEST_SUM = 1e20


class Torch(Backend):
    """Does the elementwise passes in `dtype`; by default in the dtype of the results."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self._dtype = dtype

    def passes(self, head: Head, settings: Settings, rows: int, exact: torch.dtype) -> Passes:
        """Return the passes over the blocks of a chunk (chunks.py)."""
        return Passes(head, settings, rows, exact, self._dtype or exact)


class Passes:
    """Processes blocks in buffers of dtype `compute` that are allocated once; results are in `exact`."""

    def __init__(self, head: Head, settings: Settings, rows: int, exact: torch.dtype, compute: torch.dtype) -> None:
        weight = head.weight
        kind = "cpu" if weight.device.type == "cpu" else "other"
        self.rows = max(min(BLOCK_ELEMENTS[kind] // len(weight), rows), 1)
        self._head, self._forward, self._temperature, self._exact = head, settings.forward, settings.temperature, exact
        is_cast = compute != weight.dtype
        buffers = torch.empty(5 if is_cast else 3, self.rows, len(weight), dtype=compute, device=weight.device)
        self._buffers, self._cast = buffers[:3], buffers[3:] if is_cast else None

    def block(self, raw: torch.Tensor, delta: torch.Tensor, wanted: Wanted) -> Given:
        """Return the metrics of a block, and overwrite `delta` with the gradient with respect to it."""
        compared = wanted.divergence_factor is not None
        logits, distance = raw, delta
        if self._cast is not None:
            logits, distance = (buffer[: len(raw)] for buffer in self._cast)
            logits.copy_(raw)
            if compared:
                distance.copy_(delta)
        slope = self._head.bend(logits, distance if compared else None)
        factors = (
            None if factor is None else factor.to(distance) * self._head.scale
            for factor in (wanted.divergence_factor, wanted.label_factor)
        )
        of_divergence, of_label = factors
        wanted = Wanted(of_divergence, wanted.labels, of_label, wanted.figures)
        given = (self._block if compared else self._cross_entropy)(logits, distance, wanted)
        if slope is not None:
            distance.mul_(slope)
        if self._cast is not None:
            delta.copy_(distance)
        return Given(*(part if part is None or part.dtype == torch.bool else part.to(self._exact) for part in given))

    def _block(self, raw: torch.Tensor, delta: torch.Tensor, wanted: Wanted) -> Given:
        """`block` on logits: overwrites `delta` with the gradient with respect to the student's logits.

        Args:
            raw: [rows, vocabulary], logits of the reference.
            delta: the student's logits minus `raw`.
            wanted: factors and labels.
        """
        if self._temperature == 1.0:
            return self._tempered(raw, delta, wanted)
        assert wanted.divergence_factor is not None  # noqa: S101
        logits = None if wanted.labels is None else raw + delta
        raw.div_(self._temperature)
        delta.div_(self._temperature)
        divergence = self._tempered(raw, delta, Wanted(wanted.divergence_factor / self._temperature)).divergence
        if logits is None:
            return Given(divergence)
        given = self._cross_entropy(logits, raw, wanted)
        delta.add_(raw)
        return given._replace(divergence=divergence)

    def _tempered(self, raw: torch.Tensor, delta: torch.Tensor, wanted: Wanted) -> Given:
        q, student, scratch = (buffer[: len(raw)] for buffer in self._buffers)
        torch.softmax(raw, -1, out=q)
        delta.sub_(torch.mul(q, delta, out=scratch).sum(-1, keepdim=True))
        log_norm, moved = self._student(raw, delta, q, student, scratch)
        reverse = moved - log_norm
        divergence = log_norm if self._forward else reverse
        given = Given(divergence.squeeze(-1))
        if wanted.labels is not None:
            log_sum = raw.amax(-1, keepdim=True) - q.amax(-1, keepdim=True).log_()
            labels = wanted.labels[:, None]
            nll = log_sum + log_norm - raw.gather(-1, labels) - delta.gather(-1, labels)
            given = Given(given.divergence, nll.squeeze(-1))
            if wanted.figures:
                is_top1 = torch.add(raw, delta, out=scratch).argmax(-1) == wanted.labels
                p = torch.add(student, q, out=scratch) if self._forward else scratch.copy_(student)
                entropy = log_sum + log_norm - moved - p.mul_(_finite(raw)).sum(-1, keepdim=True)
                given = Given(given.divergence, given.nll, entropy.squeeze(-1), is_top1)
        of_divergence, of_label = wanted.divergence_factor, wanted.label_factor
        assert of_divergence is not None  # noqa: S101
        if self._forward:
            torch.mul(student, of_divergence if of_label is None else of_divergence + of_label, out=delta)
            if of_label is not None:
                delta.add_(q.mul_(of_label))
        else:
            shift = of_divergence * (log_norm + reverse)
            delta.mul_(of_divergence).sub_(shift if of_label is None else shift - of_label).mul_(student)
        if wanted.labels is not None and of_label is not None:
            delta.scatter_add_(-1, wanted.labels[:, None], -of_label)
        return given

    def _student(
        self, raw: torch.Tensor, delta: torch.Tensor, q: torch.Tensor, student: torch.Tensor, scratch: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Fill `student` with p (with p − q for the forward direction); return (log Σ q·e^δ, Σ p·δ), [rows, 1] each."""
        torch.expm1(delta, out=student)
        moved = torch.mul(q, delta, out=scratch).mul_(student).sum(-1, keepdim=True)
        excess = torch.sub(student, delta, out=scratch).mul_(q).sum(-1, keepdim=True)
        if bool((excess < LARGEST_SUM).all()):
            share = 1 / (1 + excess)
            (student.sub_(excess) if self._forward else student.add_(1)).mul_(q).mul_(share)
            return excess.log1p(), moved * share
        torch.log_softmax(raw, -1, out=student).add_(delta)
        log_norm = student.logsumexp(-1, keepdim=True)
        student.sub_(log_norm).exp_()
        moved = torch.mul(student, delta, out=scratch).sum(-1, keepdim=True)
        if self._forward:
            student.sub_(q)
        return log_norm, moved

    def _cross_entropy(self, logits: torch.Tensor, gradient: torch.Tensor, wanted: Wanted) -> Given:
        """Return the labels' metrics from the student's logits, and write the gradient. The divergence is zero."""
        assert wanted.labels is not None  # noqa: S101
        assert wanted.label_factor is not None  # noqa: S101
        labels = wanted.labels[:, None]
        p, scratch, _ = (buffer[: len(logits)] for buffer in self._buffers)
        torch.softmax(logits, -1, out=p)
        log_sum = logits.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log_()
        given = Given(logits.new_zeros(len(logits)), (log_sum - logits.gather(-1, labels)).squeeze(-1))
        if wanted.figures:
            entropy = log_sum - torch.mul(p, _finite(logits), out=scratch).sum(-1, keepdim=True)
            given = given._replace(entropy=entropy.squeeze(-1), is_top1=logits.argmax(-1) == wanted.labels)
        torch.mul(p, wanted.label_factor, out=gradient)
        gradient.scatter_add_(-1, labels, -wanted.label_factor)
        return given


def _finite(logits: torch.Tensor) -> torch.Tensor:
    """Replace −∞, the logit of a class that is ruled out: times its probability, zero, it would be NaN."""
    return logits.clamp(min=torch.finfo(logits.dtype).min)
