"""The projection of a whole 7B model, and of a training step, compared with the same algebra in torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from figures import Figure, agree

from safelora_fast.ops.subspace_projection import matrix_products, transposed_products

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from timing import Timer

# q, k, v, o, gate, up and down of Qwen2.5-7B
SHAPES = [(3584, 3584), (512, 3584), (512, 3584), (3584, 3584), (18944, 3584), (18944, 3584), (3584, 18944)]
LAYERS, RANK = 28, 16
STEP_RANK, STEP_WIDTH = 32, 64


def figures(timer: Timer, backends: list[str], use: Callable[[str | None], None]) -> Iterator[Figure]:
    """Both passes over pairs of weights, then over subspaces."""
    yield from pairs(timer, backends, use)
    yield from training_step(timer, backends, use)


def factored(
    weights: Sequence[tuple[torch.Tensor, torch.Tensor]], factors: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """V·(Vᵀ·B), one module at a time, V in float32."""
    found = []
    for (aligned, base), factor in zip(weights, factors, strict=True):
        v = aligned.float() - base.float()
        found.append(v @ (v.T @ factor))
    return found


def dense(pair: tuple[torch.Tensor, torch.Tensor], factor: torch.Tensor) -> torch.Tensor:
    """(V·Vᵀ)·B, as in the published code."""
    v = pair[0].float() - pair[1].float()
    return (v @ v.T) @ factor


def both(weights: Sequence[tuple[torch.Tensor, torch.Tensor]], factors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Our projection of all modules."""
    inner, _ = transposed_products(weights, factors)
    return matrix_products(weights, inner)


def pairs(timer: Timer, backends: list[str], use: Callable[[str | None], None]) -> Iterator[Figure]:
    """V·Vᵀ·B with bfloat16 pairs of as many layers as fit in half of the memory."""
    layer_bytes = sum(4 * m * n for m, n in SHAPES)
    layers = max(min(LAYERS, int(timer.free_bytes() * 0.5) // layer_bytes), 1)
    weights, factors = [], []
    for m, n in SHAPES * layers:
        base = torch.randn(m, n, device=timer.device, dtype=torch.bfloat16)
        weights.append((base + 0.01 * torch.randn_like(base), base))
        factors.append(torch.randn(m, RANK, device=timer.device))
    moved = layers * layer_bytes
    # Alternate between modules of one shape: a single pair would stay in L2.
    alike = [index for index, shape in enumerate(SHAPES * layers) if shape == SHAPES[0]]
    whole, one = f"{len(weights)} modules, {layers} layers", f"one of {SHAPES[0]}"
    expected = factored(weights[: len(SHAPES)], factors[: len(SHAPES)])
    of_torch = timer.time([lambda: factored(weights, factors)], rounds=3)
    of_dense = timer.time([lambda at=at: dense(weights[at], factors[at]) for at in alike], rounds=5)
    yield Figure("torch, factored", whole, "ms", of_torch)
    yield Figure("torch, dense", one, "ms", of_dense)
    for name in backends:
        use(name)
        provider = f"ours, {name}"
        agree(provider, both(weights[: len(SHAPES)], factors[: len(SHAPES)]), expected, 1e-3)
        inner, _ = transposed_products(weights, factors)
        first = timer.time([lambda: transposed_products(weights, factors)], rounds=5)
        second = timer.time([lambda inner=inner: matrix_products(weights, inner)], rounds=5)
        for part, milliseconds in (("Vᵀ·B", first), ("V·T", second)):
            yield Figure(provider, f"{part}, {whole}", "ms", milliseconds)
            yield Figure(
                provider, f"{part}, {whole}", "of a copy", timer.share_of_copy(moved, milliseconds), least=0.85
            )
        yield Figure(provider, whole, "× torch, factored", of_torch / (first + second), least=3)
        alone = timer.time([lambda at=at: both(weights[at : at + 1], factors[at : at + 1]) for at in alike])
        yield Figure(provider, one, "ms", alone)
        yield Figure(provider, one, "× torch, dense", of_dense / alone, least=30)
        use(None)


def training_step(timer: Timer, backends: list[str], use: Callable[[str | None], None]) -> Iterator[Figure]:
    """P_k·B of all modules, U_k with 64 float32 columns, as SafeLoRA computes it at each step."""
    bases = [torch.randn(m, STEP_WIDTH, device=timer.device) for m, _ in SHAPES * LAYERS]
    factors = [torch.randn(m, STEP_RANK, device=timer.device) for m, _ in SHAPES * LAYERS]
    of_bases = sum(2 * basis.nbytes for basis in bases)
    moved = of_bases + sum(2 * factor.nbytes for factor in factors)
    part = f"a step, {len(bases)} modules, {of_bases / 1e6:.0f} MB of U, {moved / 1e6:.0f} MB in all"

    def plain() -> list[torch.Tensor]:
        return [basis @ (basis.T @ factor) for basis, factor in zip(bases, factors, strict=True)]

    def grouped() -> list[torch.Tensor]:
        inner, _ = transposed_products(bases, factors)
        return matrix_products(bases, inner)

    expected, of_torch = plain()[: len(SHAPES)], timer.time([plain])
    yield Figure("torch", part, "ms", of_torch)
    for name in backends:
        use(name)
        provider = f"ours, {name}"
        agree(provider, grouped()[: len(SHAPES)], expected, 1e-4)
        milliseconds = timer.time([grouped])
        yield Figure(provider, part, "ms", milliseconds, most=0.3)
        yield Figure(provider, part, "of a copy", timer.share_of_copy(moved, milliseconds))
        yield Figure(provider, part, "× torch", of_torch / milliseconds)
        yield Figure(provider, part, "ms, host included", timer.time([grouped], with_host=True), host="included")
        use(None)
