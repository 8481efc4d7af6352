"""The projections as operations of torch.library, so that torch.compile sees one node; they have no gradient."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from safelora_fast.ops.backends import choose
from safelora_fast.ops.subspace_projection.grouped import Projection, projected

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.ops.subspace_projection.grouped import Matrix


@torch.library.custom_op(  # type: ignore[untyped-decorator]
    "safelora_fast::subspace_projection",
    mutates_args=(),
    schema="(Tensor aligned_weight, Tensor base_weight, Tensor lora_b, str normalize) -> Tensor",
)
def projection(
    aligned_weight: torch.Tensor, base_weight: torch.Tensor, lora_b: torch.Tensor, normalize: str
) -> torch.Tensor:
    """C·B as one node of a graph."""
    backend = choose("subspace_projection", (aligned_weight, base_weight, lora_b)).module
    product: torch.Tensor = backend.subspace_projection(aligned_weight, base_weight, lora_b, normalize=normalize)
    return product.contiguous()


@projection.register_fake  # type: ignore[untyped-decorator]
def _(aligned_weight: torch.Tensor, base_weight: torch.Tensor, lora_b: torch.Tensor, normalize: str) -> torch.Tensor:  # noqa: ARG001
    return torch.empty(lora_b.shape, dtype=lora_b.dtype, device=lora_b.device)


def projections(matrices: Sequence[Matrix], factors: Sequence[torch.Tensor]) -> list[Projection]:
    """The projections of all modules as one node of a graph."""
    minuends = [matrix[0] if isinstance(matrix, tuple) else matrix for matrix in matrices]
    subtrahends = [matrix[1] for matrix in matrices if isinstance(matrix, tuple)]
    is_pair = [isinstance(matrix, tuple) for matrix in matrices]
    flat = iter(_projections(minuends, subtrahends, is_pair, list(factors)))
    results = []
    for pair, product, norm, *grams in zip(is_pair, *[flat] * _FIELDS, strict=True):
        results.append(Projection(product, norm if pair else torch.full_like(norm, math.nan), *grams))
    return results


_FIELDS = 5  # of a Projection


@torch.library.custom_op(  # type: ignore[untyped-decorator]
    "safelora_fast::subspace_projections",
    mutates_args=(),
    schema="(Tensor[] minuends, Tensor[] subtrahends, bool[] is_pair, Tensor[] factors) -> Tensor[]",
)
def _projections(
    minuends: Sequence[torch.Tensor],
    subtrahends: Sequence[torch.Tensor],
    is_pair: Sequence[bool],
    factors: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    others = iter(subtrahends)
    matrices = [(whole, next(others)) if pair else whole for whole, pair in zip(minuends, is_pair, strict=True)]
    results = []
    for pair, found in zip(is_pair, projected(matrices, factors), strict=True):
        # The NaN of a basis is put in outside: torch's checks compare results with ==.
        norm = found.v_norm if pair else torch.zeros_like(found.v_norm)
        results += [found.product, norm, found.gram, found.cross_gram, found.product_gram]
    # They lie side by side in one piece of memory, which results of an operation must not.
    return [tensor.clone() for tensor in results]


@_projections.register_fake  # type: ignore[untyped-decorator]
def _(minuends: Any, subtrahends: Any, is_pair: Any, factors: Any) -> list[torch.Tensor]:  # noqa: ARG001
    results = []
    for whole, factor in zip(minuends, factors, strict=True):
        rank = factor.shape[1]
        shapes = [(whole.shape[0], rank), (), *[(rank, rank)] * 3]
        results += [torch.empty(shape, dtype=torch.float32, device=factor.device) for shape in shapes]
    return results
