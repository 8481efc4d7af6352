"""Log-likelihoods of completions compared with the model's float64 logits of one sequence at a time."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass, fields

import pytest
import torch
import transformers
from families import FAMILIES, Family
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny_models import fill_adapter, tiny_model, tiny_peft_model

from safelora_fast.errors import DataError, SettingsError
from safelora_fast.models.anatomy import Head
from safelora_fast.scoring import AnswerScorer, batches_by_length, score_answers
from safelora_fast.scoring.label_likelihoods import label_log_likelihoods, picked
from safelora_fast.scoring.prefix import Pasts, shared_prefix
from safelora_fast.scoring.sequences import stretched_beyond

LLAMA4 = {"head_dim": 8, "intermediate_size_mlp": 24, "num_local_experts": 2}
GEMMA2 = {"head_dim": 8, "final_logit_softcapping": 2.0, "sliding_window": 16}
MODERN = {"cls_token_id": 1, "sep_token_id": 2, "vocab_size": 40}
BENT = {
    "soft-cap": Family(transformers.Gemma2Config, ["q_proj"], GEMMA2),
    "logit scale": Family(transformers.CohereConfig, ["q_proj"], {"logit_scale": 0.3}),
    "divided logits": Family(transformers.GraniteConfig, ["q_proj"], {"logits_scaling": 5.0}),
    "bias": Family(transformers.PhiConfig, ["q_proj"]),
    "two layers": Family(transformers.ModernBertDecoderConfig, ["Wqkv"], MODERN),
    "llama 4": Family(transformers.Llama4TextConfig, ["q_proj"], LLAMA4),
    **{name: FAMILIES[name] for name in ("qwen2", "gemma", "opt")},
}


@dataclass(frozen=True)
class Sequence:
    ids: list[int]
    labels: list[int]


def sequences(lengths=(9, 4, 17, 9, 2, 30), *, prompt=1, vocabulary=40, seed=5):
    """Everything after the prompt is the completion; if it is long enough, one token in it has no label."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        labels = [-100] * prompt + ids[prompt:]
        if length > 8:
            labels[6] = -100
        made.append(Sequence(ids, labels))
    return made


def truth(model, examples):
    """Return sum and count of the labels' log p, from the model's logits of one sequence without padding."""
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


def check(model, examples, *, rel=1e-5, scorer=None, **settings):
    scores = dict((scorer or AnswerScorer(model, **settings)).each(examples))
    for index, (likelihood, tokens) in enumerate(truth(model, examples)):
        score = scores[index]
        assert score.tokens == tokens
        assert score.log_likelihood == pytest.approx(likelihood, rel=rel)
        assert score.mean == pytest.approx(likelihood / tokens, rel=rel)


def change_logits(model, monkeypatch):
    """Change the logits in a way that the configuration does not show."""
    whole, bend = model.forward, torch.arange(40) % 2 - 0.5

    def forward(input_ids=None, logits_to_keep=0, **others):
        output = whole(input_ids=input_ids, logits_to_keep=logits_to_keep, **others)
        output.logits = output.logits + bend.to(output.logits.dtype)
        return output

    monkeypatch.setattr(model, "forward", forward)
    return model


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.INFO, logger="safelora_fast.scoring")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("name", BENT)
def test_every_kind_of_head(name, told):
    model = BENT[name].make(1)
    check(model, sequences())
    can_be_told = "logits_to_keep" in inspect.signature(model.forward).parameters  # OPT, since transformers 5
    assert bool(told()) == (name == "two layers" or not can_be_told)


@pytest.mark.parametrize("tokens_per_batch", [1, 20, 40, 100_000])
def test_batches_and_padding_change_nothing(tokens_per_batch):
    check(tiny_peft_model(vocab_size=40), sequences(), tokens_per_batch=tokens_per_batch)


def test_the_head_runs_on_answer_positions_only(monkeypatch):
    model = tiny_model()
    head, counted = model.get_output_embeddings(), []
    head.register_forward_pre_hook(lambda _m, args: counted.append(args[0].shape[:-1].numel()))
    # chunks of three tokens
    monkeypatch.setattr("safelora_fast.scoring.label_likelihoods.CHUNK_ELEMENTS", {"cpu": 3 * 61})
    check(model, sequences((30, 30, 30), prompt=25))
    assert sum(counted) <= 24 + 3 * 30  # one probe, and the calls of `truth`


