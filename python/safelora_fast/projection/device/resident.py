"""Detection of aligned weights that a loaded model already has on the device, so that only the base must be read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from safelora_fast import _core
from safelora_fast.projection.device.reader import dtype_of

if TYPE_CHECKING:
    from safelora_fast.checkpoints.geometry import Block
    from safelora_fast.projection.jobs import Group, Plan

ROWS = 16  # rows of each block to compare with the checkpoint


def resident_weights(model: Any, plan: Plan, device: torch.device) -> dict[str, torch.Tensor]:
    """Return the model's weights that equal those of the aligned checkpoint, by module name in the plan.

    A weight is accepted if its device, dtype and shape match, and if 16 evenly spaced rows of each block are bitwise
    equal, because training changes nearly every row. All other weights (quantized, other dtypes, stacked experts) are
    read from files.

    Args:
        model: a PeftModel.
        plan: the plan of its adapter.
        device: the device of the projection.
    """
    modules = dict(model.base_model.model.named_modules())
    found = {}
    for planned in plan.modules:
        module = modules.get(planned.name)
        layer = getattr(module, "base_layer", None)
        weight = getattr(layer, "weight", None)
        if weight is not None and _fits(weight, planned.group, device) and _same_rows(weight, planned.group):
            found[planned.name] = weight.detach()
    return found


def _fits(weight: Any, group: Group, device: torch.device) -> bool:
    stored = sum(block.rows for block in group.aligned), group.aligned[0].cols
    return (
        type(weight) in {torch.Tensor, torch.nn.Parameter}
        and weight.device == device
        and tuple(weight.shape) == stored
        and all(dtype_of(block) == weight.dtype for block in group.aligned)
    )


def _same_rows(weight: torch.Tensor, group: Group) -> bool:
    start = 0
    for block in group.aligned:
        rows = torch.linspace(0, block.rows - 1, min(ROWS, block.rows), dtype=torch.float64).round().long()
        ours = weight.detach()[(start + rows).to(weight.device)].cpu().contiguous()
        if not torch.equal(ours.view(torch.uint8), _read_rows(block, rows.tolist()).view(torch.uint8)):
            return False
        start += block.rows
    return True


def _read_rows(block: Block, rows: list[int]) -> torch.Tensor:
    read = torch.empty(len(rows), block.cols, dtype=dtype_of(block))
    size = block.cols * read.element_size()
    targets = [(read.data_ptr() + index * size, size) for index in range(len(rows))]
    _core.copy_views([block.cut(row, 1).view() for row in rows], targets, threads=1)
    return read
