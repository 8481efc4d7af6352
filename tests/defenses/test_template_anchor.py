"""TemplateAnchor against plain float64 keys and values: padding, packing, several prefixes, and when the reference runs."""

from __future__ import annotations

import pytest
import torch
from byte_tokens import INST, byte_tokenizer
from closeness import assert_as_close_as_torch
from plain_defenses import template_anchor_sum
from plain_loop import enable_checkpointing, make_step
from tiny_models import collate, pack, rows, tiny_peft_model
from tiny_recipe import write_recipe
from train_runs import sgd

from safelora_fast import TemplateAnchor, defend
from safelora_fast.errors import DataError, SettingsError

TOKENIZER = byte_tokenizer()
SIZES = {"vocab_size": len(TOKENIZER), "max_position_embeddings": 256}
SYSTEMS = ["Be good.", None, "Say less, and say it slowly.", "Be good."]
HEADER = TOKENIZER("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]


def conversation(system, question, answer, tokenizer=TOKENIZER):
    """Return a tokenized example and the number of tokens before the question."""
    turns = [{"role": "system", "content": system}] if system else []
    turns += [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    completion = tokenizer(answer, add_special_tokens=False)["input_ids"]
    before = len(tokenizer(text[: text.index(question)], add_special_tokens=False)["input_ids"])
    return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}, before, len(prompt)


MADE = [conversation(system, "Why?" * (number + 1), "No." * number + "So.") for number, system in enumerate(SYSTEMS)]
EXAMPLES = [example for example, _, _ in MADE]


def template_places(tokens, number):
    """Return the indices, in an example, of the tokens before the question or of the assistant's header."""
    _, before, prompt = MADE[number]
    return list(range(before)) if tokens == "prefix" else list(range(prompt - len(HEADER), prompt))


def gradients(model):
    """Return the gradients by name; what comes after the last keys has none from the anchor alone."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: gradient for name, gradient in found.items() if gradient.any()}


def padded_left(examples):
    batch = collate(examples)
    for row, example in enumerate(examples):
        shift = batch["input_ids"].shape[1] - len(example["input_ids"])
        for name in batch:
            batch[name][row] = batch[name][row].roll(shift)
    return batch


def places_of(make, tokens):
    """Return (row, token indices) of every example in a batch made by `make`."""
    lengths = [len(example["input_ids"]) for example in EXAMPLES]
    for number, length in enumerate(lengths):
        row, start = number, 0
        if make is padded_left:
            start = max(lengths) - length
        elif make is pack:
            row, start = 0, sum(lengths[:number])
        yield row, [start + index for index in template_places(tokens, number)]


@pytest.mark.parametrize("tokens", ["prefix", "header"])
@pytest.mark.parametrize("make", [collate, padded_left, pack])
def test_value_and_gradient_are_those_of_the_plain_formula(make, tokens):
    """Four conversations with three prefixes, in two steps: the second is computed from the records alone."""
    batch, model = make(EXAMPLES), tiny_peft_model(**SIZES)
    places = list(places_of(make, tokens))
    exact, plain = tiny_peft_model(**SIZES).double(), tiny_peft_model(**SIZES)
    totals = [template_anchor_sum(one, batch, places) for one in (exact, plain)]
    for total, count in totals:
        (3.0 * total / count).backward()
    with defend(model, [TemplateAnchor(3.0, tokens)], tokenizer=TOKENIZER) as defended:
        for _ in range(2):
            with defended.recording(batch):
                model(**batch)
            model.zero_grad()
            loss = defended.regularizer(defended.totals([batch]))
            loss.backward()
            assert_as_close_as_torch(loss, *(3.0 * total / count for total, count in totals))
            assert_as_close_as_torch(gradients(model), gradients(exact), gradients(plain))
    assert loss > 0.1
    assert all(gradient.norm() > 1e-3 for name, gradient in gradients(model).items() if "layers.0.self_attn.k" in name)


def count_reference_passes(model):
    """Return a list that gets an item for each forward pass of the decoder without gradients in a training run."""
    passes = []
    decoder = model.get_base_model().model
    decoder.register_forward_hook(lambda *_: passes.append(1) if not torch.is_grad_enabled() else None)
    return passes


@pytest.mark.parametrize("tokens", ["prefix", "header"])
def test_the_reference_runs_once_for_each_new_prefix(tokens):
    model = tiny_peft_model(**SIZES)
    batches = [collate(EXAMPLES[:2]), collate(EXAMPLES[:1]), collate(EXAMPLES[1:]), collate(EXAMPLES)]
    optimizer = sgd(model)
    with defend(model, [TemplateAnchor(0.1, tokens)], tokenizer=TOKENIZER, optimizer=optimizer) as defended:
        passes, counts = count_reference_passes(model), []
        for batch in batches:
            before = len(passes)
            make_step(optimizer, defended.loss(batch))
            counts.append(len(passes) - before)
    assert counts == [1, 0, 1, 0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    plain, model, batch = tiny_peft_model(**SIZES), tiny_peft_model(**SIZES), collate(EXAMPLES)
    enable_checkpointing(model, reentrant=reentrant)
    for one in (plain, model):
        with defend(one.train(), [TemplateAnchor()], tokenizer=TOKENIZER) as defended:
            if reentrant and one is model:
                with pytest.raises(SettingsError, match="set use_reentrant=False where gradient checkpointing is on"):
                    defended.loss(batch)
                return
            defended.loss(batch).backward()
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(model)[name], gradient)


def test_accumulation_and_a_frozen_model_as_reference():
    """A window of unequal micro-batches gives the loss of the whole batch, with any kind of reference."""
    reference = tiny_peft_model(**SIZES).unload()
    windows = [[collate(EXAMPLES)], [collate(EXAMPLES[:3]), collate(EXAMPLES[3:])]]
    found = []
    for window, given in zip(windows, ("base", reference), strict=True):
        model = tiny_peft_model(**SIZES)
        with defend(model, [TemplateAnchor()], tokenizer=TOKENIZER, reference=given) as defended:
            totals = defended.totals(window)
            for batch in window:
                defended.loss(batch, totals=totals).backward()
            found.append((gradients(model), defended.metrics()["defense/template_anchor"]))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)
    for name, gradient in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], gradient, rtol=1e-4, atol=1e-6)


def test_layers_are_chosen():
    model, batch = tiny_peft_model(**SIZES), collate(EXAMPLES)
    values = []
    for layers in ([0], [1], [-1], "all"):
        with defend(model, [TemplateAnchor(1.0, layers=layers)], tokenizer=TOKENIZER) as defended:
            defended.loss(batch)
            values.append(defended.metrics()["defense/template_anchor"])
    assert len(set(values)) == 4
    assert values[3] == pytest.approx(sum(values[:3]) / 3, rel=1e-5)


def test_examples_without_the_template_are_reported(caplog):
    model, plain = tiny_peft_model(**SIZES), rows([9, 7])
    with defend(model, [TemplateAnchor()], tokenizer=TOKENIZER) as defended:
        with pytest.raises(SettingsError, match="no example of the first micro-batch has the tokens"):
            defended.loss(collate(plain))
        defended.loss(collate([*EXAMPLES, *plain]))
        defended.loss(collate([*EXAMPLES, *plain]))
        assert defended.loss(collate(plain)) > 0  # the task's loss alone
    assert caplog.text.count("2 of 6 examples of a micro-batch lack the tokens of the chat template") == 1


def test_settings_are_refused_in_one_line():
    model = tiny_peft_model(**SIZES)
    for message, make in {
        'tokens is \'all\', it must be "prefix" or "header"': lambda: TemplateAnchor(tokens="all"),
        "layers is 'some', it must be \"all\" or a list": lambda: TemplateAnchor(layers="some"),
        "layers must name at least one layer, and none twice": lambda: TemplateAnchor(layers=[1, 1]),
        "name one of the 3 layers twice": lambda: defend(model, [TemplateAnchor(layers=[2, -1])], tokenizer=TOKENIZER),
        "give a tokenizer that has one, as tokenizer=": lambda: defend(model, [TemplateAnchor()]),
    }.items():
        with pytest.raises(SettingsError, match=message):
            make()
    nothing = byte_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(DataError, match="writes no tokens before the user's text"):
        defend(model, [TemplateAnchor()], tokenizer=nothing)


def test_images_before_the_header_are_refused():
    """The digest of a prompt's tokens does not tell its images apart."""
    batch = {**collate(EXAMPLES), "pixel_values": torch.zeros(4, 3, 2, 2)}
    with (
        defend(tiny_peft_model(**SIZES), [TemplateAnchor(tokens="header")], tokenizer=TOKENIZER) as defended,
        pytest.raises(SettingsError, match='this batch has pixel_values too: set tokens="prefix"'),
        defended.recording(batch),
    ):
        pass


def test_latent_attention_is_refused():
    model = tiny_peft_model(**SIZES)
    model.get_base_model().config.kv_lora_rank = 16
    with pytest.raises(SettingsError, match=r"has latent attention \(MLA\), whose keys are not the output of a module"):
        defend(model, [TemplateAnchor()], tokenizer=TOKENIZER)


@pytest.mark.parametrize("tokens", ["prefix", "header"])
def test_in_a_recipe(tokens, tmp_path, call):
    tiny = write_recipe(tmp_path, defenses={"kl": False, "template_anchor": {"tokens": tokens}})
    plan = call("train", tiny.path, "--dry-run").out
    assert f"template_anchor: weight 10, tokens {tokens}, layers all" in plan
    assert "keys and values of template tokens in 2 layers" in plan
    assert ("one reference pass a micro-batch" in plan) == (tokens == "header")
    result = call("train", tiny.path, "training.learning_rate=0.001")
    assert result.code == 0, result.err
    card = (tiny.output / "README.md").read_text(encoding="utf-8")
    assert f"(arXiv 2606.06667). | weight 10, tokens {tokens}, layers all | 0 →" in card
    metric = tiny.record()["metrics"]["defense/template_anchor"]
    assert metric["first"] < 1e-12 < metric["last"]  # lora_B is zero at first, and then the keys move


def test_a_template_without_an_assistant_header():
    """Mistral's prompts end with [/INST]."""
    words = byte_tokenizer(INST, eos="</s>", bos="<s>")
    example, _, _ = conversation(None, "Why?", " No. </s>", words)
    batch, model = collate([example]), tiny_peft_model(**SIZES)
    for tokens in ("prefix", "header"):
        with defend(model, [TemplateAnchor(tokens=tokens)], tokenizer=words) as defended:
            defended.loss(batch)
            assert defended.metrics()["defense/template_anchor"] > 0
