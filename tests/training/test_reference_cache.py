"""Hidden states of the reference model from disk: loss and gradient are those of a pass, and what is never used.

In float64, so tolerances are far above rounding and far below the effect of one wrong token.
"""

from __future__ import annotations

import errno
import logging
import os

import pytest
import torch
from multimodal_models import make as make_multimodal
from peft import LoraConfig, get_peft_model
from test_needed_examples import LAYERS, LENGTHS, close, defenses, exact_model, left, packed, right
from tiny_models import collate, furthest, gradients, pack, rows, tiny_model
from train_runs import run

from safelora_fast.defenses import KL, FeatureDistance, Steering
from safelora_fast.errors import OutputError, SettingsError
from safelora_fast.models.reference_pass import ReferencePass
from safelora_fast.training import defend

BATCHES = [collate(rows(LENGTHS)), collate(rows(LENGTHS, seed=9))]


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def ran(monkeypatch):
    """A list that receives the number of rows of each pass of the reference model."""
    found, run = [], ReferencePass.run

    def counted(self, *args, **kwargs):
        capture = run(self, *args, **kwargs)
        found.append(len(capture.hidden))
        return capture

    monkeypatch.setattr(ReferencePass, "run", counted)
    return found


def trained(cache, batches=BATCHES, given=None, *, model=None, **settings):
    """Return the loss and the gradient of each batch, as one vector."""
    model, found = exact_model() if model is None else model, []
    reference = "base" if cache is None else f"cache:{cache}"
    with defend(model, defenses() if given is None else given, reference=reference, **settings) as defended:
        for batch in batches:
            model.zero_grad()
            loss = defended.loss(batch)
            loss.backward()
            found.append(torch.cat([loss.detach()[None], *(slope.flatten() for slope in gradients(model).values())]))
    return found


def same(found, expected):
    return all(close(one, other) for one, other in zip(found, expected, strict=True))


def files(cache):
    return sorted(cache.glob("*/*.records"))


@pytest.mark.parametrize("share_logits", [True, False], ids=["shared logits", "apart"])
@pytest.mark.parametrize(("make", "safe"), [(right, 2), (left, 2), (packed, 1)])
@pytest.mark.parametrize("tokens", ["all", "safe"])
def test_loss_and_gradient_are_those_of_a_pass(make, safe, tokens, share_logits, cache, ran):
    """In the first epoch, in the second, and in another run, which computes one row again to compare it.

    Packed rows are stored whole, and the second row of a batch goes along with the first.
    """
    batches = [make(rows(LENGTHS)), make(rows(LENGTHS, seed=9))] * 2
    settings = {"given": defenses(tokens=tokens), "share_logits": share_logits}
    expected = trained(None, batches, **settings)
    count = safe if tokens == "safe" else len(batches[0]["input_ids"])
    assert ran == [count] * 4
    for passes in ([2, 2], [2]) if make is packed else ([count, count], [1]):
        ran.clear()
        assert same(trained(cache, batches, **settings), expected)
        assert ran == passes


def test_rows_are_found_in_other_batches_and_by_other_defenses(cache, ran):
    """Other companions, other padding, only some of the layers; a row that is not there is computed alone."""
    examples, others = rows(LENGTHS), rows([12, 5], seed=4)
    trained(cache, [collate(examples)])
    ran.clear()
    mixed = [collate([others[0], examples[3]]), collate([examples[0], others[1], examples[1], examples[1]])]
    given = [KL(3.0), FeatureDistance(5.0, layers=[LAYERS[1]])]
    assert same(trained(cache, mixed, given), trained(None, mixed, given))
    assert ran[:2] == [2, 1]  # with the row to compare
    ran.clear()
    deeper = [FeatureDistance(5.0, layers=[1, 2])]
    assert same(trained(cache, mixed, deeper), trained(None, mixed, deeper))
    assert ran[:2] == [2, 4]  # what is there lacks layer 1
    ran.clear()
    trained(cache, mixed, deeper)
    assert ran == [1]


