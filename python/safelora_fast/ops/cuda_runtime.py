"""CUDA as the extension module needs it: driver, compiler and stream, found when a kernel is first wanted."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from safelora_fast import _core
from safelora_fast.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

DRIVERS = ("libcuda.so.1", "libcuda.so")


@lru_cache(maxsize=1)
def runtime() -> _core.Cuda:
    """The driver of this machine; the first call initialises it.

    Raises:
        BackendError: there is none, or it refuses.
    """
    return _core.Cuda(driver=DRIVERS, nvrtc=nvrtc_candidates(), cache=cache_folder())


def place(device: torch.device) -> tuple[int, int]:
    """The number of a CUDA device, and the address of torch's current stream there."""
    import torch

    index = torch.cuda.current_device() if device.index is None else device.index
    return index, int(torch.cuda.current_stream(index).cuda_stream)


def refusal(tensors: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype]) -> str | None:
    """Why no kernel can read these tensors, in a line, or None; with no tensors, why none can run on this machine."""
    import torch

    for tensor in tensors:
        if type(tensor) not in {torch.Tensor, torch.nn.Parameter} or tensor.layout != torch.strided:
            return f"{type(tensor).__name__} of layout {tensor.layout} has no memory of its own"
        if tensor.device.type != "cuda" or torch.version.hip is not None:
            return f"the tensors are on {tensor.device}, not on a GPU of NVIDIA"
        if tensor.dtype not in dtypes:
            return f"the tensors are {str(tensor.dtype).removeprefix('torch.')}"
    try:
        if runtime().device_count == 0:
            return "the CUDA driver lists no GPU"
        for index in {tensor.device.index for tensor in tensors}:
            runtime().capability(index)
    except BackendError as error:
        return str(error)
    return None


def nvrtc_candidates() -> list[str]:
    """Where NVRTC may be: torch's own first, whose version fits the driver as torch does, then what the system finds."""
    import torch

    packages = Path(torch.__file__).parents[1]
    folders = [packages / "torch" / "lib", *sorted((packages / "nvidia").glob("*/lib"), reverse=True)]
    major = (torch.version.cuda or "").split(".")[0]
    found = [str(path) for folder in folders for path in sorted(folder.glob("libnvrtc[.-]*so*"))]
    found = [path for path in found if "builtins" not in path and ".alt." not in path]
    found.sort(key=lambda path: not (major and f".so.{major}" in path))
    return [*found, "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]


def cache_folder() -> str | None:
    """Where compiled kernels are kept: in the user's cache, or nowhere for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return str((Path(base) if base else Path.home() / ".cache") / "safelora_fast" / "kernels")
    except RuntimeError:
        return None
