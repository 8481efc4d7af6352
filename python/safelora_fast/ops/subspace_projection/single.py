"""The projection of one module by the kernels that project many."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from safelora_fast.ops.subspace_projection import eager

if TYPE_CHECKING:
    from types import ModuleType


def subspace_projection(
    kernels: ModuleType,
    aligned_weight: torch.Tensor,
    base_weight: torch.Tensor,
    lora_b: torch.Tensor,
    *,
    normalize: str,
) -> torch.Tensor:
    """V·(Vᵀ·B)/‖V‖_F by two launches of a backend's grouped kernels; σ₁(V) is left to torch."""
    if normalize == "spectral":
        return eager.subspace_projection(aligned_weight, base_weight, lora_b, normalize=normalize)
    pair, left = (aligned_weight.detach(), base_weight.detach()), lora_b.detach()
    inner, squares = kernels.transposed_products([pair], [left])
    (product,) = kernels.products([pair], inner)
    norm = squares.sqrt()
    return torch.where(norm > 0, product / norm, left.float()).to(lora_b.dtype)
