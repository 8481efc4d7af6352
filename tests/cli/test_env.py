"""safelora-fast env and bench: the backend of each operation, the self-test, and the speed of this machine."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
import torch

from safelora_fast.cli import bench
from safelora_fast.ops import self_test, subspace_projection

OPERATIONS = ("feature_distance", "linear_kl", "subspace_projection")


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv("SAFELORA_FAST_BACKEND", raising=False)


def rows(out):
    return dict(line.split(None, 1) for line in out.splitlines() if line.startswith(OPERATIONS))


def test_what_serves_is_said(call):
    code, out, err = call("env")
    assert (code, err) == (0, "")
    assert set(rows(out)) == set(OPERATIONS)
    assert rows(out)["feature_distance"].startswith("CPU: native; GPU: ")
    assert "self-test" not in out
    assert all(word in out for word in ("safelora-fast", "python", "kernels", "CPU"))


def test_the_variable_is_said_and_checked(call, monkeypatch):
    monkeypatch.setenv("SAFELORA_FAST_BACKEND", "reference")
    code, out, _ = call("env")
    assert code == 0
    assert rows(out)["linear_kl"] == "reference, by SAFELORA_FAST_BACKEND"
    monkeypatch.setenv("SAFELORA_FAST_BACKEND", "trition")
    code, out, err = call("env")
    assert (code, out) == (2, "")
    assert err == ("error: SAFELORA_FAST_BACKEND is 'trition'; it must be reference, triton or cuda, or unset\n")


def test_self_test(call):
    code, out, err = call("env", "--self-test")
    assert (code, err) == (0, "")
    table = out.partition("self-test:")[2].splitlines()[1:]
    assert len(table) >= 10
    for line in table:
        operation, _, _, _, error, tolerance, verdict = line.split()
        assert operation in OPERATIONS
        assert 0 <= float(error) <= float(tolerance)
        assert verdict == "ok"


def test_a_backend_that_is_wrong_fails_the_command(call, monkeypatch):
    check = self_test.Check("linear_kl", "eager", torch.device("cpu"), torch.float32, 0.5, 1e-6)
    broken = self_test.Check(
        "linear_kl", "triton", torch.device("cpu"), torch.float32, math.nan, 1e-6, "RuntimeError: no kernel"
    )
    monkeypatch.setattr(self_test, "run_checks", lambda: iter([check, broken]))
    code, out, _ = call("env", "--self-test")
    assert code == 1
    assert "5.0e-01  1e-06  FAILED\n" in out
    assert "nan  1e-06  FAILED RuntimeError: no kernel\n" in out


def test_bench_measures_ours_beside_its_peers(call, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", ((48, 32),))
    monkeypatch.setattr(bench, "RANKS", (3,))
    code, out, err = call("bench", "--threads", "1", "--csv", str(tmp_path / "table.csv"))
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].split()[:2] == ["48x32", "3"]
    with (tmp_path / "table.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["module"], row["rank"], row["threads"]) == ("48x32", "3", "1")
    assert all(
        float(row[name]) > 0 for name in ("ms", "share_of_read", "share_of_fma_peak", "times_numpy", "times_torch")
    )


def test_the_peers_of_bench_compute_the_same():
    pair = bench._random_pair(24, 40)
    lora_b = np.random.default_rng(1).standard_normal((24, 5), np.float32)
    aligned, base = (torch.from_numpy(weight).view(torch.bfloat16) for weight in pair)
    ours = subspace_projection(aligned, base, torch.from_numpy(lora_b))
    np.testing.assert_allclose(ours.numpy(), bench._by_numpy(pair, lora_b), rtol=1e-4, atol=1e-5)
