"""The projection on the CPU, by the extension module, in the tensors' own memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from safelora_fast import _core
from safelora_fast.ops.base import DTYPE_NAMES, NativeBackend
from safelora_fast.ops.subspace_projection.torch_impl import Torch

if TYPE_CHECKING:
    from safelora_fast.ops.subspace_projection.torch_impl import Normalize


class Backend(NativeBackend, Torch):
    """Projects one module with weights read in place. Many modules, and products alone, are left to torch."""

    def project_one(
        self, pair: tuple[torch.Tensor, torch.Tensor], lora_b: torch.Tensor, normalize: Normalize
    ) -> torch.Tensor:
        """Return C·B of one module, in the dtype of B.

        Weights with contiguous rows or contiguous columns (a transposed view) are read in place; others are copied.
        """
        (aligned, base), lora_b = (part.detach() for part in pair), lora_b.detach()
        transposed = not (_rows_contiguous(aligned) and _rows_contiguous(base))
        if transposed:
            aligned, base = aligned.mT, base.mT
            if not (_rows_contiguous(aligned) and _rows_contiguous(base)):
                aligned, base, transposed = aligned.mT.contiguous(), base.mT.contiguous(), False
        output = torch.empty_like(lora_b, memory_format=torch.contiguous_format)
        v_norm = _core.subspace_projection(
            _view(aligned)[:-1],
            _view(base)[:-1],
            _view(lora_b),
            _view(output),
            normalize=normalize,
            transposed=transposed,
        )
        return output if v_norm > 0 else output.copy_(lora_b)


def _rows_contiguous(matrix: torch.Tensor) -> bool:
    return bool(matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1])


def _view(matrix: torch.Tensor) -> tuple[int, str, int, int, int, int]:
    return matrix.data_ptr(), DTYPE_NAMES[matrix.dtype], *matrix.shape, *matrix.stride()
