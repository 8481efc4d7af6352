"""The choice of a backend, the environment variable, the self-test, and incomplete installations."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from safelora_fast.errors import BackendError, SettingsError, how_to_install
from safelora_fast.ops import (
    OPS,
    cuda_runtime,
    feature_distance,
    linear_kl,
    linear_kl_cross_entropy,
    subspace_projection,
    subspace_projections,
    triton_runtime,
)
from safelora_fast.ops.base import VARIABLE, outcomes, requested_backend
from safelora_fast.ops.feature_distance import OP as DISTANCE
from safelora_fast.ops.linear_kl import OP as LOSS
from safelora_fast.ops.self_test import largest_error, random_tensors, run_checks
from safelora_fast.ops.subspace_projection import native

ON_THE_CPU = {"feature_distance": "native", "linear_kl": "eager", "subspace_projection": "native"}
EVERY_OP = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


def results(op):
    """Results and gradients of an operation's examples."""
    return [
        tensor
        for example in op.examples(random_tensors(torch.device("cpu"), torch.float32))
        for tensor in outcomes(example)
    ]


@EVERY_OP
def test_tensors_on_the_cpu(op):
    choice = op.choose([torch.zeros(2)])
    assert choice.name == ON_THE_CPU[op.name]
    assert op.describe().startswith(f"CPU: {choice.name}; GPU: ")
    assert op.choose([torch.zeros(2, device="meta")]).name == "eager"
    assert "not triton: " in op.choose([torch.zeros(2, device="meta")]).reason


@EVERY_OP
def test_an_op_is_one_small_folder(op):
    files = {file.stem for file in (Path(triton_runtime.__file__).parent / op.name).glob("*.py")}
    assert len(files) <= 6
    assert {"__init__", "torch_impl", *op.backends} <= files


@EVERY_OP
def test_the_oracle_by_the_variable(op, monkeypatch):
    expected = results(op)
    monkeypatch.setenv(VARIABLE, "reference")
    assert op.choose([torch.zeros(2)]).name == "reference"
    assert op.describe() == "reference, by SAFELORA_FAST_BACKEND"
    exact = results(op)
    assert [tensor.dtype for tensor in exact] == [tensor.dtype for tensor in expected]
    assert largest_error(expected, exact) < 5e-6


@pytest.mark.parametrize("value", ["tritn", "native", "CUDA"])
def test_an_unknown_name_is_one_line(monkeypatch, value):
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(
        SettingsError, match=f"SAFELORA_FAST_BACKEND is '{value}'; it must be reference, triton or cuda"
    ):
        requested_backend()


@pytest.mark.parametrize(
    ("name", "reason"),
    [("triton", "a tensor is on cpu, and Triton serves GPUs"), ("cuda", "a tensor is on cpu, not on an NVIDIA GPU")],
)
def test_a_backend_that_cannot_serve_says_why(monkeypatch, name, reason):
    pytest.importorskip("triton")
    monkeypatch.setenv(VARIABLE, name)
    with pytest.raises(
        BackendError, match=f"SAFELORA_FAST_BACKEND={name} cannot serve feature_distance: {reason}; unset it"
    ):
        results(DISTANCE)


def test_an_operation_without_such_a_backend_is_served_as_by_default(monkeypatch):
    assert "cuda" not in LOSS.names
    monkeypatch.setenv(VARIABLE, "cuda")
    assert LOSS.choose([torch.zeros(2)]).name == "eager"


class Wrapped(torch.Tensor):
    """A subclass, such as a distributed tensor: its address need not point to its values."""


def test_what_kernels_can_read():
    plain, backend = torch.zeros(1, 1, 1), DISTANCE.backend("native")
    assert backend.unsupported_reason([plain, torch.nn.Parameter(plain)]) is None
    assert backend.unsupported_reason([plain, plain.double()]) == "a tensor is float64"
    assert backend.unsupported_reason([plain.to("meta")]) == "a tensor is on meta"
    assert "memory of its own" in backend.unsupported_reason([plain.to_sparse()])
    assert "Wrapped" in backend.unsupported_reason([plain.as_subclass(Wrapped)])


def test_triton_without_a_compiler_is_a_reason(monkeypatch):
    """Triton builds its launcher at the first launch. This is checked before, so that torch can serve."""
    driver = pytest.importorskip("triton.runtime.driver").driver

    class NoCompiler:
        def get_current_target(self):
            raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    monkeypatch.setattr(driver, "_active", NoCompiler())
    monkeypatch.setattr(triton_runtime, "_is_served", lambda _: True)
    triton_runtime.launcher_error.cache_clear()
    try:
        choice = DISTANCE.choose([torch.zeros(2, device="meta")])
    finally:
        triton_runtime.launcher_error.cache_clear()
    assert choice.name == "eager"
    assert "not triton: triton cannot build its launcher (Failed to find C compiler. Please specify" in choice.reason


def test_self_test_passes_here_and_fails_where_a_kernel_is_wrong(monkeypatch):
    checks = list(run_checks())
    assert {(check.operation, check.backend) for check in checks} >= set(ON_THE_CPU.items())
    assert all(check.passed for check in checks)
    assert all(check.error > 0 for check in checks if check.backend == "native" and check.dtype == torch.float32)
    monkeypatch.setattr(native.Backend, "project_one", lambda _, pair, lora_b, normalize: 1.01 * lora_b)  # noqa: ARG005
    failed = [check for check in run_checks() if not check.passed]
    assert {(check.operation, check.backend) for check in failed} == {("subspace_projection", "native")}
    monkeypatch.setattr(native.Backend, "project_one", lambda *_: 1 / 0)
    assert {check.failure for check in run_checks() if not check.passed} == {"ZeroDivisionError: division by zero"}


