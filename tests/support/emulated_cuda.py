"""CUDA kernels without a GPU: compiled as C++, run by a stand-in driver whose device memory is that of the process.

`emulated(monkeypatch)` lets the `cuda` backends of the operations take tensors of the CPU.
"""

from __future__ import annotations

import ctypes
import functools
import os
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
FOLDER = "SAFELORA_TEST_EMULATED_CUDA"


@functools.cache
def libraries() -> tuple[Path, Path]:
    """The driver with its kernels, and the compiler; built once a run, or by the process that started this one."""
    if built := os.environ.get(FOLDER):
        return Path(built) / "libdriver.so", Path(built) / "libnvrtc.so"
    if shutil.which("g++") is None or shutil.which("gcc") is None:
        pytest.skip("needs gcc and g++ to compile the kernels for the CPU")
    folder = Path(tempfile.mkdtemp(prefix="emulated-cuda-"))
    kernels = [SOURCES / f"{name}.cpp" for name in ("launch", "feature_distance", "subspace_projection")]
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    common = ["-O2", "-fPIC", "-fvisibility=hidden", *warnings]
    driver, nvrtc, part = folder / "libdriver.so", folder / "libnvrtc.so", folder / "driver.o"
    subprocess.run(["gcc", *common, "-c", SOURCES / "driver.c", "-o", part], check=True)
    subprocess.run(["g++", "-std=c++17", *common, "-shared", *kernels, part, "-o", driver], check=True)
    subprocess.run(["gcc", *common, "-shared", SOURCES / "nvrtc.c", "-o", nvrtc], check=True)
    return driver, nvrtc


def record() -> list[str]:
    """The driver's calls so far, one a line."""
    function = ctypes.CDLL(str(libraries()[0])).stand_in_record
    function.restype = ctypes.c_char_p
    return function().decode().splitlines()


def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the operations' `cuda` modules run on tensors of the CPU, by the stand-in driver."""
    driver, nvrtc = libraries()
    runtime = _core.Cuda(driver=[str(driver)], nvrtc=[str(nvrtc)])
    monkeypatch.setattr(cuda_runtime, "runtime", lambda: runtime)
    monkeypatch.setattr(cuda_runtime, "place", lambda device: (device.index or 0, STREAM))
    ctypes.CDLL(str(driver)).stand_in_forget()
