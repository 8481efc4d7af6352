"""Finding the decoder and its layers in models with unusual names for them."""

from __future__ import annotations

import pytest
import transformers
from families import FAMILIES, Family

from safelora_fast.models.anatomy import dissect

LLAMA4 = {"head_dim": 8, "intermediate_size_mlp": 24, "num_local_experts": 2}
ODD = {
    "Llama 4 names a base that it does not have": Family(transformers.Llama4TextConfig, [], LLAMA4),
    "ModernBERT's decoder is its head": Family(
        transformers.ModernBertDecoderConfig, [], {"cls_token_id": 1, "sep_token_id": 2}
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    model = FAMILIES[name].make(1)
    anatomy = dissect(model)
    assert anatomy.depth == model.config.get_text_config().num_hidden_layers
    assert anatomy.decoder is not model


@pytest.mark.parametrize("name", ODD)
def test_layers_whatever_the_model_calls_them(name):
    model = ODD[name].make(1)
    anatomy = dissect(model)
    assert anatomy.decoder is model.model
    assert list(anatomy.layers) == list(model.model.layers)
