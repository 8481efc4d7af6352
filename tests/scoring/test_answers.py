"""Log-likelihoods of answers against the model's own logits in float64, one sequence at a time; batches, heads, modes."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass

import pytest
import torch
import transformers
from families import FAMILIES, Family
from peft import PromptTuningConfig, get_peft_model
from tiny_models import fill_adapter, tiny_model, tiny_peft_model

from safelora_fast.errors import DataError, SettingsError
from safelora_fast.scoring import AnswerScorer, batches_by_length, score_answers

BENT = {
    "soft-cap": Family(
        transformers.Gemma2Config, ["q_proj"], {"head_dim": 8, "final_logit_softcapping": 2.0, "sliding_window": 16}
    ),
    "logit scale": Family(transformers.CohereConfig, ["q_proj"], {"logit_scale": 0.3}),
    "divided logits": Family(transformers.GraniteConfig, ["q_proj"], {"logits_scaling": 5.0}),
    "bias": Family(transformers.PhiConfig, ["q_proj"]),
    **{name: FAMILIES[name] for name in ("qwen2", "gemma", "opt")},
}


@dataclass(frozen=True)
class Sequence:
    ids: list[int]
    labels: list[int]


def sequences(lengths=(9, 4, 17, 9, 2, 30), *, prompt=1, vocabulary=40):
    """The answer is all but the prompt, and one token within it is not counted where there is room."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for length in lengths:
        ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        labels = [-100] * prompt + ids[prompt:]
        if length > 8:
            labels[6] = -100
        made.append(Sequence(ids, labels))
    return made


def truth(model, examples):
    """Sum and number of log p of the labels, by the model's own logits of one sequence without padding."""
    model = model.double().eval()
    found = []
    for example in examples:
        with torch.no_grad():
            logits = model(torch.tensor([example.ids])).logits[0, -len(example.ids) :]
        likelihoods = logits.log_softmax(dim=-1)
        kept = [(at, label) for at, label in enumerate(example.labels[1:]) if label != -100]
        found.append((sum(likelihoods[at, label].item() for at, label in kept), len(kept)))
    model.float()
    return found


def check(model, examples, *, rel=1e-5, **settings):
    scores = score_answers(model, examples, **settings)
    for score, (likelihood, tokens) in zip(scores, truth(model, examples), strict=True):
        assert score.tokens == tokens
        assert score.log_likelihood == pytest.approx(likelihood, rel=rel)
        assert score.mean == pytest.approx(likelihood / tokens, rel=rel)


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.INFO, logger="safelora_fast.scoring")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("name", BENT)
def test_every_kind_of_head(name, told):
    model = BENT[name].make(1)
    check(model, sequences())
    can_be_told = "logits_to_keep" in inspect.signature(model.forward).parameters  # OPT's, from 5 on
    assert bool(told()) != can_be_told


@pytest.mark.parametrize("tokens_per_batch", [1, 20, 40, 100_000])
def test_batches_and_padding_change_nothing(tokens_per_batch):
    check(tiny_peft_model(vocab_size=40), sequences(), tokens_per_batch=tokens_per_batch)


def test_the_head_runs_on_answer_positions_only(monkeypatch):
    model = tiny_model()
    head, counted = model.get_output_embeddings(), []
    head.register_forward_pre_hook(lambda _m, args: counted.append(args[0].shape[:-1].numel()))
    monkeypatch.setattr("safelora_fast.scoring.head.CHUNK_ELEMENTS", {"cpu": 3 * 61})  # chunks of three tokens
    check(model, sequences((30, 30, 30), prompt=25))
    assert sum(counted) <= 24 + 3 * 30  # one probe, and the truth itself


def test_an_adapted_head_is_the_models_own(told):
    model = tiny_peft_model(lora={"target_modules": ["q_proj", "lm_head"]}, vocab_size=40)
    check(model, sequences())
    assert told() == [
        "answers are scored by the logits of the whole model: LlamaForCausalLM makes more of its hidden states than its "
        "head does"
    ]


def test_models_that_keep_all_logits(told, monkeypatch):
    model = tiny_model(vocab_size=40)
    whole = model.forward

    def forward(input_ids=None, attention_mask=None, use_cache=None):
        return whole(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    monkeypatch.setattr(model, "forward", forward)
    check(model, sequences())
    assert told() == ["answers are scored by the logits of the whole model: LlamaForCausalLM takes no logits_to_keep"]


def test_learnt_prompts():
    model = get_peft_model(
        tiny_model(vocab_size=40), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, token_dim=32)
    )
    check(model, sequences())


def test_the_adapter_counts():
    model = tiny_peft_model(vocab_size=40)
    before = score_answers(model, sequences())
    fill_adapter(model, seed=9)
    after = score_answers(model, sequences())
    assert all(abs(a.mean - b.mean) > 1e-4 for a, b in zip(before, after, strict=True))


def test_modes_and_gradients_are_left_as_they_were():
    model = tiny_peft_model(vocab_size=40, dropout=0.5).train()
    frozen = model.get_base_model().model.layers[0].eval()
    scores = []
    for _, score in AnswerScorer(model, tokens_per_batch=20).each(sequences()):
        scores.append(score)
        assert torch.is_grad_enabled()
        assert model.training
        assert not frozen.training
    assert len(scores) == 6
    check(model, sequences())  # no dropout while it scores


def test_half_precision_is_near():
    exact = score_answers(tiny_model(vocab_size=40), sequences())
    rough = score_answers(tiny_model(vocab_size=40).bfloat16(), sequences())
    for one, other in zip(exact, rough, strict=True):
        assert one.mean == pytest.approx(other.mean, rel=2e-2)


def test_what_cannot_be_scored():
    with pytest.raises(DataError, match="example 2 of 2 has no answer token to score"):
        score_answers(tiny_model(), [Sequence([3, 4], [-100, 4]), Sequence([3, 4], [3, -100])])
    with pytest.raises(SettingsError, match="tokens_per_batch is 0, it must be at least 1"):
        score_answers(tiny_model(), sequences(), tokens_per_batch=0)
    tiny_t5 = transformers.T5Config(vocab_size=20, d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4)
    with pytest.raises(SettingsError, match="encoder-decoder"):
        AnswerScorer(transformers.T5ForConditionalGeneration(tiny_t5))
    assert score_answers(tiny_model(), []) == []


def test_batches_of_like_length():
    assert batches_by_length([5, 2, 9, 5, 1], 10) == [[2], [0, 3], [1, 4]]
    assert batches_by_length([5, 2, 9, 5, 1], 1) == [[2], [0], [3], [1], [4]]
    assert batches_by_length([], 4) == []
