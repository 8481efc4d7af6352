"""The reference of a vision or audio model is the full model before fine-tuning, run on the full model's inputs.

All tests run in float64, so that tolerances are far above rounding and far below the effect of an error.
"""

from __future__ import annotations

import copy

import pytest
import torch
from multimodal_models import MAKERS, PLACE, make
from peft import LoraConfig, get_peft_model
from plain_defenses import feature_distance_sum, kl_sum
from plain_loop import enable_checkpointing
from tiny_models import collate, fill_adapter, rows, tiny_peft_model
from transformers import LlamaForCausalLM

from safelora_fast.defenses import KL, FeatureDistance
from safelora_fast.errors import SettingsError
from safelora_fast.models.anatomy import dissect
from safelora_fast.training import defend

EXACT = 1e-9
TOWER = r".*(vision_tower.*(q_proj|v_proj|fc1|fc2)|multi_modal_projector\.linear_.)"
DECODER = r".*language_model.*(q_proj|v_proj|down_proj)"


def doubled(model, batch):
    return model.double(), {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}


def adapted(name, *, adapter="default", **lora):
    """Return (model with a random adapter, model before fine-tuning, batch)."""
    model, batch = make(name)
    model, batch = doubled(model, batch)
    before = copy.deepcopy(model).eval()
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **lora}
    model = get_peft_model(model, LoraConfig(**options), adapter_name=adapter)
    fill_adapter(model, seed=1)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in key:  # modules_to_save and trainable tokens
            parameter.data = parameter.data + 0.2 * torch.randn_like(parameter)
    return model.double().train(), before, batch


def run(model, batch):
    """Return the logits and the outputs of the language model's layers, recorded by plain hooks."""
    features = []
    handles = [
        block.register_forward_hook(lambda _m, _a, out: features.append(out[0] if isinstance(out, tuple) else out))
        for block in dissect(model).layers
    ]
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits, features


def plain(model, before, batch):
    """Return values and gradients of KL + feature distance, computed without defenses or chunks."""
    with torch.no_grad():
        reference_logits, reference_features = run(before, batch)
    logits, features = run(model, batch)
    divergence, tokens = kl_sum(logits, reference_logits, batch)
    distance, sequences = feature_distance_sum(features, reference_features, batch)
    parts = divergence / tokens, distance / sequences
    model.zero_grad()
    sum(parts).backward()
    return parts, gradients(model)


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def defenses():
    return [KL(1.0), FeatureDistance(1.0, layers=3)]


def check(model, before, batch, *, share=True, **settings):
    """Check the loss without the task part, both metrics, and the gradients against the plain formulas."""
    other = copy.deepcopy(model)
    (divergence, distance), expected = plain(other, before, batch)
    task = other(**batch, use_cache=False).loss
    with defend(model, defenses(), share_logits=share, **settings) as defended:
        loss = defended.loss(batch)
        metrics = defended.metrics()
        with defended.recording(batch):
            model(**batch)
        defended.regularizer(defended.totals([batch])).backward()
    assert divergence > 1e-3
    assert distance > 1e-3
    assert loss.item() == pytest.approx((task + divergence + distance).item(), rel=1e-6)
    assert metrics["defense/kl"] == pytest.approx(divergence.item(), rel=1e-6)
    assert metrics["defense/feature_distance"] == pytest.approx(distance.item(), rel=1e-6)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= EXACT * gradient.norm() + EXACT, name


@pytest.mark.parametrize("name", MAKERS)
def test_all_linear_layers_adapted(name):
    """PEFT's "all-linear" also adapts towers and projectors."""
    check(*adapted(name))


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": TOWER},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": DECODER, "modules_to_save": ["multi_modal_projector"]},
        {"target_modules": DECODER, "modules_to_save": ["embed_tokens"]},
        {"target_modules": DECODER, "trainable_token_indices": {"embed_tokens": [5, 9, 20, 33, PLACE]}},
        {"target_modules": DECODER},
    ],
    ids=["vision", "embeddings", "saved projector", "saved embeddings", "tokens", "decoder"],
)
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT 0.18, although it is False
def test_parts_before_the_decoder(lora, share):
    check(*adapted("llava", **lora), share=share)


def test_full_fine_tuning_against_a_frozen_copy():
    model, _, batch = adapted("llava")
    model = model.merge_and_unload().requires_grad_(True)
    model.get_output_embeddings().requires_grad_(False)
    before, _ = doubled(*make("llava"))
    check(model, before.eval(), batch, reference=copy.deepcopy(before))


def test_a_named_adapter_as_reference():
    model, before, batch = adapted("llava")
    model.add_adapter("other", LoraConfig(r=2, target_modules=TOWER))
    fill_adapter(model, seed=5, adapter="other")
    model.double().set_adapter("default")
    for name, parameter in model.named_parameters():
        if ".other." in name:
            parameter.requires_grad_(False)
    before = get_peft_model(before, LoraConfig(r=2, target_modules=TOWER))
    fill_adapter(before, seed=5)
    check(model, before.double().eval(), batch, reference="other")


def test_a_model_of_text_alone_as_reference():
    """It would silently read the image placeholder tokens as words."""
    model, before, batch = adapted("llava")
    text = text_model(before)
    refusal = pytest.raises(SettingsError, match=r"\(LlamaForCausalLM\) does not take pixel_values, which the Llava")
    with defend(model, defenses(), reference=text) as defended, refusal:
        defended.loss(batch)
    check(model, before, of_text(batch), reference=text)


