"""Which backend serves, what the variable may say, and installations that lack something."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from safelora_fast.errors import BackendError, SettingsError
from safelora_fast.ops import backends, feature_distance, linear_kl, subspace_projection, subspace_projections
from safelora_fast.ops.self_test import run_checks

OPERATIONS = ["feature_distance", "linear_kl", "subspace_projection", "subspace_projections"]
ON_THE_CPU = {
    "feature_distance": "native",
    "linear_kl": "eager",
    "subspace_projection": "native",
    "subspace_projections": "eager",
}


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv(backends.VARIABLE, raising=False)


def results():
    """One result of every operation."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    mask = torch.ones(2, 5, dtype=torch.bool)
    states, others = random(2, 5, 8), random(2, 5, 8)
    return [
        feature_distance([states], [others], mask),
        linear_kl(states, others, random(40, 8), mask),
        subspace_projection(random(12, 9), random(12, 9), random(12, 3)),
        subspace_projections([(random(12, 9), random(12, 9))], [random(12, 3)])[0].product,
    ]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_tensors_on_the_cpu(operation):
    choice = backends.choose(operation, [torch.zeros(2)])
    assert choice.name == ON_THE_CPU[operation]
    assert backends.choose(operation, [torch.zeros(2, device="meta")]).name == "eager"
    assert "not triton: " in backends.choose(operation, [torch.zeros(2, device="meta")]).reason


