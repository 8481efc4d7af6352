"""defend() in a plain loop: values, gradients, accumulation, and a model that is unchanged afterwards."""

from __future__ import annotations

import logging
from contextlib import nullcontext

import pytest
import torch
from closeness import assert_as_close_as_torch, rounded
from plain_defenses import feature_distance_sum, forward, kl_sum, reference_forward
from plain_loop import enable_checkpointing, group_of_one, make_step, scale_reference, train_windows
from tiny_models import adapter_weights, collate, furthest, gradients, pack, rows, tiny_model, tiny_peft_model
from train_runs import sgd

from safelora_fast.defenses import KL, FeatureDistance
from safelora_fast.errors import SettingsError, TrainingError
from safelora_fast.training import defend

LENGTHS = [7, 3, 9, 4, 6, 5, 8, 3]
LAYERS = [0, 2]
BATCH = collate(rows(LENGTHS))


def defenses(kl=3.0, distance=5.0, tokens="all"):
    return [KL(kl, tokens=tokens), FeatureDistance(distance, layers=LAYERS, tokens=tokens)]


def strong(tokens="all"):
    return defenses(60.0, 40.0, tokens)


def plain_loss(model, batch, *, kl=3.0, distance=5.0, tokens="all"):
    """Return the task loss, the KL term and the feature distance term, from full logits and features."""
    reference_logits, reference_features = reference_forward(model, batch)
    logits, features = forward(model, batch)
    task = model.get_base_model().loss_function(logits, batch["labels"], vocab_size=logits.shape[-1])
    kl_total, tokens_count = kl_sum(logits, reference_logits, batch, tokens=tokens)
    chosen = [features[i] for i in LAYERS], [reference_features[i] for i in LAYERS]
    distance_total, sequences = feature_distance_sum(*chosen, batch, tokens=tokens)
    return task, kl * kl_total / tokens_count, distance * distance_total / sequences


def flat_gradients(model):
    return torch.cat([gradient.flatten() for gradient in gradients(model).values()])


@pytest.mark.parametrize("make", [collate, pack], ids=["padded", "packed"])
@pytest.mark.parametrize("tokens", ["all", "completion"])
def test_loss_and_gradients_are_those_of_the_plain_formulas(make, tokens):
    batch, model = make(rows(LENGTHS)), tiny_peft_model()
    exact, plain = tiny_peft_model().double(), tiny_peft_model()
    losses = [sum(plain_loss(one, batch, tokens=tokens)) for one in (exact, plain)]
    for plainly in losses:
        plainly.backward()
    with defend(model, defenses(tokens=tokens)) as defended:
        loss = defended.loss(batch)
        loss.backward()
    assert_as_close_as_torch(loss, *losses)
    assert_as_close_as_torch(gradients(model), gradients(exact), gradients(plain))


@pytest.mark.parametrize("share_logits", [True, False])
@pytest.mark.parametrize("make", [collate, pack], ids=["padded", "packed"])
@pytest.mark.parametrize("tokens", ["all", "completion"])
def test_first_tokens_of_completions_weigh_more(make, tokens, share_logits):
    """Two completions of one example too; the mean still divides by the number of tokens."""
    examples = rows(LENGTHS)
    examples[2]["labels"][5:7] = [-100, -100]
    batch, positions = make(examples), [5.0, 20.0]
    exact, plain, model = tiny_peft_model().double(), tiny_peft_model(), tiny_peft_model()
    losses = []
    for one in (exact, plain):
        logits, reference = forward(one, batch)[0], reference_forward(one, batch)[0]
        task = one.get_base_model().loss_function(logits, batch["labels"], vocab_size=logits.shape[-1])
        total, count = kl_sum(logits, reference, batch, tokens=tokens, positions=positions)
        losses.append(task + 0.3 * total / count)
        losses[-1].backward()
    with defend(model, [KL(0.3, tokens=tokens, positions=positions)], share_logits=share_logits) as defended:
        loss = defended.loss(batch)
        loss.backward()
    assert_as_close_as_torch(loss, *losses)
    assert_as_close_as_torch(gradients(model), gradients(exact), gradients(plain))
    with pytest.raises(SettingsError, match="positions is \\[-1\\], it must be a list of weights"):
        KL(positions=[-1])


@pytest.mark.parametrize("defense", [KL(1.0), KL(1.0, direction="forward"), FeatureDistance(1.0, layers=3)], ids=repr)
def test_gradient_of_a_defense_alone_is_not_small_beside_the_task(defense):
    """Otherwise the loss scale tests would prove nothing. Some published code has a gradient of exactly zero."""
    model = tiny_peft_model()
    with defend(model, [defense]) as defended:
        totals = defended.totals([BATCH])
        with defended.recording(BATCH):
            task = model(**BATCH).loss
        task.backward(retain_graph=True)
        of_task = flat_gradients(model).norm()
        model.zero_grad()
        defended.regularizer(totals).backward()
        of_defense = flat_gradients(model).norm()
    assert 0.02 * of_task < of_defense
    assert of_task < 50 * of_defense


