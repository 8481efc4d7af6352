"""Task cross-entropy from KL's logits: the same step without the model's own head, and the cases where it is not used."""

from __future__ import annotations

import inspect
import logging
from contextlib import contextmanager

import pytest
import torch
import transformers
from families import COMMON, FAMILIES, Family, adapt
from tiny_models import collate, furthest, pack, rows, tiny_model, tiny_peft_model
from transformers import LlamaForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

from safelora_fast.defenses import KL, FeatureDistance
from safelora_fast.models.anatomy import unwrap
from safelora_fast.training import defend

LENGTHS = [7, 3, 9, 4, 6]
BENT = {
    "soft-cap": Family(
        transformers.Gemma2Config, ["q_proj"], {"head_dim": 8, "final_logit_softcapping": 2.0, "sliding_window": 16}
    ),
    "logit scale": Family(transformers.CohereConfig, ["q_proj"], {"logit_scale": 0.3}),
    "divided logits": Family(transformers.GraniteConfig, ["q_proj"], {"logits_scaling": 5.0}),
    "bias": Family(transformers.PhiConfig, ["q_proj"]),
}


def batch_for(vocabulary=COMMON["vocab_size"], make=collate):
    examples = rows(LENGTHS)
    return make([{key: [i % vocabulary if i > 0 else i for i in row[key]] for key in row} for row in examples])


@contextmanager
def head_positions(model):
    """Count the positions on which the model's own head runs with gradients."""
    counted = []
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(
        lambda _m, args: counted.append(args[0].shape[:-1].numel()) if torch.is_grad_enabled() else None
    )
    yield counted
    hook.remove()


def loss_and_gradients(model, defenses, batch, **settings):
    model.zero_grad()
    torch.manual_seed(3)
    with defend(model, defenses, **settings) as defended, head_positions(model) as counted:
        loss = defended.loss(batch)
        loss.backward()
        metrics = defended.metrics()
    metrics.pop("defense/time_share")
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return loss.item(), gradients, metrics, sum(counted)


def same_as_apart(model, defenses, batch):
    """Compare with separately computed losses, and check that only those ran the model's head."""
    loss, gradients, metrics, positions = loss_and_gradients(model, defenses, batch)
    expected_loss, expected, expected_metrics, all_positions = loss_and_gradients(
        model, defenses, batch, share_logits=False
    )
    can_be_told = "logits_to_keep" in inspect.signature(unwrap(model).forward).parameters  # OPT: from transformers 5
    assert positions == (0 if can_be_told else batch["input_ids"].numel())
    assert all_positions == batch["input_ids"].numel()
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert metrics == pytest.approx(expected_metrics, rel=1e-4)
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-7, name


@pytest.mark.parametrize("make", [collate, pack], ids=["padded", "packed"])
@pytest.mark.parametrize(
    "kl",
    [
        KL(5.0),
        KL(5.0, tokens="completion"),
        KL(5.0, direction="forward", temperature=2.0),
        KL(5.0, temperature=0.5, tokens="completion"),
    ],
    ids=repr,
)
def test_the_same_loss_gradients_and_metrics_without_the_head(kl, make):
    same_as_apart(tiny_peft_model(), [FeatureDistance(3.0, layers=2), kl], batch_for(61, make))


@pytest.mark.filterwarnings("ignore:Unsupported layer type.*Experts:UserWarning")  # PEFT 0.18
@pytest.mark.parametrize("family", (FAMILIES | BENT).values(), ids=FAMILIES | BENT)
def test_every_family(family):
    model = adapt(family.make(seed=0), **family.target)
    same_as_apart(model, [KL(5.0)], batch_for())


def test_full_fine_tuning_beside_a_frozen_head():
    model = tiny_model(seed=4)
    model.get_output_embeddings().requires_grad_(False)
    reference = tiny_model(seed=0)
    reference.get_output_embeddings().load_state_dict(model.get_output_embeddings().state_dict())
    with defend(model, [KL(1.0)], reference=reference) as defended, head_positions(model) as counted:
        defended.loss(batch_for(61)).backward()
    assert sum(counted) == 0


def test_dropout_and_labels_that_are_shifted_already():
    batch = batch_for(61)
    shifted = {**batch, "shift_labels": torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)}
    model = tiny_peft_model(dropout=0.5).train()
    results = []
    for given, share in ((batch, False), (batch, True), (shifted, True), (shifted, False)):
        results.append(loss_and_gradients(model, [KL(5.0)], given, share_logits=share))
    assert [positions == 0 for *_, positions in results] == [False, True, True, False]
    for loss, gradients, *_ in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert furthest(gradients, results[0][1]) < 1e-5


def test_bfloat16_autocast_reaches_the_shared_head():
    """Autocast may be on only inside the model's forward, as with accelerate."""
    model, exact = tiny_peft_model(), tiny_peft_model()
    batch = batch_for(61)
    with defend(exact, [KL(5.0)]) as defended:
        expected = defended.loss(batch).item()
    inner = model.forward
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(inner)
    losses = []
    for share in (True, False):
        with defend(model, [KL(5.0)], share_logits=share) as defended, head_positions(model) as counted:
            losses.append(defended.loss(batch).item())
        assert (sum(counted) == 0) is share
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert losses[0] == pytest.approx(expected, rel=3e-2)
    assert abs(losses[0] - expected) > 1e-6


