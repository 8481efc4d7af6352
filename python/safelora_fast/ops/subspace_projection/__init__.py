"""C·B for one module, with SafeLoRA's C = V·Vᵀ/‖V‖_F or its spectral normalisation; and for all modules at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from safelora_fast.ops.backends import choose
from safelora_fast.ops.subspace_projection import library, native
from safelora_fast.ops.subspace_projection.grouped import Projection, check, projected
from safelora_fast.ops.subspace_projection.reference import projection as reference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.ops.subspace_projection.grouped import Matrix

__all__ = ["Projection", "reference", "subspace_projection", "subspace_projections"]


def subspace_projection(
    aligned_weight: torch.Tensor,
    base_weight: torch.Tensor,
    lora_b: torch.Tensor,
    *,
    normalize: Literal["frobenius", "spectral"] = "frobenius",
) -> torch.Tensor:
    """Project B onto the alignment subspace of one module: C·B with V = aligned_weight − base_weight.

    Hsu et al. 2024 (arXiv 2405.16833), equation 2, as V·(Vᵀ·B)/‖V‖_F, so that neither V nor C is formed. On the CPU the
    weights are read where they lie; on a GPU each of two passes is a Triton kernel; elsewhere, and for the spectral
    norm on a GPU, the same algebra runs in torch. `SAFELORA_FAST_BACKEND` chooses another backend (ops/backends.py).

    Args:
        aligned_weight: [out_features, in_features]; float32, bfloat16 or float16.
        base_weight: the same shape; its dtype may differ.
        lora_b: [out_features, rank]; any strides.
        normalize: "frobenius" divides V·Vᵀ by ‖V‖_F, as the paper does; "spectral" by σ₁(V)², for a largest gain of 1.

    Returns:
        A new tensor like lora_b, on its device and in its dtype, without gradient. It equals lora_b where V is zero.

    Raises:
        ValueError: when shapes, dtypes or devices do not fit, or an input requires grad while gradients are recorded.
        BackendError: the backend that `SAFELORA_FAST_BACKEND` names cannot serve these tensors.
    """
    native.check(aligned_weight, base_weight, lora_b)
    if torch.compiler.is_compiling():
        compiled: torch.Tensor = library.projection(aligned_weight, base_weight, lora_b, normalize)
        return compiled
    backend = choose("subspace_projection", (aligned_weight, base_weight, lora_b)).module
    product: torch.Tensor = backend.subspace_projection(aligned_weight, base_weight, lora_b, normalize=normalize)
    return product


def subspace_projections(matrices: Sequence[Matrix], factors: Sequence[torch.Tensor]) -> list[Projection]:
    """Project the B of every module, each onto its own alignment subspace (Hsu et al. 2024, arXiv 2405.16833).

    With a pair of weights V = aligned − base it is the paper's C·B, C = V·Vᵀ/‖V‖_F, as V·(VᵀB)/‖V‖_F; with an
    orthonormal basis U_k it is P_k·B = U_k·(U_kᵀB). Neither V, C nor P_k is formed. On a GPU each of the passes is one
    launch for all modules that are alike in dtypes and layout, longest first; on the CPU the modules take turns in torch.
    Sums are float32, with products of float32 split rather than rounded to tf32, in an order that depends on shapes alone.

    Args:
        matrices: per module (aligned, base), [m, n] each, or U_k [m, k]; float32, bfloat16 or float16, rows or columns
            contiguous (others are copied).
        factors: per module B [m, r], on the device of its matrix; any strides.

    Raises:
        ValueError: shapes or devices do not fit, or there is no module.
        BackendError: the backend that `SAFELORA_FAST_BACKEND` names cannot serve these tensors.
    """
    check(matrices, factors, 0)
    if torch.compiler.is_compiling():
        return library.projections(matrices, factors)
    return projected(matrices, factors)
