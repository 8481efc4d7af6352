"""Products of many tall matrices with thin factors in float64: the truth that the others are compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.ops.subspace_projection.grouped import Matrix


def refusal(tensors: Sequence[torch.Tensor]) -> str | None:  # noqa: ARG001
    """None: torch computes this anywhere."""
    return None


def transposed_products(
    matrices: Sequence[Matrix], factors: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Mᵀ·X of every module, and ‖M‖²_F of the pairs."""
    squares = [
        _values(matrix).square().sum() if isinstance(matrix, tuple) else torch.zeros((), device=factor.device)
        for matrix, factor in zip(matrices, factors, strict=True)
    ]
    results = [(_values(matrix).mT @ factor.double()).float() for matrix, factor in zip(matrices, factors, strict=True)]
    return results, torch.stack([square.float() for square in squares])


def products(matrices: Sequence[Matrix], factors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """M·X of every module."""
    return [(_values(matrix) @ factor.double()).float() for matrix, factor in zip(matrices, factors, strict=True)]


def _values(matrix: Matrix) -> torch.Tensor:
    return matrix[0].double() - matrix[1].double() if isinstance(matrix, tuple) else matrix.double()
