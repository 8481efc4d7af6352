"""C·B for one module, with SafeLoRA's C = V·Vᵀ/‖V‖_F or its spectral normalisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from safelora_fast.ops.subspace_projection import native
from safelora_fast.ops.subspace_projection.reference import subspace_projection as reference

if TYPE_CHECKING:
    import torch

__all__ = ["reference", "subspace_projection"]


def subspace_projection(
    aligned_weight: torch.Tensor,
    base_weight: torch.Tensor,
    lora_b: torch.Tensor,
    *,
    normalize: Literal["frobenius", "spectral"] = "frobenius",
) -> torch.Tensor:
    """Project B onto the alignment subspace of one module: C·B with V = aligned_weight − base_weight.

    Hsu et al. 2024 (arXiv 2405.16833), equation 2, as V·(Vᵀ·B)/‖V‖_F, so that neither V nor C is formed. On the CPU the
    weights are read where they lie; on other devices the same algebra runs in torch.

    Args:
        aligned_weight: [out_features, in_features]; float32, bfloat16 or float16.
        base_weight: the same shape; its dtype may differ.
        lora_b: [out_features, rank]; any strides.
        normalize: "frobenius" divides V·Vᵀ by ‖V‖_F, as the paper does; "spectral" by σ₁(V)², for a largest gain of 1.

    Returns:
        A new tensor like lora_b, on its device and in its dtype, without gradient. It equals lora_b where V is zero.

    Raises:
        ValueError: when shapes, dtypes or devices do not fit, or an input requires grad while gradients are recorded.
    """
    native.check(aligned_weight, base_weight, lora_b)
    if lora_b.device.type == "cpu":
        return native.subspace_projection(aligned_weight, base_weight, lora_b, normalize=normalize)
    return reference(aligned_weight.float(), base_weight.float(), lora_b.float(), normalize=normalize).to(lora_b.dtype)
