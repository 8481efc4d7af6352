"""A comparison with benchmarks: their columns, and what becomes of those that fail, are misspelt, or are not finite."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_comparison import train_inside, write_comparison
from tiny_task import write_task

from safelora_fast.compare.measures import BenchmarksMeasure, benchmarks
from safelora_fast.errors import EvaluationError
from safelora_fast.judging.benchmarks import BenchmarkReport, Metric, TaskResult

NEEDS = "the eval extra is not installed: pip install 'safelora-fast[eval]'"


@pytest.fixture
def comparison(tmp_path, monkeypatch):
    """One run with two seeds, and a benchmark of sixteen questions."""
    pytest.importorskip("lm_eval", reason=NEEDS)
    train_inside(monkeypatch)
    made = write_comparison(tmp_path, runs={"none": {}})
    made.edit(measure={"margin": False, "tasks": write_task(tmp_path), "device": "cpu"})
    return made


def column_of(comparison):
    return next(column for column in comparison.report()["columns"] if column["key"] == "task/tiny_choice")


def test_benchmarks_are_columns(comparison, call):
    assert call(*comparison.words("-q")).code == 0
    column = column_of(comparison)
    assert (column["criterion"], column["unit"], column["better"]) == ("benign", "%", "higher")
    cell = comparison.cells("none")["task/tiny_choice"]
    for seed in cell["seeds"]:
        content = json.loads((comparison.output / seed["source"]).read_text())
        metric = content["tasks"]["tiny_choice"]["metrics"][0]
        assert (seed["value"], metric["count"]) == (metric["value"], 16)
    assert cell["low"] < cell["value"] < cell["high"]
    assert comparison.cells("reference")["task/tiny_choice"]["value"] is not None
    kept = comparison.output / "none" / "seed-1" / "tasks.json"
    content = json.loads(kept.read_text())
    content["tasks"]["tiny_choice"]["metrics"][0]["value"] = None
    kept.write_text(json.dumps(content))
    assert call(*comparison.words("-q", "--report-only")).code == 1
    cell = comparison.cells("none")["task/tiny_choice"]
    assert [seed["failure"] for seed in cell["seeds"]] == [None, "the measurement is not finite"]
    assert cell["value"] == cell["seeds"][0]["value"]


def test_benchmarks_that_fail_everywhere_are_failed_cells(comparison, call, monkeypatch):
    def fail(*_arguments, **_settings):
        raise EvaluationError("task tiny_choice: its data are gone")

    monkeypatch.setattr(benchmarks, "benchmark", fail)
    assert call(*comparison.words("-q")).code == 1
    assert comparison.report()["complete"] is False
    assert column_of(comparison)["title"] == "tiny_choice"
    for name, count in (("reference", 1), ("none", 2)):
        cell = comparison.cells(name)["task/tiny_choice"]
        assert [seed["failure"] for seed in cell["seeds"]] == ["task tiny_choice: its data are gone"] * count
        assert cell["value"] is None
    assert "its data are gone" in (comparison.output / "report.md").read_text()


def test_a_benchmark_that_fails_takes_no_other_with_it(comparison, call, monkeypatch):
    """Its rows are gone; once they are back, it alone is run again."""
    section = comparison.values()["measure"]["tasks"]
    folder = Path(section["path"])
    rows, gone = folder.parent / "choice.jsonl", folder.parent / "gone.jsonl"
    words = (folder / "tiny_choice.yaml").read_text()
    (folder / "gone.yaml").write_text(words.replace("tiny_choice", "gone").replace(str(rows), str(gone)))
    comparison.edit(measure={"margin": False, "device": "cpu", "tasks": {**section, "names": ["gone", "tiny_choice"]}})
    assert call(*comparison.words("-q")).code == 1
    for name, count in (("reference", 1), ("none", 2)):
        failed, done = (comparison.cells(name)[f"task/{task}"] for task in ("gone", "tiny_choice"))
        assert all(seed["failure"].startswith("task gone: FileNotFoundError") for seed in failed["seeds"])
        assert ([seed["failure"] for seed in done["seeds"]], failed["value"]) == ([None] * count, None)
        assert done["value"] is not None
    shutil.copy(rows, gone)
    from safelora_fast.judging import harness

    run, measure = [], harness.measure
    monkeypatch.setattr(harness, "measure", lambda *words, **rest: run.append(words[2]) or measure(*words, **rest))
    assert call(*comparison.words("-q")).code == 0
    assert run == ["gone"] * 3
    failed, done = (comparison.cells("none")[f"task/{task}"] for task in ("gone", "tiny_choice"))
    assert (failed["value"], failed["low"]) == (done["value"], done["low"])


def test_a_misspelt_benchmark_is_refused_before_the_first_step(comparison, call):
    tasks = comparison.values()["measure"]["tasks"]
    for changes, words in (
        ({"names": ["tiny_chioce"]}, "there is no task 'tiny_chioce'"),
        ({"names": ["tiny_choice", "nothing_of_that_name"]}, "there is no task 'nothing_of_that_name'"),
        ({"path": "nowhere"}, "nowhere: there is no such folder of tasks"),
    ):
        comparison.edit(measure={"margin": False, "device": "cpu", "tasks": {**tasks, **changes}})
        result = call(*comparison.words("-q"))
        assert (result.code, words in result.err) == (2, True), result.err
        assert not comparison.output.exists()


def test_a_benchmark_that_is_not_finite_takes_no_other_with_it(monkeypatch):
    def result(task, *values):
        metrics = tuple(Metric(f"m{number}", "none", value, 0.1, 9, True) for number, value in enumerate(values))
        return TaskResult(task, metrics, "1", 0, False, "0.4", "digest")

    tasks = (result("good", 0.5, math.nan), result("bad", math.nan, 0.5))
    monkeypatch.setattr(benchmarks, "benchmark", lambda *_, **__: BenchmarkReport(Path("file"), {}, tasks))
    monkeypatch.setattr(benchmarks, "folder_of", lambda *_: Path("folder"))
    section = SimpleNamespace(names=["good", "bad"], path=None, limit=None)
    settings = SimpleNamespace(
        model="m", dtype="float32", device="cpu", chat_template=None, trust_remote_code=False, template_args=None
    )
    config = SimpleNamespace(measure=SimpleNamespace(tasks=section, batch_size=1))
    bench = SimpleNamespace(config=config, settings=settings, strings="chat", progress=None, release=lambda **_: None)
    found = BenchmarksMeasure().take(SimpleNamespace(adapter=None), bench)["tasks"]
    assert [metric["value"] for metric in found["good"]["metrics"]] == [0.5, None]
    assert found["bad"] == {"failure": "the measurement is not finite: m0"}
