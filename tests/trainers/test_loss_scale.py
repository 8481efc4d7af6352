"""One SGD step is the same for batch 8, for 4 x 2 with accumulation, and for 2 processes x 2 x 2."""

from __future__ import annotations

import pytest
from tiny_models import TARGETS, adapter_weights, collate, furthest, tiny_peft_model
from train_runs import defenses, examples_of, run, run_two_processes

from safelora_fast.training import defend

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL sets it

STRONG = {"kl": 30.0, "feature_distance": 30.0, "subspace_penalty": 0.3, "template_anchor": 3.0, "safelora": 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Weights and metrics of one step on all eight examples at once, in a plain loop."""
    return run({"kind": "loop", "batch": 8, "defenses": STRONG}, tmp_path_factory.mktemp("whole"))


def same(result, expected):
    weights, metrics = result
    assert furthest(weights, expected[0]) < 1e-5
    for name in ("kl", "feature_distance", "subspace_penalty", "template_anchor", "cosine_min", "modules_projected"):
        assert metrics[f"defense/{name}"] == pytest.approx(expected[1][f"defense/{name}"], rel=1e-4)
    assert metrics["monitor/drift"] == pytest.approx(expected[1]["monitor/drift"], rel=1e-4)


def test_the_defenses_matter(whole, tmp_path):
    undefended, _ = run({"kind": "loop", "batch": 8, "defenses": {}}, tmp_path)
    assert furthest(whole[0], undefended) > 1e-2


@pytest.mark.parametrize("share_logits", [True, False], ids=["shared logits", "apart"])
@pytest.mark.parametrize("kind", ["loop", "transformers", "accelerate", "trl"])
def test_accumulation(whole, kind, share_logits, tmp_path):
    spec = {"kind": kind, "batch": 2, "accumulation": 4, "defenses": STRONG, "share_logits": share_logits}
    same(run(spec, tmp_path), whole)


def test_transformers_without_accumulation(whole, tmp_path):
    same(run({"kind": "transformers", "batch": 8, "defenses": STRONG}, tmp_path), whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "launcher"),
    [
        ("loop", "fork"),
        ("fsdp", "fork"),
        ("transformers", "torchrun"),
        ("trl", "fork"),
        ("accelerate", "fork"),
        ("accelerate", "accelerate"),
    ],
)
def test_two_processes(whole, kind, launcher, tmp_path):
    spec = {"kind": kind, "batch": 2, "accumulation": 2, "defenses": STRONG}
    same(run_two_processes(spec, tmp_path, launcher), whole)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [[2], [1, 2]], ids=str)
def test_fsdp_projects_uneven_rows_where_they_are(mesh, tmp_path):
    """Every matrix has an odd number of rows. Only lora_A is gathered, and all modules share one all-reduce."""
    model = {"intermediate_size": 47, "lora": {"r": 3}}
    # With a strong anchor, weights of the second step are in the thousands, and rounding grows with them.
    spec = {"batch": 2, "accumulation": 2, "steps": 2, "model": model, "defenses": {**STRONG, "template_anchor": 0.1}}
    whole = run({**spec, "kind": "loop", "batch": 8}, tmp_path)
    sharded = run_two_processes({**spec, "kind": "fsdp", "mesh": mesh}, tmp_path)
    same(sharded, whole)
    assert sorted(sharded[1]["messages"].values()) == [1, len(TARGETS) * 3]


@pytest.mark.slow
@pytest.mark.parametrize("share_logits", [True, False], ids=["shared logits", "apart"])
def test_fsdp_where_one_process_has_nothing_to_learn(share_logits, tmp_path):
    """It must still run the reference and gather the sharded head, because the other process waits for it.

    In the second micro-batch neither has anything, and neither runs them.
    """
    spec = {
        "batch": 2,
        "defenses": {"kl": 30.0, "kl_tokens": "completion", "safelora": 1},
        "share_logits": share_logits,
        "silent_rows": [1, 3, 4, 5, 6, 7],  # the second process has the odd rows, two per batch
    }
    whole = run({**spec, "kind": "loop", "batch": 8}, tmp_path)
    weights, metrics = run_two_processes({**spec, "kind": "fsdp", "reshard": True}, tmp_path)
    assert furthest(weights, whole[0]) < 1e-5
    assert metrics["defense/kl"] == pytest.approx(whole[1]["defense/kl"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["loop", "fsdp"])
def test_only_one_process_meets_a_new_prefix(kind, tmp_path):
    """Under FSDP2 both must run the reference, because each gathers the other's weights."""
    spec = {"batch": 2, "steps": 2, "defenses": {"template_anchor": 0.1}}
    whole = run({**spec, "kind": "loop", "batch": 8}, tmp_path)
    weights, metrics = run_two_processes({**spec, "kind": kind}, tmp_path)
    assert furthest(weights, whole[0]) < 1e-5
    assert metrics["defense/template_anchor"] == pytest.approx(whole[1]["defense/template_anchor"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["loop", "fsdp"])
def test_only_one_process_finds_its_rows_in_the_cache(kind, tmp_path):
    """Under FSDP2 both must run the reference as long as one of them misses a row. In the second step, none does."""
    spec = {"batch": 2, "steps": 2, "defenses": {"kl": 30.0, "feature_distance": 30.0}}
    whole = run({**spec, "kind": "loop", "batch": 8}, tmp_path)
    cache, model = tmp_path / "cache", tiny_peft_model()
    with defend(model, defenses(spec["defenses"], model), reference=f"cache:{cache}") as defended:
        defended.loss(collate(examples_of(spec)[0::2]))  # the rows of process 0
    weights, metrics = run_two_processes({**spec, "kind": kind, "reference": f"cache:{cache}"}, tmp_path)
    assert furthest(weights, whole[0]) < 1e-5
    assert metrics["defense/kl"] == pytest.approx(whole[1]["defense/kl"], rel=1e-4)
    assert len(list(cache.glob("*/*.records"))) == 2  # of this process and of process 1


@pytest.mark.slow
def test_a_defense_that_is_not_finite_on_one_process_makes_both_skip_the_step(tmp_path):
    spec = {"kind": "loop", "batch": 2, "on_nonfinite": "skip", "broken_rank": 1, "defenses": {"kl": 30.0}}
    weights, _ = run_two_processes(spec, tmp_path)
    assert furthest(weights, adapter_weights(tiny_peft_model())) == 0
    weights, _ = run_two_processes({**spec, "broken_rank": None}, tmp_path)
    assert furthest(weights, adapter_weights(tiny_peft_model())) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_a_model_that_sees_on_two_processes(wrapper, tmp_path):
    """The reference runs tower, projector and decoder inside the training pass, in the same order on both processes."""
    spec = {"kind": "multimodal", "model": "llava", "wrapper": wrapper}
    expected, metrics = run(spec, tmp_path)
    weights, shared = run_two_processes(spec, tmp_path)
    assert furthest(weights, expected) < 1e-5
    for name in ("defense/kl", "defense/feature_distance"):
        assert shared[name] == pytest.approx(metrics[name], rel=1e-4)