def test_the_reference_by_the_variable(monkeypatch):
    expected = results()
    monkeypatch.setenv(backends.VARIABLE, "reference")
    assert all(backends.choose(operation, [torch.zeros(2)]).name == "reference" for operation in OPERATIONS)
    for ours, theirs in zip(results(), expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_gradients_by_the_reference(monkeypatch):
    states = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    others, head, mask = states.detach() + 0.1, torch.eye(8), torch.ones(2, 5, dtype=torch.bool)
    mask[1] = False

    def gradients():
        loss = feature_distance([states], [others], mask) + linear_kl(states, others, head, mask)
        return torch.autograd.grad(loss, states)[0]

    expected = gradients()
    monkeypatch.setenv(backends.VARIABLE, "reference")
    assert torch.allclose(gradients(), expected, rtol=1e-4, atol=1e-7)
    assert not expected[1].any()


@pytest.mark.parametrize("value", ["tritn", "native", "CUDA"])
def test_an_unknown_name_is_one_line(monkeypatch, value):
    monkeypatch.setenv(backends.VARIABLE, value)
    with pytest.raises(
        SettingsError, match=f"SAFELORA_FAST_BACKEND is '{value}'; it must be reference, triton or cuda"
    ):
        results()


def test_a_backend_that_cannot_serve_says_why(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv(backends.VARIABLE, "triton")
    message = "SAFELORA_FAST_BACKEND=triton cannot serve feature_distance: a tensor is on cpu, and Triton serves GPUs"
    with pytest.raises(BackendError, match=message):
        results()


def test_an_operation_without_such_a_form_is_served_as_by_default(monkeypatch):
    assert not backends.has_form("linear_kl", "cuda")
    monkeypatch.setenv(backends.VARIABLE, "cuda")
    assert backends.choose("linear_kl", [torch.zeros(2)]).name == "eager"


def test_every_form_is_told_apart(monkeypatch):
    for operation in OPERATIONS:
        assert backends.describe(operation).startswith(f"CPU: {ON_THE_CPU[operation]}; GPU: ")
    monkeypatch.setenv(backends.VARIABLE, "reference")
    assert backends.describe("linear_kl") == "reference, by SAFELORA_FAST_BACKEND"


def test_self_test_passes_here_and_fails_where_a_kernel_is_wrong(monkeypatch):
    checks = list(run_checks())
    assert {(check.operation, check.backend) for check in checks} >= set(ON_THE_CPU.items())
    assert all(check.passed for check in checks)
    assert all(check.error > 0 for check in checks if check.backend == "native" and check.dtype == torch.float32)
    from safelora_fast.ops.subspace_projection import native

    monkeypatch.setattr(native, "subspace_projection", lambda *given, **_: 1.01 * given[2])
    failed = [check for check in run_checks() if not check.passed]
    assert {(check.operation, check.backend) for check in failed} == {("subspace_projection", "native")}
    monkeypatch.setattr(native, "subspace_projection", lambda *_given, **_named: 1 / 0)
    assert {check.failure for check in run_checks() if not check.passed} == {"ZeroDivisionError: division by zero"}


def python(code, **environment):
    """Run code in a process of its own; what it prints."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    variables.pop(backends.VARIABLE, None)
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.split("\n")


BLOCKED = """
    import sys
    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == {name!r}:
                raise ModuleNotFoundError("No module named " + name, name=name)
    sys.meta_path.insert(0, Blocked())
"""


def test_importing_touches_neither_triton_nor_a_gpu():
    code = """
        import safelora_fast, sys
        assert "torch" not in sys.modules
        import safelora_fast.ops, torch
        from safelora_fast.ops import feature_distance
        feature_distance([torch.ones(1, 2, 3)], [torch.zeros(1, 2, 3)], torch.ones(1, 2, dtype=torch.bool))
        assert not torch.cuda.is_initialized()
        print("triton" in sys.modules)
    """
    assert python(code)[0] == "False"


def test_without_triton():
    code = (
        BLOCKED.format(name="triton")
        + """
    import torch
    from safelora_fast.ops import backends, linear_kl
    states = torch.ones(1, 2, 3)
    linear_kl(states, 2 * states, torch.eye(3), torch.ones(1, 2, dtype=torch.bool))
    print(backends.choose("feature_distance", [states.to("meta")]).reason)
    print(backends.describe("linear_kl"))
    import os
    os.environ["SAFELORA_FAST_BACKEND"] = "triton"
    try:
        linear_kl(states, states, torch.eye(3), torch.ones(1, 2, dtype=torch.bool))
    except backends.BackendError as error:
        print(error)
    """
    )
    reason, description, error, *_ = python(code)
    assert reason == "not native: a tensor is on meta; not triton: triton is not installed"
    assert "GPU: none here (triton: triton is not installed)" in description
    assert error == (
        "SAFELORA_FAST_BACKEND=triton cannot serve linear_kl: triton is not installed; unset it, or name another backend"
    )


@pytest.mark.parametrize(
    ("version", "is_old"), [("3.2.0", True), ("3.3.0", False), ("3.10.1+git", False), ("4.0", False)]
)
def test_a_triton_without_tuples_of_pointers(version, is_old):
    """The oldest torch that is supported brings Triton 3.2: it is refused, and torch serves."""
    code = f"""
    import sys, types, torch
    sys.modules["triton"] = types.ModuleType("triton")
    sys.modules["triton"].__version__ = {version!r}
    from safelora_fast.ops import backends
    choice = backends.choose("feature_distance", [torch.zeros(2, device="meta")])
    print(choice.name, choice.reason)
    """
    (found, *_) = python(code)
    assert found.startswith("eager ")
    reason = f"not triton: triton {version} is too old, 3.3 or newer is needed: update torch, which brings it"
    assert (reason in found) == is_old


def test_torch_for_the_cpu_alone():
    """Its build knows no CUDA, and comes without triton; every operation works, and what names a GPU says what is missing."""
    code = (
        BLOCKED.format(name="triton")
        + """
    import os, torch
    torch.version.cuda = None
    torch.cuda.is_available = lambda: False
    from safelora_fast.ops import backends, cuda_runtime, feature_distance, linear_kl, subspace_projections
    from safelora_fast.projection.device.stream import torch_device
    cuda_runtime.DRIVERS = ("libabsent.so.1",)
    states, mask = torch.ones(1, 2, 3), torch.ones(1, 2, dtype=torch.bool)
    assert float(feature_distance([states], [2 * states], mask, "none")) == 6
    assert float(linear_kl(states, states, torch.eye(3), mask)) == 0
    assert float(subspace_projections([torch.eye(3)], [torch.eye(3)])[0].product.sum()) == 3
    print(backends.describe("feature_distance"))
    os.environ["SAFELORA_FAST_BACKEND"] = "cuda"
    for ask in (lambda: feature_distance([states], [states], mask), lambda: torch_device("cuda:3")):
        try:
            ask()
        except backends.BackendError as error:
            print(error)
    """
    )
    description, on_the_cpu, device, *_ = python(code, CUDA_VISIBLE_DEVICES="")
    assert description.startswith("CPU: native; GPU: none here (triton: triton is not installed); cuda: ")
    assert "libabsent.so.1" in description
    assert on_the_cpu == (
        "SAFELORA_FAST_BACKEND=cuda cannot serve feature_distance: the tensors are on cpu, not on a GPU of NVIDIA; unset it, or "
        "name another backend"
    )
    assert device.startswith("device 'cuda:3' cannot be used (")


def test_torch_with_cuda_but_no_gpu():
    """What torch says where its driver or its GPU is missing; the interpreter would stand in, so it is off."""
    code = """
        import torch
        torch.cuda.is_available = lambda: False
        from safelora_fast.ops import backends
        print(backends.describe("feature_distance"))
    """
    assert (
        "GPU: none here (triton: torch finds no GPU)" in python(code, TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="")[0]
    )
