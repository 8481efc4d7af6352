"""CUDA driver, compiler and current stream for the extension module, loaded when a kernel is first needed."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from safelora_fast import _core
from safelora_fast.errors import BackendError
from safelora_fast.ops.base import Backend, unreadable_reason

if TYPE_CHECKING:
    from collections.abc import Sequence

DRIVERS = ("libcuda.so.1", "libcuda.so")


@lru_cache(maxsize=1)
def runtime() -> _core.Cuda:
    """Return the CUDA driver; the first call initializes it.

    Raises:
        BackendError: the driver is missing or fails to initialize.
    """
    return _core.Cuda(driver=DRIVERS, nvrtc=nvrtc_candidates(), cache=cache_folder())


def place(device: torch.device) -> tuple[int, int]:
    """Return the index of a CUDA device and the address of torch's current stream on it."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, int(torch.cuda.current_stream(index).cuda_stream)


class CudaBackend(Backend):
    """CUDA kernels that work on the tensors' own memory."""

    def unsupported_reason(self, tensors: Sequence[torch.Tensor]) -> str | None:
        """Return why no kernel can read these tensors, or None."""
        reason = unreadable_reason(tensors, _is_nvidia, ", not on an NVIDIA GPU")
        if reason is not None:
            return reason
        try:
            if runtime().device_count == 0:
                return "the CUDA driver lists no GPU"
            for index in {tensor.device.index for tensor in tensors}:
                runtime().capability(index)
        except BackendError as error:
            return str(error)
        return None


def _is_nvidia(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


def nvrtc_candidates() -> list[str]:
    """Return where NVRTC may be: torch's own copy first, whose version fits the driver, then the system's."""
    packages = Path(torch.__file__).parents[1]
    folders = [packages / "torch" / "lib", *sorted((packages / "nvidia").glob("*/lib"), reverse=True)]
    major = (torch.version.cuda or "").split(".")[0]
    found = [str(path) for folder in folders for path in sorted(folder.glob("libnvrtc[.-]*so*"))]
    found = [path for path in found if "builtins" not in path and ".alt." not in path]
    found.sort(key=lambda path: not (major and f".so.{major}" in path))
    return [*found, "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]


def cache_folder() -> str | None:
    """Return the folder for compiled kernels in the user's cache, or None for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return str((Path(base) if base else Path.home() / ".cache") / "safelora_fast" / "kernels")
    except RuntimeError:
        return None


def is_captured(device: torch.device) -> bool:
    """Return whether work on this device is being captured into a CUDA graph."""
    return device.type == "cuda" and bool(torch.cuda.is_current_stream_capturing())