STATES, HEAD, MASK, LABELS = torch.ones(1, 3, 4), torch.ones(5, 4), torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 3)
MATRIX, WEIGHTS = torch.ones(4, 3), {"kl_weight": 1.0, "cross_entropy_weight": 1.0}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: subspace_projection(MATRIX, MATRIX.numpy(), MATRIX),
            r"base_weight is a numpy\.ndarray.*from_numpy\(base_weight\)",
        ),
        (lambda: subspace_projection(MATRIX, MATRIX, [[1.0]]), r"lora_b is a list.*torch\.as_tensor\(lora_b\)"),
        (lambda: subspace_projections([(MATRIX, MATRIX.numpy())], [MATRIX]), r"operands\[1\] is a numpy\.ndarray"),
        (lambda: feature_distance([STATES.numpy()], [STATES], MASK), r"features\[0\] is a numpy\.ndarray"),
        (lambda: feature_distance([STATES], [STATES], MASK.numpy()), r"mask is a numpy\.ndarray"),
        (lambda: feature_distance(STATES.numpy(), [STATES], MASK), r"features is a ndarray: it must be a list"),
        (lambda: linear_kl(STATES, STATES.numpy(), HEAD, MASK), r"reference_hidden is a numpy\.ndarray"),
        (lambda: linear_kl(STATES, STATES, np.ones((5, 4)), MASK), r"head_weight is a numpy\.ndarray"),
        (
            lambda: linear_kl_cross_entropy(STATES, STATES, HEAD, MASK.numpy(), LABELS, **WEIGHTS),
            r"mask is a numpy\.ndarray",
        ),
    ],
)
def test_an_array_where_a_tensor_belongs(call, message):
    with pytest.raises(TypeError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


def python(code):
    """Run code in a separate process, needed for checks of imports; return its output."""
    variables = {name: value for name, value in os.environ.items() if name != VARIABLE}
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    run = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.split("\n")


def test_importing_touches_neither_triton_nor_a_gpu():
    code = """
        import safelora_fast, sys
        assert "torch" not in sys.modules
        import safelora_fast.ops, torch
        from safelora_fast.ops import cuda_runtime, feature_distance
        import safelora_fast.ops.feature_distance.cuda
        feature_distance([torch.ones(1, 2, 3)], [torch.zeros(1, 2, 3)], torch.ones(1, 2, dtype=torch.bool))
        assert not torch.cuda.is_initialized()
        assert cuda_runtime.runtime.cache_info().currsize == 0
        with open("/proc/self/maps") as maps:
            assert not any("libcuda.so" in line for line in maps)
        print("triton" in sys.modules)
    """
    assert python(code)[0] == "False"


def test_operations_without_torch():
    code = """
        import sys
        sys.modules["torch"] = None
        from safelora_fast.errors import MissingDependencyError
        try:
            import safelora_fast.ops
        except MissingDependencyError as error:
            print(error)
    """
    assert python(code)[0] == f"safelora_fast.ops needs torch: {how_to_install('train')}"


@pytest.fixture
def triton_is(monkeypatch):
    """Replace Triton by another module or None."""

    def replace(module):
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        monkeypatch.setitem(sys.modules, "triton", module)
        triton_runtime._missing.cache_clear()

    yield replace
    triton_runtime._missing.cache_clear()


@pytest.mark.parametrize(
    ("version", "is_old"), [("3.2.0", True), ("3.3.0", False), ("3.10.1+git", False), ("4.0", False)]
)
def test_a_triton_without_tuples_of_pointers(triton_is, version, is_old):
    """The oldest supported torch ships Triton 3.2, which is not supported, so torch serves."""
    module = ModuleType("triton")
    module.__version__ = version
    triton_is(module)
    choice = DISTANCE.choose([torch.zeros(2, device="meta")])
    assert choice.name == "eager"
    reason = f"not triton: triton {version} is too old, 3.3 or newer is needed: update torch, which brings it"
    assert (reason in choice.reason) == is_old


def test_torch_for_the_cpu_alone(triton_is, monkeypatch):
    """A CPU-only build has neither CUDA nor triton. Every operation works; requests for a GPU say what is missing."""
    triton_is(None)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cuda_runtime, "DRIVERS", ("libabsent.so.1",))
    cuda_runtime.runtime.cache_clear()
    for op in OPS:
        assert results(op)
    description = DISTANCE.describe()
    assert description.startswith("CPU: native; GPU: none here (triton: triton is not installed); cuda: ")
    assert "libabsent.so.1" in description
    assert DISTANCE.choose([torch.zeros(2, device="meta")]).reason == (
        "not native: a tensor is on meta; not triton: triton is not installed"
    )
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(BackendError, match="=triton cannot serve linear_kl: triton is not installed; unset it"):
        results(LOSS)


def test_torch_with_cuda_but_no_gpu(monkeypatch):
    """Messages without a driver or GPU. The interpreter is off, because it would replace the GPU."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "GPU: none here (triton: torch finds no GPU)" in DISTANCE.describe()
