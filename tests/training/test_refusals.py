"""Models that a defense would be wrong for are refused with the reason."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from peft import AdaLoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from tiny_models import collate, random_subspace, rows, tiny_model, tiny_peft_model
from train_runs import sgd
from transformers import DynamicCache

from safelora_fast.checkpoints.lora_config import KEEPS_BASE_WEIGHTS
from safelora_fast.defenses import KL, DriftMonitor, FeatureDistance, SafeLora, Steering, SubspacePenalty
from safelora_fast.errors import SettingsError
from safelora_fast.training import defend, placement


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_initialisations_that_change_the_base_weights(init):
    model = tiny_peft_model(lora={"init_lora_weights": init})
    with pytest.raises(SettingsError, match=f"'default' was initialized by '{init}'"):
        defend(model, [FeatureDistance(1.0, layers=1)])
    reference = tiny_model()
    defend(model, [FeatureDistance(1.0, layers=1)], reference=reference)


@pytest.mark.parametrize("init", ["corda", "loftq", "lora_ga"])
def test_initialisations_that_need_data_or_other_libraries(init):
    """They are refused by name: to run them here would need what they need."""
    model = tiny_peft_model()
    model.peft_config["default"].init_lora_weights = init
    with pytest.raises(SettingsError, match=f"'default' was initialized by '{init}'"):
        defend(model, [FeatureDistance(1.0, layers=1)])


@pytest.mark.filterwarnings("ignore:.*`eva_config` is not specified", "ignore:lora with eva initialization")
@pytest.mark.parametrize("init", sorted(KEEPS_BASE_WEIGHTS))
def test_initializations_that_keep_the_base_weights(init):
    plain = tiny_model().state_dict()
    model = tiny_peft_model(lora={"init_lora_weights": init})
    for name, weight in model.get_base_model().state_dict().items():
        if "lora_" not in name:
            assert torch.equal(weight, plain[name.replace(".base_layer.", ".")]), name
    defend(model, [FeatureDistance(1.0, layers=1)])


def test_biases_that_disabling_does_not_undo():
    with pytest.raises(SettingsError, match='bias="lora_only"'):
        defend(tiny_peft_model(lora={"bias": "lora_only"}, attention_bias=True), [KL(1.0)])


def test_parameters_trained_beside_the_adapter():
    model = tiny_peft_model()
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(SettingsError, match=r"model\.norm\.weight is trained"):
        defend(model, [KL(1.0)])


def test_key_value_cache():
    model = tiny_peft_model()
    ids = torch.randint(0, 50, (1, 6))
    name = "cache" if "cache" in inspect.signature(model.get_base_model().forward).parameters else "past_key_values"
    batch = {"input_ids": ids, "labels": ids, name: DynamicCache()}
    with defend(model, [KL(1.0)]) as defended, pytest.raises(SettingsError, match="set use_cache=False"):
        defended.loss(batch)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (KL(0.1), "must be a list like"),
        ("kl", "must be a list like"),
        (["kl"], "must be objects like KL"),
        ([KL], "must be objects like KL"),
    ],
    ids=["one", "name", "names", "class"],
)
def test_what_is_no_list_of_defenses(given, message):
    with pytest.raises(SettingsError, match=message):
        defend(tiny_peft_model(), given)


@pytest.mark.parametrize("make", [SafeLora, SubspacePenalty])
def test_the_name_of_a_subspace_file(make):
    with pytest.raises(SettingsError, match=r"must be a SafeSubspace, not 'sub\.safetensors'; SafeSubspace\.load"):
        make("sub.safetensors")


@pytest.mark.parametrize("weight", ["0.1", None, -1.0, float("nan")])
def test_weights(weight):
    with pytest.raises(SettingsError, match="it must be a number, finite and not negative"):
        KL(weight)


def test_merged_adapter():
    model = tiny_peft_model()
    model.merge_adapter()
    with pytest.raises(SettingsError, match=r"layers\.0\.self_attn\.q_proj.*merged"):
        defend(model, [KL(1.0)])


@pytest.mark.parametrize(
    ("lora", "settings"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, {}),
        ({"modules_to_save": ["lm_head"]}, {}),
    ],
    ids=["adapted", "trained"],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT 0.18, of every Llama
def test_adapted_head_with_kl(lora, settings):
    model = tiny_peft_model(lora=lora, **settings)
    with pytest.raises(SettingsError, match="head is adapted or trained"):
        defend(model, [KL(1.0)])
    defend(model, [FeatureDistance(1.0, layers=1)])


def test_trained_embeddings_tied_to_the_head():
    model = tiny_model(tie_word_embeddings=True)
    with pytest.raises(SettingsError, match="head is adapted or trained"):
        defend(model, [KL(1.0)], reference=tiny_model(seed=2))


def test_wrappers():
    with pytest.raises(SettingsError, match="DataParallel"):
        defend(torch.nn.DataParallel(tiny_peft_model()), [KL(1.0)])
    with pytest.raises(SettingsError, match=r"torch\.compile"):
        defend(torch.compile(tiny_peft_model()), [KL(1.0)])


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")  # on one process
def test_the_first_fsdp(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = torch.distributed.fsdp.FullyShardedDataParallel(
            tiny_peft_model(), device_id=torch.device("cpu"), use_orig_params=True
        )
        with pytest.raises(SettingsError, match="use its second version"):
            defend(model, [KL(1.0)])
    finally:
        torch.distributed.destroy_process_group()


def test_optimizers_that_do_not_fit():
    """Without a look at its parameters, a defense on the weights of another optimizer would do nothing, in silence."""
    model = tiny_peft_model()
    for defense in (SubspacePenalty(random_subspace(model), 1.0), SafeLora(random_subspace(model), at="step")):
        with pytest.raises(SettingsError, match=r"lora_B of model\.layers\.0\.self_attn\.q_proj is not among"):
            defend(model, [defense], optimizer=sgd(tiny_peft_model())).attach()
    with pytest.raises(SettingsError, match="needs the optimizer whose step it skips"):
        defend(model, [KL(1.0)], on_nonfinite="skip").attach()


def test_a_named_reference_that_is_trained_too():
    model = tiny_peft_model()
    model.add_adapter("frozen", model.peft_config["default"])
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(SettingsError, match=r"model\.norm\.weight is trained .* the reference, which shares it"):
        defend(model, [FeatureDistance(1.0, layers=1)], reference="frozen")
    model.get_base_model().model.norm.weight.requires_grad_(False)
    defend(model, [FeatureDistance(1.0, layers=1)], reference="frozen")
    model.peft_config["default"].bias = "all"
    with pytest.raises(SettingsError, match='trains biases \\(bias="all"\\)'):
        defend(model, [FeatureDistance(1.0, layers=1)], reference="frozen")


def test_reference_names():
    model = tiny_peft_model()
    with pytest.raises(SettingsError, match="'other' does not exist; the model has default"):
        defend(model, [KL(1.0)], reference="other")
    with pytest.raises(SettingsError, match="'default' is the one in training"):
        defend(model, [KL(1.0)], reference="default")
    with pytest.raises(SettingsError, match="2 layers of width 32, the model 3"):
        defend(model, [KL(1.0)], reference=tiny_model(layers=2))
    with pytest.raises(SettingsError, match="is the model in training"):
        defend(model, [KL(1.0)], reference=model)


@pytest.mark.parametrize("name", ["altup_num_inputs", "hc_mult", "hc_count"])
def test_blocks_that_give_several_states_for_each_token(name):
    """Gemma 3n, DeepSeek-V4 and others: features, steering and monitors would mix the states, or crash."""
    model, vector = tiny_peft_model(), torch.ones(32)
    setattr(model.get_base_model().config, name, 4)
    for attach in (
        lambda: defend(model, [FeatureDistance(1.0, layers=2)]),
        lambda: defend(model, [FeatureDistance(1.0, layers=[0])]),
        lambda: defend(model, [Steering(vector, 1)]),
        lambda: defend(model, [], monitors=[DriftMonitor(vector, 1)]),
    ):
        with pytest.raises(SettingsError, match=f"LlamaForCausalLM give 4 hidden states for each token \\({name}\\)"):
            attach()
    defend(model, [KL(1.0)])


@pytest.mark.parametrize("defense", [FeatureDistance(1.0, layers=[2]), Steering(torch.ones(32), 2)], ids=repr)
def test_blocks_of_four_axes(defense):
    model = tiny_peft_model()
    model.get_base_model().model.layers[2].register_forward_hook(lambda _m, _a, out: out[None])
    ids = torch.ones(2, 5, dtype=torch.long)
    message = r"a layer gave hidden states of shape \(1, 2, 5, 32\), not \[batch, tokens, hidden\]"
    with defend(model, [defense]) as defended, pytest.raises(SettingsError, match=message):
        defended.loss({"input_ids": ids, "labels": ids})


def test_encoder_decoders():
    """Of two models too, where the outer one says so."""
    encoder = transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    decoder = transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, add_cross_attention=True)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    with pytest.raises(SettingsError, match="VisionEncoderDecoderModel is an encoder-decoder"):
        defend(transformers.VisionEncoderDecoderModel(config), [FeatureDistance(1.0, layers=2)])


def test_settings():
    with pytest.raises(SettingsError, match="given once"):
        defend(tiny_peft_model(), [KL(1.0), KL(2.0)])
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(SettingsError, match="weight"):
            KL(wrong)
    with pytest.raises(SettingsError, match="5 layers are asked for, the model has 3"):
        defend(tiny_peft_model(), [FeatureDistance(1.0)])
    with pytest.raises(SettingsError, match="layer 3 does not exist"):
        defend(tiny_peft_model(), [FeatureDistance(1.0, layers=[0, 3])])


def test_adalora_has_factors_of_its_own():
    model = get_peft_model(tiny_model(), AdaLoraConfig(target_modules=["q_proj"], total_step=10, task_type="CAUSAL_LM"))
    subspace = random_subspace(tiny_peft_model())
    for defense in (SubspacePenalty(subspace), SafeLora(subspace, at="step")):
        with pytest.raises(SettingsError, match=r"q_proj is adapted by adalora, whose update is not B·A"):
            defend(model, [defense], optimizer=sgd(model))


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig])
def test_virtual_tokens(config):
    model = get_peft_model(tiny_model(), config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(SettingsError, match=r"is of the kind P.*puts virtual tokens before the batch's"):
        defend(model, [KL(1.0)])


@pytest.mark.parametrize(
    ("make", "switch_on"),
    [
        (lambda _: KL(0.0), lambda defense: setattr(defense, "weight", 0.1)),
        (lambda _: Steering(torch.ones(32), 1, coefficient=0.0), lambda defense: setattr(defense, "coefficient", 2.0)),
        (lambda model: SubspacePenalty(random_subspace(model), 0.0), lambda defense: setattr(defense, "weight", 1)),
    ],
    ids=["KL", "Steering", "SubspacePenalty"],
)
@pytest.mark.parametrize("beside", [[], [FeatureDistance(1.0, layers=2)]], ids=["alone", "beside another"])
def test_what_is_switched_on_while_training(make, switch_on, beside):
    """What it needs is not in the model: without a word it would do nothing."""
    model = tiny_peft_model()
    batch = collate(rows([5, 4]))
    defense = make(model)
    with defend(model, [defense, *beside]) as defended:
        defended.loss(batch)
        switch_on(defense)
        with pytest.raises(
            SettingsError, match=rf"{type(defense).__name__} was switched off \(0\) when it was attached"
        ):
            defended.loss(batch)


def test_a_weight_that_is_changed_to_nonsense():
    defense = KL(0.1)
    for weight in (-1.0, float("nan"), "0.1", None):
        with pytest.raises(SettingsError, match="KL: weight is"):
            defense.weight = weight
    defense.weight = 2
    assert (defense.weight, defense.active) == (2.0, True)


def test_a_weight_that_rises_while_training():
    batch, defense = collate(rows([5, 4])), KL(1e-6)
    with defend(tiny_peft_model(), [defense]) as defended:
        small, divergence = defended.loss(batch).item(), defended.metrics()["defense/kl"]
        defense.weight = 100.0
        assert defended.loss(batch).item() == pytest.approx(small + 100 * divergence, rel=1e-5)


def test_processes_that_share_no_gradients(monkeypatch):
    model, batch = tiny_peft_model(), collate(rows([5, 4]))
    with defend(model, [KL(1.0)]) as defended:
        monkeypatch.setattr(placement, "world_size", lambda: 2)
        with pytest.raises(
            SettingsError, match=r"2 processes train.*first DistributedDataParallel, accelerator\.prepare"
        ):
            defended.loss(batch)
        with defended.recording(batch):  # for those who average by themselves
            model(**batch)
        assert defended.regularizer(defended.totals([batch])).item() > 0


def test_a_model_that_is_sharded_after_defend(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, mesh = tiny_peft_model(), torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        with defend(model, [KL(1.0)]) as defended:
            torch.distributed.fsdp.fully_shard(model, mesh=mesh)
            with pytest.raises(SettingsError, match=r"is another parameter than when defend\(\) was called"):
                defended.loss(collate(rows([5, 4])))
    finally:
        torch.distributed.destroy_process_group()


def test_wrappers_that_come_later_and_do_no_harm():
    """One process, and the model itself is what runs."""
    batch = collate(rows([5, 4]))
    with defend(tiny_peft_model(), [KL(3.0)]) as defended:
        expected = defended.loss(batch).item()
    for wrap in (torch.nn.DataParallel, torch.compile):
        model = tiny_peft_model()
        with defend(model, [KL(3.0)]) as defended:
            wrap(model)
            assert defended.loss(batch).item() == expected
