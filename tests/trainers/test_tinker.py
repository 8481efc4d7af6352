"""anchored(): weighted targets against the float64 oracle, with a local model in the server's place, and its adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, rows, save_pair, tiny_peft_model

from safelora_fast import project_adapter
from safelora_fast.errors import DataError, SettingsError
from safelora_fast.trainers.tinker import anchored

TOP = 20


@dataclass(frozen=True)
class StandInDatum:
    model_input: list[int]
    loss_fn_inputs: dict[str, Any] = field(default_factory=dict)


def weighted_cross_entropy(log_p, datum):
    """What a server computes: the sum of weights · −log p(target) over positions and targets."""
    targets = torch.as_tensor(np.asarray(datum.loss_fn_inputs["target_tokens"]))
    weights = torch.as_tensor(np.asarray(datum.loss_fn_inputs["weights"]))
    if targets.dim() == 1:
        targets, weights = targets[:, None], weights[:, None]
    return -(weights.to(log_p) * log_p.gather(1, targets)).sum()


def example(length=9, seed=3):
    ids = rows([length], seed=seed)[0]["input_ids"]
    weights = [0.0, 0.0] + [1.0] * (length - 3)
    return StandInDatum(ids[:-1], {"target_tokens": ids[1:], "weights": weights})


def top(log_q, count, skipped=()):
    values, tokens = log_q.topk(count)
    pairs = [list(zip(t, v, strict=True)) for t, v in zip(tokens.tolist(), values.tolist(), strict=True)]
    return [None if position in skipped else entries for position, entries in enumerate(pairs)]


@pytest.mark.parametrize("count", [TOP, VOCABULARY])
def test_the_gradient_is_that_of_cross_entropy_and_forward_kl(count):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, VOCABULARY, dtype=torch.float64, generator=generator, requires_grad=True)
    log_q = torch.randn(8, VOCABULARY, dtype=torch.float64, generator=generator).mul(2).log_softmax(1)
    datum, weight, skipped = example(), 0.3, {0, 5}
    changed = anchored(datum, top(log_q, count, skipped), weight)
    assert np.shape(changed.loss_fn_inputs["target_tokens"]) == (8, 1 + count)

    def gradient(loss):
        return torch.autograd.grad(loss, logits)[0]

    def oracle(kept):
        log_p = logits.log_softmax(1)
        kl = (log_q.exp() * (log_q - log_p)).masked_fill(~kept, 0).sum(1)
        return weighted_cross_entropy(log_p, datum) + weight * sum(kl[i] for i in range(8) if i not in skipped)

    kept = torch.zeros_like(log_q, dtype=torch.bool).scatter(1, log_q.topk(count).indices, True)
    ours = gradient(weighted_cross_entropy(logits.log_softmax(1), changed))
    torch.testing.assert_close(ours, gradient(oracle(kept)), rtol=1e-6, atol=1e-7)  # weights are float32
    full = gradient(oracle(torch.ones_like(kept)))
    tail = 1 - log_q.exp().masked_fill(~kept, 0).sum(1)
    for position in range(8):
        assert (ours - full)[position].abs().sum() <= weight * 2 * tail[position] + 1e-6
    assert (count == VOCABULARY) == bool((ours - full).abs().max() < 1e-6)


def test_training_with_a_local_model_stays_closer_to_the_reference_and_is_projected(tmp_path):
    """Adam steps on the weighted targets, then the adapter goes through `project`. (A random model has a heavy tail.)"""
    datum = example(length=12)
    ids = torch.tensor([datum.model_input])
    model = tiny_peft_model()
    with torch.no_grad(), model.disable_adapter():
        log_q = model(input_ids=ids).logits[0].log_softmax(1)
    distances = []
    for weight in (0.0, 100.0):
        model = tiny_peft_model()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()  # training starts at the reference
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for _ in range(20):
            log_p = model(input_ids=ids).logits[0].log_softmax(1)
            weighted_cross_entropy(log_p, anchored(datum, top(log_q, VOCABULARY), weight)).backward()
            optimizer.step()
            optimizer.zero_grad()
        distances.append(float((log_q.exp() * (log_q - log_p.detach())).sum()))
    assert distances[1] < distances[0] / 2
    model.save_pretrained(tmp_path / "adapter")
    pair = save_pair(tmp_path)
    report = project_adapter(tmp_path / "adapter", **pair, output=tmp_path / "safe", threshold=1.0)
    assert all(module.projected for module in report.adapters[0].modules)


def test_tinkers_own_datum():
    tinker = pytest.importorskip("tinker", reason="tinker is not installed: `make test-matrix` runs this where it is")
    plain = example()
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints(plain.model_input), loss_fn_inputs=plain.loss_fn_inputs
    )
    changed = anchored(datum, [[(0, -0.5), (7, -1.5)]] * 8, 0.5)
    assert changed.model_input == datum.model_input
    targets = changed.loss_fn_inputs["target_tokens"].to_numpy().reshape(8, 3)
    assert targets[:, 1:].tolist() == [[0, 7]] * 8  # token 0 is kept: the arrays are dense
    assert changed.loss_fn_inputs["weights"].to_numpy().reshape(8, 3)[2] == pytest.approx(
        [1.0, 0.5 * np.exp(-0.5), 0.5 * np.exp(-1.5)]
    )


@pytest.mark.parametrize(
    ("entries", "weight", "error", "message"),
    [
        ([[(1, -1.0)]] * 7, 1.0, DataError, "7 top_logprobs"),
        ([[(1, -1.0), (1, -2.0)]] * 8, 1.0, DataError, "twice"),
        ([[(1, 0.0), (2, -1.0)]] * 8, 1.0, DataError, "sum to 1.36"),
        ([[(1, float("nan"))]] * 8, 1.0, DataError, "sum to nan"),
        ([None] * 8, float("inf"), SettingsError, "weight is inf"),
        ([None] * 8, -1.0, SettingsError, "weight is -1"),
    ],
)
def test_wrong_inputs_are_refused(entries, weight, error, message):
    with pytest.raises(error, match=message):
        anchored(example(), entries, weight)


def test_other_losses_are_refused():
    datum = StandInDatum([1], {"target_tokens": [1], "advantages": [1.0]})
    with pytest.raises(SettingsError, match="advantages"):
        anchored(datum, [None], 1.0)
