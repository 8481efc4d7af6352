"""Warnings about what vLLM and SGLang refuse of an adapter, or compute differently."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from plain_pair import write_adapter, write_pair

from safelora_fast import project_adapter
from safelora_fast.projection.serving_limits import serving_notes

BESIDE = {"tensor": "base_model.model.lm_head.weight", "reason": "trained in full", "norm": 1.0}


def notes(copied=(), ranks=(8, 8), **config):
    modules = [SimpleNamespace(rank=rank, kind="linear") for rank in ranks]
    config = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], **config}
    return serving_notes(SimpleNamespace(modules=modules, config=config), copied)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, []),
        ({"ranks": (16,), "r": 16}, []),
        ({"ranks": (17,), "r": 17}, ["vLLM serves rank 17 with --max-lora-rank 32 only"]),
        ({"ranks": (513,), "r": 513}, ["vLLM does not serve rank 513, only up to 512"]),
        ({"target_modules": "all-linear"}, []),
        ({"target_modules": ".*q_proj"}, ["SGLang needs --lora-target-modules, since target_modules is a pattern"]),
        ({"use_rslora": True}, ["SGLang scales by lora_alpha/r, though this adapter is rank-stabilized: its answers would be "
                                "others"]),
        ({"ranks": (8, 4)}, ["SGLang scales every module by lora_alpha/r, though rank_pattern or alpha_pattern differ: its answers "
                             "would be others"]),
        ({"copied": [BESIDE]}, [f"{server} refuses or ignores what was trained beside the LoRA factors ({BESIDE['tensor']})"
                                for server in ("vLLM", "SGLang")]),
    ],
)  # fmt: skip
def test_each_limit_is_one_note(given, expected):
    assert notes(**given) == expected


def test_a_projection_warns(tmp_path):
    pair = write_pair(tmp_path / "pair")
    adapter = write_adapter(tmp_path / "adapter", 4, rank=20)
    report = project_adapter(adapter, aligned=pair.aligned, base=pair.base, output=None)
    assert sum("vLLM serves rank 20 with --max-lora-rank 32 only" in warning for warning in report.warnings) == 1
