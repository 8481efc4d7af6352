"""Every script in examples/ trains, those with KL train the same adapter, and notebooks print what is stored in them."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).parents[1] / "examples"
KL = ["plain_loop", "accelerate_loop", "transformers_trainer", "trl_sft", "ops_in_your_trainer"]
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "task")

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),  # TRL sets it
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Run the scripts in this process, each as `python SCRIPT`; return their adapters' weights by name."""
    folder = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(FOLDER)
        for name in SCRIPTS:
            patch.setattr(sys, "argv", [f"{name}.py"])
            runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    sys.modules.pop("task", None)
    return {name: load_file(folder / "runs" / name / "adapter_model.safetensors") for name in SCRIPTS}


def test_all_ways_to_train_with_kl_give_the_same_adapter(trained):
    """The operations alone are called by code without our trainers and hooks, so they are the reference here."""
    wanted = trained["ops_in_your_trainer"]
    assert min(tensor.abs().max() for tensor in wanted.values()) > 1e-3
    for name in KL:
        assert trained[name].keys() == wanted.keys()
        assert max((trained[name][key] - wanted[key]).abs().max() for key in wanted) < 1e-5, name


def test_the_kl_of_the_examples_matters(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", [""])
    program = (FOLDER / "ops_in_your_trainer.py").read_text("utf-8")
    assert program.count("kl_weight = 0.1") == 1
    exec(compile(program.replace("kl_weight = 0.1", "kl_weight = 0.0"), "undefended", "exec"), {})
    sys.modules.pop("task", None)
    undefended = load_file(tmp_path / "runs" / "ops_in_your_trainer" / "adapter_model.safetensors")
    assert max((undefended[key] - trained["plain_loop"][key]).abs().max() for key in undefended) > 1e-4


def test_the_trainer_subclass_has_its_own_loss(trained):
    assert set(SCRIPTS) == {*KL, "trainer_subclass"}
    weights = trained["trainer_subclass"].values()
    assert all(torch.isfinite(tensor).all() and tensor.any() for tensor in weights)


def printed(notebook):
    """Return what each cell prints or returns, without pictures."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = [output.get("text") or output.get("data", {}).get("text/plain") for output in outputs]
    return "".join(text for text in texts if text)


@pytest.mark.parametrize("name", ["projection", pytest.param("training", marks=pytest.mark.slow)])
def test_notebooks_print_what_is_stored_in_them(name, monkeypatch):
    """Starts a kernel. The one of training imports torch and trains seven times, ten seconds."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    stored = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    before = printed(stored)
    where = {"metadata": {"path": str(FOLDER)}}
    nbclient.NotebookClient(stored, timeout=300, kernel_name="python3", resources=where).execute()
    assert printed(stored) == before
    assert "\n" in before
