"""Drift monitors: the value equals a plain computation, and training is unchanged."""

from __future__ import annotations

import pytest
import torch
from closeness import rounded
from personas import random_persona, save_persona
from plain_defenses import documents, forward
from plain_loop import enable_checkpointing
from tiny_models import adapter_weights, collate, furthest, pack, rows, tiny_model, tiny_peft_model
from train_runs import run_transformers, run_trl, sgd

from safelora_fast.defenses import KL, DriftMonitor, FeatureDistance, Steering
from safelora_fast.errors import SettingsError
from safelora_fast.training import defend

LENGTHS = [7, 3, 9, 4, 6, 5, 8, 3]
PERSONA = random_persona()


def close(value):
    """Allow the rounding of a float32 forward pass: hidden states have size 1, but the projections nearly cancel."""
    return rounded(value, size=1.0)


def responses(batch):
    """Yield (row, labeled tokens) of every document. The first token of a document is never learned."""
    for row, document in documents(batch):
        answer = [index for index in document[1:] if batch["labels"][row, index] != -100]
        if answer:
            yield row, answer


def plain_projection(model, batch, layer, vector):
    """Return the mean over completions of the mean state's projection in float64, and the number of completions."""
    _, features = forward(model.double(), batch)
    unit = torch.as_tensor(vector).double()
    unit = unit / unit.norm()
    found = [features[layer][row, answer].mean(0) @ unit for row, answer in responses(batch)]
    return (sum(found) / len(found)).item(), len(found)


def padded_left(examples):
    """Collate with padding on the left, as tokenizers for generation do."""
    batch = collate(examples)
    return {
        name: torch.stack(
            [
                row.roll(row.shape[0] - int(mask.sum()))
                for row, mask in zip(tensor, batch["attention_mask"], strict=True)
            ]
        )
        for name, tensor in batch.items()
    }


@pytest.mark.parametrize("make", [collate, padded_left, pack], ids=["right", "left", "packed"])
def test_the_value_is_the_plain_one(make):
    batch = make(rows(LENGTHS))
    expected, count = plain_projection(tiny_peft_model(), batch, 1, PERSONA.vectors[1])
    assert count == len(LENGTHS)
    with defend(tiny_peft_model(), [], monitors=[DriftMonitor(PERSONA, 1)]) as defended:
        defended.loss(batch).backward()
        assert defended.metrics() == {"monitor/malicious": close(expected)}
        assert defended.metrics() == {}


def test_responses_count_alike_whatever_the_batch_that_they_are_in():
    examples = rows(LENGTHS)
    expected, _ = plain_projection(tiny_peft_model(), collate(examples), 2, PERSONA.vectors[2])
    with defend(tiny_peft_model(), [], monitors=[DriftMonitor(PERSONA, -1)]) as defended:
        for batch in (collate(examples[:1]), collate(examples[1:6]), pack(examples[6:])):
            defended.loss(batch).backward()
        assert defended.metrics()["monitor/malicious"] == close(expected)


