"""KL and cross-entropy from hidden states written plainly: whole logits, for tests in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


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
    raw = states @ head_weight.T
    if bias is not None:
        raw = raw + bias
    raw = raw * logit_scale
    return raw if softcap is None else softcap * (raw / softcap).tanh()
