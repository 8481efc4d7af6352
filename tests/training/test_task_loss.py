"""The task loss in a plain loop: labels count over the whole window, and the model's extra loss terms as a mean."""

from __future__ import annotations

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from tiny_models import VOCABULARY, collate, fill_adapter, rows, tiny_model
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from safelora_fast.defenses import KL
from safelora_fast.training import defend, task_loss

LENGTHS = [7, 3, 9, 4, 6, 5, 8, 3]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


class IgnoresItems(LlamaForCausalLM):
    """Accepts any keyword argument and ignores the number of items, as remote code often does."""

    extra = 0.0

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        kwargs.pop("num_items_in_batch", None)
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if labels is not None:
            flat = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            output["loss"] = torch.nn.functional.cross_entropy(*flat, ignore_index=-100) + self.extra
        return output


def adapted(model, config=None):
    model = get_peft_model(model, config or LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION))
    fill_adapter(model, seed=1)
    return model.train()


def mixtral():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    routers = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5}
    return adapted(MixtralForCausalLM(MixtralConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes, **routers)))


def adalora():
    torch.manual_seed(0)
    return adapted(tiny_model(), AdaLoraConfig(target_modules=ATTENTION, total_step=10, task_type="CAUSAL_LM"))


def ignoring(extra=0.0):
    model = IgnoresItems(tiny_model().config)
    model.extra = extra
    return adapted(model)


def window(size, silent=()):
    examples = rows(LENGTHS)
    for index in silent:
        examples[index]["labels"] = [-100] * LENGTHS[index]
    return [collate(examples[start : start + size]) for start in range(0, len(examples), size)]


def cross_entropy_sum(model, batch):
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    flat = logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    return torch.nn.functional.cross_entropy(*flat, ignore_index=-100, reduction="sum")


def labels_of(batches):
    return sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)


def added_by(model, batch):
    """Return the model's extra loss terms, from its loss with `num_items_in_batch` 1."""
    return model(**batch, num_items_in_batch=torch.tensor(1)).loss - cross_entropy_sum(model, batch)


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_close(model, defended_loss, plain_loss, expected):
    """Check that loss and gradients differ from the plain ones only by float32 rounding."""
    ours, theirs = defended_loss, gradients(model)
    plain_loss.backward()
    plain = gradients(model)
    assert ours == pytest.approx(expected, rel=1e-5)
    assert theirs.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(theirs[name], gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item())


def defended_window(model, batches, defenses=()):
    total = 0.0
    with defend(model, defenses) as defended:
        totals = defended.totals(batches)
        for batch in batches:
            loss = defended.loss(batch, totals=totals)
            loss.backward()
            total += loss.item()
    return total


@pytest.mark.parametrize("make", [mixtral, adalora])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_what_the_model_adds_counts_once_a_window(make, size):
    model, batches = make(), window(size)
    added = [added_by(model, batch) for batch in batches]
    assert sum(value.item() for value in added) / len(added) > 0.5
    plain = sum(cross_entropy_sum(model, batch) for batch in batches) / labels_of(batches) + sum(added) / len(added)
    assert_close(model, defended_window(model, batches), plain, plain.item())


@pytest.mark.parametrize("processes", [2, 3])
def test_what_the_model_adds_counts_once_for_all_processes(processes, monkeypatch):
    """All processes have the same batches, so each one's loss must equal that of a single process."""
    model, batches = mixtral(), window(2)
    alone = defended_window(model, batches)
    monkeypatch.setattr(task_loss, "world_size", lambda: processes)
    with defend(model, []) as defended:
        counted = defended.totals(batches)
        totals = type(counted)(counted.units, processes * counted.labels, counted.micro_batches)
        together = sum(defended.loss(batch, totals=totals).item() for batch in batches)
    assert together == pytest.approx(alone, rel=1e-5)


