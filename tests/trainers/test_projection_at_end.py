"""SafeLora(at="end") in the trainers: which weights are saved when, resumed runs, and two processes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import adapter_weights, furthest, save_pair, tiny_peft_model
from train_runs import run, run_transformers, run_two_processes
from transformers import Trainer, TrainerCallback

from safelora_fast import project_adapter
from safelora_fast.defenses import KL, SafeLora
from safelora_fast.subspace.safe_subspace import SafeSubspace

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL sets it

SPEC = {"batch": 2, "accumulation": 2, "steps": 4, "model": {"dropout": 0.2}}
SAVING = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 3}
OPTIONS = {"select": "number", "num_layers": 5}


@pytest.fixture
def sources(tmp_path):
    return save_pair(tmp_path)


@pytest.fixture
def at_end(sources):
    return SafeLora(SafeSubspace.from_sources(**sources), **OPTIONS)


def projected(saved, sources, output, **options):
    """Project a saved adapter; return the report and the projected tensors."""
    report = project_adapter(saved, **sources, output=output, **(options or OPTIONS))
    return report, load_file(output / "adapter_model.safetensors")


def saved_by(trainer, folder):
    trainer.save_model(str(folder))
    return load_file(folder / "adapter_model.safetensors")


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_saved_after_training_and_unprojected_while_training(sources, at_end, tmp_path):
    spec = {**SPEC, "arguments": SAVING}
    _, plain = run_transformers(spec, tmp_path / "plain", trainer_class=Trainer)
    trained = saved_by(plain, tmp_path / "trained")
    report, expected = projected(tmp_path / "trained", sources, tmp_path / "expected")
    _, trainer = run_transformers(spec, tmp_path / "run", defenses=[at_end])
    assert equal(saved_by(trainer, tmp_path / "saved"), expected)
    assert not equal(trained, expected)
    assert equal(load_file(tmp_path / "run" / "checkpoint-4" / "adapter_model.safetensors"), trained)
    assert len(trainer.projection_report.adapters[0].projected) == 5
    (logged,) = (logs for logs in trainer.state.log_history if "defense/modules_projected" in logs)
    assert logged["defense/modules_projected"] == 5
    assert logged["defense/cosine_min"] == min(module.cosine for module in report.adapters[0].modules)


@pytest.mark.parametrize("checkpoint", [2, 4])
def test_a_resumed_run_ends_as_an_unbroken_one(at_end, tmp_path, checkpoint):
    """This includes the last checkpoint, which is not projected and leaves no step to train."""
    spec = {**SPEC, "arguments": SAVING}
    unbroken, _ = run_transformers(spec, tmp_path / "run", defenses=[at_end, KL(3.0)])
    resume = str(tmp_path / "run" / f"checkpoint-{checkpoint}")
    resumed, trainer = run_transformers({**spec, "resume": resume}, tmp_path / "again", defenses=[at_end, KL(3.0)])
    assert trainer.projection_report is not None
    assert furthest(adapter_weights(unbroken), adapter_weights(resumed)) == 0


def test_callbacks_see_the_projected_model_and_open_trackers(at_end, tmp_path):
    seen = {}

    class Tracker(TrainerCallback):
        """Closes at the end of training, as trackers do."""

        closed = False

        def on_log(self, *_args, logs, **_kwargs):
            assert not self.closed
            seen.update(logs)

        def on_train_end(self, *_args, model, **_kwargs):
            self.closed = True
            seen["weights"] = adapter_weights(model)

    model, _ = run_transformers(SPEC, tmp_path, defenses=[at_end], callbacks=[Tracker()])
    assert seen["defense/modules_projected"] == 5
    assert furthest(seen["weights"], adapter_weights(model)) == 0


def test_a_run_that_fails_is_not_projected(at_end, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, _args, state, _control, **_kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    model = tiny_peft_model()
    plain, _ = run_transformers({**SPEC, "steps": 2, "model": {}}, tmp_path / "plain", trainer_class=Trainer)
    with pytest.raises(KeyboardInterrupt):
        run_transformers(SPEC, tmp_path / "run", model=model, defenses=[at_end], callbacks=[Stop()])
    assert furthest(adapter_weights(plain), adapter_weights(model)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["loop", "fsdp", "transformers"])
def test_two_processes_end_as_one(sources, tmp_path, kind):
    """Process 1 does not read the checkpoints, but must end with the projected weights too."""
    options = {"operator": "orthogonal", "rank": 3, "select": "number", "num_layers": 5}
    given = {**{role: str(path) for role, path in sources.items()}, "options": options}
    spec = {"kind": "loop" if kind == "fsdp" else kind, "batch": 4, "defenses": {"kl": 30.0, "safelora_end": given}}
    expected, _ = run(spec | {"batch": 8}, tmp_path)
    unprojected, _ = run(spec | {"batch": 8, "defenses": {"kl": 30.0}}, tmp_path)
    weights, _ = run_two_processes(spec | {"kind": kind}, tmp_path)
    assert furthest(weights, expected) < 1e-5
    assert furthest(weights, unprojected) > 1e-2
