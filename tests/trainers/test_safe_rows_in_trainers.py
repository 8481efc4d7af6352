"""Tagged examples in the trainers give the step of a plain loop, packed or not, on one process or two."""

from __future__ import annotations

import pytest
import torch
import trl.trainer.utils
from datasets import Dataset
from tiny_models import adapter_weights, collate, furthest, rows, tiny_peft_model
from train_runs import LENGTHS, constant, run, run_trl, run_two_processes, sgd, trainer_arguments
from transformers import TrainingArguments

from safelora_fast import interleave
from safelora_fast.defenses import KL
from safelora_fast.trainers.transformers import DefendedTrainer
from safelora_fast.training import defend

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL sets it

SAFE = [number % 3 == 1 for number in range(len(LENGTHS))]
SPEC = {"batch": 2, "accumulation": 4, "tagged": True}
DEFENSE = {"safe_kl": 30.0}


@pytest.fixture(scope="module")
def whole():
    """Weights and metrics of one step on all examples at once, in a plain loop."""
    model = tiny_peft_model()
    batch = {**collate(rows(LENGTHS)), "safe": torch.tensor(SAFE)}
    optimizer = sgd(model)
    with defend(model, [KL(30.0, tokens="safe")], optimizer=optimizer) as defended:
        defended.loss(batch).backward()
        optimizer.step()
        return adapter_weights(model), defended.metrics()


def same(result, whole):
    assert furthest(result[0], whole[0]) < 1e-5
    assert result[1]["defense/kl"] == pytest.approx(whole[1]["defense/kl"], rel=1e-4)


@pytest.mark.parametrize("share_logits", [True, False], ids=["shared logits", "apart"])
@pytest.mark.parametrize("kind", ["transformers", "trl"])
def test_one_process(whole, kind, share_logits, tmp_path):
    same(run({**SPEC, "kind": kind, "defenses": DEFENSE, "share_logits": share_logits}, tmp_path), whole)


def test_a_padding_free_batch(whole, tmp_path):
    """Like packed rows: several documents in one row, with one tag per token."""
    arguments = {"padding_free": True, "max_length": None}
    spec = {**SPEC, "tagged": "by token", "kind": "trl", "defenses": DEFENSE, "arguments": arguments}
    same(run(spec, tmp_path), whole)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["transformers", "trl"])
def test_two_processes(whole, kind, tmp_path):
    same(run_two_processes({**SPEC, "accumulation": 2, "kind": kind, "defenses": DEFENSE}, tmp_path), whole)


@pytest.mark.parametrize("defenses", [{}, {"kl": 1.0}], ids=["undefended", "defended"])
def test_the_log_has_the_loss_of_both_sources(defenses, tmp_path):
    model = tiny_peft_model()
    with torch.no_grad():
        logits = model(**{name: value for name, value in collate(rows(LENGTHS)).items() if name != "labels"}).logits
    labels = collate(rows(LENGTHS))["labels"][:, 1:]
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none")
    spec = {**SPEC, "defenses": defenses, "kind": "trl"}
    _, trainer = run_trl(spec, tmp_path, defenses=[KL(weight) for weight in defenses.values()])
    metrics = next(logs for logs in trainer.state.log_history if "loss" in logs)
    if not hasattr(trl.trainer.utils, "add_fused_lm_head"):  # older TRL builds the logits of every token
        assert not any(name.startswith("loss/") for name in metrics)
        return
    for name, tag in (("task", False), ("safe", True)):
        chosen = losses[torch.tensor(SAFE) == tag]
        count = (labels[torch.tensor(SAFE) == tag] != -100).sum()
        assert metrics[f"loss/{name}"] == pytest.approx((chosen.sum() / count).item(), rel=1e-4)


def test_untagged_rows_keep_their_collator(tmp_path):
    _, trainer = run_trl({"batch": 2, "steps": 1}, tmp_path, defenses=[KL(1.0)])
    assert type(trainer.data_collator).__module__.startswith("trl")
    assert not any(name.startswith("loss/") for logs in trainer.state.log_history for name in logs)


@pytest.mark.parametrize("column", ["safe", "is_response_safe"])
def test_a_column_of_that_name_with_other_values_is_no_tag(column, tmp_path):
    data = Dataset.from_list([{**row, column: "yes"} for row in rows(LENGTHS)])
    trainer = DefendedTrainer(
        model=tiny_peft_model(), args=TrainingArguments(**trainer_arguments({"batch": 2}, tmp_path)), train_dataset=data,
        data_collator=collate,
    )  # fmt: skip
    assert trainer.data_collator is collate
    assert trainer.train()


@pytest.mark.parametrize("kind", ["list", "table", "stream"])
def test_what_interleave_makes_is_trained_on(kind, tmp_path):
    """Every example of a mixture passes through the trainer once, with its own tag."""
    task, safe = rows(LENGTHS), rows([4, 5, 6], seed=8)
    if kind != "list":
        task, safe = Dataset.from_list(task), Dataset.from_list(safe)
    if kind == "stream":
        task = task.to_iterable_dataset(num_shards=3)
    mixture = interleave(task, safe, 0.25)
    seen = []

    class Watched(DefendedTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            for ids, mask, tags in zip(inputs["input_ids"], inputs["attention_mask"], inputs["safe"], strict=True):
                seen.append((ids[mask.bool()].tolist(), bool(tags[0])))
            return super().compute_loss(model, inputs, *args, **kwargs)

    model = tiny_peft_model()
    arguments = trainer_arguments({"batch": 2, "steps": 5}, tmp_path)
    optimizer = sgd(model)
    trainer = Watched(
        model=model, args=TrainingArguments(**arguments), train_dataset=mixture, data_collator=collate,
        optimizers=(optimizer, constant(optimizer)), defenses=[KL(1.0, tokens="safe")],
    )  # fmt: skip
    trainer.train()
    assert sorted(seen) == sorted((row["input_ids"], row["safe"]) for row in mixture)
    assert sum(tag for _, tag in seen) == 2
