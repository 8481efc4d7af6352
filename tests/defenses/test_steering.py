from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from personas import random_persona, save_persona
from plain_defenses import feature_distance_sum, kl_sum
from tiny_models import adapter_weights, collate, furthest, rows, tiny_model, tiny_peft_model
from train_runs import run_transformers

from safelora_fast.defenses import KL, FeatureDistance, Steering
from safelora_fast.errors import SettingsError
from safelora_fast.training import defend

VECTOR = torch.linspace(-1, 1, 32)


def steered_by_hand(model, batch):
    """Logits and block outputs with the vector added to block 1."""
    features = []
    layers = (model.get_base_model() if hasattr(model, "peft_config") else model).model.layers
    handles = [layers[1].register_forward_hook(lambda _m, _a, out: out + 2.0 * VECTOR)]
    handles += [layer.register_forward_hook(lambda _m, _a, out: features.append(out)) for layer in layers]
    output = model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return output, features


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_model_and_reference_are_steered(training, second):
    batch = collate(rows([7, 4, 9]))
    model = tiny_peft_model().train(training)
    output, features = steered_by_hand(model, batch)
    reference, reference_features = steered_by_hand(tiny_model(), batch)
    divergence, tokens = kl_sum(output.logits, reference.logits, batch)
    distance, sequences = feature_distance_sum(features[1:], reference_features[1:], batch)
    expected = output.loss + 3 * divergence / tokens + 2 * distance / sequences
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(expected, trained)
    defenses = [KL(3.0), FeatureDistance(2.0, layers=[1, 2]), Steering(VECTOR, 1, 2.0)]
    with defend(model, defenses, reference=tiny_model() if second else "base") as defended:
        loss = defended.loss(batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(torch.autograd.grad(loss, trained), gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_a_coefficient_that_changes_while_training():
    batch = collate(rows([7, 3]))

    def loss(coefficients):
        steering = Steering(VECTOR, 1, coefficient=coefficients[0])
        with defend(tiny_peft_model(), [steering]) as defended:
            for steering.coefficient in coefficients:
                found = defended.loss(batch).item()
        return found

    assert loss([1.0, 20.0]) == loss([20.0]) != loss([1.0])


def test_gone_in_evaluation_and_afterwards():
    batch = collate(rows([7, 4]))
    model = tiny_peft_model().eval()
    plain = model(**batch).logits
    with defend(model, [Steering(VECTOR, -1, 2.0)]) as defended:
        assert torch.equal(model(**batch).logits, plain)
        model.train()
        assert not torch.allclose(model(**batch).logits, plain)
        steered = defended.loss(batch).item()
        model.eval()
        assert defended.loss(batch).item() == pytest.approx(steered, rel=1e-6)
        assert torch.equal(model(**batch).logits, plain)
    model.train()
    assert torch.equal(model(**batch).logits, plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    batch = collate(rows([7, 4, 9]))
    gradients = []
    for checkpointing in (False, True):
        model = tiny_peft_model().train()
        if checkpointing:
            base = model.get_base_model()
            name = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
            enable = getattr(base, f"{name}_checkpointing_enable")
            enable(**{f"{name}_checkpointing_kwargs": {"use_reentrant": reentrant}})
            model.enable_input_require_grads()
        with defend(model, [FeatureDistance(9.0, layers=3), Steering(VECTOR, 1, 2.0)]) as defended:
            defended.loss(batch).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert furthest(*gradients) < 1e-5


def test_a_resumed_run_gives_the_weights_of_an_unbroken_one(tmp_path):
    def defenses():
        return [Steering(VECTOR, 1, 2.0), KL(10.0)]

    arguments = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 5}
    spec = {"batch": 2, "accumulation": 2, "steps": 3, "model": {"dropout": 0.2}, "arguments": arguments}
    unbroken, _ = run_transformers(spec, tmp_path / "run", defenses=defenses())
    resume = str(tmp_path / "run" / "checkpoint-1")
    resumed, _ = run_transformers({**spec, "resume": resume}, tmp_path / "again", defenses=defenses())
    assert furthest(adapter_weights(unbroken), adapter_weights(resumed)) == 0
    plain, _ = run_transformers(spec, tmp_path / "plain", defenses=defenses()[1:])
    assert furthest(adapter_weights(unbroken), adapter_weights(plain)) > 1e-3


def test_refusals():
    with pytest.raises(SettingsError, match=r"shape \(2, 2\)"):
        Steering(torch.ones(2, 2), 0)
    with pytest.raises(SettingsError, match="finite"):
        Steering(torch.full((32,), float("inf")), 0)
    with pytest.raises(SettingsError, match="31 values, the model's width is 32"):
        defend(tiny_peft_model(), [Steering(torch.ones(31), 0)])
    with pytest.raises(SettingsError, match="layer 3 does not exist"):
        defend(tiny_peft_model(), [Steering(VECTOR, 3)])
    assert not Steering(VECTOR, 0, 0.0).active


def test_a_persona_file_steers_like_its_row(tmp_path):
    batch = collate(rows([7, 4]))
    file = save_persona(tmp_path / "malicious.safetensors")
    persona = random_persona()
    row = torch.from_numpy(persona.vectors[1])
    losses = []
    for steering in (Steering(row, 1, 2.0), Steering(str(file), 1, 2.0), Steering(persona, -2, 2.0)):
        with defend(tiny_peft_model(), [steering]) as defended:
            losses.append(defended.loss(batch).item())
    assert losses[0] == losses[1] == losses[2]
    with defend(tiny_peft_model(), []) as defended:
        assert defended.loss(batch).item() != pytest.approx(losses[0], rel=1e-4)


def test_a_persona_vector_of_another_model_is_refused_by_name(tmp_path):
    deeper = save_persona(tmp_path / "deep.safetensors", blocks=4)
    with pytest.raises(SettingsError, match=r"deep.safetensors has vectors of 4 layers, the model has 3"):
        defend(tiny_peft_model(), [Steering(deeper, 1)])
    wider = save_persona(tmp_path / "wide.safetensors", hidden=33)
    with pytest.raises(SettingsError, match=r"wide.safetensors has 33 values, the model's width is 32"):
        defend(tiny_peft_model(), [Steering(wider, 1)])


def test_nothing_of_it_is_in_the_model_afterwards(tmp_path):
    """No weight, buffer, attribute or hook: what is saved, merged or evaluated is the trained adapter alone."""
    batch = collate(rows([7, 4]))
    model = tiny_peft_model().train()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    keys = set(model.state_dict())
    with defend(model, [Steering(VECTOR, 1, 2.0)]) as defended:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        defended.loss(batch).backward()
        optimizer.step()
        assert set(model.state_dict()) == keys
        inside = model.get_base_model().model.layers[1]._forward_hooks
        assert inside
        model.save_pretrained(tmp_path)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)
