"""The projection on the CPU, by the extension module, on the tensors' own memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from safelora_fast import _core
from safelora_fast.ops.operands import require_tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def refusal(tensors: Sequence[torch.Tensor]) -> str | None:
    """Why the kernels cannot read these tensors, or None."""
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"a tensor is on {tensor.device}"
    return None


def check(aligned_weight: torch.Tensor, base_weight: torch.Tensor, lora_b: torch.Tensor) -> None:
    """Raise ValueError when the operands do not fit one another."""
    require_tensors(aligned_weight=aligned_weight, base_weight=base_weight, lora_b=lora_b)
    named = {"aligned_weight": aligned_weight, "base_weight": base_weight, "lora_b": lora_b}
    for name, tensor in named.items():
        if tensor.ndim != 2:
            raise ValueError(f"{name} must be a matrix, not of shape {list(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}; float32, bfloat16 and float16 can be projected")
        if tensor.device != lora_b.device:
            raise ValueError(f"{name} is on {tensor.device}, but lora_b on {lora_b.device}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires grad, which the projection does not propagate; call it under torch.no_grad()"
            )
    if aligned_weight.shape != base_weight.shape:
        raise ValueError(f"aligned_weight is {list(aligned_weight.shape)}, but base_weight {list(base_weight.shape)}")
    if lora_b.shape[0] != aligned_weight.shape[0]:
        raise ValueError(
            f"lora_b has {lora_b.shape[0]} rows, but the weights have {aligned_weight.shape[0]}: B is [out_features, rank]"
        )


def subspace_projection(
    aligned_weight: torch.Tensor, base_weight: torch.Tensor, lora_b: torch.Tensor, *, normalize: str
) -> torch.Tensor:
    """Weights whose rows are contiguous, or whose columns are (a transposed view), are read in place; others are copied."""
    aligned, base = aligned_weight.detach(), base_weight.detach()
    transposed = not (_rows_contiguous(aligned) and _rows_contiguous(base))
    if transposed:
        aligned, base = aligned.mT, base.mT
        if not (_rows_contiguous(aligned) and _rows_contiguous(base)):
            aligned, base, transposed = aligned.mT.contiguous(), base.mT.contiguous(), False
    left = lora_b.detach()
    output = torch.empty_like(left, memory_format=torch.contiguous_format)
    v_norm = _core.subspace_projection(
        _weight(aligned),
        _weight(base),
        _factor(left),
        _factor(output),
        normalize=normalize,  # type: ignore[arg-type]
        transposed=transposed,
    )
    return output if v_norm > 0 else output.copy_(left)


def _rows_contiguous(matrix: torch.Tensor) -> bool:
    return bool(matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1])


def _weight(matrix: torch.Tensor) -> tuple[int, str, int, int, int]:
    return matrix.data_ptr(), DTYPES[matrix.dtype], *matrix.shape, matrix.stride(0)


def _factor(matrix: torch.Tensor) -> tuple[int, str, int, int, int, int]:
    return matrix.data_ptr(), DTYPES[matrix.dtype], *matrix.shape, *matrix.stride()
