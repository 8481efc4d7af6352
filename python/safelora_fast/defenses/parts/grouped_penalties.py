"""Penalty on the part of ΔW outside the safe subspace, for one module, or for all modules in grouped kernel launches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from safelora_fast.ops.subspace_projection import OP, matrix_products, transposed_products

if TYPE_CHECKING:
    from collections.abc import Sequence


def is_grouped(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the backend of these tensors groups modules into shared launches."""
    return OP.choose(tensors).name in {"triton", "cuda"}


def subspace_penalty(lora_b: torch.Tensor, lora_a: torch.Tensor, scale: float, vectors: torch.Tensor) -> torch.Tensor:
    """Return s²·tr(RᵀR·AAᵀ) of one module with R = B − U(UᵀB): a float32 scalar (float64 for float64 inputs).

    R is computed first because expanding RᵀR would cancel: just after a projection B and U(UᵀB) are almost equal.

    Args:
        lora_b: B [m, r].
        lora_a: A [r, n].
        scale: s.
        vectors: U [m, k] with orthonormal columns.
    """
    outside = lora_b - vectors @ (vectors.T @ lora_b)
    return scale**2 * ((outside.T @ outside) * (lora_a @ lora_a.T)).sum()


def subspace_penalties(
    bases: Sequence[torch.Tensor],
    lora_bs: Sequence[torch.Tensor],
    lora_as: Sequence[torch.Tensor],
    scales: Sequence[float],
) -> list[torch.Tensor]:
    """Return ‖(I − U·Uᵀ)·s·B·A‖²_F of every module (AsFT, arXiv 2506.08473).

    With R = B − U(UᵀB) this is s²·tr(RᵀR·AAᵀ), with gradients 2s²·R·(AAᵀ) in B and 2s²·(RᵀR)·A in A. The results are
    float32 scalars that can be differentiated once.

    Args:
        bases: U [m, k] with orthonormal columns, float32.
        lora_bs: B [m, r].
        lora_as: A [r, n].
        scales: s.
    """
    return list(_Penalties.apply(list(bases), list(scales), *lora_bs, *lora_as))


class _Penalties(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any, bases: list[torch.Tensor], scales: list[float], *factors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        count = len(bases)
        lora_bs, lora_as = factors[:count], factors[count:]
        inner, _ = transposed_products(bases, lora_bs)
        outside = [lora_b - inside for lora_b, inside in zip(lora_bs, matrix_products(bases, inner), strict=True)]
        flipped = [lora_a.mT for lora_a in lora_as]
        grams, _ = transposed_products([*outside, *flipped], [*outside, *flipped])
        ctx.scales = scales
        ctx.save_for_backward(*outside, *lora_as, *grams)
        b_grams, a_grams = grams[:count], grams[count:]
        return tuple(
            scale**2 * (lora_b * lora_a).sum() for scale, lora_b, lora_a in zip(scales, b_grams, a_grams, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        count = len(gradients)
        saved = ctx.saved_tensors
        outside, lora_as, grams = saved[:count], saved[count : 2 * count], saved[2 * count :]
        weights = [2 * scale**2 * gradient for scale, gradient in zip(ctx.scales, gradients, strict=True)]
        of_lora_b = matrix_products(
            outside, [gram * weight for gram, weight in zip(grams[count:], weights, strict=True)]
        )
        of_lora_a = [
            ((gram * weight) @ lora_a.float()).to(lora_a.dtype)
            for gram, weight, lora_a in zip(grams[:count], weights, lora_as, strict=True)
        ]
        return (None, None, *of_lora_b, *of_lora_a)
