"""Models that require token_type_ids in training (Gemma 3 in transformers 5.1) get the type of text by default."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from multimodal_models import gemma3
from peft import LoraConfig, get_peft_model
from torch import nn

from safelora_fast.errors import SettingsError
from safelora_fast.models.token_types import give_token_types


class Inner(nn.Module):
    def forward(self, input_ids=None, token_type_ids=None):
        if self.training and token_type_ids is None:
            raise ValueError("`token_type_ids` is required as a model input when training")
        self.told = token_type_ids
        return input_ids


class Outer(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.inner, self.config = Inner(), SimpleNamespace(model_type=kind)

    def forward(self, input_ids=None, token_type_ids=None):
        return self.inner(input_ids=input_ids, token_type_ids=token_type_ids)


def test_rows_are_text_where_nothing_else_is_said():
    model, ids = Outer("gemma3"), torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="token_type_ids"):
        model(ids)
    give_token_types(model)
    for call in (model, model.forward):  # PEFT calls the latter
        call(input_ids=ids)
        assert model.inner.told.tolist() == [[0, 0, 0], [0, 0, 0]]
    model(ids, token_type_ids=ids)
    assert model.inner.told is ids
    model.eval()(ids)
    assert model.inner.told is None


def test_a_model_whose_types_are_not_known_is_refused():
    with pytest.raises(SettingsError, match="Outer of this version of transformers wants token_type_ids"):
        give_token_types(Outer("paligemma"))


def test_gemma_3_trains_on_text():
    """The logits equal those of evaluation, so no token has bidirectional attention."""
    config, batch = gemma3()
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config)
    give_token_types(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    ids = torch.where(batch["input_ids"] >= 57, 3, batch["input_ids"])
    expected = adapted.eval()(input_ids=ids).logits
    assert torch.allclose(adapted.train()(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
