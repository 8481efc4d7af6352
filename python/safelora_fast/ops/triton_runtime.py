"""Shared by the Triton backends: whether they can serve, and how they launch.

Triton is imported only when the first kernel is needed. If the environment has `TRITON_INTERPRET=1` from the start,
Triton's interpreter runs the kernels on the CPU. That is how they are tested without a GPU.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from safelora_fast.ops.base import GPUS, Backend, gpu, unreadable_reason

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

OLDEST = (3, 3)  # the first version whose kernels take tuples of pointers
# Passed at every launch: fuse multiply-adds (one rounding), whatever this version's default is.
OPTIONS = {"enable_fp_fusion": True}


class TritonBackend(Backend):
    """Triton kernels on a GPU, or on the CPU by the interpreter."""

    def unsupported_reason(self, tensors: Sequence[torch.Tensor]) -> str | None:
        """Return why Triton cannot serve these tensors, or None."""
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
    """Return whether Triton's interpreter replaces the GPU. Triton checks this when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current device while kernels are launched on its tensors."""
    return nullcontext() if device.type == "cpu" else getattr(torch, device.type).device(device)


def dtype(of_torch: torch.dtype) -> Any:
    """Return Triton's dtype for a torch dtype."""
    from triton import language

    return getattr(language, str(of_torch).removeprefix("torch."))


def tiles(count: int, tile: int) -> int:
    """Return how many tiles cover `count` elements."""
    return -(-count // tile)


def power_of_two(count: int) -> int:
    """Return the smallest power of two that is at least `count` and at least 2."""
    return 1 << max(count - 1, 1).bit_length()


@functools.cache
def _missing() -> str | None:
    try:
        version = str(importlib.import_module("triton").__version__)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:  # a broken installation can raise anything
        return f"triton cannot be imported ({error})"
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST:
        return f"triton {version} is too old, {'.'.join(map(str, OLDEST))} or newer is needed: update torch, which brings it"
    return None


@functools.cache
def launcher_error() -> str | None:
    """Return why Triton cannot build its launcher, which needs a C compiler and Python's headers; None if it can."""
    try:
        driver = importlib.import_module("triton.runtime.driver").driver
        driver.active.get_current_target()
    except Exception as error:  # any error of the compiler or the driver
        return f"triton cannot build its launcher ({' '.join(str(error).split())}): it needs a C compiler and Python.h"
    return None
