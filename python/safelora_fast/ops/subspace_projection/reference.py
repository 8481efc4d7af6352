"""The projection in plain torch: the truth that every kernel is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


def projection(
    aligned_weight: torch.Tensor, base_weight: torch.Tensor, lora_b: torch.Tensor, *, normalize: str = "frobenius"
) -> torch.Tensor:
    """V·(Vᵀ·B) over ‖V‖_F or σ₁(V)², in the dtype of the inputs; give float64 for the truth."""
    aligned_weight, base_weight, lora_b = (tensor.detach() for tensor in (aligned_weight, base_weight, lora_b))
    v = aligned_weight - base_weight
    norm = torch.linalg.matrix_norm(v) if normalize == "frobenius" else torch.linalg.matrix_norm(v, ord=2).square()
    if norm == 0:
        return lora_b.clone()
    return v @ (v.mT @ lora_b) / norm


def refusal(tensors: Sequence[torch.Tensor]) -> str | None:  # noqa: ARG001
    """None: torch computes this anywhere."""
    return None


def subspace_projection(
    aligned_weight: torch.Tensor, base_weight: torch.Tensor, lora_b: torch.Tensor, *, normalize: str
) -> torch.Tensor:
    """The same in float64, given in lora_b's dtype."""
    exact = projection(aligned_weight.double(), base_weight.double(), lora_b.double(), normalize=normalize)
    return exact.to(lora_b.dtype)
