"""Models that a defense does not support raise an error with the reason."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from peft import AdaLoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from plain_loop import group_of_one
from tiny_models import collate, random_subspace, rows, tiny_model, tiny_peft_model
from train_runs import sgd
from transformers import DynamicCache

from safelora_fast.checkpoints.lora_config import KEEPS_BASE_WEIGHTS
from safelora_fast.defenses import KL, DriftMonitor, FeatureDistance, SafeLora, Steering, SubspacePenalty
from safelora_fast.errors import SettingsError
from safelora_fast.training import defend, placement

BATCH = collate(rows([5, 4]))
ONE_LAYER = FeatureDistance(1.0, layers=1)


def refused(message, model, *defenses, **settings):
    with pytest.raises(SettingsError, match=message):
        defend(model, list(defenses), **settings).attach()


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_initializations_that_change_the_base_weights(init):
    model = tiny_peft_model(lora={"init_lora_weights": init})
    refused(f"'default' was initialized by '{init}'", model, ONE_LAYER)
    defend(model, [ONE_LAYER], reference=tiny_model())


@pytest.mark.parametrize("init", ["corda", "loftq", "lora_ga"])
def test_initializations_that_need_data_or_other_libraries(init):
    """They are checked by name only, because running them would need that data or those libraries."""
    model = tiny_peft_model()
    model.peft_config["default"].init_lora_weights = init
    refused(f"'default' was initialized by '{init}'", model, ONE_LAYER)


@pytest.mark.filterwarnings("ignore:.*`eva_config` is not specified", "ignore:lora with eva initialization")
@pytest.mark.parametrize("init", sorted(KEEPS_BASE_WEIGHTS))
def test_initializations_that_keep_the_base_weights(init):
    plain = tiny_model().state_dict()
    try:
        model = tiny_peft_model(lora={"init_lora_weights": init})
    except ValueError as error:
        if "Unknown initialization" not in str(error):
            raise
        pytest.skip(f"this PEFT has no {init}")
    for name, weight in model.get_base_model().state_dict().items():
        if "lora_" not in name:
            assert torch.equal(weight, plain[name.replace(".base_layer.", ".")]), name
    defend(model, [ONE_LAYER])


def trained_norm():
    model = tiny_peft_model()
    model.get_base_model().model.norm.weight.requires_grad_(True)
    return model


def merged():
    model = tiny_peft_model()
    model.merge_adapter()
    return model


def virtual_tokens(config):
    return get_peft_model(tiny_model(), config(task_type="CAUSAL_LM", num_virtual_tokens=3))


def encoder_decoder():
    """An encoder-decoder made of two models; only the outer configuration marks it as one."""
    encoder = transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    decoder = transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, add_cross_attention=True)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    return transformers.VisionEncoderDecoderModel(config)


VIRTUAL = "is of the kind P.*puts virtual tokens before the batch's"
HEAD = "head is adapted or trained"
MODELS = {
    "biases that disabling does not undo": (
        lambda: tiny_peft_model(lora={"bias": "lora_only"}, attention_bias=True), 'bias="lora_only"', KL(1.0),
    ),
    "parameters trained beside the adapter": (trained_norm, r"model\.norm\.weight is trained", KL(1.0)),
    "merged adapter": (merged, r"layers\.0\.self_attn\.q_proj.*merged", KL(1.0)),
    "head adapted": (lambda: tiny_peft_model(lora={"target_modules": ["q_proj", "lm_head"]}), HEAD, KL(1.0)),
    "head trained": (lambda: tiny_peft_model(lora={"modules_to_save": ["lm_head"]}), HEAD, KL(1.0)),
    "DataParallel": (lambda: torch.nn.DataParallel(tiny_peft_model()), "DataParallel", KL(1.0)),
    "compiled": (lambda: torch.compile(tiny_peft_model()), r"torch\.compile", KL(1.0)),
    "prompt tuning": (lambda: virtual_tokens(PromptTuningConfig), VIRTUAL, KL(1.0)),
    "prefix tuning": (lambda: virtual_tokens(PrefixTuningConfig), VIRTUAL, KL(1.0)),
    "prompt encoder": (lambda: virtual_tokens(PromptEncoderConfig), VIRTUAL, KL(1.0)),
    "encoder-decoder": (encoder_decoder, "VisionEncoderDecoderModel is an encoder-decoder", ONE_LAYER),
    "too few layers": (tiny_peft_model, "5 layers are asked for, the model has 3", FeatureDistance(1.0)),
    "no such layer": (tiny_peft_model, "layer 3 does not exist", FeatureDistance(1.0, layers=[0, 3])),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT 0.18, for every Llama
@pytest.mark.parametrize("case", MODELS)
def test_models(case):
    make, message, defense = MODELS[case]
    model = make()
    refused(message, model, defense)
    if message is HEAD:
        defend(model, [ONE_LAYER])


def test_trained_embeddings_tied_to_the_head():
    refused(HEAD, tiny_model(tie_word_embeddings=True), KL(1.0), reference=tiny_model(seed=2))


def test_key_value_cache():
    model = tiny_peft_model()
    name = "cache" if "cache" in inspect.signature(model.get_base_model().forward).parameters else "past_key_values"
    with defend(model, [KL(1.0)]) as defended, pytest.raises(SettingsError, match="set use_cache=False"):
        defended.loss({"input_ids": BATCH["input_ids"], "labels": BATCH["labels"], name: DynamicCache()})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (KL(0.1), "must be a list like"),
        ("kl", "must be a list like"),
        (["kl"], "must be objects like KL"),
        ([KL], "must be objects like KL"),
        ([KL(1.0), KL(2.0)], "given once"),
    ],
    ids=["one", "name", "names", "class", "twice"],
)
def test_what_is_no_list_of_defenses(given, message):
    with pytest.raises(SettingsError, match=message):
        defend(tiny_peft_model(), given)


@pytest.mark.parametrize("make", [SafeLora, SubspacePenalty])
def test_the_name_of_a_subspace_file(make):
    with pytest.raises(SettingsError, match=r"must be a SafeSubspace, not 'sub\.safetensors'; SafeSubspace\.load"):
        make("sub.safetensors")


def test_weights():
    defense = KL(0.1)
    for weight in ("0.1", None, -1.0, float("nan"), float("inf")):
        with pytest.raises(SettingsError, match=r"KL: weight is .* must be a number, finite and not negative"):
            KL(weight)
        with pytest.raises(SettingsError, match="KL: weight is"):
            defense.weight = weight
    defense.weight = 2
    assert (defense.weight, defense.active) == (2.0, True)


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")  # on one process
def test_the_first_fsdp(tmp_path):
    with group_of_one(tmp_path):
        model = torch.distributed.fsdp.FullyShardedDataParallel(
            tiny_peft_model(), device_id=torch.device("cpu"), use_orig_params=True
        )
        refused("use its second version", model, KL(1.0))


def test_optimizers_that_do_not_fit():
    """With an optimizer of other parameters, a defense on the weights would silently do nothing."""
    model = tiny_peft_model()
    for defense in (SubspacePenalty(random_subspace(model), 1.0), SafeLora(random_subspace(model), at="step")):
        message = r"lora_B of model\.layers\.0\.self_attn\.q_proj is not among"
        refused(message, model, defense, optimizer=sgd(tiny_peft_model()))
    refused("needs the optimizer whose step it skips", model, KL(1.0), on_nonfinite="skip")
    refused("on_nonfinite is 'stop'", model, on_nonfinite="stop")


def test_a_named_reference_that_is_trained_too():
    model = trained_norm()
    model.add_adapter("frozen", model.peft_config["default"])
    model.get_base_model().model.norm.weight.requires_grad_(True)
    message = r"model\.norm\.weight is trained .* the reference, which shares it"
    refused(message, model, ONE_LAYER, reference="frozen")
    model.get_base_model().model.norm.weight.requires_grad_(False)
    defend(model, [ONE_LAYER], reference="frozen")
    model.peft_config["default"].bias = "all"
    refused('trains biases \\(bias="all"\\)', model, ONE_LAYER, reference="frozen")


def test_reference_names():
    model = tiny_peft_model()
    refused("'other' does not exist; the model has default", model, KL(1.0), reference="other")
    refused("'default' is the one in training", model, KL(1.0), reference="default")
    refused("2 layers of width 32, the model 3", model, KL(1.0), reference=tiny_model(layers=2))
    refused("is the model in training", model, KL(1.0), reference=model)


@pytest.mark.parametrize("name", ["altup_num_inputs", "hc_mult", "hc_count"])
def test_layers_that_give_several_states_for_each_token(name):
    """Gemma 3n, DeepSeek-V4 and others: feature distance, steering and monitors would mix the states or crash."""
    model, vector = tiny_peft_model(), torch.ones(32)
    setattr(model.get_base_model().config, name, 4)
    message = f"LlamaForCausalLM give 4 hidden states for each token \\({name}\\)"
    for defense in (FeatureDistance(1.0, layers=2), FeatureDistance(1.0, layers=[0]), Steering(vector, 1)):
        refused(message, model, defense)
    refused(message, model, monitors=[DriftMonitor(vector, 1)])
    defend(model, [KL(1.0)])


@pytest.mark.parametrize("defense", [FeatureDistance(1.0, layers=[2]), Steering(torch.ones(32), 2)], ids=repr)
def test_outputs_of_four_axes(defense):
    model = tiny_peft_model()
    model.get_base_model().model.layers[2].register_forward_hook(lambda _m, _a, out: out[None])
    message = r"a layer gave hidden states of shape \(1, 2, 5, 32\), not \[batch, tokens, hidden\]"
    with defend(model, [defense]) as defended, pytest.raises(SettingsError, match=message):
        defended.loss(BATCH)


def test_adalora_has_factors_of_its_own():
    model = get_peft_model(tiny_model(), AdaLoraConfig(target_modules=["q_proj"], total_step=10, task_type="CAUSAL_LM"))
    subspace = random_subspace(tiny_peft_model())
    for defense in (SubspacePenalty(subspace), SafeLora(subspace, at="step")):
        refused("q_proj is adapted by adalora, whose update is not B·A", model, defense, optimizer=sgd(model))


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (lambda _: KL(0.0), "weight"),
        (lambda _: Steering(torch.ones(32), 1, coefficient=0.0), "coefficient"),
        (lambda model: SubspacePenalty(random_subspace(model), 0.0), "weight"),
    ],
    ids=["KL", "Steering", "SubspacePenalty"],
)
@pytest.mark.parametrize("beside", [[], [FeatureDistance(1.0, layers=2)]], ids=["alone", "beside another"])
def test_what_is_switched_on_while_training(make, setting, beside):
    """Its hooks are not installed, so it would silently do nothing."""
    model = tiny_peft_model()
    defense = make(model)
    with defend(model, [defense, *beside]) as defended:
        defended.loss(BATCH)
        setattr(defense, setting, 2.0)
        message = rf"{type(defense).__name__} was switched off \(0\) when it was attached"
        with pytest.raises(SettingsError, match=message):
            defended.loss(BATCH)


def test_a_weight_that_rises_while_training():
    defense = KL(1e-6)
    with defend(tiny_peft_model(), [defense]) as defended:
        small, divergence = defended.loss(BATCH).item(), defended.metrics()["defense/kl"]
        defense.weight = 100.0
        assert defended.loss(BATCH).item() == pytest.approx(small + 100 * divergence, rel=1e-5)


def test_processes_that_share_no_gradients(monkeypatch):
    model = tiny_peft_model()
    with defend(model, [KL(1.0)]) as defended:
        monkeypatch.setattr(placement, "world_size", lambda: 2)
        message = r"2 processes train.*first DistributedDataParallel, accelerator\.prepare"
        with pytest.raises(SettingsError, match=message):
            defended.loss(BATCH)
        with defended.recording(BATCH):  # for users who average gradients themselves
            model(**BATCH)
        assert defended.regularizer(defended.totals([BATCH])).item() > 0


def test_a_model_that_is_sharded_after_defend(tmp_path):
    with group_of_one(tmp_path):
        model, mesh = tiny_peft_model(), torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        with defend(model, [KL(1.0)]) as defended:
            torch.distributed.fsdp.fully_shard(model, mesh=mesh)
            with pytest.raises(SettingsError, match=r"is another parameter than when defend\(\) was called"):
                defended.loss(BATCH)


def test_wrappers_that_come_later_and_do_no_harm():
    """On one process they are harmless, because the model itself is called."""
    losses = []
    for wrap in (lambda _model: None, torch.nn.DataParallel, torch.compile):
        model = tiny_peft_model()
        with defend(model, [KL(3.0)]) as defended:
            wrap(model)
            losses.append(defended.loss(BATCH).item())
    assert losses == losses[:1] * 3


def test_stages_of_deepspeed_that_partition_or_copy_weights():
    """With a stand-in for ZeRO 3, which leaves empty parameters, and for an engine of stage 0."""
    model = tiny_peft_model()
    weight = model.get_base_model().lm_head.weight
    weight.ds_shape, weight.data = weight.shape, torch.empty(0)
    refused(r"DeepSpeed partitions base_model.model.lm_head.weight \(ZeRO stage 3\)", model, ONE_LAYER)
    model = tiny_peft_model()
    model.zero_optimization_stage = lambda: 0
    refused("ZeRO stage 0", model, ONE_LAYER)
    model.zero_optimization_stage = lambda: 2
    defend(model, [ONE_LAYER])
