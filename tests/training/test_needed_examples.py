"""The reference pass on the examples that defenses look at: the values of a pass on the whole batch, all in float64.

Tolerances are far above rounding in float64 and far below the effect of one wrong token.
"""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from multimodal_models import make as make_multimodal
from peft import LoraConfig, get_peft_model
from plain_defenses import feature_distance_sum, forward, kl_sum, reference_forward
from plain_loop import make_step, train_windows
from tiny_models import collate, fill_adapter, furthest, gradients, pack, rows, tiny_peft_model
from train_runs import run_transformers, sgd

from safelora_fast.data.batch_part import Part, part_of
from safelora_fast.data.draws import draws
from safelora_fast.data.spans import read_spans
from safelora_fast.defenses import KL, FeatureDistance
from safelora_fast.errors import SettingsError
from safelora_fast.models.call_part import depends_on_longest_row, part_of_call
from safelora_fast.models.capture import Call
from safelora_fast.training import defend

EXACT = 1e-10
LENGTHS = [9, 3, 7, 4, 6]
SAFE = [False, True, False, True, False]
LAYERS = [0, 2]


def tagged(batch, lengths=LENGTHS, safe=SAFE):
    """Tag the tokens of safe examples."""
    tags = torch.tensor([tag for tag, length in zip(safe, lengths, strict=True) for _ in range(length)])
    real = read_spans(batch).real
    return {**batch, "safe": torch.zeros_like(real).masked_scatter_(real, tags)}


def right(examples):
    return tagged(collate(examples))


