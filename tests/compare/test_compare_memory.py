"""Tests of memory use: how many models a comparison loads at once, and its messages when one does not fit."""

from __future__ import annotations

import gc
import json
import weakref
from types import SimpleNamespace

import pytest
import torch
import yaml
from judge_server import alignment_or_coherence, serving
from tiny_comparison import train_inside, write_comparison
from tiny_task import write_task

from safelora_fast.compare.compare import compare
from safelora_fast.compare.config import load_config
from safelora_fast.models import load as models_load
from safelora_fast.scoring import drift

NEEDS = "the eval extra is not installed: pip install 'safelora-fast[eval]'"
CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.2 GiB is free."
)


@pytest.fixture
def comparison(tmp_path, monkeypatch):
    """Two runs with one seed, trained and not measured."""
    train_inside(monkeypatch)
    made = write_comparison(tmp_path, seeds=[0])
    measure = made.values()["measure"]
    made.edit(measure={"margin": False, "device": "cpu", "operator_swap": measure["operator_swap"]})
    monkeypatch.setattr("safelora_fast.compare.compare._measure", lambda *_: None)
    compare(load_config(made.path), talk=False)
    made.edit(measure={**measure, "scaled": [0.25, 0.5]})
    monkeypatch.undo()
    train_inside(monkeypatch)
    return made


@pytest.fixture
def live(monkeypatch):
    """The number of live models after each load; automatic garbage collection is off."""
    models, counts, place = [], [], models_load.place  # called for models that are read, and for those that are copied

    def counting(model, device):
        model = place(model, device)
        models.append(weakref.ref(model))
        counts.append(sum(one() is not None for one in models))
        return model

    monkeypatch.setattr(models_load, "place", counting)
    gc.collect()
    gc.disable()
    yield counts
    gc.enable()


def measure(comparison):
    return compare(load_config(comparison.path), talk=False)


def test_two_models_at_most_are_alive(comparison, live):
    """The reference and the run, for the divergence of the run itself, of its scaled update and of the sweep."""
    assert measure(comparison).complete
    assert len(live) >= 9
    assert max(live) == 2


def test_one_model_is_alive_while_answers_are_judged_and_benchmarks_run(comparison, live, monkeypatch):
    pytest.importorskip("inspect_ai", reason=NEEDS)
    pytest.importorskip("lm_eval", reason=NEEDS)
    monkeypatch.setenv("STUB_API_KEY", "none")
    folder = comparison.path.parent
    (folder / "questions.yaml").write_text(yaml.safe_dump([{"id": "a", "paraphrases": ["why?"]}]))

    def judge(prompt, _headers):
        return 200, {"alignment": "10", "coherence": "80"}[alignment_or_coherence(prompt)], None

    general = comparison.values()["measure"]["general"]
    with serving(judge) as (url, _):
        comparison.edit(
            measure={
                "device": "cpu", "general": general, "tasks": write_task(folder),
                "judge": {"model": "openai-api/stub/one", "url": url, "questions": str(folder / "questions.yaml"),
                          "samples": 1, "max_tokens": 2, "attempts": 1},
            }
        )  # fmt: skip
        report = measure(comparison)
    assert report.complete, [cell.failures for row in report.rows for cell in row.cells.values()]
    # margin and divergence, answers, benchmarks: first for the reference, then for each run beside the reference
    assert live == [1, 1, 1, *[1, 2, 1, 1] * 2]


def out_of_memory(*_arguments, **_settings):
    raise torch.OutOfMemoryError(CUDA)


def test_a_model_that_does_not_fit_is_failed_cells_that_say_what_to_lower(comparison, call, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "to", out_of_memory)
    result = call(*comparison.words())
    assert result.code == 1
    assert "Traceback" not in result.err
    said = f"device cpu: out of memory ({CUDA}): "
    cells = comparison.cells("reference")
    assert cells["exact"]["seeds"][0]["failure"] == (
        f"{said}lower measure.batch_size, now 16, or set measure.dtype to bfloat16"
    )
    for kind in ("margin", "drift", "scaled", "sweep"):
        content = json.loads((comparison.output / "none" / "seed-0" / f"{kind}.json").read_text())
        assert content["failure"].endswith(f": out of memory ({CUDA}): set measure.dtype to bfloat16"), kind


def test_a_batch_that_does_not_fit_says_what_to_lower_here(comparison, call, monkeypatch):
    """The advice `ask for fewer` is for callers of the function; a configuration has no such setting."""
    monkeypatch.setattr(drift, "_batch", out_of_memory)
    assert call(*comparison.words("-q")).code == 1
    assert comparison.cells("none")["learned"]["seeds"][0]["failure"] == (
        "out of memory with 1024 tokens in a batch: set measure.dtype to bfloat16"
    )
    assert comparison.cells("none")["margin_rise"]["value"] is not None


def test_a_failure_leaves_no_model_behind(comparison, live, monkeypatch):
    monkeypatch.setattr("safelora_fast.scoring.drift.answer_drift", out_of_memory)
    measure(comparison)
    assert max(live) <= 2


def test_a_benchmark_that_does_not_fit_says_what_to_lower(monkeypatch):
    pytest.importorskip("lm_eval", reason=NEEDS)
    from safelora_fast.errors import EvaluationError
    from safelora_fast.judging import harness

    tasks = SimpleNamespace(manager=SimpleNamespace(load=lambda _names: {"tasks": {}}))
    model = SimpleNamespace(task="", batch_size=16)
    monkeypatch.setattr(harness.lm_eval, "simple_evaluate", out_of_memory)
    with pytest.raises(EvaluationError) as caught:
        harness.measure(model, tasks, "quiz", limit=None, chat=False, seed=0)
    assert str(caught.value) == "task quiz: out of memory with 16 requests at a time: lower the batch size"
