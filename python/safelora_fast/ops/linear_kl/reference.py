"""KL and cross-entropy written plainly: whole logits, for tests in float64, and the backend that computes in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from safelora_fast.ops.linear_kl.passes import Given, Settings, Wanted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.ops.linear_kl.head import Head


def linear_kl_reference(
    hidden: torch.Tensor,
    reference_hidden: torch.Tensor,
    head_weight: torch.Tensor,
    mask: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    direction: str = "reverse",
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """Mean over the tokens in `mask`; the arguments are those of `linear_kl`."""
    p, q = (
        (logits(states[mask], head_weight, bias, logit_scale, softcap) / temperature).log_softmax(-1)
        for states in (hidden, reference_hidden)
    )
    if direction == "forward":
        p, q = q, p
    return (p.exp() * (p - q)).sum() / max(int(mask.sum()), 1)


def cross_entropy_reference(
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of each label, entropy and first choice at those positions, [labels] each."""
    labelled = labels != -100
    log_p = logits(hidden[labelled], head_weight, bias, logit_scale, softcap).log_softmax(-1)
    nll = -log_p.gather(-1, labels[labelled][:, None])[:, 0]
    return nll, -(log_p.exp() * log_p).sum(-1), log_p.argmax(-1)


def logits(
    states: torch.Tensor,
    head_weight: torch.Tensor,
    bias: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """softcap(logit_scale · (h·Wᵀ + bias))."""
    return _bent(states @ head_weight.T, bias, logit_scale, softcap)


def _bent(raw: torch.Tensor, bias: torch.Tensor | None, logit_scale: float, softcap: float | None) -> torch.Tensor:
    if bias is not None:
        raw = raw + bias
    raw = raw * logit_scale
    return raw if softcap is None else softcap * (raw / softcap).tanh()


def refusal(tensors: Sequence[torch.Tensor]) -> str | None:  # noqa: ARG001
    """None: torch computes this anywhere."""
    return None


class Passes:
    """The definition in float64, its gradient by autograd; the arguments are those of every backend."""

    def __init__(self, head: Head, settings: Settings, rows: int, exact: torch.dtype) -> None:
        self._head, self._settings, self.rows, self._exact = head, settings, rows, exact

    def block(self, raw: torch.Tensor, delta: torch.Tensor, wanted: Wanted) -> Given:
        """Figures of a block; `delta` becomes the gradient with respect to what it was."""
        moved = delta.detach().double().requires_grad_()
        with torch.enable_grad():
            reference, student = self._logits(raw.double()), self._logits(raw.double() + moved)
            p, q = ((z / self._settings.temperature).log_softmax(-1) for z in (student, reference))
            if self._settings.forward:
                p, q = q, p
            divergence = (p.exp() * (p - q)).sum(-1)
            total = (wanted.divergence_factor[:, 0] * divergence).sum()
            log_p = student.log_softmax(-1)
            nll = None if wanted.labels is None else -log_p.gather(-1, wanted.labels[:, None])[:, 0]
            if nll is not None and wanted.label_factor is not None:
                total = total + (wanted.label_factor[:, 0] * nll).sum()
            (gradient,) = torch.autograd.grad(total, moved)
        delta.copy_(gradient)
        if nll is None:
            return Given(divergence.detach().to(self._exact))
        entropy = -(log_p.exp() * log_p).sum(-1)
        divergence, nll, entropy = (figure.detach().to(self._exact) for figure in (divergence, nll, entropy))
        return Given(divergence, nll, entropy, log_p.argmax(-1) == wanted.labels)

    def _logits(self, raw: torch.Tensor) -> torch.Tensor:
        bias = None if self._head.bias is None else self._head.bias.to(raw)
        return _bent(raw, bias, self._head.scale, self._head.softcap)
