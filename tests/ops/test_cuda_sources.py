"""The machine code that NVRTC makes from the CUDA sources, for GPUs that need not be present."""

from __future__ import annotations

import pytest
from disassembly import ARCHITECTURES, kernels
from sanitizer_report import CUDA, TRITON, errors

from safelora_fast import _core
from safelora_fast.errors import BackendError
from safelora_fast.ops import cuda_runtime

NAMES = ["f32", "bf16", "f16"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
class TestFeatureDistance:
    @pytest.mark.parametrize("name", [f"{kernel}_{name}" for kernel in ("token_sums", "gradient") for name in NAMES])
    def test_hot_loops_read_16_bytes_at_a_time_from_registers_that_suffice(self, architecture, name):
        kernel = kernels("feature_distance.cu", architecture)[name]
        assert kernel.registers <= 64  # four blocks of 256 threads per multiprocessor, half of its capacity
        assert (kernel.stack, kernel.count("LDL"), kernel.count("STL")) == (0, 0, 0)
        assert kernel.count("LDG", "128") >= 2 * 4  # both tensors, unrolled four times
        if name.startswith("gradient"):
            assert kernel.count("STG", "128") >= 4
        else:
            assert kernel.count("DFMA") >= 3 * 4  # sums in float64

    @pytest.mark.parametrize("name", ["sequence_factors", "total_distance"])
    def test_the_small_kernels_do_not_spill(self, architecture, name):
        kernel = kernels("feature_distance.cu", architecture)[name]
        assert kernel.registers <= 64
        assert kernel.stack <= 16  # the stack frame of a call to the square root, on sm_80


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
class TestSubspaceProjection:
    @pytest.mark.parametrize("ranks", [16, 32])
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("kind", ["single", "pair"])
    @pytest.mark.parametrize("form", ["transposed", "straight"])
    def test_hot_loops_multiply_on_tensor_cores_what_they_read_16_bytes_at_a_time(
        self, architecture, form, kind, name, ranks
    ):
        kernel = kernels("subspace_projection.cu", architecture)[f"{form}_{kind}_{name}_{ranks}"]
        assert kernel.registers <= (192 if ranks == 16 else 240)  # two blocks of 128 threads per multiprocessor
        assert (kernel.stack, kernel.count("LDL"), kernel.count("STL")) == (0, 0, 0)
        assert kernel.count("LDG", "128", "CONSTANT") >= (8 if kind == "pair" else 4)
        # Products of the bfloat16 parts of float32, in a loop for whole groups and in one for any.
        parts = {"f32": 6, "f16": 5, "bf16": 5 if kind == "pair" else 3}[name]
        steps = 4 if name == "f32" else 8
        # Four ranks at a time, of 32 rows or of twice WIDTH columns of V.
        assert kernel.count("STG", "128") >= (4 if form == "straight" or name == "f32" else 8) * ranks // 16
        assert kernel.count("HMMA", "16816", "BF16") == 2 * parts * steps * ranks // 16
        assert kernel.count("HMMA", "TF32") == 0

    @pytest.mark.parametrize("name", ["add_chunks", "add_squares"])
    def test_the_small_kernels_do_not_spill(self, architecture, name):
        kernel = kernels("subspace_projection.cu", architecture)[name]
        assert kernel.registers <= 64
        assert kernel.stack == 0


def test_an_architecture_that_nvrtc_does_not_know_is_an_error_of_one_line():
    kernels("feature_distance.cu", "sm_90")  # skips without NVRTC
    with pytest.raises(BackendError, match=r"does not compile for sm_19 with NVRTC .*: .*gpu-architecture") as error:
        _core.cuda_kernels("feature_distance.cu", "sm_19", nvrtc=cuda_runtime.nvrtc_candidates())
    assert "\n" not in str(error.value)


def test_no_nvrtc_and_no_such_source():
    with pytest.raises(BackendError, match=r"NVRTC was not found: looked for /nowhere/libnvrtc\.so\.13"):
        _core.cuda_kernels("feature_distance.cu", "sm_90", nvrtc=["/nowhere/libnvrtc.so.13"])
    with pytest.raises(ValueError, match="no file of kernels"):
        _core.cuda_kernels("absent.cu", "sm_90", nvrtc=[])


def test_a_sanitizer_report_is_read_for_our_kernels_only():
    blocks = [
        "========= COMPUTE-SANITIZER\n",
        "========= Invalid __global__ read of size 4 bytes\n=========     at 0x70 in void at::native::add<float>(float *)\n",
        "========= Program hit cudaErrorNotReady (error 600) on CUDA API call to cudaEventQuery.\n",
        "========= Invalid __global__ write of size 4 bytes\n=========     at token_sums_bf16+0x70 in feature_distance.cu:91\n",
        "========= Error: Race reported between Write access at linear_loss+0x70\n",
    ]
    report = "=========\n".join(blocks)
    assert errors(report, CUDA) == [blocks[3].strip()]
    assert errors(report, f"{CUDA}|{TRITON}") == [blocks[3].strip(), blocks[4].strip()]
