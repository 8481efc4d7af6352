"""defend() in a plain loop: values, gradients, windows, and the model left as found."""

from __future__ import annotations

import logging
from contextlib import nullcontext

import pytest
import torch
from closeness import assert_as_close_as_torch, rounded
from plain_defenses import feature_distance_sum, forward, kl_sum, reference_forward
from tiny_models import adapter_weights, collate, furthest, gradients, pack, rows, tiny_model, tiny_peft_model
from train_runs import sgd

from safelora_fast.defenses import KL, FeatureDistance
from safelora_fast.errors import SettingsError, TrainingError
from safelora_fast.training import defend

LENGTHS = [7, 3, 9, 4, 6, 5, 8, 3]
BLOCKS = [0, 2]


def defenses(kl=3.0, distance=5.0, tokens="all"):
    return [KL(kl, tokens=tokens), FeatureDistance(distance, layers=BLOCKS, tokens=tokens)]


def plain_loss(model, batch, *, kl, distance, tokens="all"):
    """Task loss and defenses by whole logits and features."""
    reference_logits, reference_features = reference_forward(model, batch)
    logits, features = forward(model, batch)
    task = model.get_base_model().loss_function(logits, batch["labels"], vocab_size=logits.shape[-1])
    kl_total, tokens_count = kl_sum(logits, reference_logits, batch, tokens=tokens)
    chosen = [features[i] for i in BLOCKS], [reference_features[i] for i in BLOCKS]
    distance_total, sequences = feature_distance_sum(*chosen, batch, tokens=tokens)
    return task, kl * kl_total / tokens_count, distance * distance_total / sequences


@pytest.mark.parametrize("make", [collate, pack], ids=["padded", "packed"])
@pytest.mark.parametrize("tokens", ["all", "completion"])
def test_loss_and_gradients_are_those_of_the_plain_formulas(make, tokens):
    batch = make(rows(LENGTHS))
    model = tiny_peft_model()
    exact, plain = tiny_peft_model().double(), tiny_peft_model()
    losses = [sum(plain_loss(one, batch, kl=3.0, distance=5.0, tokens=tokens)) for one in (exact, plain)]
    for plainly in losses:
        plainly.backward()
    with defend(model, defenses(tokens=tokens)) as defended:
        loss = defended.loss(batch)
        loss.backward()
    assert_as_close_as_torch(loss, *losses)
    assert_as_close_as_torch(gradients(model), gradients(exact), gradients(plain))


@pytest.mark.parametrize("defense", [KL(1.0), KL(1.0, direction="forward"), FeatureDistance(1.0, layers=3)], ids=repr)
def test_gradient_of_a_defense_alone_is_not_small_beside_the_task(defense):
    """Otherwise the tests of loss scale would prove nothing; published code had a gradient of exactly zero."""
    batch = collate(rows(LENGTHS))
    model = tiny_peft_model()
    with defend(model, [defense]) as defended:
        totals = defended.totals([batch])
        with defended.recording(batch):
            task = model(**batch).loss
        task.backward(retain_graph=True)
        of_task = torch.cat([g.flatten() for g in gradients(model).values()]).norm()
        model.zero_grad()
        defended.regularizer(totals).backward()
        of_defense = torch.cat([g.flatten() for g in gradients(model).values()]).norm()
    assert of_defense > 0.02 * of_task
    assert of_defense * 50 > of_task


def step_once(model, windows, chosen, lr=0.02):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    with defend(model, chosen, optimizer=optimizer) as defended:
        for window in windows:
            totals = defended.totals(window)
            for batch in window:
                defended.loss(batch, totals=totals).backward()
            optimizer.step()
            optimizer.zero_grad()
        figures = defended.metrics()
        assert defended.step == (len(windows) if defended.defenses else 0)
    return adapter_weights(model), figures


