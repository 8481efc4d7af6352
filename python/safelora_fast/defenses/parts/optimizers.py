"""What an optimizer has beside the parameters: hooks around its steps, modes, and copies of the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

SLOW_WEIGHTS = {"slow_params", "slow_buffer", "cached_params"}  # Lookahead's
AVERAGES = {"x", "y", "z"}  # schedule-free: what is evaluated, trained at, and stepped


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper, whose own hooks never run."""
    while any(kind.__name__ == "AcceleratedOptimizer" for kind in type(optimizer).__mro__):
        optimizer = optimizer.optimizer
    return optimizer


def with_hooks(optimizer: Any) -> torch.optim.Optimizer | None:
    """The optimizer if hooks run around its steps; None for DeepSpeed's, for LOMO, which steps in backward, and for wrappers."""
    if not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "fused_backward"):
        return None
    patched = getattr(type(optimizer).step, "hooked", False) and hasattr(optimizer, "_optimizer_step_post_hooks")
    return optimizer if patched else None


def has_modes(optimizer: Any) -> bool:
    """Whether the optimizer is told of evaluation, where it may put other weights into the parameters (schedule-free)."""
    return callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))


def weight_copies(optimizer: Any, parameter: torch.Tensor) -> Iterator[torch.Tensor]:
    """Tensors from which the optimizer may compute the parameter again: its averages and slow weights."""
    state = getattr(optimizer, "state", None) or {}
    names = SLOW_WEIGHTS | (AVERAGES if has_modes(optimizer) else set())
    for name, value in state.get(parameter, {}).items():
        if name in names and isinstance(value, torch.Tensor) and value.shape == parameter.shape:
            yield value


def parameters_of(optimizer: Any) -> list[torch.Tensor]:
    """The parameters that the optimizer was given."""
    return [parameter for group in getattr(optimizer, "param_groups", ()) for parameter in group["params"]]
