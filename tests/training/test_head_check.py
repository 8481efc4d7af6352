"""KL raises an error for a model whose logits are not its head applied to its hidden states, and is exact for others."""

from __future__ import annotations

import logging
from contextlib import nullcontext

import pytest
import torch
import transformers
from families import COMMON, Family, adapt
from tiny_models import collate, rows, tiny_model, tiny_peft_model

from safelora_fast.defenses import KL, FeatureDistance
from safelora_fast.defenses.parts.head_check import check_logits
from safelora_fast.errors import SettingsError
from safelora_fast.models.anatomy import dissect
from safelora_fast.training import defend

IDS = torch.tensor([[5, 9, 2, 17, 30, 8, 11, 4, 21], [7, 3, 12, 1, 39, 26, 6, 18, 10]])
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
RECURRENT = {"num_hidden_layers": 3, "attention_window_size": 8, "lru_width": 32, "head_dim": 8, "logits_soft_cap": 1.0}
MPT = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": 40, "logit_scale": 0.5}
RIGHT = {
    "soft-cap under another name": Family(transformers.RecurrentGemmaConfig, ["gate_proj", "up_proj"], RECURRENT),
    "a scale that the model ignores": Family(transformers.MptConfig, ["Wqkv", "out_proj"], MPT, common=False),
}


def divergence(model):
    """Return the mean over tokens of KL(model ‖ model without adapter), from both models' logits in float64."""
    inputs = {"input_ids": IDS, "attention_mask": BATCH["attention_mask"], "use_cache": False}
    model.eval()
    with torch.no_grad():
        p = model(**inputs).logits.double().log_softmax(-1)
        with model.disable_adapter():
            q = model(**inputs).logits.double().log_softmax(-1)
    model.train()
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("family", RIGHT.values(), ids=RIGHT)
@pytest.mark.parametrize("share", [True, False])
def test_heads_that_the_configuration_tells(family, share):
    model = adapt(family.make(seed=0), **family.target)
    with defend(model, [KL(1.0)], share_logits=share) as defended:
        defended.loss(BATCH).backward()
        assert defended.metrics()["defense/kl"] == pytest.approx(divergence(model), rel=1e-4)


@pytest.mark.parametrize("share", [True, False])
def test_a_head_with_more_before_it(share):
    """BERT's language model has a transform between the decoder and the head."""
    family = Family(transformers.BertConfig, ["query", "value"], {"is_decoder": True})
    model = adapt(family.make(seed=0), **family.target)
    message = "the logits of BertLMHeadModel are not its head on the decoder's hidden states"
    with defend(model, [KL(1.0)], share_logits=share) as defended, pytest.raises(SettingsError, match=message):
        defended.loss(BATCH)
    with defend(model, [FeatureDistance(1.0, layers=2)]) as defended:
        defended.loss(BATCH).backward()


def asked_with(model, name):
    """Make the model's forward fail if the argument `name` is missing."""
    forward = model.get_base_model().forward

    def needing(*args, **kwargs):
        if kwargs.get(name) is None:
            raise ValueError(f"no {name}")
        return forward(*args, **kwargs)

    model.get_base_model().forward = needing


@pytest.mark.parametrize("scaled", [False, True])
def test_a_model_that_needs_more_than_tokens_is_asked_with_the_batch(scaled, caplog):
    model = tiny_peft_model()
    asked_with(model, "attention_mask")
    if scaled:
        model.get_base_model().lm_head.register_forward_hook(lambda _m, _a, logits: 0.5 * logits)
    refusal = pytest.raises(SettingsError, match="are not its head") if scaled else nullcontext()
    with caplog.at_level(logging.WARNING, logger="safelora_fast"), defend(model, [KL(1.0)]) as defended, refusal:
        defended.loss(collate(rows([7, 3])))
    assert not caplog.records


@pytest.mark.parametrize(
    ("extra", "refused"),
    [
        ({"theirs": float("-inf")}, True),
        ({"theirs": float("nan")}, True),
        ({"theirs": float("-inf"), "ours": float("-inf"), "scale": 3.0}, True),
        ({"theirs": float("nan"), "ours": float("nan"), "scale": 3.0}, True),
        ({"theirs": float("-inf"), "ours": float("-inf")}, False),
    ],
    ids=str,
)
def test_logits_that_are_not_finite(extra, refused):
    """NaN used to hide all other differences, because no comparison with NaN exceeds a tolerance."""
    model = tiny_peft_model()
    head = model.get_base_model().lm_head
    if "ours" in extra:
        head.bias = torch.nn.Parameter(torch.zeros(head.weight.shape[0]), requires_grad=False)
        head.bias[-3:] = extra["ours"]

    def masked(_module, _inputs, logits):
        logits = extra.get("scale", 1.0) * logits
        logits[..., -3:] = extra["theirs"]
        return logits

    head.register_forward_hook(masked)
    expectation = pytest.raises(SettingsError, match="are not its head") if refused else nullcontext()
    with expectation:
        check_logits(model, dissect(model), collate(rows([7, 3])))


def test_a_model_that_cannot_be_asked_is_trained_with_a_word(caplog):
    model = tiny_peft_model()
    asked_with(model, "labels")
    batch = collate(rows([7, 3]))
    with caplog.at_level(logging.WARNING, logger="safelora_fast"), defend(model, [KL(1.0)]) as defended:
        defended.loss(batch)
        defended.loss(batch)
    assert [record.message for record in caplog.records] == [
        "KL: the head of LlamaForCausalLM could not be compared with its logits (ValueError: no labels)"
    ]


@pytest.mark.parametrize("change", ["weight", "vocabulary"])
def test_a_reference_with_another_head(change):
    other = tiny_model(seed=0)
    if change == "weight":
        other.get_output_embeddings().weight.data[3, 1] += 1e-3
    else:
        other = tiny_model(seed=0, vocab_size=COMMON["vocab_size"] + 30)
    model = tiny_peft_model()
    with pytest.raises(SettingsError, match="output head of the model given as reference"):
        defend(model, [KL(1.0)], reference=other)
    if change == "weight":
        defend(model, [FeatureDistance(1.0, layers=2)], reference=other)
