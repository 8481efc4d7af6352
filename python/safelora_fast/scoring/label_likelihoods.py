"""Log-likelihoods of labels from hidden states, with logits in memory for only one chunk of tokens at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear

if TYPE_CHECKING:
    from safelora_fast.models.anatomy import Head

NARROW = {torch.bfloat16, torch.float16}
# Logits per chunk. Without gradients, smaller chunks than the KL's are as fast.
CHUNK_ELEMENTS = {"cpu": 1 << 22, "other": 1 << 26}
# Logits per log-softmax: on a CPU they stay in the cache and need no new memory pages.
ROWS_ELEMENTS = {"cpu": 1 << 19, "other": 1 << 26}


def label_log_likelihoods(hidden: torch.Tensor, labels: torch.Tensor, head: Head) -> torch.Tensor:
    """Return the log-likelihood of each hidden state's label, in float32; products run in the head's dtype.

    Logits are large, and 16 bits hold only three digits. The label's own logit is subtracted inside the product, before
    rounding, so that the remaining digits represent the differences between logits.

    Args:
        hidden: [tokens, hidden], after the decoder's final norm.
        labels: [tokens], the next token of each position.
        head: the output head.

    Returns:
        [tokens], natural logarithms.
    """
    weight, bias = head.parameters()
    at_once = _rows(CHUNK_ELEMENTS, weight.device, len(weight))
    states, labels = hidden.to(weight.device, weight.dtype), labels.to(weight.device)
    parts = []
    for some, wanted in zip(states.split(at_once), labels.split(at_once), strict=True):
        logits = _logits(some, wanted, weight, bias, head)
        parts.append(picked(logits, wanted))
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


def _logits(
    states: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, head: Head
) -> torch.Tensor:
    """Return logits [tokens, vocabulary] up to a constant per token, in float32, or in 16 bits if only linear."""
    bent = head.scale != 1.0 or head.softcap is not None
    if weight.dtype in NARROW:
        level = (states.float() * weight[labels].float()).sum(dim=1, keepdim=True).to(weight.dtype)
        logits = torch.addmm(level.neg().expand(-1, len(weight)), states, weight.T)
        if bent or bias is not None:
            logits = logits.float()
        if bent:
            logits.add_(level)
        if bias is not None:
            logits.add_(bias)
    else:
        logits = linear(states, weight, bias).float()
    if head.scale != 1.0:
        logits.mul_(head.scale)
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits


def picked(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the log-likelihood of each token's label from logits [tokens, vocabulary], in float32."""
    at_once = _rows(ROWS_ELEMENTS, logits.device, logits.shape[1])
    found = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    for own, some, wanted in zip(found.split(at_once), logits.split(at_once), labels.split(at_once), strict=True):
        exact = some.float()
        own.copy_(exact.gather(1, wanted[:, None]).squeeze(1)).sub_(exact.logsumexp(dim=1))
    return found


def _rows(elements: dict[str, int], device: torch.device, width: int) -> int:
    return max(elements["cpu" if device.type == "cpu" else "other"] // width, 1)
