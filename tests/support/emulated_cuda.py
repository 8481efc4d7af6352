"""CUDA kernels without a GPU: compiled as C++, and run by a stub driver that uses host memory as device memory.

`emulated(monkeypatch)` makes the `cuda` backends of the operations accept CPU tensors.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from safelora_fast import _core
from safelora_fast.ops import cuda_runtime

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "rust" / "cuda" / "tests" / "stand_in"
STREAM = 0x77


@functools.cache
def libraries() -> tuple[Path, Path]:
    """Return the stub driver with its kernels, and the stub of NVRTC. They are cached under target/ by source digest."""
    sources = sorted([*SOURCES.iterdir(), *(ROOT / "rust" / "cuda" / "kernels").iterdir()])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    folder = ROOT / "target" / f"emulated-cuda-{digest}"
    if not folder.is_dir():
        if shutil.which("g++") is None or shutil.which("gcc") is None:
            pytest.skip("needs gcc and g++ to compile the kernels for the CPU")
        folder.parent.mkdir(exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix="emulated-cuda-", dir=folder.parent))
        _build(partial)
        try:
            partial.rename(folder)
        except OSError:  # another process has built it first
            shutil.rmtree(partial)
    return folder / "libdriver.so", folder / "libnvrtc.so"


def _build(folder: Path) -> None:
    kernels = [SOURCES / f"{name}.cpp" for name in ("launch", "feature_distance", "subspace_projection")]
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    common = ["-O2", "-fPIC", "-fvisibility=hidden", *warnings]
    part = folder / "driver.o"
    subprocess.run(["gcc", *common, "-c", SOURCES / "driver.c", "-o", part], check=True)
    subprocess.run(["g++", "-std=c++17", *common, "-shared", *kernels, part, "-o", folder / "libdriver.so"], check=True)
    subprocess.run(["gcc", *common, "-shared", SOURCES / "driver.c", "-o", folder / "libhost.so"], check=True)
    subprocess.run(["gcc", *common, "-shared", SOURCES / "nvrtc.c", "-o", folder / "libnvrtc.so"], check=True)


def record() -> list[str]:
    """Return the driver calls so far, one per line."""
    function = ctypes.CDLL(str(libraries()[0])).stand_in_record
    function.restype = ctypes.c_char_p
    return function().decode().splitlines()


def emulated(monkeypatch: pytest.MonkeyPatch, *, runs_kernels: bool = True) -> None:
    """Run the operations' `cuda` modules on CPU tensors with the stub driver. `runs_kernels=False` runs only host code."""
    driver, nvrtc = libraries()
    if not runs_kernels:
        driver = driver.with_name("libhost.so")
    runtime = _core.Cuda(driver=[str(driver)], nvrtc=[str(nvrtc)])
    monkeypatch.setattr(cuda_runtime, "runtime", lambda: runtime)
    monkeypatch.setattr(cuda_runtime, "place", lambda device: (device.index or 0, STREAM))
    ctypes.CDLL(str(driver)).stand_in_forget()
