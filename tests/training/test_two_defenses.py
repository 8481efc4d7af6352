"""Every pair of defenses: one step with both equals the step with the sum of their terms, in plain float64."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

import pytest
import torch
from closeness import assert_as_close_as_torch
from plain_defenses import feature_distance_sum, forward, kl_sum, reference_forward, template_anchor_sum
from tiny_models import adapter_weights, collate, random_subspace, tiny_peft_model
from train_runs import examples_of, sgd, tiny_tokenizer

from safelora_fast.defenses import (
    KL,
    FeatureDistance,
    SafeLora,
    Steering,
    SubspacePenalty,
    TemplateAnchor,
    registered,
)
from safelora_fast.models.lora_factors import adapted_modules
from safelora_fast.training import defend

LAYERS, PREFIX, STEERED = [0, 2], [0, 1], 1
VECTOR = torch.linspace(-1, 2, 32)
BATCH = collate(examples_of({"defenses": {"template_anchor": 1.0}}))
TABLE = Path(__file__).parents[2] / "docs" / "which-defense.md"


def kl(model):
    total, count = kl_sum(forward(model, BATCH)[0], reference_forward(model, BATCH)[0], BATCH)
    return 3.0 * total / count


def feature_distance(model):
    both = [
        [of_model[1][layer] for layer in LAYERS]
        for of_model in (forward(model, BATCH), reference_forward(model, BATCH))
    ]
    total, count = feature_distance_sum(*both, BATCH)
    return 5.0 * total / count


def template_anchor(model):
    total, count = template_anchor_sum(model, BATCH, [(row, PREFIX) for row in range(len(BATCH["input_ids"]))])
    return 0.5 * total / count


def subspace_penalty(model):
    total = 0.0
    for module, vectors in projectors(model, rank=3, seed=0):
        update = module.scale * module.lora_b @ module.lora_a
        total = total + (update - vectors @ (vectors.T @ update)).square().sum()
    return 0.3 * total


def projectors(model, *, rank, seed):
    """Yield each adapted module with the vectors of `random_subspace`."""
    found = random_subspace(model, rank=rank, seed=seed)
    for module in adapted_modules(model.get_base_model(), owner="test"):
        yield module, torch.from_numpy(found.find(module.name, None).left_vectors).to(module.lora_b.dtype)


@contextmanager
def steered(model):
    """Add the vector to one layer's output, for the model and for the reference."""
    layer = model.get_base_model().model.layers[STEERED]
    handle = layer.register_forward_hook(lambda _m, _a, out: out + (2.0 * VECTOR).to(out))
    yield
    handle.remove()


# By name: the defense, and its term in the loss of a step. Two have none: they act on the states and on the weights.
DEFENSES = {
    "kl": (lambda _: KL(3.0), kl),
    "feature_distance": (lambda _: FeatureDistance(5.0, layers=LAYERS), feature_distance),
    "template_anchor": (lambda _: TemplateAnchor(0.5), template_anchor),
    "subspace_penalty": (lambda model: SubspacePenalty(random_subspace(model), 0.3), subspace_penalty),
    "safelora": (lambda model: SafeLora(random_subspace(model, rank=20, seed=1), at="step"), None),
    "steering": (lambda _: Steering(VECTOR, STEERED, 2.0), None),
}


def plain_step(model, names):
    """Make the step with plain torch, in the model's dtype; return the adapter's weights."""
    with steered(model) if "steering" in names else torch.enable_grad():
        logits, _ = forward(model, BATCH)
        loss = model.get_base_model().loss_function(logits, BATCH["labels"], vocab_size=logits.shape[-1])
        for name in names:
            if (term := DEFENSES[name][1]) is not None:
                loss = loss + term(model)
    loss.backward()
    sgd(model).step()
    with torch.no_grad():
        for module, vectors in projectors(model, rank=20, seed=1) if "safelora" in names else ():
            module.lora_b.copy_(vectors @ (vectors.T @ module.lora_b))
    return adapter_weights(model)


@pytest.mark.parametrize("names", list(combinations(sorted(DEFENSES), 2)), ids="+".join)
def test_a_step_with_both(names):
    exact, plain = plain_step(tiny_peft_model().double(), names), plain_step(tiny_peft_model(), names)
    model = tiny_peft_model()
    optimizer = sgd(model)
    with defend(
        model, [DEFENSES[name][0](model) for name in names], optimizer=optimizer, tokenizer=tiny_tokenizer()
    ) as defended:
        defended.loss(BATCH).backward()
        optimizer.step()
    assert_as_close_as_torch(adapter_weights(model), exact, plain)


@pytest.mark.parametrize("name", sorted(DEFENSES))
def test_each_changes_the_step(name):
    """Otherwise the test of pairs would prove nothing."""
    with_it, without = plain_step(tiny_peft_model(), [name]), plain_step(tiny_peft_model(), [])
    assert max((with_it[key] - without[key]).abs().max().item() for key in without) > 1e-4


def test_the_table_names_every_pair():
    """A new defense needs an entry above, and a row and a column in the table."""
    assert sorted(DEFENSES) == sorted(registered())
    lines = TABLE.read_text("utf-8").partition("## Pairs that are tested")[2].partition("\n## ")[0].splitlines()
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    (_, *columns), body = rows[0], rows[2:]
    found = {frozenset((row[0], column)) for row in body for column, cell in zip(columns, row[1:], strict=True) if cell}
    assert found == set(map(frozenset, combinations(registered(), 2)))
