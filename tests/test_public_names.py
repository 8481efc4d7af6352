from __future__ import annotations

import subprocess
import sys

import pytest

import safelora_fast
from safelora_fast.errors import MissingDependencyError, how_to_install


def in_a_fresh_process(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.strip()


DEFENSES = [
    "KL",
    "DefendedMixin",
    "DefendedSFTTrainer",
    "DefendedTrainer",
    "DriftMonitor",
    "FeatureDistance",
    "MarginCallback",
    "PersonaVector",
    "SafeLora",
    "SafeSubspace",
    "StopRule",
    "Steering",
    "SubspacePenalty",
    "answer_margin",
    "defend",
]


def test_names_load_when_first_used():
    for name in DEFENSES:
        assert getattr(safelora_fast, name).__name__ == name
    assert {*DEFENSES, *safelora_fast.__all__} <= set(dir(safelora_fast))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = safelora_fast.nothing


def test_the_base_import_needs_no_torch():
    program = "import sys, safelora_fast; safelora_fast.SafeSubspace; import safelora_fast.subspace.plan"
    loaded = in_a_fresh_process(f"{program}; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])")
    assert loaded == "[]"


def test_a_missing_torch_is_said_so(monkeypatch):
    monkeypatch.setitem(safelora_fast._HOMES, "lacking", "safelora_fast.lacking")
    monkeypatch.setattr(safelora_fast.importlib, "import_module", missing)
    with pytest.raises(MissingDependencyError, match=r"lacking needs torch: pip install .*'torch>="):
        _ = safelora_fast.lacking


def missing(_name):
    raise ModuleNotFoundError("No module named 'torch'", name="torch")


def test_packages_are_named_that_can_be_installed():
    """This package is not on the index, but its requirements are."""
    assert how_to_install("plot") == "pip install 'matplotlib>=3.8'"
    assert how_to_install("train").startswith("pip install 'accelerate>=")
    assert "safelora-fast" not in how_to_install("eval")
