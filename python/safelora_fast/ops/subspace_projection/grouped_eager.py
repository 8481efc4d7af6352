"""Products of many tall matrices with thin factors by torch, one module after the other."""

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
    results, squares = [], []
    for matrix, factor in zip(matrices, factors, strict=True):
        values = _values(matrix)
        results.append(values.mT @ factor.float())
        squares.append(values.square().sum() if isinstance(matrix, tuple) else values.new_zeros(()))
    return results, torch.stack(squares)


def products(matrices: Sequence[Matrix], factors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """M·X of every module."""
    return [_values(matrix) @ factor.float() for matrix, factor in zip(matrices, factors, strict=True)]


def _values(matrix: Matrix) -> torch.Tensor:
    return matrix[0].float() - matrix[1].float() if isinstance(matrix, tuple) else matrix.float()
