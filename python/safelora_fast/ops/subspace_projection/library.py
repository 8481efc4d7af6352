"""The projection as an operation of torch.library, so that torch.compile sees one node; it has no gradient."""

from __future__ import annotations

import torch

from safelora_fast.ops.backends import choose


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
    projected: torch.Tensor = backend.subspace_projection(aligned_weight, base_weight, lora_b, normalize=normalize)
    return projected.contiguous()


@projection.register_fake  # type: ignore[untyped-decorator]
def _(aligned_weight: torch.Tensor, base_weight: torch.Tensor, lora_b: torch.Tensor, normalize: str) -> torch.Tensor:  # noqa: ARG001
    return torch.empty(lora_b.shape, dtype=lora_b.dtype, device=lora_b.device)
