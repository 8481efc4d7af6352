"""Slices of lora_A and lora_B for one expert in the tensors that PEFT writes for `target_parameters`.

For a parameter of E experts, PEFT stores lora_A as (r·E, a), expert-major, and lora_B as (b, r·E), rank-major. The
update of expert e is B[:, e::E] @ A[e·r:(e+1)·r, :]. It is normally (out, in). PEFT may take (E, in, out) for
(E, out, in), or the reverse. The update is then transposed, and lora_A has the output dimension ("swapped").
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safelora_fast.checkpoints.orientation import DECLARED, EXPERTS_IN_OUT
from safelora_fast.errors import PairingError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from safelora_fast.checkpoints.adapter import LoraModule

SIDES_BY_LAYOUT = (0, 19)  # first PEFT version that uses `is_transposed`


@dataclass(frozen=True)
class Slice:
    """A strided matrix inside an adapter tensor. Offset and strides count elements."""

    key: str
    offset: int
    rows: int
    cols: int
    row_stride: int
    col_stride: int


def whole(key: str, shape: tuple[int, int]) -> Slice:
    """Return a slice that covers all of lora_A or lora_B."""
    return Slice(key, 0, shape[0], shape[1], shape[1], 1)


def transpose(matrix: Slice) -> Slice:
    """Return the same elements with rows and columns exchanged."""
    return Slice(matrix.key, matrix.offset, matrix.cols, matrix.rows, matrix.col_stride, matrix.row_stride)


def expert_factors(module: LoraModule, expert: int, experts: int, *, swapped: bool) -> tuple[Slice, Slice]:
    """Return lora_B (out, r) and lora_A (r, in) of one expert.

    Args:
        module: a module of kind "parameter".
        expert: the index of the expert.
        experts: the number of experts.
        swapped: whether lora_A has the output dimension.
    """
    total = module.rank
    rank, b, a = total // experts, module.lora_b_shape[0], module.lora_a_shape[1]
    side_b = Slice(module.lora_b_key, expert, b, rank, total, experts)
    side_a = Slice(module.lora_a_key, expert * rank * a, rank, a, a, 1)
    return (transpose(side_a), transpose(side_b)) if swapped else (side_b, side_a)


def sides_swapped(module: LoraModule, out: int, inner: int, model_type: object, peft_version: object) -> bool | None:
    """Return whether lora_A has the output dimension.

    The shapes decide. For a square weight, the PEFT version and the model type decide.

    Args:
        module: a module of kind "parameter".
        out: rows of the weight as (out, in).
        inner: columns of the weight as (out, in).
        model_type: `model_type` in the checkpoint's configuration.
        peft_version: `peft_version` in the adapter's configuration; absent before PEFT 0.18.

    Returns:
        None if the shapes fit neither way.
    """
    shape = (module.lora_b_shape[0], module.lora_a_shape[1])
    if out != inner:
        return {(out, inner): False, (inner, out): True}.get(shape)
    if shape != (out, inner):
        return None
    version = re.match(r"(\d{1,9})\.(\d{1,9})", str(peft_version or ""))
    if version is not None and (int(version[1]), int(version[2])) >= SIDES_BY_LAYOUT:
        return model_type in EXPERTS_IN_OUT - DECLARED
    return model_type not in EXPERTS_IN_OUT


def assign(
    modules: Sequence[LoraModule], weights: Mapping[str, tuple[int, int]], model_type: object, peft_version: object
) -> list[tuple[LoraModule, str, bool]]:
    """Find the parameter of each pair of lora_A and lora_B by shape, since PEFT's keys do not name it.

    Args:
        modules: the pairs that PEFT nested on one module.
        weights: the candidate parameters, each with the shape (out, in) of one expert.
        model_type: `model_type` in the checkpoint's configuration.
        peft_version: `peft_version` in the adapter's configuration.

    Returns:
        For each pair, its parameter and whether it is swapped. All pairs have the same value of swapped.

    Raises:
        PairingError: no assignment fits the shapes, or several do.
    """
    found = list(_assignments(modules, weights, model_type, peft_version))
    if len(found) == 1:
        return found[0]
    updates = ", ".join(str([module.lora_b_shape[0], module.lora_a_shape[1]]) for module in modules)
    known = ", ".join(f"{parameter} {list(shape)}" for parameter, shape in weights.items()) or "none"
    if not found:
        raise PairingError(
            f"{modules[0].name}: its factors make updates of {updates}, but the parameters there are {known}"
        )
    raise PairingError(
        f"{modules[0].name}: its factors make updates of {updates}, which may belong to several of {known}; the adapter does "
        "not say which: train with one target parameter at a time"
    )


def _assignments(
    modules: Sequence[LoraModule], weights: Mapping[str, tuple[int, int]], model_type: object, peft_version: object
) -> Iterator[list[tuple[LoraModule, str, bool]]]:
    for chosen in itertools.permutations(weights, len(modules)):
        pairs = list(zip(modules, chosen, strict=True))
        swaps = [sides_swapped(module, *weights[name], model_type, peft_version) for module, name in pairs]
        decided = {swap for swap, name in zip(swaps, chosen, strict=True) if weights[name][0] != weights[name][1]}
        if None not in swaps and len(decided) <= 1:
            swapped = bool(decided.pop() if decided else swaps[0])
            yield [(module, name, swapped) for module, name in pairs]