def test_a_row_is_more_than_its_tokens(cache, ran):
    """The same tokens at other positions, in other documents, or behind padding are other rows."""
    examples = rows([6, 5])
    one, ids = pack(examples), torch.cat([torch.tensor(example["input_ids"]) for example in examples])[None]
    whole = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    padded = {name: torch.nn.functional.pad(value, (2, 0)) for name, value in whole.items()}
    shifted = {**whole, "position_ids": torch.arange(3, 14)[None]}
    masked = {**whole, "attention_mask": (torch.arange(11) != 4).long()[None]}
    batches = [one, whole, padded, shifted, masked]
    expected = trained(None, batches)
    ran.clear()
    assert same(trained(cache, batches), expected)
    assert ran == [1] * 5
    with torch.autocast("cpu", torch.bfloat16):
        trained(cache, [whole])
    assert len(ran) == 6


def test_only_the_same_model_finds_states(cache, ran):
    """The adapter does not matter: its start, its place and its rank may differ. One weight or setting does."""
    trained(cache)
    other_adapter = {"r": 2, "target_modules": ["q_proj", "embed_tokens"]}
    models = [
        exact_model(lora=other_adapter),
        exact_model(seed=1),
        exact_model(rope_parameters={"rope_type": "default", "rope_theta": 5e3}),
        exact_model(attn_implementation="eager"),
        exact_model().float(),
        exact_model(),
    ]
    with torch.no_grad():
        models[-1].get_base_model().model.layers[1].mlp.up_proj.base_layer.weight[3, 5] += 1e-9
    found = []
    for model in models:
        ran.clear()
        trained(cache, [BATCHES[0]], model=model)
        found.append(list(ran))
    assert found == [[1], *([[len(LENGTHS)]] * 5)]
    assert len(files(cache)) == 6


def test_states_of_another_model_under_its_name_are_refused(cache):
    """Nothing that the digest covers differs, yet the model computes something else: here, its folder was renamed."""
    trained(cache)
    (folder,) = cache.iterdir()
    trained(cache, model=exact_model(seed=1))
    (other,) = set(cache.iterdir()) - {folder}
    for file in folder.glob("*.records"):
        file.unlink()
    (file,) = other.glob("*.records")
    file.rename(folder / file.name)
    with pytest.raises(SettingsError, match="are not those of the reference model"):
        trained(cache)


@pytest.mark.parametrize("harm", ["flipped", "truncated", "emptied"])
def test_damage_is_computed_again(harm, cache, ran, caplog):
    expected = trained(cache)
    (file,) = files(cache)
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes({"flipped": bytes(content), "truncated": content[:-9], "emptied": b""}[harm])
    ran.clear()
    assert same(trained(cache), expected)
    assert ran == {"flipped": [1, 1], "truncated": [1, 1], "emptied": [5, 5]}[harm]
    assert len(caplog.records) == (harm == "flipped")
    ran.clear()
    assert same(trained(cache), expected)  # the row is there again
    assert ran == [1]


def test_two_runs_at_once_share_what_each_computes(cache, ran):
    """Each finds the rows that the other one has written since it began."""
    expected = trained(None)
    ran.clear()
    one, two = exact_model(), exact_model()
    with (
        defend(one, defenses(), reference=f"cache:{cache}") as first,
        defend(two, defenses(), reference=f"cache:{cache}") as second,
    ):
        losses = [second.loss(BATCHES[0]), first.loss(BATCHES[1]), first.loss(BATCHES[0]), second.loss(BATCHES[1])]
    assert ran == [5, 5, 1, 1]
    assert all(close(loss, expected[place][0]) for loss, place in zip(losses, [0, 1, 0, 1], strict=True))


