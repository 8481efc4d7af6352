"""SubspacePenalty, SafeLora(at="step"), and the file format of a safe subspace."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from plain_loop import make_step, train_windows
from tiny_models import adapter_weights, collate, furthest, random_subspace, rows, tiny_peft_model
from train_runs import sgd

from safelora_fast.defenses import KL, SafeLora, SubspacePenalty
from safelora_fast.defenses.parts.grouped_penalties import subspace_penalty
from safelora_fast.defenses.parts.safe_modules import SafeModules
from safelora_fast.errors import CheckpointError, PairingError, SettingsError, TrainingError
from safelora_fast.models.lora_factors import adapted_modules
from safelora_fast.subspace.safe_subspace import SafeSubspace
from safelora_fast.training import defend


def outside(model, subspace):
    """Return ‖(I − P)ΔW‖²_F of every module, from dense float64 matrices."""
    result = {}
    for module in adapted_modules(model.get_base_model(), owner="test"):
        vectors = torch.from_numpy(subspace.find(module.name).left_vectors).double()
        update = module.scale * module.lora_b.detach().double() @ module.lora_a.detach().double()
        result[module.name] = (update - vectors @ (vectors.T @ update)).square().sum().item()
    return result


def test_penalty_against_dense_matrices_and_gradcheck():
    torch.manual_seed(0)
    left = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    right = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    vectors = torch.linalg.qr(torch.randn(7, 2, dtype=torch.float64))[0]
    projector = torch.eye(7, dtype=torch.float64) - vectors @ vectors.T
    dense = (1.5 * projector @ left @ right).square().sum()
    assert subspace_penalty(left, right, 1.5, vectors).item() == pytest.approx(dense.item(), rel=1e-12)
    assert torch.autograd.gradcheck(lambda b, a: subspace_penalty(b, a, 1.5, vectors), (left, right))


def test_penalty_is_accurate_just_after_a_projection():
    """The true value is tiny here, so expanding the formula into small products would cancel."""
    torch.manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(300, 8))[0]
    right = torch.randn(8, 200)
    left = vectors @ torch.randn(8, 8) + 1e-5 * torch.randn(300, 8)
    exact = left.double() - vectors.double() @ (vectors.double().T @ left.double())
    expected = (exact @ right.double()).square().sum().item()
    assert subspace_penalty(left, right, 1.0, vectors).item() == pytest.approx(expected, rel=0.05)


def test_penalty_is_counted_once_an_optimizer_step():
    examples, model = rows([7, 3, 9, 4]), tiny_peft_model()
    subspace = random_subspace(model)
    whole, parts = [collate(examples)], [collate(examples[:2]), collate(examples[2:])]
    found = [train_windows([window], [SubspacePenalty(subspace, 0.5)]) for window in (whole, parts)]
    undefended, _ = train_windows([whole], [SubspacePenalty(subspace, 0.0)])
    assert furthest(found[0][0], found[1][0]) < 1e-5
    assert furthest(found[0][0], undefended) > 1e-2
    for _, metrics in found:
        assert metrics["defense/subspace_penalty"] == pytest.approx(sum(outside(model, subspace).values()), rel=1e-5)


def test_projection_after_every_second_step():
    model = tiny_peft_model()
    subspace = random_subspace(model)
    optimizer = sgd(model)
    left_over = []
    with defend(model, [SafeLora(subspace, at="step", every=2)], optimizer=optimizer) as defended:
        for _ in range(4):
            make_step(optimizer, defended.loss(collate(rows([7, 3]))))
            left_over.append(max(outside(model, subspace).values()))
        metrics = defended.metrics()
    assert [value < 1e-8 for value in left_over] == [False, True, False, True]
    assert metrics["defense/modules_projected"] == 21
    assert 0 < metrics["defense/cosine_min"] < 1


def test_bfloat16_factors():
    """lora_A and lora_B in bfloat16: all products run in float32, and only the written lora_B is rounded again."""
    model, exact = tiny_peft_model(lora={"r": 3}).to(torch.bfloat16), tiny_peft_model(lora={"r": 3})
    exact.load_state_dict(model.state_dict())
    subspace = random_subspace(model)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ours, truth = (SafeModules(m.get_base_model(), subspace, owner="test") for m in (model, exact.double()))
    vectors = {m.name: truth.vectors(m).double() for m in truth.modules}
    expected = sum(subspace_penalty(m.lora_b, m.lora_a, m.scale, vectors[m.name]) for m in truth.modules)
    total = sum(value for _, value in ours.penalties())
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = [
        torch.autograd.grad(s, [dict(m.named_parameters())[n] for n in names])
        for s, m in ((total, model), (expected, exact))
    ]
    for left, right in zip(*gradients, strict=True):
        assert left.dtype == torch.bfloat16
        assert (left.double() - right).norm() < 5e-3 * right.norm()
    projected = {m.name: vectors[m.name] @ (vectors[m.name].T @ m.lora_b.detach()) for m in truth.modules}
    ours.project(1)
    for module in ours.modules:
        assert module.lora_b.dtype == torch.bfloat16
        assert (module.lora_b.double() - projected[module.name]).norm() < 3e-3 * projected[module.name].norm()


@pytest.mark.parametrize(
    ("make", "window"),
    [(SubspacePenalty, [collate(rows([7, 3]))]), (lambda subspace: SafeLora(subspace, at="step"), [])],
    ids=["penalty", "projection"],
)
def test_a_factor_that_is_not_finite_is_named_and_nothing_is_written(make, window):
    model, name = tiny_peft_model(), "model.layers.1.mlp.up_proj"
    left = dict(model.named_parameters())[f"base_model.model.{name}.lora_B.default.weight"]
    left.data[3, 1] = float("inf")
    before, defense = adapter_weights(model), make(random_subspace(model))
    message = rf"{defense.name} is not finite (at|after) optimizer step 6: (lora_B of )?module {name}"
    with pytest.raises(TrainingError, match=message):
        train_windows([window], [defense], model=model, first_step=5)
    left.data[3, 1] = before[f"base_model.model.{name}.lora_B.default.weight"][3, 1] = 0.0
    assert furthest(before, adapter_weights(model)) == 0


def test_saved_and_loaded(tmp_path):
    subspace = random_subspace(tiny_peft_model())
    subspace.save(tmp_path / "safe.safetensors")
    loaded = SafeSubspace.load(tmp_path / "safe.safetensors")
    assert loaded.sources == subspace.sources
    assert loaded.modules.keys() == subspace.modules.keys()
    for name, module in subspace.modules.items():
        assert np.array_equal(loaded.modules[name].left_vectors, module.left_vectors)
        assert np.array_equal(loaded.modules[name].singular_values, module.singular_values)
        assert loaded.modules[name].energy == module.energy
    assert [path.name for path in tmp_path.iterdir()] == ["safe.safetensors"]
    with pytest.raises(CheckpointError, match="cannot be read"):
        SafeSubspace.load(tmp_path / "missing.safetensors")
    damaged = (tmp_path / "safe.safetensors").read_bytes()[:-4]
    (tmp_path / "safe.safetensors").write_bytes(damaged)
    with pytest.raises(CheckpointError, match="cannot be read"):
        SafeSubspace.load(tmp_path / "safe.safetensors")


def test_a_subspace_that_does_not_fit_is_refused_by_name():
    model = tiny_peft_model()
    subspace = random_subspace(model)
    name = "model.layers.1.mlp.down_proj"
    missing = SafeSubspace({key: value for key, value in subspace.modules.items() if key != name})
    with pytest.raises(PairingError, match=r"module model\.layers\.1\.mlp\.down_proj is not in the subspace; nearest"):
        defend(model, [SubspacePenalty(missing, 1.0)])
    other = subspace.modules["model.layers.1.mlp.up_proj"]
    with pytest.raises(PairingError, match=r"down_proj is \(32, 48\), the subspace has \(48, 32\)"):
        defend(model, [SubspacePenalty(SafeSubspace({**subspace.modules, name: other}), 1.0)])
    prefixed = SafeSubspace({f"language_model.{key}": value for key, value in subspace.modules.items()})
    defend(model, [SubspacePenalty(prefixed, 1.0)])


def test_refusals():
    model = tiny_peft_model()
    subspace = random_subspace(model)
    with pytest.raises(SettingsError, match="needs the optimizer"):
        defend(model, [SafeLora(subspace, at="step")]).attach()
    dora = tiny_peft_model(lora={"use_dora": True})
    with pytest.raises(SettingsError, match=r"layers\.0\.self_attn\.q_proj is adapted by DoRA"):
        defend(dora, [SubspacePenalty(subspace, 1.0)])


def test_off_and_beside_other_defenses():
    model = tiny_peft_model()
    subspace, losses = random_subspace(model), []
    for beside in ([], [SubspacePenalty(subspace, 0.0)], [SubspacePenalty(subspace, 0.5)]):
        with defend(model, [KL(2.0), *beside]) as defended:
            losses.append(defended.loss(collate(rows([7, 3]))).item())
    assert losses[1] == losses[0]
    assert losses[2] == pytest.approx(losses[0] + 0.5 * sum(outside(model, subspace).values()), rel=1e-5)


def with_bias():
    """A model whose lora_B has biases, and a function that returns [ΔW, s·b] of every module in float64."""
    model = tiny_peft_model(lora={"lora_bias": True})

    def updates():
        return {
            module.name: module.scale
            * torch.cat([module.lora_b @ module.lora_a, module.bias[:, None]], dim=1).detach().double()
            for module in adapted_modules(model.get_base_model(), owner="test")
        }

    return model, updates


def left_over(updates, subspace):
    rest = {}
    for name, update in updates.items():
        vectors = torch.from_numpy(subspace.find(name).left_vectors).double()
        rest[name] = ((update - vectors @ (vectors.T @ update)).norm() / update.norm()).item()
    return rest


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer")
def test_the_bias_of_lora_b_is_projected_and_penalized_like_a_column():
    model, updates = with_bias()
    subspace, optimizer = random_subspace(model), sgd(model)
    before = updates()
    norms = [(left_over(before, subspace)[name] * update.norm()).item() for name, update in before.items()]
    with defend(model, [SubspacePenalty(subspace, 1.0)]) as defended:
        defended.loss(collate(rows([7, 3])))
        assert defended.metrics()["defense/subspace_penalty"] == pytest.approx(sum(n**2 for n in norms), rel=1e-5)
    with defend(model, [SafeLora(subspace, at="step")], optimizer=optimizer) as defended:
        make_step(optimizer, defended.loss(collate(rows([7, 3]))))
        assert defended.metrics()["defense/modules_projected"] == 21
    assert max(left_over(updates(), subspace).values()) < 10 * torch.finfo(torch.float32).eps
    assert min(left_over(before, subspace).values()) > 0.1
