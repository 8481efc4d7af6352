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

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

GPUS = ("cuda", "xpu")  # "cuda" is AMD's device type too
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = (3, 3)  # the first whose kernels take tuples of pointers
# Said at every launch: a product and the sum that it goes into are rounded once, whatever this version's default is.
OPTIONS = {"enable_fp_fusion": True}


def refusal(tensors: Sequence[torch.Tensor]) -> str | None:
    """Why Triton cannot serve these tensors, or None; with none, what the machine alone forbids."""
    missing = _missing()
    if missing is not None:
        return missing
    if not tensors:
        return None if interpreted() or gpu() is not None else "torch finds no GPU"
    for tensor in tensors:
        if tensor.device.type not in GPUS and not (tensor.device.type == "cpu" and interpreted()):
            return f"a tensor is on {tensor.device}, and Triton serves GPUs"
        if tensor.dtype not in DTYPES:
            return f"a tensor is {str(tensor.dtype).removeprefix('torch.')}"
        if type(tensor) not in {torch.Tensor, torch.nn.Parameter} or tensor.layout != torch.strided:
            return f"a {type(tensor).__name__} need not have memory of its own"
    return None


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU; Triton reads this when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one while kernels are launched on its tensors."""
    return nullcontext() if device.type == "cpu" else getattr(torch, device.type).device(device)


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


def gpu() -> torch.device | None:
    """The GPU that torch uses by default, None where it finds none."""
    for kind in GPUS:
        if hasattr(torch, kind) and getattr(torch, kind).is_available():
            return torch.device(kind)
    return None