def left(examples):
    """Pad on the left; positions say where each row begins."""
    reverse = collate([{name: values[::-1] for name, values in example.items()} for example in examples])
    batch = {name: values.flip(1) for name, values in reverse.items()}
    return tagged({**batch, "position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)})


def packed(examples):
    """Pack two rows; the safe examples are documents of the first."""
    one, two = pack(examples[:4]), pack([examples[4], *rows([5, 9, 3], seed=8)])
    assert one["input_ids"].shape[1] == two["input_ids"].shape[1]
    batch = {name: torch.cat([one[name], two[name]]) for name in one}
    return tagged(batch, [*LENGTHS, 5, 9, 3], [*SAFE, False, False, False])


def passes(model):
    """Return a list that receives the shapes of the token ids of each pass without gradients."""
    shapes = []

    def note(_module, args, kwargs):
        if not torch.is_grad_enabled():
            shapes.append(tuple(kwargs["input_ids"].shape if "input_ids" in kwargs else args[0].shape))

    model.get_base_model().model.register_forward_pre_hook(note, with_kwargs=True)
    return shapes


def plainly(model, batch, tokens, *, share_logits=True):
    """Return loss and KL from full logits and features of all examples. The model's own task loss is float32."""
    reference_logits, reference_features = reference_forward(model, batch)
    logits, features = forward(model, batch)
    task = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    if not share_logits:
        task = model.get_base_model().loss_function(logits, batch["labels"], vocab_size=logits.shape[-1])
    divergence, count = kl_sum(logits, reference_logits, batch, tokens=tokens)
    chosen = [features[index] for index in LAYERS], [reference_features[index] for index in LAYERS]
    distance, sequences = feature_distance_sum(*chosen, batch, tokens=tokens)
    return {"loss": task + 3 * divergence / count + 5 * distance / sequences, "kl": divergence / count}


def defenses(**settings):
    return [KL(3.0, **settings), FeatureDistance(5.0, layers=LAYERS, **settings)]


def close(found, expected):
    return (found - expected).norm() <= EXACT * expected.norm()


def exact_model(**settings):
    return tiny_peft_model(**settings).double()


@pytest.mark.parametrize("share_logits", [True, False], ids=["shared logits", "apart"])
@pytest.mark.parametrize(
    ("make", "shape"), [(right, (2, 4)), (left, (2, 9)), (packed, (1, 7))], ids=["right", "left", "packed"]
)
def test_the_plain_formulas_from_a_pass_on_the_safe_rows_alone(make, shape, share_logits):
    batch, model, other = make(rows(LENGTHS)), exact_model(), exact_model()
    expected = plainly(other, batch, "safe", share_logits=share_logits)
    expected["loss"].backward()
    with defend(model, defenses(tokens="safe"), share_logits=share_logits) as defended:
        defended.loss(batch)  # the first one compares the head with the model's logits, and tries packed documents
        model.zero_grad()
        shapes = passes(model)
        defended.loss(batch).backward()
        assert shapes == [shape]
        assert defended.metrics()["defense/kl"] == pytest.approx(expected["kl"].item(), rel=EXACT)
        assert close(defended.loss(batch), expected["loss"])
    found = gradients(model)
    assert all(close(found[name], gradient) for name, gradient in gradients(other).items())


@pytest.mark.parametrize("several", [True, False], ids=["two rows", "one row"])
def test_documents_that_a_model_does_not_keep_apart_stay_in_their_rows(several, monkeypatch, caplog):
    """The mask ignores positions, so each document sees those before it, in the model in training as in the reference."""
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda _positions: None)
    caplog.set_level(logging.INFO, logger="safelora_fast")
    model, batch = exact_model(), packed(rows(LENGTHS))
    batch = batch if several else {name: value[:1] for name, value in batch.items()}
    expected = plainly(model, batch, "safe")["kl"]
    with defend(model, defenses(tokens="safe")) as defended:
        defended.loss(batch)
        shapes = passes(model)
        defended.loss(batch)
        assert shapes == [(1 + several, 23)]
        assert defended.metrics()["defense/kl"] == pytest.approx(expected.item(), rel=EXACT)
    (message,) = [record.getMessage() for record in caplog.records if "packed rows" in record.getMessage()]
    assert message.startswith(
        "the reference runs on whole packed rows: LlamaForCausalLM does not keep their documents apart"
    )


def test_the_documents_of_a_part():
    """Needed documents come first, in order; other tokens of the row fill it up, each once."""
    batch = packed(rows(LENGTHS))
    spans = read_spans(batch)
    part = part_of(spans.real, spans.segments, spans.safe)
    assert (part.rows, part.width, part.by_rows().rows) == ((0,), 7, (0, 1))
    assert part.columns.tolist() == [[9, 10, 11, 19, 20, 21, 22]]
    both = part_of(spans.real, spans.segments, spans.safe | (spans.segments == 1))
    assert both.columns.tolist() == [[9, 10, 11, 19, 20, 21, 22], [6, 7, 8, 9, 10, 0, 1]]
    assert part_of(spans.real, spans.segments, spans.real) is None
    assert torch.equal(both.take(both.spread(both.take(batch["input_ids"]))), both.take(batch["input_ids"]))
    model = tiny_peft_model().get_base_model().model
    positions = batch["position_ids"]
    assert part_of_call(model, Call((), {"position_ids": positions}), part).kwargs["position_ids"].tolist() == [
        [0, 1, 2, 0, 1, 2, 3]
    ]
    for others in ({}, {"position_ids": positions, "attention_mask": positions}, {"position_ids": positions + 1}):
        assert part_of_call(model, Call((), others), part) is None


def test_one_pass_serves_defenses_that_look_at_different_examples():
    """The feature distance looks at all examples, so the pass is whole; the KL still looks at the safe ones only."""
    batch, model, other = right(rows(LENGTHS)), exact_model(), exact_model()
    expected = plainly(other, batch, "safe")["kl"]
    shapes = passes(model)
    with defend(model, [KL(3.0, tokens="safe"), FeatureDistance(5.0, layers=LAYERS)], share_logits=False) as defended:
        defended.loss(batch)
        assert shapes[-1] == batch["input_ids"].shape
        assert defended.metrics()["defense/kl"] == pytest.approx(expected.item(), rel=EXACT)


def test_without_a_needed_example_there_is_no_pass():
    """A window whose last micro-batch has none: its loss still has a gradient function, and the weights are the same."""
    examples, safe = rows(LENGTHS), [True, True, False, False, False]
    whole = tagged(collate(examples), safe=safe)
    parts = [{name: value[part] for name, value in whole.items()} for part in (slice(2), slice(2, 5))]
    trained = []
    for window in ([whole], parts):
        model = exact_model()
        shapes = passes(model)
        trained.append(train_windows([window], defenses(tokens="safe"), model=model, share_logits=False)[0])
        assert shapes[-1] == (2, 9)
        assert len(shapes) == 2  # with that of the head's check
    assert furthest(*trained) < 1e-9
    with defend(exact_model(), defenses(tokens="safe")) as defended:
        with defended.recording(parts[1]):
            defended.model(**{name: value for name, value in parts[1].items() if name != "safe"})
        alone = defended.regularizer(defended.totals([parts[1]]))
        alone.backward()
    assert alone.item() == 0


@pytest.mark.parametrize("share_logits", [True, False], ids=["shared logits", "apart"])
def test_inputs_that_cannot_be_cut_run_whole(share_logits):
    """Images come in rows of their own. A mask of all pairs of tokens is cut; a tensor of an unknown name is not."""
    model, batch = make_multimodal("llava")
    batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    options = LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*(q_proj|v_proj)")
    model = get_peft_model(model.double(), options)
    fill_adapter(model, seed=1)
    model.double()
    found = []
    for safe in ([True, True], [True, False]):
        tags = read_spans(batch).real & torch.tensor(safe)[:, None]
        with defend(model, [KL(1.0, tokens="safe")], share_logits=share_logits) as defended:
            defended.loss({**batch, "safe": tags})
            found.append(defended.metrics()["defense/kl"] * int(tags.sum()))
    with torch.no_grad():
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**inputs).logits
        with model.disable_adapter():
            reference = model(**inputs).logits
    p, q = logits.log_softmax(-1), reference.log_softmax(-1)
    each = ((p.exp() * (p - q)).sum(-1) * batch["attention_mask"]).sum(1)
    assert found[0] == pytest.approx(each.sum().item(), rel=1e-8)
    assert found[1] == pytest.approx(each[0].item(), rel=1e-8)


