"""KL from hidden states written plainly: whole logits, for tests in float64."""

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

    def log_probabilities(states: torch.Tensor) -> torch.Tensor:
        logits = states[mask] @ head_weight.T
        if bias is not None:
            logits = logits + bias
        logits = logits * logit_scale
        if softcap is not None:
            logits = softcap * (logits / softcap).tanh()
        return (logits / temperature).log_softmax(-1)

    p, q = log_probabilities(hidden), log_probabilities(reference_hidden)
    if direction == "forward":
        p, q = q, p
    return (p.exp() * (p - q)).sum() / max(int(mask.sum()), 1)
