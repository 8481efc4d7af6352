"""safelora-fast env: what serves which operation, and the self-test."""

from __future__ import annotations

import math

import pytest
import torch

from safelora_fast.ops import self_test

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
