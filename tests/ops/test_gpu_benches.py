"""`make bench-gpu` without clock and GPU: everything else, on small tensors, with the reference instead of a kernel."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._functorch import config

from safelora_fast.ops.base import VARIABLE, gpu, requested_backend
from safelora_fast.ops.subspace_projection.torch_impl import Torch

pytest.importorskip("triton")
FOLDER = Path(__file__).parents[2] / "benches" / "gpu"
SMALL = {
    "projection": {"SHAPES": [(12, 12), (4, 12), (4, 12), (12, 12), (40, 12), (40, 12), (12, 40)], "LAYERS": 2},
    "feature_distance": {"TOKENS": 6, "HIDDEN": 10},
    "linear_kl": {"TOKENS": 9, "HIDDEN": 16, "VOCABULARY": 50},
}
# Suite, metric and aim, as specified.
AIMS = {
    ("projection", "of a copy", "≥ 0.85"),
    ("projection", "× torch, factored", "≥ 3"),
    ("projection", "× torch, dense", "≥ 30"),
    ("projection", "ms", "≤ 0.3"),
    ("feature_distance", "of a copy", "≥ 0.85"),
    ("feature_distance", "× torch", "≥ 3"),
    ("feature_distance", "× torch.compile", "≥ 1.2"),
    ("linear_kl", "× TRL", "≥ 1"),
    ("linear_kl", "memory, of TRL's", "≤ 1"),
}


@pytest.fixture
def main(monkeypatch):
    """Import the script as a module, with small inputs."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    spec = importlib.util.spec_from_file_location("gpu_benches", FOLDER / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for suite, sizes in SMALL.items():
        for name, value in sizes.items():
            monkeypatch.setattr(module.SUITES[suite], name, value)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setenv(VARIABLE, "")  # so that the script's own setting is undone afterwards
    donated = config.donated_buffer
    yield module
    config.donated_buffer = donated
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == FOLDER:
            del sys.modules[name]


def rehearsal(main):
    class Rehearsal(main.Timer):
        """Calls everything, and reports two milliseconds for each call."""

        def sets(self, bytes_a_set):
            assert bytes_a_set > 0
            return 2

        def free_bytes(self):
            return 1 << 30

        def time(self, calls, rounds=1, *, with_host=False):  # noqa: ARG002
            for call in calls:
                call()
            return 2.0

        def peak_bytes(self, call):
            call()
            return 1000

    return Rehearsal(torch.device("cpu"), 1e6)


def test_every_aim_has_a_figure(main):
    torch._dynamo.reset()
    found, peers, with_host = set(), set(), set()
    for suite, module in main.SUITES.items():
        for figure in module.figures(rehearsal(main), ["reference"], main.use):
            assert figure.value > 0
            peers.add(figure.provider)
            if figure.host != "excluded":
                with_host.add((suite, figure.name))
            if figure.aim:
                assert figure.provider == "ours, reference"
                found.add((suite, figure.name, figure.aim))
    peer = set() if importlib.util.find_spec("trl.kernels") is None else {"TRL"}  # which older versions lack
    assert found >= {aim for aim in AIMS if peer or "TRL" not in aim[1]}
    assert peers >= {"torch", "torch, factored", "torch, dense", "torch.compile"} | peer
    assert with_host >= {("projection", "ms, host included"), ("linear_kl", "ms")}
    assert ("feature_distance", "ms") not in with_host
    assert requested_backend() is None


def test_a_wrong_kernel_is_not_timed(main, monkeypatch):
    right = Torch.products
    monkeypatch.setattr(Torch, "products", lambda *given: [1.1 * found for found in right(*given)])
    with pytest.raises(SystemExit, match=r"ours, reference: results differ by 0\.1"):
        list(main.SUITES["projection"].figures(rehearsal(main), ["reference"], main.use))


@pytest.mark.usefixtures("main")
def test_aims_are_judged_by_their_figures():
    figures = sys.modules["figures"]
    assert [figures.Figure("a", "b", "ms", value, most=0.3).reached for value in (0.3, 0.31)] == ["yes", "no"]
    assert [figures.Figure("a", "b", "×", value, least=3).reached for value in (3.0, 2.9)] == ["yes", "no"]
    assert figures.Figure("a", "b", "ms", float("nan"), most=0.3).reached == "no"
    assert figures.Figure("a", "b", "ms", 1.0).reached == ""


def test_without_a_gpu_nothing_is_measured(main, monkeypatch, capsys):
    monkeypatch.setattr(main, "gpu", lambda: None)
    assert main.main() == 2
    assert capsys.readouterr().err == "no GPU that torch.cuda can use: nothing to measure\n"


@pytest.mark.skipif(gpu() is not None or shutil.which("make") is None, reason="there is a GPU, or no make")
def test_without_a_gpu_nothing_passes_for_tested():
    """`make test-gpu` would otherwise skip every test and succeed."""
    command = ["make", "test-gpu", f"GPU_PYTHON={sys.executable}"]
    not_a_child = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    run = subprocess.run(command, cwd=FOLDER.parents[1], env=not_a_child, capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert run.stderr.startswith("no GPU that torch can use: nothing to test\n")
    assert run.stdout == ""