EXAMPLES = rows(LENGTHS)
SILENT = rows(LENGTHS[:4]) + rows([5, 6], prompt=6)


@pytest.mark.parametrize(
    ("examples", "window", "tokens"),
    [
        (EXAMPLES, [collate(EXAMPLES[i : i + 2]) for i in range(0, 8, 2)], "all"),
        (EXAMPLES, [collate(EXAMPLES[i : i + 2]) for i in range(0, 8, 2)], "completion"),
        (EXAMPLES, [pack(EXAMPLES[:5]), pack(EXAMPLES[5:])], "all"),
        (SILENT, [collate(SILENT[:4]), collate(SILENT[4:])], "all"),
    ],
    ids=["accumulated", "accumulated completions", "packed", "a micro-batch without labels for the task"],
)
def test_a_window_in_parts_gives_the_weights_of_one_batch(examples, window, tokens):
    whole, metrics = train_windows([[collate(examples)]], strong(tokens))
    parts, metrics_of_parts = train_windows([window], strong(tokens))
    undefended, _ = train_windows([window], [])
    assert furthest(whole, parts) < 1e-5
    assert furthest(whole, undefended) > 1e-2
    for name in ("defense/kl", "defense/feature_distance"):
        assert metrics[name] > 0
        assert metrics[name] == pytest.approx(metrics_of_parts[name], rel=1e-5)


def test_off_means_off():
    window = [collate(rows(LENGTHS[:4])), collate(rows(LENGTHS[4:]))]
    weights, passes = [], []
    for given in ([], defenses(0.0, 0.0)):
        model = tiny_peft_model(dropout=0.3)
        model.get_base_model().model.register_forward_pre_hook(lambda *_: passes.append("forward"))
        torch.manual_seed(5)
        found, metrics = train_windows([window], given, model=model)
        weights.append(found)
        assert metrics == {}
    assert furthest(*weights) == 0
    assert len(passes) == 2 * len(window)


