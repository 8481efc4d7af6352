"""Trackers show the metrics of defenses and monitors, offline: TensorBoard, MLflow, trackio."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_peft_model
from train_runs import run_transformers

from safelora_fast.defenses import KL, DriftMonitor

NAMES = ("defense/kl", "monitor/drift")


def trained(tracker, folder, **arguments):
    """Train two steps; return the values that the trainer logged."""
    pytest.importorskip(tracker, reason=f"{tracker} is not installed: `make test-trainers` runs this where it is")
    spec = {
        "batch": 4,
        "accumulation": 2,
        "steps": 2,
        "arguments": {"report_to": [tracker], "run_name": "a-run", **arguments},
    }
    monitor = DriftMonitor(torch.linspace(-1, 2, 32), 1)
    _, trainer = run_transformers(spec, folder, model=tiny_peft_model(), defenses=[KL(1.0)], monitors=[monitor])
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {name: [entry[name] for entry in logs] for name in NAMES}


def test_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    logged = trained("tensorboard", tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(next(tmp_path.rglob("events.out.tfevents.*")).parent))
    board.Reload()
    for name, values in logged.items():
        assert [event.value for event in board.Scalars(f"train/{name}")] == pytest.approx(values, rel=1e-6)


def test_mlflow(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/runs.db")
    monkeypatch.setenv("MLFLOW_ENABLE_TELEMETRY", "false")
    monkeypatch.chdir(tmp_path)
    logged = trained("mlflow", tmp_path)
    import mlflow

    mlflow.end_run()
    client = mlflow.MlflowClient()
    run = mlflow.search_runs(search_all_experiments=True, output_format="list")[0]
    for name, values in logged.items():
        history = sorted(client.get_metric_history(run.info.run_id, name), key=lambda metric: metric.step)
        assert [metric.value for metric in history] == pytest.approx(values)


def test_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported
    logged = trained("trackio", tmp_path, project="tiny", trackio_static_space_id=False)
    from trackio.sqlite_storage import SQLiteStorage

    logs = SQLiteStorage.get_logs("tiny", "a-run")
    for name, values in logged.items():
        assert [entry[f"train/{name}"] for entry in logs if f"train/{name}" in entry] == pytest.approx(values)
