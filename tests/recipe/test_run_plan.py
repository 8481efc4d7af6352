"""The plan compared with the run: exact counts, and the same operations as counted by torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
from demo_model import save_tiny
from tiny_models import collate, random_subspace
from tiny_recipe import write_recipe
from torch.utils.flop_counter import FlopCounterMode

from safelora_fast.configuration.defense_section import Subspaces
from safelora_fast.errors import CheckpointError, SafeLoraFastError
from safelora_fast.models.load import load_config
from safelora_fast.models.quiet_libraries import quiet_libraries
from safelora_fast.recipe.adapted_model import load_model, outline
from safelora_fast.recipe.lora_and_trainer_arguments import trainer_arguments
from safelora_fast.recipe.prepare import prepare
from safelora_fast.recipe.recipe import load_recipe
from safelora_fast.recipe.run_plan import (
    estimate,
    kept_checkpoints,
    measure,
    optimizer_bytes,
    optimizer_steps,
    workload,
)
from safelora_fast.recipe.summary_text import operations, plan_lines, size
from safelora_fast.training import defend


@pytest.fixture(autouse=True)
def quiet():
    with quiet_libraries():
        yield


@pytest.fixture
def without_a_rehearsal(monkeypatch):
    monkeypatch.setattr("safelora_fast.recipe.prepare.rehearse", lambda *_: None)


def test_the_outline_has_the_shapes_of_the_model(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path).path)
    sketch, model = outline(recipe, load_config(recipe.model)), load_model(recipe)
    assert all(parameter.is_meta for parameter in sketch.parameters())
    shapes = [{name: (p.shape, p.dtype, p.requires_grad) for name, p in m.named_parameters()} for m in (sketch, model)]
    assert shapes[0] == shapes[1]
    shape = measure(sketch)
    assert shape == measure(model)
    assert shape.adapter == model.get_nb_trainable_parameters()[0]
    assert shape.parameters + shape.adapter == model.get_nb_trainable_parameters()[1]
    assert len(shape.adapted) == 14


def test_no_weight_is_read(tmp_path):
    tiny = write_recipe(tmp_path)
    (tiny.model / "model.safetensors").unlink()
    plan = prepare(load_recipe(tiny.path)).plan
    assert (plan.steps, plan.rows_per_step, plan.data.used) == (6, 4, 12)
    with pytest.raises(CheckpointError, match="the model cannot be loaded"):
        load_model(load_recipe(tiny.path))


KL = {"kl": {"weight": 0.5}}
ANSWERS = {"kl": {"weight": 0.5, "tokens": "completion"}}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DISTANCE = {"feature_distance": {"layers": 2}}


@pytest.mark.usefixtures("without_a_rehearsal")
@pytest.mark.parametrize(
    ("defenses", "checkpointing", "layers"),
    [
        ({}, False, None), (KL, False, None), (DISTANCE, False, None), (KL | DISTANCE, False, None), (ANSWERS, False, None),
        (KL | DISTANCE, True, None), ({}, False, [3]), (KL, True, [2, 3]),
    ],
)  # fmt: skip
def test_operations_are_those_that_torch_counts(tmp_path, defenses, checkpointing, layers):
    """For one step of a wider model, torch counts matrix products and attention, the latter without the causal mask."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = write_recipe(
        tmp_path,
        data={"max_rows": 6},
        training={"num_train_epochs": 1, "gradient_accumulation_steps": 3, "gradient_checkpointing": checkpointing},
        defenses={"kl": False, **defenses},
        lora={"layers_to_transform": layers, "target_modules": PROJECTIONS} if layers else {},
    )
    config = LlamaConfig.from_pretrained(
        tiny.model, hidden_size=96, intermediate_size=192, num_hidden_layers=4, attn_implementation="eager"
    )
    LlamaForCausalLM(config).save_pretrained(tiny.model)
    prepared = prepare(load_recipe(tiny.path, ["model.attention=eager"]))
    model = load_model(prepared.recipe)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    rows = [{"input_ids": example.ids, "labels": example.labels} for example in prepared.train.examples]
    batches = [collate([row]) for row in rows]
    built = [spec.build(Subspaces(build=True)) for spec in prepared.recipe.defenses]
    counter = FlopCounterMode(display=False)
    with defend(model, built) as defended:
        totals = defended.totals(batches)
        with counter:
            for batch in batches:
                defended.loss(batch, totals=totals).backward()
    work = workload(prepared.arguments, prepared.train)
    assert (work.tokens, work.micro_batches) == (sum(prepared.train.lengths), 3)
    counted_as_torch_does = replace(work, squares=2 * work.squares, head_tokens=work.tokens)
    expected = estimate(prepared.plan.shape, counted_as_torch_does, prepared.recipe.defenses)
    assert counter.get_total_flops() == pytest.approx(expected.defended, rel=0.1)
    assert bool(defenses) == (expected.reference > 0) == (expected.defended > expected.step)


