from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from personas import random_persona, save_persona
from plain_defenses import feature_distance_sum, kl_sum
from plain_loop import enable_checkpointing, make_step
from tiny_models import collate, furthest, gradients, rows, tiny_model, tiny_peft_model
from train_runs import sgd

from safelora_fast.defenses import KL, FeatureDistance, Steering
from safelora_fast.errors import SettingsError
from safelora_fast.training import defend

VECTOR = torch.linspace(-1, 1, 32)
BATCH = collate(rows([7, 4, 9]))


def steered_by_hand(model, batch):
    """Return logits and layer outputs with the vector added to the output of layer 1."""
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
    model = tiny_peft_model().train(training)
    output, features = steered_by_hand(model, BATCH)
    reference, reference_features = steered_by_hand(tiny_model(), BATCH)
    divergence, tokens = kl_sum(output.logits, reference.logits, BATCH)
    distance, sequences = feature_distance_sum(features[1:], reference_features[1:], BATCH)
    expected = output.loss + 3 * divergence / tokens + 2 * distance / sequences
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    plain = torch.autograd.grad(expected, trained)
    defenses = [KL(3.0), FeatureDistance(2.0, layers=[1, 2]), Steering(VECTOR, 1, 2.0)]
    with defend(model, defenses, reference=tiny_model() if second else "base") as defended:
        loss = defended.loss(BATCH)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(torch.autograd.grad(loss, trained), plain, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_a_coefficient_that_changes_while_training():
    def loss(coefficients):
        steering = Steering(VECTOR, 1, coefficient=coefficients[0])
        with defend(tiny_peft_model(), [steering]) as defended:
            for steering.coefficient in coefficients:
                found = defended.loss(BATCH).item()
        return found

    assert loss([1.0, 20.0]) == loss([20.0]) != loss([1.0])


def test_gone_in_evaluation_and_afterwards():
    model = tiny_peft_model().eval()
    plain = model(**BATCH).logits
    with defend(model, [Steering(VECTOR, -1, 2.0)]) as defended:
        assert torch.equal(model(**BATCH).logits, plain)
        model.train()
        assert not torch.allclose(model(**BATCH).logits, plain)
        steered = defended.loss(BATCH).item()
        model.eval()
        assert defended.loss(BATCH).item() == pytest.approx(steered, rel=1e-6)
        assert torch.equal(model(**BATCH).logits, plain)
    model.train()
    assert torch.equal(model(**BATCH).logits, plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    found = []
    for checkpointing in (False, True):
        model = tiny_peft_model().train()
        if checkpointing:
            enable_checkpointing(model, reentrant=reentrant)
        with defend(model, [FeatureDistance(9.0, layers=3), Steering(VECTOR, 1, 2.0)]) as defended:
            defended.loss(BATCH).backward()
        found.append(gradients(model))
    assert furthest(*found) < 1e-5


def test_refusals(tmp_path):
    deeper = save_persona(tmp_path / "deep.safetensors", blocks=4)
    wider = save_persona(tmp_path / "wide.safetensors", hidden=33)
    for arguments, message in (
        ((torch.ones(2, 2), 0), r"shape \(2, 2\)"),
        ((torch.full((32,), float("inf")), 0), "the vector must be finite"),
        ((VECTOR, 0, float("nan")), "coefficient is nan, it must be finite"),
        ((torch.ones(31), 0), "31 values, the model's width is 32"),
        ((VECTOR, 3), "layer 3 does not exist"),
        ((deeper, 1), "deep.safetensors has vectors of 4 layers, the model has 3"),
        ((wider, 1), "wide.safetensors has 33 values, the model's width is 32"),
    ):
        with pytest.raises(SettingsError, match=message):
            defend(tiny_peft_model(), [Steering(*arguments)])
    assert not Steering(VECTOR, 0, 0.0).active


def test_a_persona_file_steers_like_its_row(tmp_path):
    file, persona = save_persona(tmp_path / "malicious.safetensors"), random_persona()
    row = torch.from_numpy(persona.vectors[1])
    losses = []
    for defenses in (
        [],
        *([Steering(vector, layer, 2.0)] for vector, layer in ((row, 1), (str(file), 1), (persona, -2))),
    ):
        with defend(tiny_peft_model(), defenses) as defended:
            losses.append(defended.loss(BATCH).item())
    assert losses[1] == losses[2] == losses[3] != pytest.approx(losses[0], rel=1e-4)


def test_nothing_of_it_is_in_the_model_afterwards(tmp_path):
    """No weight, buffer, attribute or hook remains, so only the trained adapter is saved, merged or evaluated."""
    model = tiny_peft_model().train()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    keys = set(model.state_dict())
    with defend(model, [Steering(VECTOR, 1, 2.0)]) as defended:
        make_step(sgd(model, lr=0.1), defended.loss(BATCH))
        assert set(model.state_dict()) == keys
        assert model.get_base_model().model.layers[1]._forward_hooks
        model.save_pretrained(tmp_path)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    assert torch.equal(loaded(**BATCH).logits, model.eval()(**BATCH).logits)
