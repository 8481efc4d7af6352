"""SafeLoRA's step with launches that are planned once, on CUDA kernels emulated on the CPU, compared with float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from emulated_cuda import emulated, record
from tiny_models import fill_adapter, random_subspace, tiny_peft_model

from safelora_fast.defenses.parts.safe_modules import SafeModules
from safelora_fast.errors import TrainingError
from safelora_fast.ops.base import served_by

pytestmark = pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer")


@pytest.fixture
def step(monkeypatch):
    """Project with the emulated kernels and check all against float64; return the plan and the launched kernels."""
    emulated(monkeypatch)

    def run(modules, copies=None):
        before = [(module.lora_b.detach().clone(), module.lora_a.detach().clone()) for module in modules.modules]
        more = [copy.clone() for module in modules.modules for copy in (copies(module.lora_b) if copies else ())]
        launched = len(record())
        with served_by("cuda"):
            cosine = modules.project(1, copies)
        cosines = []
        for module, (lora_b, lora_a) in zip(modules.modules, before, strict=True):
            vectors = modules.vectors(module).double()
            exact = vectors @ (vectors.T @ lora_b.double())
            assert (module.lora_b.double() - exact).norm() <= 1e-6 * exact.norm()
            whole = lora_b.double().view(len(lora_b), -1) @ lora_a.double()
            cosines.append(((exact.view(len(exact), -1) @ lora_a.double()).norm() / whole.norm()).item())
        assert cosine == pytest.approx(min(cosines), rel=1e-6)
        if copies:
            for module, copy in zip(modules.modules, more, strict=True):
                vectors, (found,) = modules.vectors(module).double(), copies(module.lora_b)
                assert torch.allclose(found.double(), vectors @ (vectors.T @ copy.double()), atol=1e-6)
        launches = [line.split()[1] for line in record()[launched:] if line.startswith("cuLaunchKernel")]
        return modules._prepared, launches

    return run


@pytest.fixture
def model():
    """lora_B of two ranks, one with a bias, and lora_A of several widths."""
    lora = {"r": 4, "rank_pattern": {"q_proj": 3}, "lora_bias": True}
    made = tiny_peft_model(layers=2, lora=lora)
    for name, parameter in made.named_parameters():
        if name.endswith("lora_B.default.bias"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    return made


def safe_modules(model):
    return SafeModules(model.get_base_model(), random_subspace(model), owner="test")


def test_a_step_takes_three_launches_and_is_planned_once(model, step):
    modules = safe_modules(model)
    plan, launches = step(modules)
    assert [kernel.rpartition("_")[0] for kernel in launches if not kernel.startswith("add")] == [
        "transposed_single_f32", "straight_single_f32", "transposed_single_f32"
    ]  # fmt: skip
    versions = [module.lora_b._version for module in modules.modules]
    for module in modules.modules:
        module.lora_b.data.normal_(generator=torch.Generator().manual_seed(1))
    again, _ = step(modules)
    assert again is plan
    assert all(module.lora_b._version > seen for module, seen in zip(modules.modules, versions, strict=True))


def test_replaced_memory_and_copies_are_planned_anew(model, step):
    modules = safe_modules(model)
    plan, _ = step(modules)
    fill_adapter(model, seed=9)  # replaces `.data` of every matrix
    replaced, _ = step(modules)
    assert replaced is not plan
    slow = {module.lora_b: torch.randn(module.lora_b.shape) for module in modules.modules}
    with_copies, launches = step(modules, lambda parameter: [slow[parameter]])
    assert with_copies is not replaced
    assert len([kernel for kernel in launches if not kernel.startswith("add")]) == 3


def test_what_cannot_be_read_in_place_is_projected_too(model, step):
    modules = safe_modules(model)
    first = modules.modules[0].lora_b
    first.data = first.data.T.contiguous().T
    (_, _, prepared), _ = step(modules)
    assert prepared is None


@pytest.mark.parametrize("of_copy", [False, True])
def test_an_infinity_is_named_and_nothing_written(model, monkeypatch, of_copy):
    modules = safe_modules(model)
    slow = {module.lora_b: torch.randn(module.lora_b.shape) for module in modules.modules}
    bad = modules.modules[4]
    (slow[bad.lora_b] if of_copy else bad.lora_b.data)[3] = torch.inf
    before = [module.lora_b.detach().clone() for module in modules.modules]
    emulated(monkeypatch)
    with served_by("cuda"), pytest.raises(TrainingError, match=f"lora_B of module {bad.name} holds NaN or Inf"):
        modules.project(7, lambda parameter: [slow[parameter]])
    assert modules._prepared[2] is not None
    assert all(torch.equal(module.lora_b, left) for module, left in zip(modules.modules, before, strict=True))


def test_vectors_follow_a_model_to_another_device(model):
    modules = safe_modules(model)
    module = modules.modules[0]
    assert modules._held_vectors(module).device.type == "cpu"
    moved = replace(module, lora_b=module.lora_b.to("meta"))  # any other device
    assert modules._held_vectors(moved).device.type == "meta"
