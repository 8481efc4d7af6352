"""The subspace penalty and the projection in a training step, with one launch per pass for all modules."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_subspace, tiny_peft_model

from safelora_fast.defenses.parts.grouped_penalties import subspace_penalty
from safelora_fast.defenses.parts.safe_modules import SafeModules
from safelora_fast.errors import TrainingError
from safelora_fast.ops.subspace_projection import triton_kernels


class Counted:
    """Wraps a kernel and counts its launches."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


@pytest.fixture
def launches(monkeypatch):
    counted = {name: Counted(getattr(triton_kernels, name)) for name in ("transposed_parts", "products")}
    for name, kernel in counted.items():
        monkeypatch.setattr(triton_kernels, name, kernel)
    return lambda: {name: kernel.launches for name, kernel in counted.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["prepared", "each"])
def test_a_step_of_a_model(launches, dtype):
    model = tiny_peft_model(lora={"r": 3}, layers=2).to(dtype)
    subspace = random_subspace(model)
    modules = SafeModules(model.get_base_model(), subspace, owner="test")
    vectors = {module.name: modules.vectors(module).double() for module in modules.modules}
    before = {
        module.name: (module.lora_b.detach().double(), module.lora_a.detach().double()) for module in modules.modules
    }
    for module, (name, value) in zip(modules.modules, modules.penalties(), strict=True):
        exact = subspace_penalty(*before[name], module.scale, vectors[name])
        assert value.item() == pytest.approx(exact.item(), rel=1e-4)
    after_penalties = launches()
    assert after_penalties["products"] == 1
    cosine = modules.project(1)
    assert launches()["products"] == after_penalties["products"] + 1
    assert launches()["transposed_parts"] <= after_penalties["transposed_parts"] + 3
    cosines = []
    for module in modules.modules:
        left, right = before[module.name]
        projected = vectors[module.name] @ (vectors[module.name].T @ left)
        assert (module.lora_b.double() - projected).norm() < 8e-3 * projected.norm()
        update = projected @ right
        cosines.append((update.norm() / (left @ right).norm()).item())
    assert cosine == pytest.approx(min(cosines), rel=1e-5)


def test_an_infinity_is_named_and_nothing_written():
    model = tiny_peft_model(lora={"r": 3})
    modules = SafeModules(model.get_base_model(), random_subspace(model), owner="test")
    bad = modules.modules[4]
    bad.lora_b.data[3, 1] = torch.inf
    before = [module.lora_b.detach().clone() for module in modules.modules]
    with pytest.raises(TrainingError, match=bad.name):
        modules.project(7)
    assert all(torch.equal(module.lora_b, left) for module, left in zip(modules.modules, before, strict=True))