def of_text(batch):
    """Return the same rows with words instead of image placeholder tokens."""
    ids = batch["input_ids"].masked_fill(batch["input_ids"] == PLACE, 7)
    return {**{key: value for key, value in batch.items() if key != "pixel_values"}, "input_ids": ids}


def text_model(model):
    text = LlamaForCausalLM(model.config.text_config).double()
    text.model.load_state_dict(dissect(model).decoder.state_dict())
    text.lm_head.load_state_dict(model.get_output_embeddings().state_dict())
    return text


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # frozen tower, re-entrant
def test_gradient_checkpointing(reentrant):
    model, before, batch = adapted("llava", target_modules=DECODER, modules_to_save=["multi_modal_projector"])
    enable_checkpointing(model, reentrant=reentrant)
    check(model, before, batch)


def test_a_batch_of_text():
    model, before, batch = adapted("llava", target_modules=["q_proj", "embed_tokens"])
    check(model, before, of_text(batch))


def test_embeddings_that_were_computed_before():
    """Without gradients they are ordinary inputs; with gradients, they may depend on trained parameters."""
    model, before, batch = adapted("llava", target_modules=["q_proj", "embed_tokens"])
    ids = of_text(batch)["input_ids"]
    embeddings = model.get_input_embeddings()(ids)
    inputs = {"attention_mask": batch["attention_mask"], "labels": batch["labels"]}
    refusal = pytest.raises(SettingsError, match="inputs_embeds was computed with gradients")
    with defend(model, defenses()) as defended, refusal:
        defended.loss({**inputs, "inputs_embeds": embeddings})
    inputs["inputs_embeds"] = embeddings.detach()
    with defend(model, defenses()) as defended, torch.no_grad():
        reference_logits, reference_features = run(before, inputs)
        logits, features = run(model, inputs)
        task = model(**inputs, use_cache=False).loss
        with torch.enable_grad():
            loss = defended.loss(inputs)
    divergence, tokens = kl_sum(logits, reference_logits, {**inputs, "input_ids": ids})
    distance, sequences = feature_distance_sum(features, reference_features, {**inputs, "input_ids": ids})
    assert loss.item() == pytest.approx((task + divergence / tokens + distance / sequences).item(), rel=1e-6)


def test_a_decoder_called_without_its_model():
    """The embeddings come from trained parameters, and the inputs that they were computed from are unknown."""
    model, _, batch = adapted("llava", target_modules=["q_proj", "embed_tokens"])
    ids, mask = of_text(batch)["input_ids"], batch["attention_mask"]
    decoder = dissect(model).decoder
    refusal = pytest.raises(SettingsError, match="inputs_embeds was computed with gradients")
    with defend(model, defenses()) as defended, refusal, defended.recording(batch):
        decoder(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask)
    with defend(model, defenses()) as defended:
        with defended.recording(batch):
            decoder(input_ids=ids, attention_mask=mask)
        assert defended.regularizer(defended.totals([batch])).item() > 1e-3


def test_the_student_keeps_noise_and_dropout_to_itself():
    """NEFTune's noise and a tower's dropout act in the trained model, and not in the reference."""
    model, before, batch = adapted("llava", target_modules=DECODER)

    def noise(module, _inputs, output):
        return output + 1.0 if module.training else output  # like NEFTune, but deterministic

    for module in (model.get_input_embeddings(), model.get_base_model().model.multi_modal_projector):
        module.register_forward_hook(noise)
    (divergence, _), _ = plain(model, before, batch)
    check(model, before, batch)
    quiet, _, _ = adapted("llava", target_modules=DECODER)
    (without, _), _ = plain(quiet, before, batch)
    assert abs(divergence - without) > 1e-3


@pytest.mark.parametrize("second", [False, True])
def test_a_mask_that_depends_on_the_mode(second):
    """Before transformers 5, PaliGemma's mask is not causal in evaluation mode. The reference must use the training mask."""
    model, before, batch = adapted("llava")
    modes = []

    class Masked(type(before)):
        def forward(self, *args, **kwargs):
            modes.append([self.training, self.model.training, self.model.vision_tower.training])
            return super().forward(*args, **kwargs)

    model.get_base_model().__class__ = before.__class__ = Masked
    settings = {"reference": before} if second else {}
    with defend(model, [FeatureDistance(1.0, layers=3)], **settings) as defended, defended.recording(batch):
        model(**batch)
    assert modes == [[True, True, True], [True, True, False]]  # the trained model, then the reference
    assert all(module.training for module in model.modules())
    assert not any(module.training for module in before.modules())


def test_models_of_text_run_their_decoder_only():
    """The reference pass calls the decoder directly, so its cost stays the same."""
    model = tiny_peft_model()
    calls = []
    base = model.get_base_model()
    base.forward = lambda *args, **kwargs: calls.append("model") or type(base).forward(base, *args, **kwargs)
    base.model.register_forward_pre_hook(lambda *_: calls.append("decoder"))
    batch = collate(rows([7, 3]))
    with defend(model, [FeatureDistance(1.0, layers=3)]) as defended, defended.recording(batch):
        model(**batch)
    assert calls == ["model", "decoder", "decoder"]
