"""KL from hidden states, a chunk of tokens at a time, with the gradient computed in the forward."""

from __future__ import annotations

from typing import Any, Literal

import torch

CHUNK_ELEMENTS = 1 << 22


def linear_kl(
    hidden: torch.Tensor,
    reference_hidden: torch.Tensor,
    head_weight: torch.Tensor,
    mask: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    direction: Literal["reverse", "forward"] = "reverse",
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """Mean over tokens of the KL divergence between the next-token distributions of two hidden states.

    Logits are softcap(logit_scale · (h·Wᵀ + bias))/temperature. They are made a chunk of tokens at a time, of the
    reference and of the difference W(h − h₀), so that nothing cancels while both are close; the gradient with respect
    to `hidden` is computed on the way, and only that is kept. There is none for W, the bias or the reference.

    Args:
        hidden: [batch, tokens, hidden] of the student; float32, bfloat16, float16 or float64.
        reference_hidden: the same of the reference.
        head_weight: W [vocabulary, hidden], shared; used in the dtype of `hidden`.
        mask: [batch, tokens] bool, the tokens that count.
        bias: [vocabulary].
        direction: "reverse" is KL(student ‖ reference), "forward" is KL(reference ‖ student).
        temperature: divides the logits.
        logit_scale: multiplies the logits before the soft-cap.
        softcap: c of c·tanh(logits/c).

    Returns:
        A float32 scalar (float64 for float64 states); zero where no token counts.

    Raises:
        ValueError: shapes disagree or `direction` is unknown.
    """
    if direction not in {"reverse", "forward"}:
        raise ValueError(f'direction is {direction!r}, it must be "reverse" or "forward"')
    if hidden.shape != reference_hidden.shape or hidden.shape[:-1] != mask.shape:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, reference {tuple(reference_hidden.shape)} and mask {tuple(mask.shape)} "
            "disagree"
        )
    if head_weight.shape[-1] != hidden.shape[-1]:
        raise ValueError(f"the head has width {head_weight.shape[-1]}, the hidden states {hidden.shape[-1]}")
    mask = mask.to(torch.bool)
    head = _Head(head_weight.detach(), None if bias is None else bias.detach(), logit_scale, softcap, temperature)
    reference = reference_hidden.detach()[mask].to(hidden.device)
    total: torch.Tensor = _LinearKL.apply(hidden[mask], reference, head, direction == "forward")
    return total / max(int(mask.sum()), 1)


class _Head:
    """Logits of the reference and their distance to the student's, a chunk at a time."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scale: float,
        softcap: float | None,
        temperature: float,
    ) -> None:
        self.weight, self.bias, self.scale, self.softcap, self.temperature = weight, bias, scale, softcap, temperature

    def logits(
        self, hidden: torch.Tensor, reference: torch.Tensor, exact: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(z₀, z − z₀, ∂z/∂raw of the student or None where it is constant), each [tokens, vocabulary]."""
        difference = (hidden.to(exact) - reference.to(exact)).to(hidden.dtype)
        weight = self.weight.to(device=hidden.device, dtype=hidden.dtype)
        stacked = torch.cat([reference.to(hidden.dtype), difference]) @ weight.T
        raw, delta = stacked.to(exact).split(len(hidden))
        if self.bias is not None:
            raw = raw + self.bias.to(raw)
        if self.scale != 1.0:
            raw, delta = raw * self.scale, delta * self.scale
        slope = None
        if self.softcap is not None:
            reference_bent, bent = (raw / self.softcap).tanh(), ((raw + delta) / self.softcap).tanh()
            # tanh a − tanh b = tanh(a − b)·(1 − tanh a·tanh b)
            delta = self.softcap * (delta / self.softcap).tanh() * (1 - reference_bent * bent)
            raw, slope = self.softcap * reference_bent, 1 - bent * bent
        if self.temperature != 1.0:
            raw, delta = raw / self.temperature, delta / self.temperature
        return raw, delta, slope

    def back(self, gradient: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The gradient with respect to the student's hidden states from that with respect to the raw logits."""
        scaled = gradient.mul_(self.scale / self.temperature).to(dtype)
        return scaled @ self.weight.to(device=gradient.device, dtype=dtype)


class _LinearKL(torch.autograd.Function):  # type: ignore[misc]
    """Sum over tokens; computes the gradient in the forward, where the logits are at hand."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, reference: torch.Tensor, head: _Head, forward_direction: bool
    ) -> torch.Tensor:
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        chunk = max(CHUNK_ELEMENTS // len(head.weight), 16)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        total = torch.zeros((), dtype=exact, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), chunk):
                part = slice(start, start + chunk)
                raw, delta, slope = head.logits(hidden[part], reference[part], exact)
                divergence, of_logits = _divergence(raw, delta, forward_direction=forward_direction)
                total += divergence
                if gradient is not None:
                    gradient[part] = head.back(of_logits if slope is None else of_logits.mul_(slope), hidden.dtype)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * gradients[0]).to(gradient.dtype), None, None, None


def _divergence(
    raw: torch.Tensor, delta: torch.Tensor, *, forward_direction: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the divergence over a chunk, and its gradient with respect to the student's logits; overwrites both.

    With q the reference and x = log p − log q, both divergences are sums of terms that are never negative:
    KL(p‖q) = Σ p·x − (p − q) and KL(q‖p) = Σ (p − q) − q·x, with p − q = q·(eˣ − 1) where x is small.
    """
    log_q = raw.log_softmax(-1)
    q = log_q.exp()
    delta = delta.sub_((q * delta).sum(-1, keepdim=True))
    # log Σ q·e^δ: exactly of second order while p is near q; from the two normalisers where it is not small.
    near = torch.log1p((q * (torch.expm1(delta) - delta)).sum(-1, keepdim=True))
    far = log_q.add(delta).logsumexp(-1, keepdim=True)
    x = delta.sub_(torch.where(far > 0.1, far, near))
    p = log_q.add_(x).exp_()
    excess = torch.where(x.abs() < 0.5, q * torch.expm1(x), p - q)
    if forward_direction:
        return (excess - q * x).sum(), excess
    divergences = (p * x - excess).sum(-1, keepdim=True)
    return divergences.sum(), p.mul_(x.sub_(divergences))
