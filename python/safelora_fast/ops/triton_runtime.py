"""What the Triton backends share: whether they can serve, and how they launch.

Triton is imported when the first kernel is needed, never before. With `TRITON_INTERPRET=1` in the environment from the
start its interpreter runs the kernels on the CPU, which is how they are tested without a GPU.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from safelora_fast.ops.base import Backend, unreadable_reason

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

GPUS = ("cuda", "xpu")  # "cuda" is AMD's device type too
OLDEST = (3, 3)  # the first whose kernels take tuples of pointers
# Said at every launch: a product and the sum that it goes into are rounded once, whatever this version's default is.
OPTIONS = {"enable_fp_fusion": True}


class TritonBackend(Backend):
    """Triton kernels on a GPU, or on the CPU by the interpreter."""

    def unsupported_reason(self, tensors: Sequence[torch.Tensor]) -> str | None:
        """Say why Triton cannot serve these tensors, or None."""
        reason = _missing()
        if reason is not None:
            return reason
        if not tensors and not interpreted() and gpu() is None:
            return "torch finds no GPU"
        reason = unreadable_reason(tensors, _is_served, ", and Triton serves GPUs")
        if reason is not None or interpreted():
            return reason
        return launcher_error()


def _is_served(device: torch.device) -> bool:
    return device.type in GPUS or (device.type == "cpu" and interpreted())


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU; Triton reads this when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one while kernels are launched on its tensors."""
    return nullcontext() if device.type == "cpu" else getattr(torch, device.type).device(device)


def dtype(of_torch: torch.dtype) -> Any:
    """Triton's name of a dtype."""
    from triton import language

    return getattr(language, str(of_torch).removeprefix("torch."))


def tiles(count: int, tile: int) -> int:
    """How many tiles hold so many elements."""
    return -(-count // tile)


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count`, and at least 2."""
    return 1 << max(count - 1, 1).bit_length()


@functools.cache
def _missing() -> str | None:
    try:
        version = str(importlib.import_module("triton").__version__)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:  # a broken installation raises anything
        return f"triton cannot be imported ({error})"
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST:
        return f"triton {version} is too old, {'.'.join(map(str, OLDEST))} or newer is needed: update torch, which brings it"
    return None


@functools.cache
def launcher_error() -> str | None:
    """Say why Triton cannot launch kernels on the GPU: it builds its launcher with a C compiler and Python's headers."""
    try:
        driver = importlib.import_module("triton.runtime.driver").driver
        driver.active.get_current_target()
    except Exception as error:  # whatever the compiler or the driver says
        return f"triton cannot build its launcher ({' '.join(str(error).split())}): it needs a C compiler and Python.h"
    return None


def gpu() -> torch.device | None:
    """The GPU that torch uses by default, None where it finds none."""
    for kind in GPUS:
        if hasattr(torch, kind) and getattr(torch, kind).is_available():
            return torch.device(kind)
    return None