def test_the_arguments_of_a_part():
    model = tiny_peft_model().get_base_model().model
    part = Part(batch=4, tokens=6, rows=(1, 3), width=5)

    def cut(**arguments):
        call = part_of_call(model, Call((), arguments), part)
        return None if call is None else next(iter(call.kwargs.values()))

    values = torch.arange(4 * 6).view(4, 6)
    expected = values[[1, 3], :5]
    for name in ("input_ids", "attention_mask", "position_ids", "token_type_ids"):
        assert torch.equal(cut(**{name: values}), expected)
    assert torch.equal(part_of_call(model, Call((values,), {}), part).args[0], expected)
    assert torch.equal(cut(inputs_embeds=values[..., None].expand(4, 6, 2)), expected[..., None].expand(2, 5, 2))
    assert torch.equal(cut(position_ids=values[:1]), values[:1, :5])
    assert torch.equal(
        cut(position_ids=torch.stack([values, -values, values])), torch.stack([expected, -expected, expected])
    )
    pairs = torch.arange(4 * 36).view(4, 1, 6, 6)
    assert torch.equal(cut(attention_mask=pairs), pairs[[1, 3], :, :5, :5])
    assert torch.equal(cut(attention_mask=pairs[:1]), pairs[:1, :, :5, :5])
    assert cut(use_cache=False) is False
    for unknown in ({"pixel_values": values}, {"attention_mask": {"full": pairs}}, {"cu_seq_lens_q": values[0]}):
        assert cut(**unknown) is None
    whole = part.spread(expected)
    assert torch.equal(part.take(whole), expected)
    assert whole.sum() == expected.sum()


def test_rotary_embeddings_that_depend_on_the_longest_row():
    """Cut from its batch, a row would get other frequencies than in training."""
    call = Call((), {})
    plain = exact_model().config
    dynamic = exact_model(
        max_position_embeddings=8, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    )
    assert not depends_on_longest_row(plain, call, 1000)
    assert [depends_on_longest_row(dynamic.config, call, tokens) for tokens in (8, 9)] == [False, True]
    batch = right(rows(LENGTHS))
    shapes = passes(dynamic)
    with defend(dynamic, [KL(1.0, tokens="safe")]) as defended:
        defended.loss(batch)
    assert shapes[-1] == batch["input_ids"].shape


# sample=


def test_draws_depend_on_tokens_seed_and_step_alone():
    examples = rows(LENGTHS)
    spans = {make: (batch := make(examples), read_spans(batch)) for make in (right, left, packed)}

    def drawn(make, seed=0, step=0):
        batch, span = spans[make]
        return draws(batch, span, seed=seed, step=step)[span.real].unique_consecutive()

    expected = drawn(right)
    assert torch.equal(drawn(left), expected)
    assert torch.equal(drawn(packed)[: len(LENGTHS)], expected)
    others = [drawn(right, seed=1), drawn(right, step=1), drawn(right, seed=1, step=1)]
    assert len(torch.cat([expected, *others]).unique()) == 4 * len(LENGTHS)
    many = torch.stack([drawn(right, step=step) for step in range(2000)])
    assert 0 <= many.min() < many.max() < 1
    # 4 standard errors of the mean of a uniform number, and of a correlation of independent ones
    assert (many.mean(0) - 0.5).abs().max() < 4 * 12**-0.5 * 2000**-0.5
    assert (many.T.corrcoef() - torch.eye(len(LENGTHS))).abs().max() < 4 * 2000**-0.5