@pytest.mark.parametrize(
    "lora",
    [{"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
    ids=["adapted", "saved"],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # PEFT 0.18
def test_an_adapted_head_is_the_models_own(told, lora):
    model = tiny_peft_model(lora=lora, vocab_size=40)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data.mul_(1.5)
    check(model, sequences())
    assert told() == [
        "completions are scored by the logits of the whole model: the output head of LlamaForCausalLM is adapted"
    ]


def test_an_adapted_head_is_not_lost_in_half_precision():
    """Its effect may be smaller than the resolution of single 16-bit logits."""
    model = tiny_peft_model(lora={"target_modules": ["lm_head"]}, vocab_size=40)
    fill_adapter(model, seed=1, scale=0.05)
    model.bfloat16()
    adapted = score_answers(model, sequences())
    exact = truth(model, sequences())
    with model.disable_adapter():
        plain = truth(model, sequences())
    apart = [abs(one - other) for (one, _), (other, _) in zip(exact, plain, strict=True)]
    off = [abs(score.log_likelihood - one) for score, (one, _) in zip(adapted, exact, strict=True)]
    assert sum(off) < sum(apart) / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_that_are_bent_in_an_unknown_way_are_the_models_own(told, monkeypatch, dtype):
    score_answers(change_logits(tiny_model(vocab_size=40).to(dtype), monkeypatch), sequences())
    assert told() == [
        "completions are scored by the logits of the whole model: LlamaForCausalLM makes more of its hidden states than its "
        "head does"
    ]


def test_what_runs_out_of_memory_while_it_is_tried_is_tried_again(told, monkeypatch):
    def no_memory(*_args):
        raise torch.OutOfMemoryError

    model = change_logits(tiny_model(vocab_size=40), monkeypatch)
    scorer = AnswerScorer(model)
    with monkeypatch.context() as once:
        once.setattr("safelora_fast.scoring.answer_scores.label_log_likelihoods", no_memory)
        with pytest.raises(SettingsError, match="out of memory"):
            list(scorer.each(sequences()))
    check(model, sequences(), scorer=scorer)
    assert len(told()) == 1


ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    "longrope": {
        "rope_type": "longrope", "factor": 4.0, "rope_theta": 10000.0, "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4, "original_max_position_embeddings": 16,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_models_that_stretch_their_positions_with_the_length(kind):
    """A shared prefix and other sequences in the batch must not change whether positions are rescaled."""
    longest = 64 if kind == "longrope" else 16
    name = "rope_parameters" if "rope_parameters" in dir(transformers.LlamaConfig()) else "rope_scaling"
    settings = {**ROPES[kind], **({} if name == "rope_parameters" else {"type": kind})}
    model = tiny_model(vocab_size=40, max_position_embeddings=longest, **{name: settings})
    assert stretched_beyond(model.config) == 16
    examples = [*sequences((9, 30, 12, 21), prompt=8), *beginning_alike(12, (16, 24, 14, 20))]
    rel = 16 * 30 * 2**-24  # rounding of angles up to 30 radians is 30 times that of the states
    check(model, [*examples[:1], *examples], rel=rel)
    alike = [
        Sequence(examples[1].ids[:20] + example.ids[8:], [-100] * 20 + example.ids[8:]) for example in examples[:3]
    ]
    check(model, alike, rel=rel)


def test_models_that_do_not():
    assert [stretched_beyond(config) for config in (tiny_model().config, transformers.Gemma3TextConfig())] == [None] * 2


def test_models_that_keep_all_logits(told, monkeypatch):
    model = tiny_model(vocab_size=40)
    whole = model.forward

    def forward(input_ids=None, attention_mask=None, use_cache=None):
        return whole(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    monkeypatch.setattr(model, "forward", forward)
    check(model, sequences())
    assert told() == [
        "completions are scored by the logits of the whole model: LlamaForCausalLM takes no logits_to_keep"
    ]


def test_learned_prompts():
    model = get_peft_model(
        tiny_model(vocab_size=40), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, token_dim=32)
    )
    check(model, sequences())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_learned_prompts_stand_before_what_batches_begin_with(dtype):
    """PEFT would prepend them again after cached tokens, and in 16 bits the error looks like rounding."""
    options = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, token_dim=32)
    model = get_peft_model(tiny_model(vocab_size=40), options).to(dtype)
    examples = beginning_alike(12, (30, 25, 26))
    seen = []
    model.get_base_model().lm_head.register_forward_pre_hook(lambda _m, args: seen.append(len(args[0])))
    scorer = AnswerScorer(model)
    list(scorer.each(examples[:1]))
    seen.clear()
    list(scorer.each(examples))
    assert seen == [3]  # no separate pass for the prefix
    check(model, examples, rel=1e-5 if dtype == torch.float32 else 2e-3)


def test_an_adapter_that_is_activated_within_what_batches_begin_with():
    lora = {"alora_invocation_tokens": [7, 8], "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    if "alora_invocation_tokens" not in {field.name for field in fields(LoraConfig)}:
        pytest.skip("this PEFT has no activated LoRA")
    model = tiny_peft_model(lora=lora, vocab_size=40)
    examples = beginning_alike(20, (40, 35, 46))
    for example in examples:
        example.ids[14:16] = [7, 8]
    check(model, [examples[0]])
    check(model, examples)


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
    check(model, sequences())  # scoring disables dropout


@pytest.mark.parametrize("name", BENT)
def test_what_all_begin_with_runs_once(name):
    model = BENT[name].make(1)
    examples = beginning_alike(12, (20, 15, 26))
    check(model, [examples[0]])  # runs the probes first
    scorer = AnswerScorer(model)
    list(scorer.each([examples[0]]))
    seen = []
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda _m, args: seen.append(args[0].shape))
    check(model, examples, scorer=scorer)
    handle.remove()
    assert seen[:2] == [(1, 11), (3, 15)]  # the prefix's last token predicts a completion


def test_an_answer_within_what_all_begin_with_is_scored():
    examples = [Sequence(example.ids, [-100] * 9 + example.ids[9:]) for example in beginning_alike(12, (20, 15, 26))]
    assert shared_prefix(examples) == 8
    check(tiny_peft_model(vocab_size=40), examples)
    twins = [Sequence([5, 6, 7], [-100, -100, 7])] * 3
    assert shared_prefix(twins) == 1
    check(tiny_peft_model(vocab_size=40), twins)


def test_little_that_is_shared_is_left():
    pasts = Pasts(tiny_model(vocab_size=40))
    assert pasts.shared(beginning_alike(12, (20, 15, 26))) == 11
    assert pasts.shared(beginning_alike(1, (30, 26))) == 0
    assert pasts.shared(beginning_alike(12, (20,))) == 0
    assert pasts.shared(sequences()) == 0


@pytest.mark.parametrize("name", BENT)
def test_what_batches_begin_with_runs_once(name):
    """Four sequences with one prefix in three batches, then some with another prefix, then the first ones again."""
    model = BENT[name].make(1)
    alike = beginning_alike(12, (30, 26, 20, 15))
    others = beginning_alike(9, (28, 25), seed=6)
    expected = [likelihood for likelihood, _ in truth(model, [*alike, *others, *alike])]
    scorer = AnswerScorer(model, tokens_per_batch=60)
    list(scorer.each([others[0]]))
    seen = []
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda _m, args: seen.append(tuple(args[0].shape)))
    found = [score.log_likelihood for some in (alike, others, alike) for _, score in sorted(scorer.each(some))]
    handle.remove()
    first, second, third = [(2, 19), (2, 9)], [(2, 20)], [(2, 19), (2, 9)]
    assert seen == [(1, 11), *first, (1, 8), *second, (1, 11), *third]
    assert found == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_a_past_serves_a_batch_that_begins_with_more():
    model = tiny_model(vocab_size=40).double().eval()
    pasts = Pasts(model)
    alike = beginning_alike(12, (26, 15))
    longer = [Sequence([*alike[0].ids[:16], number], [-100] * 16 + [number]) for number in (5, 6, 7)]
    assert pasts.shared(longer) == 15
    pasts.of(torch.tensor([alike[0].ids[:11]]), 2)
    assert pasts.shared(longer) == pasts.shared(alike) == 11
    assert pasts.shared(alike[:1]) == 11
    pasts.of(torch.tensor([alike[0].ids[:5]]), 2)
    assert pasts.shared(longer) == 15  # with the 5 cached tokens, too much of the prefix would run again
    whole = model(torch.tensor([longer[0].ids])).logits
    after = model(torch.tensor([longer[0].ids[5:]]), **pasts.of(torch.tensor([longer[0].ids[:5]]), 1)).logits
    assert torch.allclose(after, whole[:, 5:])
    again = model(torch.tensor([longer[0].ids[5:]]), **pasts.of(torch.tensor([longer[0].ids[:5]]), 1)).logits
    assert torch.equal(after, again)  # using the cache does not change it


def test_a_model_whose_past_is_another_thing_runs_whole(monkeypatch):
    monkeypatch.setattr(Pasts, "of", lambda *_, **__: {})
    check(tiny_model(vocab_size=40), beginning_alike(12, (20, 15, 26)))


def test_too_few_tokens_to_try_a_past_on_are_no_proof_of_one(monkeypatch):
    monkeypatch.setattr(Pasts, "of", lambda *_, **__: {})
    model = tiny_model(vocab_size=40)
    scorer = AnswerScorer(model)
    list(scorer.each([Sequence([5, 6], [-100, 6])]))
    check(model, beginning_alike(12, (20, 15, 26)), scorer=scorer)


def beginning_alike(length, lengths, seed=5):
    """Return sequences whose completions start at the end of their common prefix."""
    first, *others = sequences(lengths, prompt=length, seed=seed)
    return [first, *(Sequence(first.ids[:length] + other.ids[length:], other.labels) for other in others)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["plain", "bias", "scale", "soft-cap"])
def test_large_logits_of_half_precision_are_precise_where_it_matters(dtype, kind):
    """Likely labels, and logits near theirs, compared with float64 from the same numbers."""
    generator = torch.Generator().manual_seed(4)
    module = torch.nn.Linear(32, 61, bias=kind == "bias")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    module.to(dtype)
    hidden = (5 * torch.randn(200, 32, generator=generator)).to(dtype)
    head = Head(module, 0.25 if kind == "scale" else 1.0, 300.0 if kind == "soft-cap" else None)
    logits = hidden.double() @ module.weight.double().T
    logits = head.scale * (logits + module.bias.double() if kind == "bias" else logits)
    logits = logits if head.softcap is None else (logits / head.softcap).tanh() * head.softcap
    assert logits.max() > 20
    labels = logits.topk(2, dim=1).indices[torch.arange(200), torch.arange(200) % 2]
    expected = logits.log_softmax(dim=1)[torch.arange(200), labels]
    with torch.no_grad():
        ours = label_log_likelihoods(hidden, labels, head)
    digits = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    # A logit's rounding error is at most `digits` times its distance to the label's logit, which is rounded too. Errors
    # are weighted by the logit's probability.
    products = hidden.double() @ module.weight.double().T
    own = products[torch.arange(200), labels][:, None]
    off = digits * ((products - own).abs() + digits * own.abs())
    bound = head.scale * (logits.softmax(dim=1) * off).sum(dim=1) * 1.1 + 1e-5
    assert ((ours - expected).abs() <= bound).all()
    rounded = logits.to(dtype).double().log_softmax(dim=1)[torch.arange(200), labels]
    assert (ours - expected).square().mean() < (rounded - expected).square().mean() / 9


def test_log_likelihoods_are_float32_whatever_new_tensors_are():
    logits = torch.randn(5, 61, generator=torch.Generator().manual_seed(4))
    expected = logits.log_softmax(dim=1)[:, 7]
    former = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = picked(logits, torch.full((5,), 7))
    finally:
        torch.set_default_dtype(former)
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, rtol=1e-6)


def test_half_precision_is_near():
    exact = score_answers(tiny_model(vocab_size=40), sequences())
    rough = score_answers(tiny_model(vocab_size=40).bfloat16(), sequences())
    for one, other in zip(exact, rough, strict=True):
        assert one.mean == pytest.approx(other.mean, rel=2e-2)


def test_what_cannot_be_scored():
    with pytest.raises(DataError, match="example 2 of 2 has no completion token to score"):
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
    assert batches_by_length([5, 2, 9, 5, 7, 1], 10, alone_beyond=6) == [[0, 3], [1, 5], [4], [2]]
