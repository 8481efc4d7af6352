"""The penalty and the projection of a training step, with all modules of a model in one launch a pass."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_subspace, tiny_peft_model

from safelora_fast.defenses.parts.safe_modules import SafeModules
from safelora_fast.errors import TrainingError
from safelora_fast.ops.subspace_projection import triton_kernels
from safelora_fast.ops.subspace_projection.penalties import subspace_penalties, subspace_penalty


class Counted:
    """A kernel whose launches are counted."""

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


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_penalties_and_gradients_against_float64():
    shapes = [(40, 3, 21, 4), (33, 3, 50, 8), (16, 5, 16, 2)]
    bases = [torch.linalg.qr(random(m, k, seed=m))[0] for m, _, _, k in shapes]
    lefts = [random(m, r, seed=m + 1).requires_grad_() for m, r, _, _ in shapes]
    rights = [random(r, n, seed=m + 2).requires_grad_() for m, r, n, _ in shapes]
    scales = [1.5, 0.5, 2.0]
    found = subspace_penalties(bases, lefts, rights, scales)
    exact = [factor.detach().double().requires_grad_() for factor in (*lefts, *rights)]
    expected = [subspace_penalty(exact[i], exact[3 + i], scales[i], bases[i].double()) for i in range(3)]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    ours = torch.autograd.grad(found[0] + 2 * found[1] + 3 * found[2], [*lefts, *rights])
    theirs = torch.autograd.grad(expected[0] + 2 * expected[1] + 3 * expected[2], exact)
    for left, right in zip(ours, theirs, strict=True):
        assert (left.double() - right).norm() < 1e-5 * right.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_step_of_a_model(dtype, launches):
    model = tiny_peft_model(lora={"r": 3}).to(dtype)
    subspace = random_subspace(model)
    modules = SafeModules(model.get_base_model(), subspace, owner="test")
    vectors = {module.name: modules.vectors(module).double() for module in modules.modules}
    before = {
        module.name: (module.left.detach().double(), module.right.detach().double()) for module in modules.modules
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
        assert (module.left.double() - projected).norm() < (
            1e-6 if dtype == torch.float32 else 4e-3 * 2
        ) * projected.norm()
        update = projected @ right
        cosines.append((update.norm() / (left @ right).norm()).item())
    assert cosine == pytest.approx(min(cosines), rel=1e-5)


def test_an_infinity_is_named_and_nothing_written():
    model = tiny_peft_model(lora={"r": 3})
    modules = SafeModules(model.get_base_model(), random_subspace(model), owner="test")
    bad = modules.modules[4]
    bad.left.data[3, 1] = torch.inf
    before = [module.left.detach().clone() for module in modules.modules]
    with pytest.raises(TrainingError, match=bad.name):
        modules.project(7)
    assert all(torch.equal(module.left, left) for module, left in zip(modules.modules, before, strict=True))