def test_processes_decide_together_in_totals_and_never_in_a_loss(monkeypatch):
    """A process may compute its loss in another way than the others, so the loss itself must not be collective."""
    asked = []
    monkeypatch.setattr(task_loss, "world_size", lambda: 2)
    monkeypatch.setattr(task_loss, "sum_over_ranks", lambda votes, _device: asked.append(votes) or [0.0, 1.0])
    model, batches = mixtral(), window(2, silent=(0, 1))
    with defend(model, []) as defended:
        totals = defended.totals(batches)
        assert asked == [[0.0, 0.0]]  # no label on this process; the other one has some
        defended.totals(batches)
        first = defended.loss(batches[1], totals=totals)
        assert len(asked) == 1
    share = labels_of(batches[1:2]) / totals.labels * 2
    assert first.item() == pytest.approx(model(**batches[1]).loss.item() * share, rel=1e-5)


@pytest.mark.parametrize("extra", [0.0, 1.0])
@pytest.mark.parametrize("silent", [(), (2, 3), (0, 1)])
def test_a_model_that_ignores_the_number_of_items(extra, silent):
    model, batches = ignoring(extra), window(2, silent)
    plain = sum(cross_entropy_sum(model, batch) for batch in batches) / labels_of(batches) + extra
    assert_close(model, defended_window(model, batches), plain, plain.item())


class FSDPModule:
    """Stub of FSDP2's class, which casts all floating-point inputs of the model under mixed precision."""

    def forward(self, *args, **kwargs):
        cast = {
            name: value.bfloat16() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in kwargs.items()
        }
        return super().forward(*args, **cast)


class Sharded(FSDPModule, LlamaForCausalLM):
    """A model that casts its inputs as a sharded model does."""


def test_the_number_of_items_is_not_rounded_to_half_precision():
    model, batches = adapted(Sharded(tiny_model().config)), window(2)
    with defend(model, []) as defended:
        counted = defended.totals(batches)
        for count in (131, 515, 1031):  # not representable in bfloat16
            totals = type(counted)(counted.units, count, 1)
            expected = cross_entropy_sum(model, batches[0]).item() / count
            assert defended.loss(batches[0], totals=totals).item() == pytest.approx(expected, rel=1e-5)


class TakesAPlainNumber(IgnoresItems):
    """Divides by the number of items, but not in the autograd graph."""

    def forward(self, *args, labels=None, num_items_in_batch=None, **kwargs):
        output = super().forward(*args, labels=labels, **kwargs)
        if num_items_in_batch is not None:
            count = (labels[:, 1:] != -100).sum()
            output["loss"] = output["loss"] * (count / float(num_items_in_batch.detach()))
        return output


def test_a_model_that_divides_out_of_sight():
    model, batches = adapted(TakesAPlainNumber(tiny_model().config)), window(2)
    plain = sum(cross_entropy_sum(model, batch) for batch in batches) / labels_of(batches)
    assert_close(model, defended_window(model, batches), plain, plain.item())


def test_a_window_that_begins_without_labels():
    """Whether the model divides shows only in a batch with labels; before that, its loss is just the extra terms."""
    model, batches = mixtral(), window(2, silent=(0, 1))
    added = [added_by(model, batch) for batch in batches]
    plain = sum(cross_entropy_sum(model, batch) for batch in batches) / labels_of(batches) + sum(added) / len(added)
    assert_close(model, defended_window(model, batches), plain, plain.item())


def test_beside_a_defense():
    model, batches = mixtral(), window(2)
    alone = defended_window(model, batches)
    with defend(model, [KL(3.0)]) as defended:
        totals = defended.totals(batches)
        loss = sum(defended.loss(batch, totals=totals).item() for batch in batches)
        divergence = defended.metrics()["defense/kl"]
    assert loss == pytest.approx(alone + 3.0 * divergence, rel=1e-5)


def test_asking_changes_no_mode_and_no_random_number():
    model, (batch,) = ignoring(), window(8)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    with defend(model, []) as defended:
        defended.loss(batch)
    assert torch.equal(torch.rand(1), expected)
    assert all(part.training for part in model.modules())