def test_a_defense_that_keeps_what_the_reference_gave(cache, ran, tmp_path):
    """The pass that a template anchor asks for runs, whatever is stored; the KL of the next step is read."""
    spec = {"kind": "loop", "batch": 8, "steps": 3, "defenses": {"kl": 30.0, "template_anchor": 3.0}}
    expected, metrics = run(spec, tmp_path)
    for passes in ([8, 8], [8, 1]):
        ran.clear()
        weights, found = run({**spec, "reference": f"cache:{cache}"}, tmp_path)
        assert ran == passes
        assert furthest(weights, expected) < 1e-6
        assert found["defense/kl"] == pytest.approx(metrics["defense/kl"], rel=1e-5)


def test_a_full_disk_ends_the_storing_but_not_the_training(cache, ran, monkeypatch, caplog):
    def full(_descriptor, _data):
        raise OSError(errno.ENOSPC, "No space left on device")

    expected = trained(None)
    ran.clear()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        assert same(trained(cache, [*BATCHES, *BATCHES]), [*expected, *expected])
    assert ran == [5] * 4
    (warning,) = caplog.records
    assert "the disk is full" in warning.message
    assert "training goes on" in warning.message


def test_what_a_key_does_not_cover_runs_as_without_a_cache(cache, ran, caplog):
    """Images, rotary embeddings of the longest row, and embeddings instead of tokens: with one warning each."""
    model, batch = make_multimodal("llava")
    batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    options = LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*(q_proj|v_proj)")
    seeing = get_peft_model(model.double(), options)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    dynamic = exact_model(max_position_embeddings=8, rope_parameters=rope)
    embedded = exact_model()
    states = {
        "inputs_embeds": torch.rand(2, 5, 32, dtype=torch.float64),
        "attention_mask": torch.ones(2, 5, dtype=torch.long),
        "labels": torch.ones(2, 5, dtype=torch.long),
    }
    for model, inputs in ((seeing, batch), (dynamic, BATCHES[0]), (embedded, states)):
        ran.clear()
        caplog.clear()
        trained(cache, [inputs] * 2, [KL(1.0)], model=model)
        assert len(ran) == 2
        (warning,) = [record for record in caplog.records if "not used for every batch" in record.message]
        assert warning.levelno == logging.WARNING
    assert files(cache) == []


def test_batches_that_are_flattened_anew_store_more_with_one_warning(cache, ran, caplog):
    """The same examples in another order are another row; a packed row that is found stores nothing, without a word."""
    examples = rows(LENGTHS)
    trained(cache, [pack(examples), pack(examples[::-1]), pack(examples)])
    assert ran == [1, 1]
    (warning,) = caplog.records
    assert "packed rows are stored whole and found again only as the same rows" in warning.message
    assert "\n" not in warning.message
    caplog.clear()
    trained(cache, [pack(examples)])
    assert caplog.records == []


def test_a_batch_without_a_needed_row_needs_no_folder_of_states(cache, ran):
    batch = right(rows(LENGTHS))
    batch["safe"] = torch.zeros_like(batch["safe"])
    trained(cache, [batch], defenses(tokens="safe"))
    assert ran == []
    assert files(cache) == []


def test_refusals(tmp_path):
    model, given = exact_model(), defenses()
    (tmp_path / "file").touch()
    for reference, words in {
        "cache:": "names no folder",
        f"cache:{tmp_path}/file": "is not a folder",
    }.items():
        with pytest.raises(SettingsError, match=words):
            defend(model, given, reference=reference)
    with pytest.raises(SettingsError, match="no adapter to disable"):
        defend(tiny_model(), given, reference=f"cache:{tmp_path}/cache")
    steering = Steering(torch.ones(32), layer=1)
    with pytest.raises(SettingsError, match="Steering acts on the reference model"):
        defend(model, [*given, steering], reference=f"cache:{tmp_path}/cache")
    with (
        defend(model, given, reference=f"cache:{tmp_path}/file/cache") as defended,
        pytest.raises(OutputError, match="file/cache"),
    ):
        defended.loss(BATCHES[0])
