"""Operands of the operations must be tensors of torch."""

from __future__ import annotations

import torch


def require_tensors(**named: object) -> None:
    """Refuse an array, a list or another thing where a tensor belongs.

    Args:
        named: operands by the names that the caller knows them by, e.g. `hidden` or `operands[1]`.

    Raises:
        TypeError: naming the operand, what it is, and how to make a tensor of it.
    """
    for name, value in named.items():
        if isinstance(value, torch.Tensor):
            continue
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        how = "torch.from_numpy" if kind.startswith("numpy.") else "torch.as_tensor"
        raise TypeError(f"{name} is a {kind}, it must be a torch.Tensor: pass {how}({name.partition('[')[0]})")