@pytest.mark.parametrize("make", [right, packed], ids=["padded", "packed"])
def test_a_sample_is_the_mean_over_drawn_examples_and_on_average_that_of_all(make):
    """Loss and gradient of 250 draws: their means are within 4 standard errors of those of all examples."""
    batch, model, share = make(rows(LENGTHS)), exact_model(), 0.25
    spans = read_spans(batch)

    def regularizer(defended):
        model.zero_grad()
        with defended.recording(batch):
            model(**{name: value for name, value in batch.items() if name != "safe"})
        loss = defended.regularizer(defended.totals([batch]))
        loss.backward()
        flat = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.requires_grad])
        return torch.cat([loss.detach()[None], flat])

    with defend(model, defenses()) as defended:
        expected = regularizer(defended)
    found, shares = [], []
    with defend(model, defenses(sample=share), optimizer=sgd(model), seed=5) as defended:
        for step in range(250):
            defended.step = step
            found.append(regularizer(defended))
            shares.append((draws(batch, spans, seed=5, step=step)[spans.real] < share).double().mean())
    values = torch.stack(found)
    assert ((values[:, 0] == 0) == (torch.stack(shares) == 0)).all()
    error = (values.mean(0) - expected).norm() / expected.norm()
    spread = values.var(0).sum().sqrt() / expected.norm()  # of one draw
    assert spread > 0.5
    assert error < 4 * spread * len(values) ** -0.5


@pytest.mark.parametrize("share_logits", [True, False], ids=["shared logits", "apart"])
def test_splits_and_a_resumed_run_draw_the_same_examples(share_logits):
    lengths = [7, 3, 9, 4, 6, 5, 8, 3]
    examples = rows(lengths)
    windows = {
        "one": [[collate(examples)]] * 3,
        "parts": [[collate(examples[start : start + 2]) for start in range(0, 8, 2)]] * 3,
        "packed": [[pack(examples[:5]), pack(examples[5:])]] * 3,
    }
    train = partial(train_windows, share_logits=share_logits, seed=3)
    given = defenses(sample=0.5)
    found = {name: train(each, given, model=exact_model())[0] for name, each in windows.items()}
    assert furthest(found["one"], found["parts"]) < 1e-9
    assert furthest(found["one"], found["packed"]) < 1e-9
    assert furthest(found["one"], train(windows["one"], defenses(), model=exact_model())[0]) > 1e-4
    resumed = exact_model()
    train(windows["one"][:1], given, model=resumed)
    optimizer = sgd(resumed)
    with defend(resumed, given, optimizer=optimizer, first_step=1, share_logits=share_logits, seed=3) as defended:
        for window in windows["one"][1:]:
            make_step(optimizer, defended.loss(window[0]))
    assert furthest(found["one"], {n: p for n, p in resumed.named_parameters() if p.requires_grad}) < 1e-9


def test_a_trainer_draws_by_its_seed(tmp_path):
    """Accumulated micro-batches of the trainer give the weights of a plain loop with its seed."""
    given = [KL(30.0, sample=0.5)]
    expected, _ = train_windows([[collate(rows([7, 3, 9, 4, 6, 5, 8, 3]))]], given, seed=7)
    spec = {"batch": 2, "accumulation": 4}
    model, _ = run_transformers(spec, tmp_path / "run", defenses=given)
    other, _ = run_transformers({**spec, "arguments": {"seed": 8}}, tmp_path / "other", defenses=given)
    found = [{n: p.detach() for n, p in each.named_parameters() if p.requires_grad} for each in (model, other)]
    assert furthest(found[0], expected) < 1e-5
    assert furthest(found[1], expected) > 1e-4


@pytest.mark.parametrize("sample", [0, -0.5, 1.5, float("nan"), "half"])
def test_a_sample_is_a_share(sample):
    with pytest.raises(SettingsError, match=r"sample is .* must be a share of the examples"):
        KL(0.1, sample=sample)


def test_a_sample_needs_steps_and_tokens():
    with pytest.raises(SettingsError, match=r"FeatureDistance: sample=0.5 .*: give it to defend\(\), optimizer="):
        defend(exact_model(), [FeatureDistance(1.0, layers=2, sample=0.5)]).attach()
    model, batch = exact_model(), collate(rows(LENGTHS))
    batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    refusal = pytest.raises(SettingsError, match="the batch has no input_ids: set sample=1")
    with defend(model, [KL(1.0, sample=0.5)], optimizer=sgd(model)) as defended, refusal:
        defended.loss(batch)