def apart(model, caplog, reason, batch=None):
    """Check that the losses are computed separately, and that the reason is logged once."""
    batch = batch_for() if batch is None else batch
    with caplog.at_level(logging.INFO, logger="safelora_fast"), defend(model, [KL(5.0)]) as defended:
        with head_positions(model) as counted:
            losses = [defended.loss(batch) for _ in range(2)]
        assert sum(counted) == 2 * batch["input_ids"].numel()
    (said,) = [record.message for record in caplog.records if "logits of its own" in record.message]
    assert reason in said
    with defend(model, [KL(5.0)], share_logits=False) as defended:
        assert defended.loss(batch).item() == pytest.approx(losses[0].item(), rel=1e-6)


def llama():
    return adapt(FAMILIES["llama"].make(seed=0), target_modules=["q_proj"])


class OwnLossFunction(LlamaForCausalLM):
    def loss_function(self, *args, **kwargs):
        return 2 * ForCausalLMLoss(*args, **kwargs)


class Penalized(LlamaForCausalLM):
    def forward(self, *args, logits_to_keep=0, **kwargs):
        output = super().forward(*args, logits_to_keep=logits_to_keep, **kwargs)
        if output.loss is not None:
            output.loss = output.loss + 1e-3 * output.logits.logsumexp(-1).square().mean()
        return output


class Stubborn(LlamaForCausalLM):
    def forward(self, *args, logits_to_keep=0, **kwargs):  # noqa: ARG002
        return super().forward(*args, **kwargs)


class Older(LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        return super().forward(input_ids, attention_mask=attention_mask, labels=labels, **kwargs)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (OwnLossFunction, "OwnLossFunction has a loss function of its own"),
        (Penalized, "the model's own loss is not the plain cross-entropy"),
        (Stubborn, "computes logits that logits_to_keep excludes"),
        (Older, "Older takes no logits_to_keep"),
    ],
)
def test_models_with_a_loss_or_logits_of_their_own(kind, reason, caplog):
    model = llama()
    model.get_base_model().__class__ = kind
    apart(model, caplog, reason)


@pytest.mark.parametrize("by", ["configuration", "batch"])
def test_losses_of_routers(by, caplog):
    family = FAMILIES["mixtral"]
    asked = {"output_router_logits": True}
    model = adapt(family.make(seed=0, **(asked if by == "configuration" else {})), target_modules=["q_proj"])
    batch = batch_for() | ({} if by == "configuration" else asked)
    reason = "adds the loss of its routers" if by == "configuration" else "the batch sets output_router_logits"
    apart(model, caplog, reason, batch)


def test_a_model_that_fails_when_it_is_asked(caplog):
    """The model is unchanged afterwards, and trained with separate losses."""
    model = llama().train()
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("not yet")

    handle = model.get_base_model().model.layers[1].register_forward_pre_hook(fail)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    apart(model, caplog, "gives no loss of a few tokens (RuntimeError: not yet)")
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all(module.training for module in model.modules())
    handle.remove()


def test_batches_are_judged_one_by_one(caplog):
    model, batch = llama(), batch_for()
    with caplog.at_level(logging.INFO, logger="safelora_fast"), defend(model, [KL(5.0)]) as defended:
        assert defended.shares_logits(model, batch)
        assert not defended.shares_logits(model, {"input_ids": batch["input_ids"]})
        assert not defended.shares_logits(model, {**batch, "logits_to_keep": 3})
        assert not defended.shares_logits(model, batch, unless="the user says so")
        assert defended.shares_logits(model, batch)
    assert [record.message.rsplit(": ", 1)[1] for record in caplog.records] == [
        "the batch has no labels",
        "the batch sets logits_to_keep",
        "the user says so",
    ]


def test_nothing_is_said_where_there_is_nothing_to_share(caplog):
    model, batch = llama(), batch_for()
    with caplog.at_level(logging.INFO, logger="safelora_fast"):
        for defenses, share in (([FeatureDistance(1.0, layers=1)], True), ([KL(1.0)], False), ([KL(0.0)], True)):
            with defend(model, defenses, share_logits=share) as defended:
                assert not defended.shares_logits(model, batch)
                defended.loss(batch).backward()
    assert not caplog.records


def test_a_step_to_be_skipped_still_has_the_task_loss():
    model, batch = tiny_peft_model(), batch_for(61)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    task = model(**batch).loss
    task.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    block = model.get_base_model().model.layers[1]
    with defend(model, [KL(5.0)], optimizer=optimizer, on_nonfinite="skip") as defended:
        assert defended.shares_logits(model, batch)
        handle = block.register_forward_hook(
            lambda _m, _a, out: out * float("inf") if not torch.is_grad_enabled() else out
        )
        loss = defended.loss(batch)
        loss.backward()
        handle.remove()
        assert loss.item() == pytest.approx(task.item(), rel=1e-5)
        assert furthest({name: p.grad for name, p in model.named_parameters() if p.requires_grad}, expected) < 1e-5
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
