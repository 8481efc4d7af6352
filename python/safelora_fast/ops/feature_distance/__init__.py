"""Feature distance between the hidden states of two models (LDIFS)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from safelora_fast.ops.backends import choose
from safelora_fast.ops.feature_distance import library
from safelora_fast.ops.feature_distance.arguments import Comparison, Normalize
from safelora_fast.ops.feature_distance.autograd import distance
from safelora_fast.ops.feature_distance.reference import feature_distance_reference
from safelora_fast.ops.operands import require_tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["feature_distance", "feature_distance_reference"]


def feature_distance(
    features: Sequence[torch.Tensor],
    reference_features: Sequence[torch.Tensor],
    mask: torch.Tensor,
    normalize: Normalize = "sequence",
    segments: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum over blocks, mean over sequences, of ‖x − x₀‖² (Kaczér et al., arXiv 2508.06249: LDIFS).

    Never computed as 2 − 2⟨x, x₀⟩, which cancels: from ‖h − h₀‖², ⟨h − h₀, h₀⟩ and ‖h₀‖². On the CPU these are summed in
    float64 in one read, the gradient takes one more, and both are the same bits for any number of threads. On a GPU one
    launch of a Triton kernel reads all blocks and one writes all gradients, with sums in float32 and the same bits every
    run; on other devices and for float64 the same algebra runs in torch. `SAFELORA_FAST_BACKEND` chooses another backend
    (ops/backends.py). Differentiable once, in `features` only. Tokens that do not count may hold anything.
    `torch.compile(fullgraph=True)` takes it as one operation.

    Args:
        features: per block, hidden states [batch, tokens, hidden]; float32, bfloat16, float16 or float64.
        reference_features: per block, hidden states of the reference, same shapes.
        mask: [batch, tokens] bool, the tokens that count.
        normalize: what is scaled to unit length: "sequence", each sequence's tokens × hidden; "token", each token;
            "none", nothing.
        segments: [batch, tokens] int; in packed rows, tokens of one row with one number are a sequence. None: each
            row is one.

    Returns:
        A float32 scalar (float64 for float64 features); zero where no token counts.

    Raises:
        TypeError: an operand is no tensor.
        ValueError: shapes differ, or `normalize` is unknown.
        BackendError: the backend that `SAFELORA_FAST_BACKEND` names cannot serve these tensors.
        RuntimeError: a gradient of the gradient is asked for.
    """
    _check_tensors(features, reference_features, mask, segments)
    _check(features, reference_features, mask, normalize, segments)
    references = [reference.detach() for reference in reference_features]
    comparison = Comparison(features, references, mask.to(torch.bool), normalize, segments)
    if torch.compiler.is_compiling():
        return library.distance(comparison)
    return distance(choose("feature_distance", (*features, *references)).module, comparison)


def _check_tensors(
    features: Sequence[torch.Tensor],
    reference_features: Sequence[torch.Tensor],
    mask: torch.Tensor,
    segments: torch.Tensor | None,
) -> None:
    require_tensors(mask=mask, **({} if segments is None else {"segments": segments}))
    for name, blocks in (("features", features), ("reference_features", reference_features)):
        if isinstance(blocks, list | tuple):
            require_tensors(**{f"{name}[{index}]": block for index, block in enumerate(blocks)})
        elif not isinstance(blocks, torch.Tensor):
            raise TypeError(
                f"{name} is a {type(blocks).__name__}: it must be a list, one tensor [batch, tokens, hidden] a block"
            )


def _check(
    features: Sequence[torch.Tensor],
    reference_features: Sequence[torch.Tensor],
    mask: torch.Tensor,
    normalize: str,
    segments: torch.Tensor | None,
) -> None:
    if normalize not in {"sequence", "token", "none"}:
        raise ValueError(f'normalize is {normalize!r}, it must be "sequence", "token" or "none"')
    if isinstance(features, torch.Tensor) or isinstance(reference_features, torch.Tensor):
        raise ValueError("features and reference features are lists, one tensor [batch, tokens, hidden] a block")
    if mask.is_floating_point():
        raise ValueError(f"mask is {mask.dtype}: it must say of each token whether it counts, not how much")
    if len(features) != len(reference_features) or not features:
        raise ValueError(f"{len(features)} blocks of features and {len(reference_features)} of reference features")
    for block, reference in zip(features, reference_features, strict=True):
        if not (block.is_floating_point() and reference.is_floating_point()):
            raise ValueError(f"features are {block.dtype}, reference features {reference.dtype}: they must be floats")
        if block.shape != reference.shape or block.shape[:2] != mask.shape or block.dim() != 3:
            raise ValueError(
                f"features {tuple(block.shape)}, reference {tuple(reference.shape)} and mask {tuple(mask.shape)} "
                "disagree"
            )
    if segments is not None and segments.shape != mask.shape:
        raise ValueError(f"segments {tuple(segments.shape)} and mask {tuple(mask.shape)} disagree")
