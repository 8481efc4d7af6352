"""C·B or P_k·B for all modules of a model at once, with what the cosines need."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

from safelora_fast.ops.backends import choose
from safelora_fast.ops.operands import require_tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

Matrix: TypeAlias = "torch.Tensor | tuple[torch.Tensor, torch.Tensor]"


@dataclass(frozen=True)
class Projection:
    """One module's projected factor, float32, and the r×r products that the cosine needs.

    Attributes:
        product: S = C·B or P_k·B [m, r]; B itself where V is zero.
        v_norm: ‖V‖_F, a scalar; NaN for an orthonormal basis, which knows no V.
        gram: BᵀB [r, r].
        cross_gram: BᵀS.
        product_gram: SᵀS.
    """

    product: torch.Tensor
    v_norm: torch.Tensor
    gram: torch.Tensor
    cross_gram: torch.Tensor
    product_gram: torch.Tensor

    def cosine(self, right_gram: torch.Tensor) -> torch.Tensor:
        """Frobenius cosine of S·A and B·A, a float64 scalar; NaN where one of them is zero.

        Args:
            right_gram: A·Aᵀ [r, r].
        """
        right = right_gram.double()
        cross, product, plain = (
            (gram.double() * right).sum() for gram in (self.cross_gram, self.product_gram, self.gram)
        )
        return cross / (product * plain).sqrt()


def projected(matrices: Sequence[Matrix], factors: Sequence[torch.Tensor]) -> list[Projection]:
    """What `subspace_projections` gives, by the backend that serves, without the dispatcher."""
    with torch.no_grad():
        inner, squares = transposed_products(matrices, factors)
        products = matrix_products(matrices, inner)
        norms = squares.sqrt()
        results = []
        for index, matrix in enumerate(matrices):
            if isinstance(matrix, tuple):
                norm = norms[index]
                scaled = products[index] / norm
                products[index] = torch.where(norm > 0, scaled, factors[index].float())
        grams, _ = transposed_products([*factors, *factors, *products], [*factors, *products, *products])
        count = len(factors)
        for index, matrix in enumerate(matrices):
            norm = norms[index] if isinstance(matrix, tuple) else torch.full_like(norms[index], math.nan)
            results.append(
                Projection(products[index], norm, grams[index], grams[count + index], grams[2 * count + index])
            )
    return results


def transposed_products(
    matrices: Sequence[Matrix], factors: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Mᵀ·X of every module [columns, rank], and ‖M‖²_F of the pairs [modules] (zero for a matrix alone), float32."""
    check(matrices, factors, 0)
    module = choose("subspace_projections", _tensors(matrices, factors)).module
    found: tuple[list[torch.Tensor], torch.Tensor] = module.transposed_products(matrices, factors)
    return found


def matrix_products(matrices: Sequence[Matrix], factors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """M·X of every module [rows, rank], float32."""
    check(matrices, factors, 1)
    module = choose("subspace_projections", _tensors(matrices, factors)).module
    found: list[torch.Tensor] = module.products(matrices, factors)
    return found


def _tensors(matrices: Sequence[Matrix], factors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    parts = [part for matrix in matrices for part in (matrix if isinstance(matrix, tuple) else (matrix,))]
    return [*parts, *factors]


def check(matrices: Sequence[Matrix], factors: Sequence[torch.Tensor], axis: int) -> None:
    """Refuse, by a ValueError, what is no matrix with a factor of as many rows as the matrix has along `axis`."""
    if len(matrices) != len(factors) or not factors:
        raise ValueError(f"{len(matrices)} matrices and {len(factors)} factors; one factor belongs to each matrix")
    require_tensors(**{f"operands[{index}]": tensor for index, tensor in enumerate(_tensors(matrices, factors))})
    device = factors[0].device
    for index, (matrix, factor) in enumerate(zip(matrices, factors, strict=True)):
        parts = matrix if isinstance(matrix, tuple) else (matrix,)
        if any(part.ndim != 2 or part.shape != parts[0].shape for part in parts) or factor.ndim != 2:
            shapes = ", ".join(str(list(part.shape)) for part in (*parts, factor))
            raise ValueError(f"module {index}: {shapes} are not matrices that fit")
        if parts[0].shape[axis] != factor.shape[0]:
            raise ValueError(
                f"module {index}: the factor has {factor.shape[0]} rows, but the matrix is {list(parts[0].shape)}"
            )
        if any(part.device != device for part in (*parts, factor)):
            raise ValueError(f"module {index} is not on {device}, where the first one is; group modules by device")
