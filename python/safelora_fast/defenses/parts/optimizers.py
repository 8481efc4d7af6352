"""Helpers for optimizers: step hooks, training and evaluation modes, and copies of the weights in the optimizer state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

SLOW_WEIGHTS = {"slow_params", "slow_buffer", "cached_params"}  # state keys of Lookahead
AVERAGES = {"x", "y", "z"}  # state keys of schedule-free: weights for evaluation, for gradients, and for steps


def unwrapped(optimizer: Any) -> Any:
    """Return the optimizer inside accelerate's wrapper. Step hooks of the wrapper itself never run."""
    while any(kind.__name__ == "AcceleratedOptimizer" for kind in type(optimizer).__mro__):
        optimizer = optimizer.optimizer
    return optimizer


def with_hooks(optimizer: Any) -> torch.optim.Optimizer | None:
    """Return the optimizer if it runs step hooks; None for DeepSpeed, wrappers, and LOMO (which steps in backward)."""
    if not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "fused_backward"):
        return None
    patched = getattr(type(optimizer).step, "hooked", False) and hasattr(optimizer, "_optimizer_step_post_hooks")
    return optimizer if patched else None


def has_modes(optimizer: Any) -> bool:
    """Whether the optimizer has `train()` and `eval()`, which may exchange the weights (schedule-free)."""
    return callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))


def weight_copies(optimizer: Any, parameter: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield tensors from which the optimizer may recompute the parameter: averages and slow weights."""
    state = getattr(optimizer, "state", None) or {}
    names = SLOW_WEIGHTS | (AVERAGES if has_modes(optimizer) else set())
    for name, value in state.get(parameter, {}).items():
        if name in names and isinstance(value, torch.Tensor) and value.shape == parameter.shape:
            yield value


def parameters_of(optimizer: Any) -> list[torch.Tensor]:
    """Return all parameters of the optimizer's groups."""
    return [parameter for group in getattr(optimizer, "param_groups", ()) for parameter in group["params"]]
