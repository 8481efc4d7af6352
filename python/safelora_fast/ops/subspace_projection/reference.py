"""The projection in plain torch: the truth that every kernel is compared with."""

from __future__ import annotations

import torch


def subspace_projection(
    aligned_weight: torch.Tensor, base_weight: torch.Tensor, lora_b: torch.Tensor, *, normalize: str = "frobenius"
) -> torch.Tensor:
    """V·(Vᵀ·B) over ‖V‖_F or σ₁(V)², in the dtype of the inputs; give float64 for the truth."""
    aligned_weight, base_weight, lora_b = (tensor.detach() for tensor in (aligned_weight, base_weight, lora_b))
    v = aligned_weight - base_weight
    norm = torch.linalg.matrix_norm(v) if normalize == "frobenius" else torch.linalg.matrix_norm(v, ord=2).square()
    if norm == 0:
        return lora_b.clone()
    return v @ (v.mT @ lora_b) / norm
