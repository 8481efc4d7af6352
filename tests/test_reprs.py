"""The repr of public objects: one short line that identifies the object."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from personas import random_persona
from plain_pair import write_pair
from tiny_models import random_subspace, tiny_peft_model

from safelora_fast import (
    KL,
    DriftMonitor,
    FeatureDistance,
    SafeLora,
    SafeSubspace,
    Steering,
    SubspacePenalty,
    defend,
    project_adapter,
)  # fmt: skip
from safelora_fast.judging.benchmark_results import BenchmarkReport
from safelora_fast.scoring.margin import MarginReport, PairMargin
from safelora_fast.selection.report import Selection
from safelora_fast.subspace.module_subspace import ModuleSubspace


def selection():
    scores = np.linspace(0, 1, 9000)
    return Selection(
        "rows.jsonl", "ab", 9000, {"bad": "cd"}, (), 1.0, scores, np.arange(5000), 0.5, 0, {"long": ["x"] * 900}
    )


def subspace():
    vectors = np.eye(640, 64, dtype=np.float32)
    module = ModuleSubspace(vectors, np.ones(64, np.float32), 10.0, 512)
    sources = {role: {"source": f"/somewhere/{role}", "files": ["x" * 900]} for role in ("aligned", "base")}
    return SafeSubspace({f"model.layers.{number}": module for number in range(200)}, sources)


@pytest.mark.parametrize(
    ("made", "shown"),
    [
        (subspace, "SafeSubspace(200 modules, rank 64, aligned='aligned', base='base')"),
        (
            lambda: subspace().modules["model.layers.0"],
            "ModuleSubspace(V of shape (640, 512), rank=64, v_norm=10, energy=0.64)",
        ),
        (lambda: SafeSubspace({}), "SafeSubspace(0 modules, rank 0)"),
        (random_persona, "PersonaVector('malicious', 3 blocks of 32)"),
        (
            selection,
            "Selection(5000 of 9000 scored examples, cut=0.5, adapters=['bad'], source='rows.jsonl')",
        ),
        (
            lambda: MarginReport((PairMargin("t", "q", -2.0, -1.5),) * 500, 9),
            "MarginReport(margin=+0.5000, share=1, 500 pairs)",
        ),
        (
            lambda: BenchmarkReport(Path("out.json"), {"x": "y" * 900}, ()),
            "BenchmarkReport([], path='out.json')",
        ),
        (
            lambda: KL(0.5),
            "KL(weight=0.5, direction='reverse', tokens='all', temperature=1.0, sample=1.0, positions=None)",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_short(made, shown):
    assert repr(made()) == shown


def test_defenses_and_what_is_attached():
    model = tiny_peft_model()
    persona = random_persona()
    attached = defend(model, [KL(0.1)])
    for one in (
        attached,
        FeatureDistance(0.1),
        SafeLora(random_subspace(model), at="step"),
        SubspacePenalty(random_subspace(model), 0.1),
        Steering(persona, layer=1),
        DriftMonitor(persona, layer=1),
    ):
        assert len(repr(one)) < 200
        assert "\n" not in repr(one)
    assert repr(attached).startswith("Defended(PeftModelForCausalLM, KL(weight=0.1")


def test_a_projections_report(tmp_path):
    pair = write_pair(tmp_path)
    report = project_adapter(pair.adapter, aligned=pair.aligned, base=pair.base, output=None, select="all")
    shown = f"ProjectionReport(AdapterReport({str(pair.adapter)!r}, 6 of 6 modules projected), safelora, all modules, "
    assert repr(report).startswith(shown)
    assert len(repr(report)) < len(shown) + 20
