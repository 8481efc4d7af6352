"""Where the factors of one expert lie in the tensors that PEFT writes for `target_parameters`.

For a parameter of E experts PEFT stores lora_A as (r·E, a), expert-major, and lora_B as (b, r·E), rank-major: the
update of expert e is B[:, e::E] @ A[e·r:(e+1)·r, :]. It is (out, in), except where PEFT took the parameter for
(E, in, out) although it is (E, out, in) or the other way round; then it is the transpose, and lora_A holds the side
of the output.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safelora_fast.errors import PairingError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from safelora_fast.checkpoints.adapter import LoraModule

# Experts kept as (E, in, out); those that declare it (`is_transposed`) are known to PEFT since 0.19.
DECLARED = {"aria", "aria_text", "gpt_oss", "openai_privacy_filter"}
STORED_IN_OUT = DECLARED | {"llama4", "llama4_text"}
READS_HIDDEN = {"gate_up_proj", "gate_proj", "up_proj"}
WRITES_HIDDEN = {"down_proj"}
SIDES_BY_LAYOUT = (0, 19)


@dataclass(frozen=True)
class Slice:
    """A strided matrix in a tensor of the adapter, in elements."""

    key: str
    offset: int
    rows: int
    cols: int
    row_stride: int
    col_stride: int


def whole(key: str, shape: tuple[int, int]) -> Slice:
    """All of a factor."""
    return Slice(key, 0, shape[0], shape[1], shape[1], 1)


def expert_factors(module: LoraModule, expert: int, experts: int, *, swapped: bool) -> tuple[Slice, Slice]:
    """The factors left (out, r) and right (r, in) of one expert.

    Args:
        module: a module of kind "parameter".
        expert: its position among the experts.
        experts: how many there are.
        swapped: lora_A holds the side of the output.
    """
    total = module.rank
    rank, b, a = total // experts, module.left_shape[0], module.right_shape[1]
    side_b = Slice(module.left_key, expert, b, rank, total, experts)
    side_a = Slice(module.right_key, expert * rank * a, rank, a, a, 1)
    if not swapped:
        return side_b, side_a
    return transpose(side_a), transpose(side_b)


def transpose(matrix: Slice) -> Slice:
    """The same elements with rows and columns exchanged."""
    return Slice(matrix.key, matrix.offset, matrix.cols, matrix.rows, matrix.col_stride, matrix.row_stride)


def stored_in_out(parameter: str, shape: tuple[int, int], hidden_size: object, model_type: object) -> bool | None:
    """Whether a checkpoint keeps an expert as (in, out); `shape` is one expert's. None when nothing tells."""
    if shape[0] != shape[1] and hidden_size in shape:
        if parameter in READS_HIDDEN:
            return shape[0] == hidden_size
        if parameter in WRITES_HIDDEN:
            return shape[1] == hidden_size
    return None if model_type is None else model_type in STORED_IN_OUT


def sides_swapped(module: LoraModule, out: int, inner: int, model_type: object, peft_version: object) -> bool | None:
    """Whether lora_A holds the side of the output; by shapes, and by PEFT's version where they are square.

    Args:
        module: a module of kind "parameter".
        out: rows of the weight as (out, in).
        inner: its columns.
        model_type: of the checkpoint's configuration.
        peft_version: of the adapter's configuration; absent before PEFT 0.18.

    Returns:
        None when the shapes fit neither way.
    """
    shape = (module.left_shape[0], module.right_shape[1])
    if out != inner:
        return {(out, inner): False, (inner, out): True}.get(shape)
    if shape != (out, inner):
        return None
    version = re.match(r"(\d{1,9})\.(\d{1,9})", str(peft_version or ""))
    by_layout = version is not None and (int(version[1]), int(version[2])) >= SIDES_BY_LAYOUT
    if by_layout:
        return model_type in STORED_IN_OUT - DECLARED
    return model_type not in STORED_IN_OUT


def assign(
    modules: Sequence[LoraModule], weights: Mapping[str, tuple[int, int]], model_type: object, peft_version: object
) -> list[tuple[LoraModule, str, bool]]:
    """Tell which parameter each pair of factors stands for, since PEFT's keys name none.

    Args:
        modules: the pairs that PEFT nested on one module.
        weights: the parameters they may stand for, with one expert's (out, in).
        model_type: of the checkpoint's configuration.
        peft_version: of the adapter's configuration.

    Returns:
        For each pair its parameter, and whether lora_A holds the side of the output: the same for all of them.

    Raises:
        PairingError: when the shapes leave none or several.
    """
    name = modules[0].name
    found = list(_assignments(modules, weights, model_type, peft_version))
    shapes = ", ".join(str([module.left_shape[0], module.right_shape[1]]) for module in modules)
    known = ", ".join(f"{parameter} {list(shape)}" for parameter, shape in weights.items()) or "none"
    if not found:
        raise PairingError(f"{name}: its factors make updates of {shapes}, but the parameters there are {known}")
    if len(found) > 1:
        raise PairingError(
            f"{name}: its factors make updates of {shapes}, which may belong to several of {known}; the adapter does "
            "not say which: train with one target parameter at a time"
        )
    return found[0]


def _assignments(
    modules: Sequence[LoraModule], weights: Mapping[str, tuple[int, int]], model_type: object, peft_version: object
) -> Iterator[list[tuple[LoraModule, str, bool]]]:
    for chosen in itertools.permutations(weights, len(modules)):
        swaps = [
            sides_swapped(module, *weights[parameter], model_type, peft_version)
            for module, parameter in zip(modules, chosen, strict=True)
        ]
        decided = {
            swap
            for swap, parameter in zip(swaps, chosen, strict=True)
            if weights[parameter][0] != weights[parameter][1]
        }
        if None in swaps or len(decided) > 1:
            continue
        common = decided.pop() if decided else bool(swaps[0])
        yield [(module, parameter, bool(common)) for module, parameter in zip(modules, chosen, strict=True)]
