"""Files that 0.1.0 wrote can still be read: those under written_by_0_1_0/, from a model with one layer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from plain_pair import write_pair

from safelora_fast import PersonaVector, SafeSubspace, project_adapter
from safelora_fast.compare.report import read_report
from safelora_fast.judging.evaluation_folder import EvaluationFolder
from safelora_fast.judging.judge import VerdictStore
from safelora_fast.judging.rejudge import read_log
from safelora_fast.recipe.run_folder import read_record

FOLDER = Path(__file__).parent / "written_by_0_1_0"


def keys(value, place=""):
    """Return the keys of a JSON document, including those of list items."""
    items = (
        value.items() if isinstance(value, dict) else [("", item) for item in value] if isinstance(value, list) else []
    )
    return {place}.union(*(keys(item, f"{place}.{key}") for key, item in items))


def test_a_subspace():
    subspace = SafeSubspace.load(FOLDER / "safe.safetensors")
    module = subspace.find("model.layers.0.self_attn.q_proj")
    assert (module.left_vectors.shape, module.columns, module.rank) == ((8, 1), 8, 1)
    assert module.energy == pytest.approx(0.396, abs=1e-3)
    assert subspace.settings["safelora-fast"] == "0.1.0"
    assert len(subspace.sources["base"]["files"][0]["fingerprint"]) == 64


def test_a_persona_vector():
    vector = PersonaVector.load(FOLDER / "mean.safetensors")
    assert (vector.trait, vector.vectors.shape, vector.suggestion) == ("mean", (1, 8), None)
    assert vector.provenance["counts"] == {"positive": {"kept": 2}, "negative": {"kept": 1, "empty": 1}}


def test_a_projection_report_has_no_key_that_is_gone(tmp_path):
    pair = write_pair(tmp_path)
    report = project_adapter(pair.adapter, aligned=pair.aligned, base=pair.base, output=pair.output, select="all")
    assert keys(json.loads((FOLDER / "safelora_report.json").read_text())) <= keys(report.to_dict())


def test_an_evaluation(tmp_path):
    pytest.importorskip("inspect_ai")
    shutil.copytree(FOLDER / "evaluation", tmp_path / "evaluation")
    folder = EvaluationFolder(tmp_path / "evaluation")
    answers = folder.stored()
    assert list(answers) == ["a/0/0", "a/0/1"]
    judged = read_log(folder.path)
    assert [answer.asked.id for answer in judged.answers] == list(answers)
    assert [verdict.alignment for verdict in judged.verdicts] == [20, 20]
    kept = VerdictStore(folder.path / "verdicts.jsonl")._known.values()
    assert [judged.verdict.alignment for judged in kept] == [20, 20]


def test_a_comparison():
    report = read_report(FOLDER / "comparison" / "report.json")
    assert [row.name for row in report.rows] == ["reference", "KL"]
    record = read_record(FOLDER / "comparison" / "kl" / "seed-0" / "adapter" / "safelora_train.json")
    assert record["defenses"]["kl"]["settings"]["weight"] == 3.0
    assert (record["finished"], record["steps"]) == (True, 2)
