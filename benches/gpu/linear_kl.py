"""KL from hidden states at the size of a 7B model's batch, beside Liger's fused linear JSD and TRL's divergence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from timing import Timer, peak_bytes, time

from safelora_fast.ops import linear_kl

if TYPE_CHECKING:
    from collections.abc import Iterator

TOKENS, HIDDEN, VOCABULARY = 8192, 3584, 152064


def ours(hidden: torch.Tensor, reference: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """This package's."""
    mask = torch.ones(1, len(hidden), dtype=torch.bool, device=hidden.device)
    return linear_kl(hidden[None], reference[None], head, mask)


def peers() -> dict[str, Any]:
    """Those that can be imported."""
    found: dict[str, Any] = {}
    try:
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD
    except ImportError:
        pass
    else:
        jsd = LigerFusedLinearJSD(jsd_beta=1.0)
        found["Liger fused linear JSD"] = lambda hidden, reference, head: jsd(hidden, head, reference, head)
    try:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    except ImportError:
        pass
    else:
        found["TRL chunked divergence"] = lambda hidden, reference, head: ChunkedDivergenceFunction.apply(
            hidden, head, None, reference, head, None, 1.0
        )[0].mean()
    return found


def rows(timer: Timer, backends: list[str], use: object) -> Iterator[dict[str, object]]:
    """One row per provider: forward and backward together, and the memory that they need."""
    make = {"device": timer.device, "dtype": torch.bfloat16}
    reference = torch.randn(TOKENS, HIDDEN, **make)
    hidden = (reference + 0.05 * torch.randn(TOKENS, HIDDEN, **make)).requires_grad_()
    head = torch.randn(VOCABULARY, HIDDEN, **make) / HIDDEN**0.5
    providers = {f"ours, {name}": (name, ours) for name in backends if name != "cuda"}
    providers |= {name: (None, loss) for name, loss in peers().items()}
    for provider, (backend, loss) in providers.items():
        use(backend)

        def step(loss=loss):
            return torch.autograd.grad(loss(hidden, reference, head), hidden)

        milliseconds = time([step], rounds=5)
        # Three products with the head; the share of the time that they alone would take is the aim.
        product = time([lambda: hidden.detach() @ head.T], rounds=5)
        yield {
            "provider": provider,
            "pass": "both",
            "ms": milliseconds,
            "three_products_ms": 3 * product,
            "peak_mb": peak_bytes(step) / 1e6,
        }
