"""Tests of benchmarks in a comparison: columns, and tasks that fail, are misspelled, moved or not finite."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_task import write_task

from safelora_fast.compare.compare import check_inputs
from safelora_fast.compare.config import load_config
from safelora_fast.compare.measures.tasks import Tasks
from safelora_fast.errors import EvaluationError, SafeLoraFastError
from safelora_fast.judging import benchmarks
from safelora_fast.judging.benchmark_results import BenchmarkReport, Metric, TaskResult

NEEDS = "the eval extra is not installed: pip install 'safelora-fast[eval]'"


@pytest.fixture
def comparison(unmeasured, tmp_path):
    """One run with two seeds, and a benchmark of sixteen questions."""
    pytest.importorskip("lm_eval", reason=NEEDS)
    unmeasured.edit(measure={"margin": False, "tasks": write_task(tmp_path), "device": "cpu"})
    return unmeasured


def column_of(comparison):
    return next(column for column in comparison.report()["columns"] if column["key"] == "task/tiny_choice")


def failures(comparison, run, task="tiny_choice"):
    return [seed["failure"] for seed in comparison.cells(run)[f"task/{task}"]["seeds"]]


def test_benchmarks_are_columns(comparison, call, move, monkeypatch):
    """Results survive a move of the folder; other tasks, or another harness, count as other measurements."""
    from safelora_fast.models import load

    assert call(*comparison.words("-q")).code == 0
    column, rows = column_of(comparison), comparison.report()["rows"]
    assert (column["criterion"], column["unit"], column["better"]) == ("benign", "%", "higher")
    cell = comparison.cells("none")["task/tiny_choice"]
    for seed in cell["seeds"]:
        content = json.loads((comparison.output / seed["source"]).read_text())
        metric = content["tasks"]["tiny_choice"]["metrics"][0]
        assert (seed["value"], metric["count"]) == (metric["value"], 16)
    assert cell["low"] < cell["value"] < cell["high"]
    assert comparison.cells("reference")["task/tiny_choice"]["value"] is not None
    moved = move(comparison, "tasks.json")
    with monkeypatch.context() as patch:
        patch.setattr(load, "load_subject", None)  # every task's result is in its folder
        result = call(*moved.words("-q"))
    assert result.code == 0, result.err
    assert moved.report()["rows"] == rows

    def value():
        call(*moved.words("-q", "--report-only"))
        return moved.cells("none").get("task/tiny_choice", {"value": None})["value"]

    assert value() is not None
    with monkeypatch.context() as patch:
        patch.setattr(benchmarks, "harness_version", lambda: "0.0.1")
        assert value() is None
    task = Path(moved.values()["measure"]["tasks"]["path"]) / "tiny_choice.yaml"
    before = task.read_text()
    task.write_text(before + "target_delimiter: ''\n")
    assert value() is None
    task.write_text(before)
    kept = moved.output / "none" / "seed-1" / "tasks.json"
    content = json.loads(kept.read_text())
    content["tasks"]["tiny_choice"]["metrics"][0]["value"] = None
    kept.write_text(json.dumps(content))
    assert value() == moved.cells("none")["task/tiny_choice"]["seeds"][0]["value"]
    assert failures(moved, "none") == [None, "the measurement is not finite"]


def test_benchmarks_that_fail_everywhere_are_failed_cells(comparison, call, monkeypatch):
    def fail(*_arguments, **_settings):
        raise EvaluationError("task tiny_choice: its data are gone")

    monkeypatch.setattr(benchmarks, "benchmark", fail)
    assert call(*comparison.words("-q")).code == 1
    assert comparison.report()["complete"] is False
    assert column_of(comparison)["title"] == "tiny_choice"
    for name, count in (("reference", 1), ("none", 2)):
        assert failures(comparison, name) == ["task tiny_choice: its data are gone"] * count
        assert comparison.cells(name)["task/tiny_choice"]["value"] is None
    assert "its data are gone" in (comparison.output / "report.md").read_text()


def test_a_benchmark_that_fails_takes_no_other_with_it(comparison, call, monkeypatch):
    """Its data file is missing; once the file is back, only this benchmark is run again."""
    section = comparison.values()["measure"]["tasks"]
    folder = Path(section["path"])
    rows, gone = folder.parent / "choice.jsonl", folder.parent / "gone.jsonl"
    words = (folder / "tiny_choice.yaml").read_text()
    (folder / "gone.yaml").write_text(words.replace("tiny_choice", "gone").replace(str(rows), str(gone)))
    comparison.edit(measure={"margin": False, "device": "cpu", "tasks": {**section, "names": ["gone", "tiny_choice"]}})
    assert call(*comparison.words("-q")).code == 1
    for name, count in (("reference", 1), ("none", 2)):
        assert all(reason.startswith("task gone: FileNotFoundError") for reason in failures(comparison, name, "gone"))
        assert failures(comparison, name) == [None] * count
    shutil.copy(rows, gone)
    from safelora_fast.judging import harness

    run, measure = [], harness.measure
    monkeypatch.setattr(harness, "measure", lambda *words, **rest: run.append(words[2]) or measure(*words, **rest))
    assert call(*comparison.words("-q")).code == 0
    assert run == ["gone"] * 3
    failed, done = (comparison.cells("none")[f"task/{task}"] for task in ("gone", "tiny_choice"))
    assert (failed["value"], failed["low"]) == (done["value"], done["low"])


def test_a_misspelled_benchmark_is_refused_before_the_first_step(comparison):
    section = {**comparison.values()["measure"]["tasks"], "names": ["tiny_chioce"]}
    comparison.edit(measure={"margin": False, "device": "cpu", "tasks": section})
    with pytest.raises(SafeLoraFastError, match="there is no task 'tiny_chioce'"):
        check_inputs(load_config(comparison.path))


def test_a_benchmark_that_is_not_finite_takes_no_other_with_it(monkeypatch):
    def result(task, *values):
        metrics = tuple(Metric(f"m{number}", "none", value, 0.1, 9, True) for number, value in enumerate(values))
        return TaskResult(task, metrics, "1", 0, False, "0.4", "digest")

    tasks = (result("good", 0.5, math.nan), result("bad", math.nan, 0.5))
    monkeypatch.setattr(benchmarks, "benchmark", lambda *_, **__: BenchmarkReport(Path("file"), {}, tasks))
    monkeypatch.setattr(Tasks, "folder", lambda *_: Path("folder"))
    section = SimpleNamespace(names=["good", "bad"], path=None, limit=None)
    settings = SimpleNamespace(
        model="m", dtype="float32", device="cpu", chat_template=None, trust_remote_code=False, template_args=None
    )
    config = SimpleNamespace(measure=SimpleNamespace(tasks=section, batch_size=1))
    bench = SimpleNamespace(config=config, settings=settings, strings="chat", progress=None, release=lambda **_: None)
    found = Tasks().take(SimpleNamespace(adapter=None), bench)["tasks"]
    assert [metric["value"] for metric in found["good"]["metrics"]] == [0.5, None]
    assert found["bad"] == {"failure": "the measurement is not finite: m0"}
