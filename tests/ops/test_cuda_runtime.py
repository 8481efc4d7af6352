"""Finding the CUDA driver and compiler at run time, and what happens without them."""

from __future__ import annotations

import pytest
import torch
from emulated_cuda import emulated

from safelora_fast import _core
from safelora_fast.errors import BackendError
from safelora_fast.ops import cuda_runtime
from safelora_fast.ops.cuda_runtime import CudaBackend


@pytest.fixture(autouse=True)
def _fresh():
    cuda_runtime.runtime.cache_clear()
    yield
    cuda_runtime.runtime.cache_clear()


def test_no_driver_is_a_reason_of_one_line(monkeypatch):
    monkeypatch.setattr(cuda_runtime, "DRIVERS", ("libno-driver.so.1",))
    with pytest.raises(BackendError, match="the CUDA driver was not found: looked for libno-driver"):
        cuda_runtime.runtime()
    assert CudaBackend().unsupported_reason([]).startswith("the CUDA driver was not found")
    assert "\n" not in CudaBackend().unsupported_reason([])


def test_tensors_that_are_not_on_a_gpu_are_refused_before_a_driver_is_looked_for(monkeypatch):
    monkeypatch.setattr(cuda_runtime, "runtime", lambda: pytest.fail("looked for a driver"))
    assert CudaBackend().unsupported_reason([torch.zeros(2)]) == "a tensor is on cpu, not on an NVIDIA GPU"


def test_a_gpu_that_the_driver_does_not_list_is_refused(monkeypatch):
    emulated(monkeypatch)
    device = type("Device", (), {"type": "cuda", "index": 5})
    tensor = torch.zeros(2)
    monkeypatch.setattr(torch.Tensor, "device", device)
    assert CudaBackend().unsupported_reason([tensor]) == "there is no CUDA device 5: the driver lists 2"


def test_a_driver_without_a_gpu_is_refused(monkeypatch):
    emulated(monkeypatch)
    assert CudaBackend().unsupported_reason([]) is None
    monkeypatch.setattr(cuda_runtime, "runtime", lambda: type("NoGpu", (), {"device_count": 0}))
    assert CudaBackend().unsupported_reason([]) == "the CUDA driver lists no GPU"


def test_torchs_own_compiler_comes_first():
    candidates = cuda_runtime.nvrtc_candidates()
    assert candidates[-3:] == ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]
    assert not any("builtins" in candidate for candidate in candidates)
    if torch.version.cuda and len(candidates) > 3:
        assert f".so.{torch.version.cuda.split('.')[0]}" in candidates[0]


def test_the_cache_is_in_the_users_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cuda_runtime.cache_folder() == str(tmp_path / "safelora_fast" / "kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cuda_runtime.cache_folder() == str(tmp_path / ".cache" / "safelora_fast" / "kernels")


def test_a_driver_of_no_use_is_an_error_of_python():
    with pytest.raises(BackendError, match="has no cuInit; update the CUDA driver"):
        _core.Cuda(driver=["libc.so.6"], nvrtc=[])
