"""Defenses with tokens="safe": the plain formulas over the tokens of safe examples only."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_as_close_as_torch
from plain_defenses import forward, kl_sum, reference_forward
from plain_loop import train_windows
from tiny_models import collate, furthest, gradients, pack, rows, tiny_peft_model

from safelora_fast.data.collate import TaggedCollator
from safelora_fast.data.spans import read_spans
from safelora_fast.defenses import KL, FeatureDistance
from safelora_fast.errors import DataError, SettingsError
from safelora_fast.training import defend

LENGTHS = [7, 3, 9, 4, 6]
SAFE = [False, True, False, True, True]


def tagged(make, lengths=LENGTHS, safe=SAFE):
    """Collate a batch, and add the tags by hand."""
    batch = make(rows(lengths))
    ids = batch["input_ids"]
    if make is pack:
        tags = torch.tensor([[tag for tag, length in zip(safe, lengths, strict=True) for _ in range(length)]])
    else:
        tags = torch.tensor(safe)[:, None] & (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None])
    return {**batch, "safe": tags}


@pytest.mark.parametrize("share_logits", [True, False], ids=["shared logits", "apart"])
@pytest.mark.parametrize("make", [collate, pack], ids=["padded", "packed"])
def test_the_kl_of_safe_rows_is_the_plain_one(make, share_logits):
    def plainly(model):
        reference_logits, _ = reference_forward(model, batch)
        logits, _ = forward(model, batch)
        task = model.get_base_model().loss_function(logits, batch["labels"], vocab_size=logits.shape[-1])
        total, count = kl_sum(logits, reference_logits, batch, tokens="safe")
        assert count == sum(length for length, tag in zip(LENGTHS, SAFE, strict=True) if tag)
        loss = task + 3.0 * total / count
        loss.backward()
        return {"loss": loss, "kl": total / count}, gradients(model)

    batch = tagged(make)
    model = tiny_peft_model()
    exact, plain = plainly(tiny_peft_model().double()), plainly(tiny_peft_model())
    with defend(model, [KL(3.0, tokens="safe")], share_logits=share_logits) as defended:
        loss = defended.loss(batch)
        loss.backward()
        metrics = defended.metrics()
    assert_as_close_as_torch({"loss": loss, "kl": metrics["defense/kl"]}, exact[0], plain[0])
    assert_as_close_as_torch(gradients(model), exact[1], plain[1])


def test_accumulation_gives_the_weights_of_one_batch():
    """The last micro-batch has no safe example; units are counted over the whole window."""
    lengths, safe = [*LENGTHS, 5, 8], [*SAFE, False, False]
    defenses = [KL(60.0, tokens="safe"), FeatureDistance(40.0, layers=2, tokens="safe")]
    whole = tagged(collate, lengths, safe)
    batches = [{name: value[part] for name, value in whole.items()} for part in (slice(2), slice(2, 5), slice(5, 7))]
    parts, _ = train_windows([batches], defenses)
    assert furthest(train_windows([[whole]], defenses)[0], parts) < 1e-5
    assert furthest(train_windows([[whole]], [])[0], parts) > 1e-2


def test_without_a_safe_row_only_the_task_is_left():
    batch = tagged(collate, safe=[False] * 5)
    defended, undefended = (train_windows([[batch]], given)[0] for given in ([KL(60.0, tokens="safe")], []))
    assert furthest(defended, undefended) < 1e-6


@pytest.mark.parametrize("defense", [KL(1.0, tokens="safe"), FeatureDistance(1.0, tokens="safe", layers=2)], ids=repr)
def test_rows_without_a_tag_are_refused(defense):
    with (
        defend(tiny_peft_model(), [defense]) as defended,
        pytest.raises(SettingsError, match="mix them in with interleave"),
    ):
        defended.loss(collate(rows(LENGTHS)))


def test_tags_of_rows_and_of_tokens():
    batch = collate(rows(LENGTHS))
    by_row, by_token = ({**batch, "safe": tags} for tags in (torch.tensor(SAFE), tagged(collate)["safe"]))
    assert torch.equal(read_spans(by_row).safe, read_spans(by_token).safe)
    with pytest.raises(SettingsError, match=r"safe has shape \(4,\)"):
        read_spans({**batch, "safe": torch.tensor(SAFE[:4])})


def flipped(examples):
    """Collate with padding on the left."""
    reverse = collate([{name: values[::-1] for name, values in example.items()} for example in examples])
    return {name: values.flip(1) for name, values in reverse.items()}


@pytest.mark.parametrize("inner", [collate, flipped, pack], ids=["right", "left", "joined"])
@pytest.mark.parametrize("by_token", [False, True])
def test_the_collator_puts_every_tag_where_its_row_is(inner, by_token):
    examples = rows(LENGTHS)
    for example, tag in zip(examples, SAFE, strict=True):
        example["safe"] = [tag] * len(example["input_ids"]) if by_token else tag
    batch = TaggedCollator(inner)(examples)
    safe_tokens = {token for example, tag in zip(examples, SAFE, strict=True) if tag for token in example["input_ids"]}
    found = batch["input_ids"][read_spans(batch).safe].tolist()
    assert sorted(found) == sorted(t for e, tag in zip(examples, SAFE, strict=True) if tag for t in e["input_ids"])
    assert set(found) <= safe_tokens


def test_the_collator_leaves_untagged_rows_alone_and_refuses_cut_ones():
    assert "safe" not in TaggedCollator(collate)(rows(LENGTHS))
    examples = [{**example, "safe": [True] * len(example["input_ids"])} for example in rows(LENGTHS)]
    with pytest.raises(DataError, match="made 22 tokens of 29"):
        TaggedCollator(lambda batch: {name: values[:, :5] for name, values in collate(batch).items()})(examples)
