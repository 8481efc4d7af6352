"""The projection by torch operations in float32, on any device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelora_fast.ops.subspace_projection.reference import projection

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


def refusal(tensors: Sequence[torch.Tensor]) -> str | None:  # noqa: ARG001
    """None: torch computes this anywhere."""
    return None


def subspace_projection(
    aligned_weight: torch.Tensor, base_weight: torch.Tensor, lora_b: torch.Tensor, *, normalize: str
) -> torch.Tensor:
    """V·(Vᵀ·B) over ‖V‖_F or σ₁(V)²."""
    given = projection(aligned_weight.float(), base_weight.float(), lora_b.float(), normalize=normalize)
    return given.to(lora_b.dtype)
