"""Projections and products of tall matrices with thin factors by torch, one module at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from safelora_fast.ops.base import Backend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.ops.subspace_projection import Matrix, Normalize


class Projector(Backend):
    """Computes projections from a backend's products, which subclasses make in float32."""

    def project_one(
        self, pair: tuple[torch.Tensor, torch.Tensor], lora_b: torch.Tensor, normalize: Normalize
    ) -> torch.Tensor:
        """Return C·B of one module, in the dtype of B."""
        (product,), _ = self.project([pair], [lora_b], normalize)
        return product.to(lora_b.dtype)

    def project(
        self, matrices: Sequence[Matrix], factors: Sequence[torch.Tensor], normalize: Normalize = "frobenius"
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return C·B or P_k·B of every module, and ‖V‖_F of the pairs. σ₁(V) is computed by torch."""
        if normalize == "spectral":
            return Torch().project(matrices, factors, normalize)
        inner, squares = self.transposed_products(matrices, factors)
        norms = list(squares.sqrt())
        found = zip(matrices, factors, self.products(matrices, inner), norms, strict=True)
        return [_divided(*module) for module in found], norms

    def transposed_products(
        self, matrices: Sequence[Matrix], factors: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return Mᵀ·X of every module, and ‖M‖²_F of the pairs [modules] (zero for a single matrix)."""
        raise NotImplementedError

    def products(self, matrices: Sequence[Matrix], factors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return M·X of every module."""
        raise NotImplementedError


class Torch(Projector):
    """Computes in `dtype`, by default in float32; `products` and `transposed_products` return float32."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self._dtype = dtype or torch.float32

    def project(
        self, matrices: Sequence[Matrix], factors: Sequence[torch.Tensor], normalize: Normalize = "frobenius"
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return V·(Vᵀ·B) over ‖V‖_F or σ₁(V)², or P_k·B, and ‖V‖_F."""
        products, norms = [], []
        for matrix, factor in zip(matrices, factors, strict=True):
            values, exact = self._values(matrix), factor.to(self._dtype)
            norm = values.square().sum().sqrt()
            divisor = norm if normalize == "frobenius" else torch.linalg.matrix_norm(values, ord=2).square()
            products.append(_divided(matrix, exact, values @ (values.mT @ exact), divisor))
            norms.append(norm)
        return products, norms

    def transposed_products(
        self, matrices: Sequence[Matrix], factors: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return Mᵀ·X of every module, and ‖M‖²_F of the pairs [modules] (zero for a single matrix)."""
        results, squares = [], []
        for matrix, factor in zip(matrices, factors, strict=True):
            values = self._values(matrix)
            results.append((values.mT @ factor.to(self._dtype)).float())
            squares.append(values.square().sum() if isinstance(matrix, tuple) else values.new_zeros(()))
        return results, torch.stack(squares).float()

    def products(self, matrices: Sequence[Matrix], factors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return M·X of every module."""
        pairs = zip(matrices, factors, strict=True)
        return [(self._values(matrix) @ factor.to(self._dtype)).float() for matrix, factor in pairs]

    def _values(self, matrix: Matrix) -> torch.Tensor:
        if isinstance(matrix, tuple):
            return matrix[0].to(self._dtype) - matrix[1].to(self._dtype)
        return matrix.to(self._dtype)


def _divided(matrix: Matrix, factor: torch.Tensor, product: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    """Divide V·(Vᵀ·B) by `divisor`; return B if V is zero, and the product unchanged for a basis."""
    if isinstance(matrix, tuple):
        return torch.where(divisor == 0, factor.to(product.dtype), product / divisor)
    return product
