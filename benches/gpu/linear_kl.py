"""KL from hidden states for a 7B model's batch, compared with Liger's fused linear JSD and TRL's divergence."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from figures import Figure, agree

from safelora_fast.ops import linear_kl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from timing import Timer

    Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

TOKENS, HIDDEN, VOCABULARY = 8192, 3584, 152064
ROUNDS = 5


def ours(hidden: torch.Tensor, reference: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Our KL(student ‖ reference), mean over tokens, equal to the peers' with beta 1."""
    mask = torch.ones(1, len(hidden), dtype=torch.bool, device=hidden.device)
    return linear_kl(hidden[None], reference[None], head, mask)


def peers() -> dict[str, Loss]:
    """Return the peers that can be imported; print the others to stderr."""
    found: dict[str, Loss] = {}
    try:
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD
    except ImportError as error:
        print(f"without Liger's fused linear JSD ({error}): pip install liger-kernel", file=sys.stderr)
    else:
        jsd = LigerFusedLinearJSD(jsd_beta=1.0)
        found["Liger"] = lambda hidden, reference, head: jsd(hidden, head, reference, head, None)
    try:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    except ImportError as error:
        print(f"without TRL's chunked divergence ({error}): pip install -U trl", file=sys.stderr)
    else:
        found["TRL"] = lambda hidden, reference, head: ChunkedDivergenceFunction.apply(
            hidden, head, None, reference, head, None, 1.0
        )[0].mean()
    return found


def figures(timer: Timer, backends: list[str], use: Callable[[str | None], None]) -> Iterator[Figure]:
    """Time of forward plus backward, and the memory they need; ours as multiples of the peers'."""
    make = {"device": timer.device, "dtype": torch.bfloat16}
    reference = torch.randn(TOKENS, HIDDEN, **make)
    hidden = (reference + 0.05 * torch.randn(TOKENS, HIDDEN, **make)).requires_grad_()
    head = torch.randn(VOCABULARY, HIDDEN, **make) / HIDDEN**0.5

    def measured(loss: Loss) -> tuple[float, float]:
        def step() -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(loss(hidden, reference, head), hidden)

        milliseconds = timer.time([step], rounds=ROUNDS)
        return milliseconds, timer.peak_bytes(step) / 1e6

    product = timer.time([lambda: hidden.detach() @ head.T], rounds=ROUNDS)
    yield Figure("torch", "three products with the head, which take most of it", "ms", 3 * product)
    others = {name: (loss, *measured(loss)) for name, loss in peers().items()}
    for name, (_, milliseconds, megabytes) in others.items():
        yield Figure(name, "both passes", "ms", milliseconds)
        yield Figure(name, "both passes", "MB", megabytes)
    for backend in (name for name in backends if name != "cuda"):
        use(backend)
        provider, value = f"ours, {backend}", ours(hidden, reference, head)
        for name, (loss, *_) in others.items():
            agree(f"{provider} and {name}", [value], [loss(hidden, reference, head)], 3e-2)
        milliseconds, megabytes = measured(ours)
        waits = "included after its one wait for the number of tokens"
        yield Figure(provider, "both passes", "ms", milliseconds, host=waits)
        yield Figure(provider, "both passes", "MB", megabytes)
        for name, (_, of_peer, peer_megabytes) in others.items():
            yield Figure(provider, "both passes", f"× {name}", of_peer / milliseconds, least=1, host=waits)
            yield Figure(provider, "both passes", f"memory, of {name}'s", megabytes / peer_megabytes, most=1)
        use(None)