def test_defenses_are_checked_against_the_outline(tmp_path):
    tiny = write_recipe(tmp_path)
    model = load_model(load_recipe(tiny.path))
    random_subspace(model, rank=2).save(tmp_path / "fits.safetensors")
    save_tiny(tmp_path / "other")
    tiny.edit(defenses={"subspace_penalty": {"subspace": str(tmp_path / "fits.safetensors")}})
    assert prepare(load_recipe(tiny.path)).plan.cost.extras["subspace_penalty"].flops > 0
    refusals = {
        "defenses.feature_distance.layers=[9]": "layer 9 does not exist, the model has 2 layers",
        "lora.target_modules=[q_prj]": "command line: lora.target_modules: Target modules",
        "lora={target_modules: [q_proj], r: -1}": "command line: lora.r: ",
        "lora.init_lora_weights=pissa": "pissa",
        "lora.target_modules=[lm_head]": "lm_head",
        "model.attention=flush": "the model cannot be loaded",
        "model.device=cuda": "model.device: is cuda, but torch sees no GPU",
        "training.lr_scheduler_type=linaer": "training.lr_scheduler_type: linaer is not a valid",
        "training.save_strategy=never": "training.save_strategy: ",
        "training.optim=adam": "training.optim",
        "defenses.steering={vector: [1.0, 2.0], layer: 0}": "the vector has 2 values, the model's width is 32",
    }
    for override, message in refusals.items():
        with pytest.raises(SafeLoraFastError) as refused:
            prepare(load_recipe(tiny.path, [override]))
        assert message in str(refused.value), override
        assert "\n" not in str(refused.value)


def test_a_share_is_held_out(tmp_path):
    tiny = write_recipe(tmp_path, data={"eval": 0.25})
    prepared = prepare(load_recipe(tiny.path))
    train, held_out = ({example.place for example in s.examples} for s in (prepared.train, prepared.held_out))
    assert (len(train), len(held_out), len(train | held_out)) == (9, 3, 12)
    again = prepare(load_recipe(tiny.path)).held_out
    other = prepare(load_recipe(tiny.path, ["training.seed=1"])).held_out
    assert [e.place for e in again.examples] == [e.place for e in prepared.held_out.examples]
    assert [e.place for e in other.examples] != [e.place for e in prepared.held_out.examples]
    with pytest.raises(SafeLoraFastError, match="too few to hold out"):
        prepare(load_recipe(tiny.path, ["data.max_rows=1"]))


def test_arguments_follow_the_recipe(tmp_path):
    path = write_recipe(tmp_path).path
    assert trainer_arguments(load_recipe(path)).bf16 is False
    assert trainer_arguments(load_recipe(path, ["model.dtype=bfloat16"])).bf16 is True
    assert trainer_arguments(load_recipe(path, ["model.dtype=bfloat16", "training.bf16=false"])).bf16 is False
    assert trainer_arguments(load_recipe(path, ["training.logging_steps=10"])).logging_first_step is True
    assert trainer_arguments(load_recipe(path, ["training.logging_first_step=false"])).logging_first_step is False


@pytest.mark.parametrize(
    ("override", "steps"),
    [
        ("training.max_steps=5", 5),
        ("training.num_train_epochs=1.5", 5),
        ("training.dataloader_drop_last=true", 6),
        ("training.per_device_train_batch_size=5", 4),
        ("training.gradient_accumulation_steps=100", 2),
    ],
)
def test_steps(tmp_path, override, steps):
    arguments = trainer_arguments(load_recipe(write_recipe(tmp_path).path, [override]))
    assert optimizer_steps(arguments, 12, 1) == steps


@pytest.mark.parametrize(
    ("overrides", "kept"),
    [([], 3), (["training.save_total_limit=1"], 2), (["training.save_strategy=no"], 0), (["training.save_steps=0.5"], 2)],
)  # fmt: skip
def test_checkpoints_on_the_disk(tmp_path, overrides, kept):
    arguments = trainer_arguments(load_recipe(write_recipe(tmp_path).path, overrides))
    assert kept_checkpoints(arguments, 6) == kept


def test_words(tmp_path):
    tiny = write_recipe(tmp_path, defenses={"feature_distance": {"weight": 0}})
    text = "\n".join(f"{label:<9}{line}" for label, line in plan_lines(prepare(load_recipe(tiny.path))))
    for words in ("LoRA on 14 modules", "12 rows", "6 steps of 4 rows (2 × 2)", "kl: weight 0.5", "switched off", "≈"):
        assert words in text
    assert (size(1234), size(5.6e9)) == ("1.23 kB", "5.6 GB")
    assert (operations(999), operations(3.21e15)) == ("999 FLOP", "3.21 PFLOP")


def test_optimizer_state():
    names = {"adamw_torch": 8, "OptimizerNames.ADAMW_8BIT": 2, "sgd": 0, "lion_8bit": 1, "adafactor": 0}
    assert {name: optimizer_bytes(name) for name in names} == names


@pytest.mark.usefixtures("without_a_rehearsal")
def test_the_reference_is_counted_where_a_defense_looks(tmp_path):
    tiny = write_recipe(tmp_path)
    tiny.edit(data={"safe": {"path": str(tiny.data), "fraction": 0.5}})
    prepared = prepare(load_recipe(tiny.path))
    work = replace(workload(prepared.arguments, prepared.train), tokens=1000.0, safe=50.0)

    def cost(**defenses):
        tiny.edit(defenses={"kl": False, "feature_distance": False, **defenses})
        return estimate(prepared.plan.shape, work, load_recipe(tiny.path).defenses)

    whole = cost(**KL)
    safe, sampled = cost(kl={"tokens": "safe"}), cost(kl={"sample": 0.25}, feature_distance={"sample": 0.1})
    assert safe.reference == pytest.approx(0.05 * whole.reference)
    assert sampled.reference == pytest.approx(0.25 * whole.reference)
    assert cost(kl={"tokens": "safe"}, **DISTANCE).reference == whole.reference
    assert cost(kl={"tokens": "safe", "sample": 0.5}).reference == pytest.approx(0.025 * whole.reference)
    assert sampled.extras["kl"].flops == pytest.approx(0.25 * whole.extras["kl"].flops)
