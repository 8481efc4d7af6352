"""Access to a LoRA matrix in training: whole, sharded by rows (FSDP2), or in DeepSpeed's float32 copy."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from safelora_fast.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import nn


def is_sharded(model: nn.Module) -> bool:
    """Return whether FSDP2 shards parts of a model, so that its forward pass is collective."""
    return any(kind.__name__ == "FSDPModule" for part in model.modules() for kind in type(part).__mro__)


def is_whole(tensors: Iterable[torch.Tensor]) -> bool:
    """Return whether each is a plain tensor that the optimizer updates in place: no shard, and no copy of DeepSpeed's."""
    return "deepspeed" not in sys.modules and {torch.Tensor, torch.nn.Parameter}.issuperset(map(type, tensors))


def held_rows(parameter: torch.Tensor) -> torch.Tensor:
    """Return this process's shard of a matrix, its rows in float32 without gradient. Do not modify them.

    DeepSpeed optimizes a float32 copy that is sharded over the processes, and overwrites the parameter from it. That
    copy is gathered whole on every process. Collective with DeepSpeed.
    """
    copy = _deepspeed_copy(parameter)
    return local_rows(parameter).detach().float() if copy is None else copy.detach().float()


def write_rows(parameter: torch.Tensor, rows: torch.Tensor) -> None:
    """Write the rows of :func:`held_rows` in the parameter's dtype; with DeepSpeed, also to its float32 copy."""
    with torch.no_grad():
        if "deepspeed" in sys.modules:
            from deepspeed.utils import safe_set_full_fp32_param

            safe_set_full_fp32_param(parameter, rows)
        local_rows(parameter).copy_(rows)


def matching_rows(parameter: torch.Tensor, whole: torch.Tensor, *, owner: str) -> torch.Tensor:
    """Return the rows of a whole matrix that match this process's shard of `parameter`, as a view.

    FSDP2 splits rows like `torch.chunk`, so the last processes may have fewer rows or none.

    Raises:
        SettingsError: the parameter is sharded, but not by rows.
    """
    for size, rank, _ in _shards(parameter, owner=owner):
        pieces = whole.chunk(size)
        whole = pieces[rank] if rank < len(pieces) else whole[:0]
    return whole


def sum_over_shards(
    parameters: Sequence[torch.Tensor], partial: Sequence[torch.Tensor], *, owner: str
) -> list[torch.Tensor]:
    """Sum the partial results that processes computed from their shards, in one message per mesh.

    Collective for sharded parameters; values of whole parameters are returned unchanged.
    """
    together: dict[tuple[Any, ...], list[int]] = {}
    for index, parameter in enumerate(parameters):
        together.setdefault(tuple(group for *_, group in _shards(parameter, owner=owner)), []).append(index)
    summed = list(partial)
    for groups, indices in together.items():
        if not groups:
            continue
        message = torch.cat([partial[index].flatten() for index in indices])
        for group in groups:
            distributed.all_reduce(message, group=group)
        pieces = message.split([partial[index].numel() for index in indices])
        for index, piece in zip(indices, pieces, strict=True):
            summed[index] = piece.view_as(partial[index])
    return summed


def _shards(parameter: Any, *, owner: str) -> list[tuple[int, int, Any]]:
    """Return (size, this process's rank, process group) of every mesh dimension that shards rows."""
    if not hasattr(parameter, "placements"):
        return []
    from torch.distributed.tensor import Replicate, Shard

    mesh = parameter.device_mesh
    cuts = []
    for dimension, placement in enumerate(parameter.placements):
        if isinstance(placement, Replicate):
            continue
        if type(placement) is not Shard or placement.dim != 0:
            raise SettingsError(
                f"{owner}: a lora_B of shape {tuple(parameter.shape)} is placed by {placement}: shard it by rows, "
                "as fully_shard does by default"
            )
        cuts.append((mesh.size(dimension), mesh.get_local_rank(dimension), mesh.get_group(dimension)))
    return cuts


def local_rows(parameter: Any) -> torch.Tensor:
    """Return this process's shard of a parameter, in its own dtype; the whole parameter if it is not sharded."""
    rows: torch.Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return rows


def _deepspeed_copy(parameter: torch.Tensor) -> torch.Tensor | None:
    """Return the whole float32 copy of a parameter that DeepSpeed optimizes, or None without DeepSpeed."""
    if "deepspeed" not in sys.modules:
        return None
    from deepspeed.utils import safe_get_full_fp32_param

    copy: torch.Tensor | None = safe_get_full_fp32_param(parameter)
    return copy
