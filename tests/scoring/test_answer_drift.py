"""Loss and divergence of completions compared with one example at a time in float64, for several batch sizes."""

from __future__ import annotations

import pytest
import torch
from demo_model import save_tiny
from tiny_recipe import tiny_rows, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from safelora_fast.data.rows import read_rows
from safelora_fast.data.tokens import Encoder
from safelora_fast.errors import SettingsError
from safelora_fast.scoring.drift import answer_drift


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drift")
    models = []
    for seed in (0, 1):
        save_tiny(folder / str(seed), seed)
        models.append(AutoModelForCausalLM.from_pretrained(folder / str(seed), dtype=torch.float32))
    rows = read_rows(str(write_rows(folder / "rows.jsonl", tiny_rows(9))))
    return models, Encoder(AutoTokenizer.from_pretrained(folder / "0")).encode(rows).examples


def plain(model, reference, example):
    """Return tokens, loss and KL(model ‖ reference) of one completion, in float64."""
    loss = divergence = 0.0
    own, other = (
        one.double().eval()(torch.tensor([example.ids])).logits[0].log_softmax(-1) for one in (model, reference)
    )
    for position, label in enumerate(example.labels[1:]):
        if label != -100:
            loss -= own[position, label].item()
            divergence += (own[position].exp() * (own[position] - other[position])).sum().item()
    return len(example.answer), loss, divergence


@pytest.mark.parametrize("tokens_per_batch", [1, 40, 10_000])
def test_drift_is_that_of_single_rows(setting, tokens_per_batch):
    (model, reference), examples = setting
    found = answer_drift(model, reference, examples, tokens_per_batch=tokens_per_batch)
    with torch.no_grad():
        expected = [plain(model, reference, example) for example in examples]
    model.float()
    reference.float()
    assert [answer.tokens for answer in found] == [tokens for tokens, _, _ in expected]
    assert [answer.loss for answer in found] == pytest.approx([loss for _, loss, _ in expected], rel=1e-5)
    assert [answer.divergence for answer in found] == pytest.approx([moved for _, _, moved in expected], rel=1e-3)


def test_a_model_is_where_it_is(setting):
    (model, _), examples = setting
    assert all(abs(answer.divergence) < 1e-6 for answer in answer_drift(model, model, examples))
    assert all(answer.divergence == 0 for answer in answer_drift(model, None, examples))


def test_training_mode_and_gradients_are_left_alone(setting):
    (model, _), examples = setting
    model.train()
    answer_drift(model, None, examples)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_another_vocabulary_is_refused(setting):
    (model, reference), examples = setting
    reference = AutoModelForCausalLM.from_config(reference.config)
    reference.resize_token_embeddings(reference.config.vocab_size + 3)
    with pytest.raises(SettingsError, match="no divergence"):
        answer_drift(model, reference, examples)
