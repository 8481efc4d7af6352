"""The projection of every module of a 7B model, and that of a training step, beside the same algebra in torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from timing import Timer, time

from safelora_fast.ops.subspace_projection.grouped import matrix_products, transposed_products

if TYPE_CHECKING:
    from collections.abc import Iterator

# q, k, v, o, gate, up and down of Qwen2.5-7B
SHAPES = [(3584, 3584), (512, 3584), (512, 3584), (3584, 3584), (18944, 3584), (18944, 3584), (3584, 18944)]
LAYERS, DENSE_SHAPE = 28, (3584, 3584)


def rows(timer: Timer, backends: list[str], use: object) -> Iterator[dict[str, object]]:
    """Both passes over pairs of weights, then over subspaces."""
    yield from pairs(timer, backends, use)
    torch.cuda.empty_cache()
    yield from training_step(timer, backends, use)


def pairs(timer: Timer, backends: list[str], use: object, rank: int = 16) -> Iterator[dict[str, object]]:
    """C·B with bfloat16 pairs of as many layers as fit in half of the memory."""
    layer_bytes = sum(4 * m * n for m, n in SHAPES)
    free, _ = torch.cuda.mem_get_info(timer.device)
    layers = min(LAYERS, int(free * 0.5) // layer_bytes)
    weights, factors = [], []
    for m, n in SHAPES * layers:
        base = torch.randn(m, n, device=timer.device, dtype=torch.bfloat16)
        weights.append((base + 0.01 * torch.randn_like(base), base))
        factors.append(torch.randn(m, rank, device=timer.device))
    moved = layers * layer_bytes

    def factored() -> list[torch.Tensor]:
        found = []
        for (aligned, base), factor in zip(weights, factors, strict=True):
            v = aligned.float() - base.float()
            found.append(v @ (v.T @ factor) / v.norm())
        return found

    for name in backends:
        use(name)
        inner, _ = transposed_products(weights, factors)
        first = time([lambda: transposed_products(weights, factors)], rounds=5)
        second = time([lambda inner=inner: matrix_products(weights, inner)], rounds=5)
        for kind, milliseconds in (("Vᵀ·B", first), ("V·T", second)):
            yield {
                "provider": f"ours, {name}",
                "pass": f"{kind}, {layers} layers",
                "ms": milliseconds,
                "of_copy": timer.share_of_copy(moved, milliseconds),
            }
    use(None)
    yield {"provider": "torch, factored", "pass": f"both, {layers} layers", "ms": time([factored], rounds=3)}
    index = SHAPES.index(DENSE_SHAPE)

    def dense() -> torch.Tensor:
        v = weights[index][0].float() - weights[index][1].float()
        return (v @ v.T / v.norm()) @ factors[index]

    def same() -> list[torch.Tensor]:
        inner, _ = transposed_products(weights[index : index + 1], factors[index : index + 1])
        return matrix_products(weights[index : index + 1], inner)

    yield {"provider": "torch, dense", "pass": f"both, one {DENSE_SHAPE}", "ms": time([dense], rounds=5)}
    yield {"provider": "ours, by default", "pass": f"both, one {DENSE_SHAPE}", "ms": time([same], rounds=5)}


def training_step(
    timer: Timer, backends: list[str], use: object, rank: int = 32, width: int = 64
) -> Iterator[dict[str, object]]:
    """P_k·B of all 196 modules with U_k of 64 columns in float32."""
    bases = [torch.randn(m, width, device=timer.device) for m, _ in SHAPES * LAYERS]
    factors = [torch.randn(m, rank, device=timer.device) for m, _ in SHAPES * LAYERS]
    moved = sum(2 * basis.numel() * 4 + 2 * factor.numel() * 4 for basis, factor in zip(bases, factors, strict=True))

    def grouped() -> list[torch.Tensor]:
        inner, _ = transposed_products(bases, factors)
        return matrix_products(bases, inner)

    def plain() -> list[torch.Tensor]:
        return [basis @ (basis.T @ factor) for basis, factor in zip(bases, factors, strict=True)]

    for provider, backend, call in [
        *((f"ours, {name}", name, grouped) for name in backends), ("torch", None, plain),
    ]:  # fmt: skip
        use(backend)
        milliseconds = time([call])
        yield {
            "provider": provider,
            "pass": f"a step, {len(bases)} modules",
            "ms": milliseconds,
            "of_copy": timer.share_of_copy(moved, milliseconds),
        }
