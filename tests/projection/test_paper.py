"""The paper's algorithm, computed directly in float64: dense C and ΔW, the cosine test, and B ← C·B if selected."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, adapt, save, weights
from safetensors.torch import load_file

from safelora_fast import project_adapter

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


class Paper:
    """Algorithm 1 of arXiv 2405.16833 with C = V·Vᵀ/‖V‖_F from Appendix A, without optimizations."""

    def __init__(self, adapted, base_weights):
        aligned = weights(adapted)
        self.cosines, self.projected = {}, {}
        for name, module in adapted.base_model.model.named_modules():
            if name not in aligned:
                continue
            v = aligned[name] - base_weights[name]
            c = v @ v.T / v.norm()
            b, a = (getattr(module, f"lora_{factor}")["default"].weight.detach().double() for factor in "BA")
            update = b @ a
            after = c @ update
            self.cosines[name] = float((after * update).sum() / (after.norm() * update.norm()))
            self.projected[name] = c @ b

    def below(self, threshold):
        return {name for name, cosine in self.cosines.items() if cosine <= threshold}

    def lowest(self, number):
        return set(sorted(self.cosines, key=lambda name: (self.cosines[name], name))[:number])


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper")
    family = FAMILIES["llama"]
    aligned, base = family.make(1), family.make(2)
    folders = save(aligned, folder / "aligned"), save(base, folder / "base")
    base_weights, adapted = weights(adapt(base, **family.target)), adapt(aligned, **family.target)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(request.param)
    return folder, folders, save(adapted, folder / "adapter"), Paper(adapted, base_weights), request.param


def check(case, selected, output, **settings):
    folder, (aligned, base), adapter, paper, dtype = case
    report = project_adapter(adapter, aligned=aligned, base=base, output=folder / output, **settings)
    modules = report.adapters[0].modules
    assert {module.name for module in modules if module.projected} == selected(paper)
    before, after = (load_file(place / "adapter_model.safetensors") for place in (adapter, folder / output))
    for module in modules:
        assert module.cosine == pytest.approx(paper.cosines[module.name], abs=1e-6)
        key = f"base_model.model.{module.name}.lora_B.weight"
        assert after[key].dtype == before[key].dtype == dtype
        if not module.projected:
            assert torch.equal(after[key], before[key])
            continue
        truth = paper.projected[module.name]
        error = (after[key].double() - truth).abs()
        if dtype is torch.float32:
            assert error.norm() <= ROUNDING[dtype] * truth.norm()
        else:  # elementwise: one rounding to the stored dtype, plus the fp32 error of the projection
            smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            assert (error <= ROUNDING[dtype] * truth.abs() + 1e-6 * truth.abs().max() + smallest).all()


def test_threshold(case):
    cosines = sorted(case[3].cosines.values())
    threshold = round((cosines[6] + cosines[7]) / 2, 5)
    check(case, lambda paper: paper.below(threshold), "threshold", threshold=threshold)


@pytest.mark.parametrize("number", [1, 5, 100])
def test_number(case, number):
    check(case, lambda paper: paper.lowest(number), f"number-{number}", select="number", num_layers=number)


def test_all(case):
    check(case, lambda paper: set(paper.cosines), "all", select="all")