@pytest.mark.parametrize("tokens", ["all", "completion"])
def test_accumulation_gives_the_weights_of_one_batch(tokens):
    examples = rows(LENGTHS)
    whole, figures = step_once(tiny_peft_model(), [[collate(examples)]], defenses(60.0, 40.0, tokens))
    parts = [collate(examples[i : i + 2]) for i in range(0, 8, 2)]
    accumulated, figures_of_parts = step_once(tiny_peft_model(), [parts], defenses(60.0, 40.0, tokens))
    undefended, _ = step_once(tiny_peft_model(), [parts], [])
    assert furthest(whole, accumulated) < 1e-5
    assert furthest(whole, undefended) > 1e-2
    for name in ("defense/kl", "defense/feature_distance"):
        assert figures[name] > 0
        assert figures[name] == pytest.approx(figures_of_parts[name], rel=1e-5)


def test_packed_rows_give_the_weights_of_padded_rows():
    examples = rows(LENGTHS, prompt=2)
    padded, _ = step_once(tiny_peft_model(), [[collate(examples)]], defenses(60.0, 40.0))
    packed, _ = step_once(tiny_peft_model(), [[pack(examples[:5]), pack(examples[5:])]], defenses(60.0, 40.0))
    assert furthest(padded, packed) < 1e-5


def test_a_micro_batch_without_labels_for_the_task_counts_for_the_defenses():
    examples = rows(LENGTHS[:4]) + rows([5, 6], prompt=6)
    whole, _ = step_once(tiny_peft_model(), [[collate(examples)]], defenses(60.0, 40.0))
    parts, _ = step_once(tiny_peft_model(), [[collate(examples[:4]), collate(examples[4:])]], defenses(60.0, 40.0))
    assert furthest(whole, parts) < 1e-5


def test_off_means_off():
    window = [collate(rows(LENGTHS[:4])), collate(rows(LENGTHS[4:]))]
    plain = tiny_peft_model(dropout=0.3)
    torch.manual_seed(5)
    undefended, _ = step_once(plain, [window], [])
    off = tiny_peft_model(dropout=0.3)
    hooks = []
    decoder = off.get_base_model().model
    decoder.register_forward_pre_hook(lambda *_: hooks.append("forward"))
    torch.manual_seed(5)
    switched_off, figures = step_once(off, [window], defenses(0.0, 0.0))
    assert furthest(undefended, switched_off) == 0
    assert len(hooks) == len(window)
    assert figures == {}


def enable_checkpointing(model, *, reentrant):
    base = model.get_base_model()
    if hasattr(base, "activation_checkpointing_enable"):
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    else:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    batch = collate(rows(LENGTHS))
    plain, _ = step_once(tiny_peft_model(), [[batch]], defenses(60.0, 40.0))
    model = tiny_peft_model()
    enable_checkpointing(model, reentrant=reentrant)
    model.enable_input_require_grads()
    model.train()
    checkpointed, _ = step_once(model, [[batch]], defenses(60.0, 40.0))
    assert furthest(plain, checkpointed) < 1e-6


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
def test_a_model_compiled_in_place():
    batch = collate(rows(LENGTHS))
    plain, _ = step_once(tiny_peft_model().train(), [[batch]], defenses(60.0, 40.0))
    model = tiny_peft_model().train()
    model.compile(backend="aot_eager")
    compiled, _ = step_once(model, [[batch]], defenses(60.0, 40.0))
    assert furthest(plain, compiled) < 1e-6


def test_dropout_stays_on_in_the_student_and_off_in_the_reference():
    batch = collate(rows(LENGTHS))
    model = tiny_peft_model(dropout=0.5).train()
    losses = []
    with defend(model, [KL(1.0)]) as defended:
        for seed in (0, 1, 0):
            torch.manual_seed(seed)
            losses.append(defended.loss(batch).item())
    assert losses[0] == losses[2] != losses[1]
    torch.manual_seed(0)
    task = model(**batch).loss.item()
    for share, tolerance in ((False, 0.0), (True, 1e-6)):
        torch.manual_seed(0)
        with defend(model, [KL(1e-30)], share_logits=share) as defended:
            assert defended.loss(batch).item() == pytest.approx(task, rel=tolerance)


def test_noise_on_the_embeddings_is_the_students_alone():
    """As NEFTune's, by the same kind of hook, but the same every time."""
    batch = collate(rows(LENGTHS))
    model = tiny_peft_model().train()
    with defend(model, [KL(1.0)]) as defended:
        defended.loss(batch)
        quiet = defended.metrics()["defense/kl"]
    model.get_input_embeddings().register_forward_hook(lambda m, _a, out: out + 0.2 if m.training else out)
    _, divergence, _ = plain_loss(model, batch, kl=1.0, distance=0.0)
    with defend(model, [KL(1.0)]) as defended:
        defended.loss(batch)
        assert defended.metrics()["defense/kl"] == pytest.approx(divergence.item(), rel=1e-4)
    assert abs(divergence.item() - quiet) > 0.05 * quiet