@pytest.mark.parametrize("how", ["checkpointed", "checkpointed re-entrantly", "compiled in place"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo reads it
def test_other_ways_to_run_a_model_change_nothing(how):
    plain, _ = train_windows([[BATCH]], strong(), model=tiny_peft_model().train())
    model = tiny_peft_model().train()
    if how == "compiled in place":
        model.compile(backend="aot_eager")
    else:
        enable_checkpointing(model, reentrant=how != "checkpointed")
    found, _ = train_windows([[BATCH]], strong(), model=model)
    assert furthest(plain, found) < 1e-6


def test_dropout_stays_on_in_the_student_and_off_in_the_reference():
    model = tiny_peft_model(dropout=0.5).train()
    losses = []
    with defend(model, [KL(1.0)]) as defended:
        for seed in (0, 1, 0):
            torch.manual_seed(seed)
            losses.append(defended.loss(BATCH).item())
    assert losses[0] == losses[2] != losses[1]
    torch.manual_seed(0)
    task = model(**BATCH).loss.item()
    for share, tolerance in ((False, 0.0), (True, 1e-6)):
        torch.manual_seed(0)
        with defend(model, [KL(1e-30)], share_logits=share) as defended:
            assert defended.loss(BATCH).item() == pytest.approx(task, rel=tolerance)


def test_noise_on_the_embeddings_is_the_students_alone():
    """The noise uses the same kind of hook as NEFTune, but is deterministic."""
    model = tiny_peft_model().train()

    def divergence():
        with defend(model, [KL(1.0)]) as defended:
            defended.loss(BATCH)
            return defended.metrics()["defense/kl"]

    quiet = divergence()
    model.get_input_embeddings().register_forward_hook(lambda m, _a, out: out + 0.2 if m.training else out)
    _, expected, _ = plain_loss(model, BATCH, kl=1.0, distance=0.0)
    assert divergence() == pytest.approx(expected.item(), rel=1e-4)
    assert abs(expected.item() - quiet) > 0.05 * quiet


def state_of(model):
    return (
        {name: module.training for name, module in model.named_modules()},
        {name: p.requires_grad for name, p in model.named_parameters()},
        {name: tuple(m.active_adapters) for name, m in model.named_modules() if hasattr(m, "lora_A")},
        {name: m.disable_adapters for name, m in model.named_modules() if hasattr(m, "lora_A")},
        sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
    )


@pytest.mark.parametrize("reference", ["base", "frozen"])
@pytest.mark.parametrize("fails", [None, "reference", "student"])
def test_model_is_left_as_found(reference, fails):
    """The modes and flags are mixed, so a careless restore would lose them. The second micro-batch may fail in either pass."""
    model = tiny_peft_model(dropout=0.1).train()
    layers = model.get_base_model().model.layers
    layers[1].eval()
    layers[0].self_attn.q_proj.lora_A["default"].weight.requires_grad_(False)
    if reference == "frozen":
        model.add_adapter("frozen", model.peft_config["default"])
    before = state_of(model)
    broken = []

    def fail(*_):
        if broken and fails and torch.is_grad_enabled() == (fails == "student"):
            raise RuntimeError("broken layer")

    handle = layers[2].register_forward_pre_hook(fail)
    expectation = pytest.raises(RuntimeError, match="broken layer") if fails else nullcontext()
    with expectation, defend(model, defenses(), reference=reference, share_logits=not fails) as defended:
        defended.loss(BATCH).backward()
        broken.append(True)
        torch.manual_seed(11)
        random_state = torch.get_rng_state()
        defended.loss(BATCH).backward()
    if fails == "reference":
        assert torch.equal(torch.get_rng_state(), random_state)
    handle.remove()
    model.zero_grad()
    assert state_of(model) == before


def defended_loss(model, *, given=None, **settings):
    with defend(model, given or defenses(), **settings) as defended:
        return defended.loss(BATCH).item()


def test_named_adapter_and_second_model_as_reference():
    model = tiny_peft_model()
    expected = rounded(defended_loss(model))
    assert defended_loss(model, reference=tiny_model()) == expected
    model.add_adapter("zero", model.peft_config["default"])
    assert defended_loss(model, reference="zero") == expected
    copy = tiny_peft_model()
    copy.add_adapter("copy", copy.peft_config["default"])
    weights = {n.replace(".default.", ".copy."): p for n, p in copy.named_parameters() if ".default." in n}
    for name, parameter in copy.named_parameters():
        if name in weights:
            parameter.data = weights[name].data.clone()
    assert defended_loss(copy, reference="copy") == rounded(copy(**BATCH).loss.item())


def test_full_fine_tuning_against_a_second_model():
    model, other = tiny_model(seed=4), tiny_model(seed=0)
    model.get_output_embeddings().requires_grad_(False)
    with pytest.raises(SettingsError, match="no adapter to disable"):
        defend(model, [KL(1.0)])
    with pytest.raises(SettingsError, match="output head of the model given as reference is not that of the model"):
        defend(model, [KL(1.0)], reference=other)
    other.get_output_embeddings().load_state_dict(model.get_output_embeddings().state_dict())
    with defend(model, [KL(1.0), FeatureDistance(1.0, layers=2)], reference=other) as defended:
        defended.loss(BATCH).backward()
        assert defended.metrics()["defense/kl"] > 0


def test_a_second_model_that_is_sharded(tmp_path):
    """FSDP2 gathers the embeddings only if the whole model is called."""
    from torch.distributed.fsdp import fully_shard

    model, reference = tiny_peft_model(), tiny_model()
    expected = defended_loss(model)
    with group_of_one(tmp_path):
        for layer in reference.model.layers:
            fully_shard(layer)
        with defend(model, defenses(), reference=fully_shard(reference)) as defended:
            assert [defended.loss(BATCH).item() for _ in range(2)] == pytest.approx([expected] * 2, rel=1e-6)


def test_only_the_gradients_of_training_passes_are_recorded():
    """A pass without gradients (for entropy or metrics) is ignored; a second training pass raises an error."""
    model = tiny_peft_model()
    with defend(model, [KL(1.0)]) as defended:
        totals = defended.totals([BATCH])
        with defended.recording(BATCH):
            loss = model(**BATCH).loss
            with torch.no_grad():
                model(**BATCH)
        assert torch.isfinite(loss + defended.regularizer(totals))
        with pytest.raises(SettingsError, match="twice"), defended.recording(BATCH):
            assert model(**BATCH).loss is not model(**BATCH).loss
        with pytest.raises(SettingsError, match="no training forward"), defended.recording(BATCH), torch.no_grad():
            model(**BATCH)
    with pytest.raises(SettingsError, match="not attached"):
        defended.loss(BATCH)


def test_two_defended_models_in_one_pass():
    """The first must not record the reference pass of the second as its own training pass."""
    model, (kl, distance) = tiny_peft_model(), defenses(kl=500.0)
    with defend(model, [kl, distance]) as both:
        with both.recording(BATCH):
            model(**BATCH)
        expected = both.regularizer(both.totals([BATCH])).item()
    with defend(model, [kl]) as first, defend(model, [distance]) as second:
        with first.recording(BATCH), second.recording(BATCH):
            model(**BATCH)
        parts = [defended.regularizer(defended.totals([BATCH])).item() for defended in (first, second)]
    assert min(parts) > 0.01 * expected
    assert sum(parts) == rounded(expected)


@pytest.mark.parametrize("kept", ["last", "mask"])
def test_labels_cut_to_the_kept_logits(kept):
    """ms-swift cuts labels by `logits_to_keep`; the loss must equal that of the full labels."""
    batch = collate(rows(LENGTHS[:4], prompt=4))
    tokens = batch["labels"].shape[1]
    positions = tokens - 2 if kept == "last" else torch.arange(tokens) >= 2
    cut = {**batch, "labels": batch["labels"][:, 2:], "logits_to_keep": positions}
    with defend(tiny_peft_model(), defenses(tokens="completion"), share_logits=False) as defended:
        assert defended.loss(cut).item() == rounded(defended.loss(batch).item())


@pytest.mark.parametrize(("counted", "step"), [(True, " at optimizer step 7"), (False, "")])
def test_not_finite_names_defense_layer_and_step(counted, step):
    model = tiny_peft_model()
    settings = {"optimizer": sgd(model), "first_step": 6} if counted else {}
    with defend(model, defenses(), **settings) as defended:
        defended.loss(BATCH)
        model.get_base_model().model.layers[2].self_attn.o_proj.lora_B["default"].weight.data[3, 1] = float("nan")
        with pytest.raises(TrainingError, match=rf"^defense \w+ is not finite{step}: layer 2 of the model"):
            defended.loss(BATCH)


def test_a_step_that_a_scaler_leaves_out_takes_no_other_with_it():
    model = tiny_peft_model()
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu")
    moved = []
    with defend(model, defenses(), optimizer=optimizer, on_nonfinite="skip") as defended:
        for factor in (float("inf"), 1.0, 1.0):
            before = adapter_weights(model)
            handle = model.get_base_model().model.layers[1].register_forward_hook(lambda _m, _a, out: out * factor)  # noqa: B023
            scaler.scale(defended.loss(BATCH)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            handle.remove()
            moved.append(furthest(before, adapter_weights(model)) > 0)
    assert moved == [False, True, True]


def test_skipped_steps_are_counted_and_many_in_a_row_end_the_run(caplog):
    model = tiny_peft_model()
    next(parameter for name, parameter in model.named_parameters() if "lora_B" in name).data.fill_(float("nan"))
    optimizer = sgd(model)
    with (
        caplog.at_level(logging.WARNING, logger="safelora_fast"),
        defend(model, [FeatureDistance(1.0, layers=2)], optimizer=optimizer, on_nonfinite="skip") as defended,
    ):
        for _ in range(19):
            make_step(optimizer, defended.loss(BATCH))
        defended.loss(BATCH).backward()
        with pytest.raises(TrainingError, match="20 optimizer steps in a row were skipped: defense feature_distance"):
            optimizer.step()
        assert defended.metrics()["defense/steps_skipped"] == 20
    assert [record.message[:45] for record in caplog.records] == ["optimizer step 1 is skipped, as others may be"]


def test_a_step_that_is_not_finite_can_be_skipped():
    model = tiny_peft_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    before = adapter_weights(model)
    with defend(model, defenses(), optimizer=optimizer, on_nonfinite="skip") as defended:
        broken = scale_reference(model, float("inf"), layer=1)
        make_step(optimizer, defended.loss(BATCH))
        assert furthest(before, adapter_weights(model)) == 0
        broken.remove()
        make_step(optimizer, defended.loss(BATCH))
        assert furthest(before, adapter_weights(model)) > 1e-3


@pytest.mark.parametrize("make", [collate, pack], ids=["padded", "packed"])
def test_a_bfloat16_model_is_as_good_as_torch(make):
    """Errors against the float64 oracle with the same rounded weights are at most twice those of plain bfloat16."""
    batch = make(rows(LENGTHS))
    model, plain = tiny_peft_model().to(torch.bfloat16), tiny_peft_model().to(torch.bfloat16)
    exact = tiny_peft_model()
    exact.load_state_dict(model.state_dict())
    exact = exact.double()
    for one in (plain, exact):
        sum(plain_loss(one, batch)).backward()
    with defend(model, defenses()) as defended:
        defended.loss(batch).backward()
    truth = flat_gradients(exact)
    off = [flat_gradients(one).double() - truth for one in (model, plain)]
    assert 0 < off[0].norm() <= 2 * off[1].norm()
    assert off[0].norm() < 0.1 * truth.norm()


def test_bfloat16_autocast_keeps_the_students_gradients():
    """The reference pass inside autocast must not leave weight casts without gradients in autocast's cache."""
    found = []
    for autocast in (nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
        model = tiny_peft_model()
        with defend(model, defenses()) as defended:
            with autocast:
                loss = defended.loss(BATCH)
            loss.backward()
        found.append(flat_gradients(model))
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.99
