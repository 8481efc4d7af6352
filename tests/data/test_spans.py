"""Token masks and documents of a batch, compared with a plain enumeration."""

from __future__ import annotations

import pytest
import torch
from plain_defenses import looked_at
from tiny_models import collate, pack, rows

from safelora_fast.data.spans import read_spans
from safelora_fast.errors import SettingsError

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


@pytest.mark.parametrize("hidden", [None, -65504.0, torch.finfo(torch.float32).min, float("-inf")])
def test_square_masks_separate_documents(hidden):
    """As LLaMA-Factory packs: documents and padding behind them in one row, and positions that need not restart."""
    numbers = torch.tensor([[1] * 5 + [2] * 4 + [0] * 3, [0] * 2 + [1] * 10])
    seen = (numbers[:, :, None] == numbers[:, None]) & (numbers[:, None] != 0) & torch.ones(12, 12).tril().bool()
    mask = seen[:, None] if hidden is None else torch.zeros(2, 1, 12, 12).masked_fill(~seen[:, None], hidden)
    spans = read_spans({"input_ids": numbers, "labels": numbers, "attention_mask": mask})
    assert torch.equal(spans.real, numbers != 0)
    assert spans.sequences(spans.real) == 3
    assert not spans.completion[0, 4]  # the last token of a document predicts nothing
    alone = read_spans({"input_ids": numbers[1:], "attention_mask": mask[1:]})
    assert alone.segments is None


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


def test_positions_that_jump_ahead_stay_in_their_document():
    batch = collate(rows([7, 4]))
    expected = read_spans(batch)
    for positions in (
        torch.arange(0, 14, 2),
        torch.tensor([3, 4, 5, 90, 91, 92, 93]),
        torch.tensor([2, 3, 3, 3, 4, 5, 6]),
    ):
        spans = read_spans({**batch, "position_ids": positions.expand(2, 7)})
        assert torch.equal(spans.completion, expected.completion)
        assert spans.sequences(spans.real) == 2
    restarting = read_spans({**batch, "position_ids": torch.tensor([0, 2, 4, 0, 3, 6, 9]).expand(2, 7)})
    assert restarting.sequences(restarting.real) == 4


@pytest.mark.parametrize("positions", [[0, 2, 4, 6, 8], [0, 1, 2, 7, 8], [1, 1, 1, 2, 3]], ids=str)
def test_positions_that_jump_without_a_mask(positions):
    """In transformers a jump starts a document with some attention implementations and not with others."""
    batch = {"input_ids": torch.ones(1, 5, dtype=torch.long), "position_ids": torch.tensor([positions])}
    with pytest.raises(SettingsError, match="position_ids jump or repeat, and there is no attention_mask"):
        read_spans(batch)
    assert read_spans({**batch, "attention_mask": torch.ones(1, 5)}).sequences(torch.ones(1, 5) != 0) == 1


def test_text_positions_before_those_of_three_axes():
    """Packed sequences of Qwen2-VL: the first of four planes marks the documents; three planes do not mark them."""
    batch = pack(rows([5, 4]))
    positions = batch["position_ids"]
    planes = torch.stack([positions, *torch.randint(0, 9, (3, *positions.shape))])
    spans = read_spans({**batch, "position_ids": planes})
    assert torch.equal(spans.segments, read_spans(batch).segments)
    assert spans.sequences(spans.real) == 2
    assert read_spans({**batch, "position_ids": planes[1:]}).segments is None


@pytest.mark.parametrize("kept", ["last", "mask", "indices"])
@pytest.mark.parametrize("shifted", [False, True])
def test_labels_of_kept_positions_only(kept, shifted):
    """As ms-swift cuts them: the first kept position has no label of its own, or the model ignores it too."""
    batch = collate(rows([7, 5], prompt=3))
    whole = read_spans(batch)
    positions = {
        "last": 5,
        "mask": torch.tensor([False, False, True, True, True, True, True]),
        "indices": torch.tensor([2, 3, 4, 5, 6]),
    }[kept]
    name, labels = ("shift_labels", whole.next_labels) if shifted else ("labels", batch["labels"])
    cut = {key: value for key, value in batch.items() if key != "labels"}
    spans = read_spans({**cut, name: labels[:, 2:], "logits_to_keep": positions})
    assert torch.equal(spans.next_labels, whole.next_labels)
    assert torch.equal(spans.completion, whole.completion)
    assert spans.labels == whole.labels
    with pytest.raises(SettingsError, match=r"have shape \(2, 4\), the tokens \(2, 7\)"):
        read_spans({**cut, name: labels[:, 3:], "logits_to_keep": positions})


def test_labels_of_another_length():
    batch = collate(rows([7, 5]))
    with pytest.raises(
        SettingsError, match=r"labels have shape \(2, 4\), the tokens \(2, 7\): give one for each token"
    ):
        read_spans({**batch, "labels": batch["labels"][:, :4], "logits_to_keep": torch.ones(2, 7) != 0})


def test_refusals():
    batch = collate(rows([4]))
    with pytest.raises(SettingsError, match="attention_mask has more than one mask"):
        read_spans({**batch, "attention_mask": {"full_attention": batch["attention_mask"]}})
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