def state_of(model):
    return (
        {name: module.training for name, module in model.named_modules()},
        {name: p.requires_grad for name, p in model.named_parameters()},
        {name: tuple(m.active_adapters) for name, m in model.named_modules() if hasattr(m, "lora_A")},
        {name: m.disable_adapters for name, m in model.named_modules() if hasattr(m, "lora_A")},
        sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
    )


def unusual_model():
    """Modes and flags that a careless restore would lose: a block in evaluation mode, a frozen lora_A."""
    model = tiny_peft_model(dropout=0.1).train()
    layers = model.get_base_model().model.layers
    layers[1].eval()
    for name, parameter in model.named_parameters():
        if "layers.0" in name and "lora_A" in name:
            parameter.requires_grad_(False)
    return model


@pytest.mark.parametrize("reference", ["base", "frozen"])
@pytest.mark.parametrize("fails", [None, "reference", "student"])
def test_model_is_left_as_found(reference, fails):
    """Also where the second micro-batch fails, in the reference's pass or the student's."""
    model = unusual_model()
    if reference == "frozen":
        model.add_adapter("frozen", model.peft_config["default"])
    before = state_of(model)
    block = model.get_base_model().model.layers[2]
    broken = []

    def fail(*_):
        if broken and fails and torch.is_grad_enabled() == (fails == "student"):
            raise RuntimeError("broken block")

    handle = block.register_forward_pre_hook(fail)
    expectation = pytest.raises(RuntimeError, match="broken block") if fails else nullcontext()
    with expectation, defend(model, defenses(), reference=reference, share_logits=not fails) as defended:
        defended.loss(collate(rows(LENGTHS))).backward()
        broken.append(True)
        torch.manual_seed(11)
        random_state = torch.get_rng_state()
        defended.loss(collate(rows(LENGTHS))).backward()
    if fails == "reference":
        assert torch.equal(torch.get_rng_state(), random_state)
    handle.remove()
    model.zero_grad()
    assert state_of(model) == before


def test_named_adapter_and_second_model_as_reference():
    batch = collate(rows(LENGTHS))
    model = tiny_peft_model()
    with defend(model, defenses()) as defended:
        expected = defended.loss(batch).item()
    with defend(model, defenses(), reference=tiny_model()) as defended:
        assert defended.loss(batch).item() == rounded(expected)
    model.add_adapter("zero", model.peft_config["default"])
    with defend(model, defenses(), reference="zero") as defended:
        assert defended.loss(batch).item() == rounded(expected)
    copy = tiny_peft_model()
    copy.add_adapter("copy", copy.peft_config["default"])
    weights = {n.replace(".default.", ".copy."): p for n, p in copy.named_parameters() if ".default." in n}
    for name, parameter in copy.named_parameters():
        if name in weights:
            parameter.data = weights[name].data.clone()
    with defend(copy, defenses(), reference="copy") as defended:
        assert defended.loss(batch).item() == rounded(copy(**batch).loss.item())


def with_head_of(model):
    """A model with other blocks and the same head."""
    other = tiny_model(seed=0)
    other.get_output_embeddings().load_state_dict(model.get_output_embeddings().state_dict())
    return other


def test_full_fine_tuning_against_a_second_model():
    batch = collate(rows(LENGTHS))
    model = tiny_model(seed=4)
    for parameter in model.get_output_embeddings().parameters():
        parameter.requires_grad_(False)
    with pytest.raises(SettingsError, match="no adapter to disable"):
        defend(model, [KL(1.0)])
    with pytest.raises(SettingsError, match="output head of the model given as reference is not that of the model"):
        defend(model, [KL(1.0)], reference=tiny_model(seed=0))
    with defend(model, [KL(1.0), FeatureDistance(1.0, layers=2)], reference=with_head_of(model)) as defended:
        defended.loss(batch).backward()
        assert defended.metrics()["defense/kl"] > 0


