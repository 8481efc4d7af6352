"""The projection of one module by the kernels that project many."""

from __future__ import annotations

import torch

from safelora_fast.ops.subspace_projection import eager, grouped_cuda
from safelora_fast.ops.subspace_projection.grouped_cuda import refusal

__all__ = ["refusal", "subspace_projection"]


def subspace_projection(
    aligned_weight: torch.Tensor, base_weight: torch.Tensor, lora_b: torch.Tensor, *, normalize: str
) -> torch.Tensor:
    """V·(Vᵀ·B)/‖V‖_F by two launches; σ₁(V) is left to torch."""
    if normalize == "spectral":
        return eager.subspace_projection(aligned_weight, base_weight, lora_b, normalize=normalize)
    pair, left = (aligned_weight.detach(), base_weight.detach()), lora_b.detach()
    inner, squares = grouped_cuda.transposed_products([pair], [left])
    (product,) = grouped_cuda.products([pair], inner)
    norm = squares.sqrt()
    return torch.where(norm > 0, product / norm, left.float()).to(lora_b.dtype)