@pytest.mark.parametrize("defenses", [[], [KL(3.0)], [FeatureDistance(2.0, layers=2)]], ids=["none", "kl", "distance"])
def test_training_does_not_notice(defenses):
    """Loss and gradients are bit-identical, and the monitors do not read the reference pass."""
    batch = collate(rows(LENGTHS))
    results = []
    for monitors in ([], [DriftMonitor(PERSONA, 1), DriftMonitor(PERSONA, 2, name="other")]):
        model = tiny_peft_model()
        with defend(model, defenses, monitors=monitors) as defended:
            loss = defended.loss(batch)
            loss.backward()
            metrics = defended.metrics()
        results.append((loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    assert results[0][0] == results[1][0]
    assert furthest(results[0][1], results[1][1]) == 0
    for name, layer in (("malicious", 1), ("other", 2)):
        expected, _ = plain_projection(tiny_peft_model(), batch, layer, PERSONA.vectors[layer])
        assert metrics[f"monitor/{name}"] == close(expected)


def test_checkpointing_and_a_model_without_adapter():
    batch = collate(rows(LENGTHS))
    expected, _ = plain_projection(tiny_model(), batch, 1, PERSONA.vectors[1])
    for reentrant in (False, True):
        model = tiny_model().train()
        enable_checkpointing(model, reentrant=reentrant)
        with defend(model, [], monitors=[DriftMonitor(PERSONA, 1)]) as defended:
            defended.loss(batch).backward()
            assert defended.metrics()["monitor/malicious"] == close(expected)


def test_steering_is_in_it():
    batch = collate(rows(LENGTHS))
    expected, _ = plain_projection(tiny_peft_model(), batch, 1, PERSONA.vectors[1])
    length = torch.from_numpy(PERSONA.vectors[1]).norm().item()
    with defend(tiny_peft_model(), [Steering(PERSONA, 1, 0.5)], monitors=[DriftMonitor(PERSONA, 1)]) as defended:
        defended.loss(batch).backward()
        assert defended.metrics()["monitor/malicious"] == close(expected + 0.5 * length)


def test_bfloat16_under_autocast_is_projected_in_float32():
    batch = collate(rows(LENGTHS))
    model = tiny_peft_model().to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        _, features = forward(model, batch)
    unit = torch.from_numpy(PERSONA.vectors[1]).double()
    found = [features[1][row, answer].double().mean(0) @ unit / unit.norm() for row, answer in responses(batch)]
    with defend(model, [], monitors=[DriftMonitor(PERSONA, 1)]) as defended:
        with torch.autocast("cpu", torch.bfloat16):
            defended.loss(batch).backward()
        assert defended.metrics()["monitor/malicious"] == close(sum(found).item() / len(found))


def test_the_trainers_log_it_and_train_as_before(tmp_path):
    spec = {"batch": 2, "accumulation": 2, "steps": 2}
    plain, _ = run_transformers(spec, tmp_path / "plain", defenses=[])
    watched, trainer = run_transformers(spec, tmp_path / "watched", monitors=[DriftMonitor(PERSONA, 1)])
    assert furthest(adapter_weights(plain), adapter_weights(watched)) == 0
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    assert all("monitor/malicious" in entry and "defense/time_share" not in entry for entry in logs)
    assert logs[0]["monitor/malicious"] != logs[1]["monitor/malicious"]
    assert not any(module._forward_hooks for module in watched.modules())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL sets it
def test_trl_logs_it_beside_a_kl(tmp_path):
    spec = {"batch": 2, "accumulation": 2, "steps": 1}
    examples = rows(LENGTHS)
    _, trainer = run_trl(spec, tmp_path, defenses=[KL(1.0)], monitors=[DriftMonitor(PERSONA, 1)])
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    each = [plain_projection(tiny_peft_model(), collate([one]), 1, PERSONA.vectors[1])[0] for one in examples]
    assert min(each) <= entry["monitor/malicious"] <= max(each)
    assert {"defense/kl", "defense/time_share"} <= entry.keys()


def test_it_follows_where_the_model_goes():
    """The loss itself pulls the states along the vector."""
    batch = collate(rows(LENGTHS))
    model, monitor = tiny_peft_model(), DriftMonitor(PERSONA, 1)
    optimizer = sgd(model, lr=0.05)
    block, states, metrics = model.get_base_model().model.layers[1], [], []
    hook = block.register_forward_hook(lambda _m, _a, out: states.append(out))
    with defend(model, [], monitors=[monitor]) as defended:
        for _ in range(5):
            defended.loss(batch)
            (-(states.pop() @ monitor.unit).mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
            metrics.append(defended.metrics()["monitor/malicious"])
    hook.remove()
    assert metrics == sorted(metrics)
    assert metrics[-1] > metrics[0] + 0.1


def test_refusals(tmp_path):
    deeper = save_persona(tmp_path / "deep.safetensors", blocks=4)
    for arguments, message in (
        ((torch.zeros(32), 0), "the vector is zero"),
        ((torch.ones(32), 0, "a b"), "name is 'a b'"),
        ((torch.ones(2, 32), 0), r"shape \(2, 32\)"),
        ((tmp_path / "absent.safetensors", 0), "cannot be read"),
    ):
        with pytest.raises(SettingsError, match=message):
            DriftMonitor(*arguments)
    for monitors, message in (
        ([DriftMonitor(torch.ones(31), 0)], "the vector has 31 values, the model's width is 32"),
        ([DriftMonitor(torch.ones(32), 3)], "layer 3 does not exist"),
        ([DriftMonitor(deeper, 1)], "deep.safetensors has vectors of 4 layers, the model has 3"),
        ([DriftMonitor(PERSONA, 0), DriftMonitor(PERSONA, 1)], "a name of its own, not malicious, malicious"),
    ):
        with pytest.raises(SettingsError, match=message):
            defend(tiny_peft_model(), [], monitors=monitors)
    batch = collate(rows([4, 5]))
    del batch["labels"]
    with defend(tiny_peft_model(), [], monitors=[DriftMonitor(PERSONA, 1)]) as defended:
        with defended.recording(batch):
            defended.model(**batch)
        with pytest.raises(SettingsError, match="no labels"):
            defended.regularizer(defended.totals([batch]))
    assert DriftMonitor(torch.ones(32), 0).name == "drift"