def test_a_second_model_that_is_sharded(tmp_path):
    """FSDP2 gathers its embeddings only where the whole model is called."""
    from torch.distributed.fsdp import fully_shard

    batch = collate(rows(LENGTHS))
    model = tiny_peft_model()
    with defend(model, defenses()) as defended:
        expected = defended.loss(batch).item()
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        reference = tiny_model()
        for block in reference.model.layers:
            fully_shard(block)
        with defend(model, defenses(), reference=fully_shard(reference)) as defended:
            assert [defended.loss(batch).item() for _ in range(2)] == pytest.approx([expected] * 2, rel=1e-6)
    finally:
        torch.distributed.destroy_process_group()


def test_only_the_gradients_of_training_passes_are_recorded():
    """A pass without gradients in between (entropy, metrics) is ignored; two training passes are refused."""
    batch = collate(rows(LENGTHS))
    model = tiny_peft_model()
    with defend(model, [KL(1.0)]) as defended:
        totals = defended.totals([batch])
        with defended.recording(batch):
            loss = model(**batch).loss
            with torch.no_grad():
                model(**batch)
        assert torch.isfinite(loss + defended.regularizer(totals))
        first = pytest.raises(SettingsError, match="twice")
        with first, defended.recording(batch):
            assert model(**batch).loss is not model(**batch).loss
        with pytest.raises(SettingsError, match="no training forward"), defended.recording(batch), torch.no_grad():
            model(**batch)


def test_two_defended_models_in_one_pass():
    """The reference pass of the second must not be taken for the student's of the first."""
    batch = collate(rows(LENGTHS))
    model = tiny_peft_model()
    with defend(model, defenses(kl=500.0)) as both:
        with both.recording(batch):
            model(**batch)
        expected = both.regularizer(both.totals([batch])).item()
    kl, distance = defenses(kl=500.0)
    with defend(model, [kl]) as first, defend(model, [distance]) as second:
        with first.recording(batch), second.recording(batch):
            model(**batch)
        parts = [defended.regularizer(defended.totals([batch])).item() for defended in (first, second)]
    assert min(parts) > 0.01 * expected
    assert sum(parts) == rounded(expected)


@pytest.mark.parametrize("kept", ["last", "mask"])
def test_labels_cut_to_the_kept_logits(kept):
    """ms-swift cuts labels by `logits_to_keep`: the loss is that of whole labels."""
    batch = collate(rows(LENGTHS[:4], prompt=4))
    cut = {**batch, "labels": batch["labels"][:, 2:], "logits_to_keep": batch["labels"].shape[1] - 2}
    if kept == "mask":
        cut["logits_to_keep"] = torch.arange(batch["labels"].shape[1]) >= 2
    model = tiny_peft_model()
    with defend(model, defenses(tokens="completion"), share_logits=False) as defended:
        assert defended.loss(cut).item() == rounded(defended.loss(batch).item())


def test_not_finite_names_defense_layer_and_step():
    batch = collate(rows(LENGTHS))
    model = tiny_peft_model()
    with defend(model, defenses(), optimizer=sgd(model), first_step=6) as defended:
        defended.loss(batch)
        parameter = dict(model.named_parameters())[
            "base_model.model.model.layers.2.self_attn.o_proj.lora_B.default.weight"
        ]
        parameter.data[3, 1] = float("nan")
        with pytest.raises(TrainingError, match=r"(feature_distance|kl) .*step 7.*layer 2 of the model"):
            defended.loss(batch)


def test_steps_that_nobody_counts_are_not_named():
    model = tiny_peft_model()
    next(parameter for parameter in model.parameters() if parameter.requires_grad).data.fill_(float("nan"))
    with (
        defend(model, defenses()) as defended,
        pytest.raises(TrainingError, match=r"defense \w+ is not finite: layer 0 of the model"),
    ):
        defended.loss(collate(rows(LENGTHS)))


