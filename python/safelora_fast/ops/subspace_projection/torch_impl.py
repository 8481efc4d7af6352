"""The interface of the backends, and projections by torch, one module at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

import torch

from safelora_fast.ops.base import Backend

if TYPE_CHECKING:
    from collections.abc import Sequence

# (aligned, base), whose difference is V; or a single matrix, such as an orthonormal basis U_k.
Matrix: TypeAlias = "torch.Tensor | tuple[torch.Tensor, torch.Tensor]"
Normalize = Literal["frobenius", "spectral"]
ALIGNMENT = 16  # bytes, of factors that CUDA kernels read in place
Place: TypeAlias = "tuple[int, tuple[int, int]]"  # a result's first element, and its shape


class Projector(Backend, ABC):
    """Interface of the backends."""

    def project_one(
        self, pair: tuple[torch.Tensor, torch.Tensor], lora_b: torch.Tensor, normalize: Normalize
    ) -> torch.Tensor:
        """Return C·B of one module, in the dtype of B."""
        (product,), _ = self.project([pair], [lora_b], normalize)
        return product.to(lora_b.dtype)

    @abstractmethod
    def project(
        self, matrices: Sequence[Matrix], factors: Sequence[torch.Tensor], normalize: Normalize = "frobenius"
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return V·(Vᵀ·B) over ‖V‖_F or σ₁(V)², or P_k·B, and ‖V‖_F."""

    @abstractmethod
    def transposed_products(
        self, matrices: Sequence[Matrix], factors: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return Mᵀ·X of every module, and ‖M‖²_F of the pairs [modules] (zero for a single matrix), float32."""

    @abstractmethod
    def products(self, matrices: Sequence[Matrix], factors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return M·X of every module, float32."""


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


class Prepared(Protocol):
    """Mᵀ·X or M·X of the same operands, for one call or for many. Values may change between calls, addresses may not.

    Attributes:
        places: where each module's result is.
        size: elements of the memory of all results; nothing is written to those between results.
    """

    places: list[Place]
    size: int

    def __call__(self, results: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the memory of all results, float32 (`results` if given), and ‖M‖²_F (zero for a single matrix)."""
        ...


def views(results: torch.Tensor, places: Sequence[Place]) -> list[torch.Tensor]:
    """Return the results as matrices in their memory."""
    return [results.as_strided((rows, rank), (rank, 1), start) for start, (rows, rank) in places]


class GroupedProjector(Projector):
    """Computes everything with launches for all modules, which subclasses prepare."""

    @abstractmethod
    def prepared(
        self,
        matrices: Sequence[Matrix],
        factors: Sequence[torch.Tensor],
        *,
        transposed: bool,
        outputs: Sequence[torch.Tensor] | None = None,
    ) -> Prepared:
        """Return the launches of Mᵀ·X (`transposed`) or M·X of every module.

        Args:
            matrices: M of every module.
            factors: X of every module.
            transposed: which product.
            outputs: where results go, float32, contiguous and aligned. A call then allocates no memory for them, and
                returns that of the first.
        """

    def transposed_products(
        self, matrices: Sequence[Matrix], factors: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return Mᵀ·X of every module, and ‖M‖²_F of the pairs [modules] (zero for a single matrix), float32."""
        launches = self.prepared(matrices, factors, transposed=True)
        results, squares = launches()
        return views(results, launches.places), squares

    def products(self, matrices: Sequence[Matrix], factors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return M·X of every module, float32."""
        launches = self.prepared(matrices, factors, transposed=False)
        return views(launches()[0], launches.places)

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


def _divided(matrix: Matrix, factor: torch.Tensor, product: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    """Divide V·(Vᵀ·B) by `divisor`; return B if V is zero, and the product unchanged for a basis."""
    if isinstance(matrix, tuple):
        return torch.where(divisor == 0, factor.to(product.dtype), product / divisor)
    return product
