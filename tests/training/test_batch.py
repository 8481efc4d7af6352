from __future__ import annotations

import pytest
import torch
from plain_defences import looked_at
from tiny_models import collate, pack, rows

from safelora_fast.errors import SettingsError
from safelora_fast.training.batch import read_spans

LENGTHS = [7, 3, 9, 4]


def as_mask(batch, tokens):
    mask = torch.zeros(batch["input_ids"].shape, dtype=torch.bool)
    for row, indices in looked_at(batch, tokens):
        mask[row, indices] = True
    return mask


@pytest.mark.parametrize("make", [collate, pack], ids=["padded", "packed"])
@pytest.mark.parametrize("tokens", ["all", "completion"])
def test_masks_and_sequences(make, tokens):
    batch = make(rows(LENGTHS))
    spans = read_spans(batch)
    mask = spans.mask(tokens, owner="test")
    assert torch.equal(mask, as_mask(batch, tokens))
    assert spans.sequences(mask) == len(LENGTHS)
    assert spans.labels == sum(length - 2 for length in LENGTHS)


def test_a_sequence_without_completion_is_no_unit():
    batch = collate([*rows([6]), *rows([5], prompt=5)])
    spans = read_spans(batch)
    assert spans.sequences(spans.mask("completion", owner="test")) == 1
    assert spans.sequences(spans.mask("all", owner="test")) == 2


def test_left_padding_is_one_sequence_a_row():
    batch = collate(rows([4, 6]))
    flipped = {key: value.flip(1) for key, value in batch.items()}
    flipped["position_ids"] = (flipped["attention_mask"].cumsum(1) - 1).masked_fill(flipped["attention_mask"] == 0, 1)
    spans = read_spans(flipped)
    assert spans.sequences(spans.real) == 2


def test_packed_padding_counts_nothing():
    batch = pack(rows([5, 4]))
    padded = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 3)),
        "labels": torch.nn.functional.pad(batch["labels"], (0, 3), value=-100),
        "position_ids": torch.nn.functional.pad(batch["position_ids"], (0, 3)),
    }
    spans = read_spans(padded)
    assert int(spans.real.sum()) == 9
    assert spans.sequences(spans.real) == 2


def test_completion_does_not_cross_documents():
    batch = pack(rows([4, 4], prompt=0))
    batch["labels"] = batch["input_ids"].clone()
    completion = read_spans(batch).mask("completion", owner="test")
    assert completion.tolist() == [[True, True, True, False, True, True, True, False]]


def test_shifted_labels_are_taken_as_they_are():
    batch = collate(rows([6, 4]))
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    spans = read_spans({**batch, "shift_labels": shifted})
    assert torch.equal(spans.completion, read_spans(batch).completion)


def test_refusals():
    batch = collate(rows([4]))
    with pytest.raises(SettingsError, match=r"attention_mask has shape"):
        read_spans({**batch, "attention_mask": torch.ones(1, 1, 4, 4)})
    with pytest.raises(SettingsError, match="neither input_ids"):
        read_spans({"labels": batch["labels"]})
    unlabelled = {key: value for key, value in batch.items() if key != "labels"}
    with pytest.raises(SettingsError, match="needs labels"):
        read_spans(unlabelled).mask("completion", owner="KL")


def test_numbers_of_documents_may_be_anything():
    batch = {"input_ids": torch.ones(4, 4, dtype=torch.long), "seq_idx": torch.tensor([[5, 5, 6, 6], [0, 0, 1, 1]] * 2)}
    spans = read_spans(batch)
    assert spans.sequences(spans.real) == 8