def test_a_step_that_a_scaler_leaves_out_takes_no_other_with_it():
    batch = collate(rows(LENGTHS))
    model = tiny_peft_model()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu")
    left = next(parameter for name, parameter in model.named_parameters() if "lora_B" in name)
    with defend(model, defenses(), optimizer=optimizer, on_nonfinite="skip") as defended:
        moved = []
        for factor in (float("inf"), 1.0, 1.0):
            before, hook = left.detach().clone(), None
            if factor != 1.0:
                hook = model.get_base_model().model.layers[1].register_forward_hook(lambda _m, _a, out: out * factor)  # noqa: B023
            scaler.scale(defended.loss(batch)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if hook is not None:
                hook.remove()
            moved.append((left - before).abs().max().item() > 0)
    assert moved == [False, True, True]


def test_skipped_steps_are_counted_and_many_in_a_row_end_the_run(caplog):
    batch = collate(rows(LENGTHS))
    model = tiny_peft_model()
    next(parameter for name, parameter in model.named_parameters() if "lora_B" in name).data.fill_(float("nan"))
    optimizer = sgd(model)
    defenses = [FeatureDistance(1.0, layers=2)]
    with (
        caplog.at_level(logging.WARNING, logger="safelora_fast"),
        defend(model, defenses, optimizer=optimizer, on_nonfinite="skip") as defended,
    ):
        for _ in range(19):
            defended.loss(batch).backward()
            optimizer.step()
        defended.loss(batch).backward()
        with pytest.raises(TrainingError, match="20 optimizer steps in a row were skipped: defense feature_distance"):
            optimizer.step()
        assert defended.metrics()["defense/steps_skipped"] == 20
    assert [record.message[:45] for record in caplog.records] == ["optimizer step 1 is skipped, as others may be"]


def test_losses_outside_the_context_are_refused():
    model = tiny_peft_model()
    batch = collate(rows(LENGTHS))
    with defend(model, defenses()) as defended:
        pass
    with pytest.raises(SettingsError, match="not attached"):
        defended.loss(batch)


def test_a_step_that_is_not_finite_can_be_skipped():
    batch = collate(rows(LENGTHS))
    model = tiny_peft_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    with defend(model, defenses(), optimizer=optimizer, on_nonfinite="skip") as defended:
        broken = (
            model.get_base_model()
            .model.layers[1]
            .register_forward_hook(lambda _m, _a, out: out * float("inf") if not torch.is_grad_enabled() else out)
        )
        before = adapter_weights(model)
        defended.loss(batch).backward()
        optimizer.step()
        assert furthest(before, adapter_weights(model)) == 0
        broken.remove()
        optimizer.zero_grad()
        defended.loss(batch).backward()
        optimizer.step()
        assert furthest(before, adapter_weights(model)) > 1e-3


@pytest.mark.parametrize("make", [collate, pack], ids=["padded", "packed"])
def test_a_bfloat16_model_is_as_good_as_torch(make):
    """Beside float64 on the same rounded weights, no more than twice as far off as the plain formulas in bfloat16."""
    batch = make(rows(LENGTHS))
    model, plain = tiny_peft_model().to(torch.bfloat16), tiny_peft_model().to(torch.bfloat16)
    exact = tiny_peft_model()
    exact.load_state_dict(model.state_dict())
    exact = exact.double()
    for one in (plain, exact):
        sum(plain_loss(one, batch, kl=3.0, distance=5.0)).backward()
    with defend(model, defenses()) as defended:
        defended.loss(batch).backward()
    truth = torch.cat([g.flatten() for g in gradients(exact).values()])
    off = [torch.cat([g.flatten() for g in gradients(one).values()]).double() - truth for one in (model, plain)]
    assert 0 < off[0].norm() <= 2 * off[1].norm()
    assert off[0].norm() < 0.1 * truth.norm()


def test_bfloat16_autocast_keeps_the_students_gradients():
    """A reference pass inside autocast must not leave casts without gradients in autocast's cache."""
    batch = collate(rows(LENGTHS))
    model = tiny_peft_model()
    exact = tiny_peft_model()
    with defend(exact, defenses()) as defended:
        defended.loss(batch).backward()
    with defend(model, defenses()) as defended:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = defended.loss(batch)
        loss.backward()
    left = torch.cat([g.flatten() for g in gradients(model).values()])
    right = torch.cat([g.flatten() for g in gradients(exact).values()])
    assert torch.nn.functional.cosine_similarity(left, right, dim=0) > 0.99
