"""Tests of diverged runs and of null values in files: failed cells with a reason in an otherwise complete report."""

from __future__ import annotations

import json
import math
import shutil

import pytest
from safetensors.torch import load_file, save_file

from safelora_fast.compare.measures.base import NOT_FINITE, not_finite


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def reasons(cell):
    return [seed["failure"] for seed in cell["seeds"]]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a": [1.0, None, "nan", True]}, None),
        ({"general": [{"loss": 1.0}, {"loss": math.nan}]}, f"{NOT_FINITE}: general[1].loss is nan"),
        ({"margin": -math.inf}, f"{NOT_FINITE}: margin is -inf"),
    ],
)
def test_what_is_not_finite_is_said_with_its_place(content, words):
    assert not_finite(content) == words


def test_a_run_that_diverged_is_failed_cells_and_no_traceback(copied, call):
    """NaN weights in a defense, and overflowing weights in the undefended run, which has curves."""
    for run, factor in (("none", 1e30), ("kl", math.nan)):
        file = copied.output / run / "seed-1" / "adapter" / "adapter_model.safetensors"
        save_file({name: factor * value for name, value in load_file(file).items()}, file)
    result = call(*copied.words())
    assert result.code == 1
    assert f"KL, seed 1, margin: failed: {NOT_FINITE}: " in " ".join(result.err.split())
    for run in ("none", "KL"):
        cells = copied.cells(run)
        for key in ("margin_rise", "learned", "learned_share", "divergence", "general_loss"):
            first, second = reasons(cells[key])
            assert first is None
            assert second.startswith(f"{NOT_FINITE}: ")
            assert cells[key]["value"] == cells[key]["seeds"][0]["value"]
    report = copied.report()
    assert report["complete"] is False
    low, _ = report["sweep"]
    assert reasons(low["cells"]["learned"])[0] is None
    assert reasons(low["cells"]["learned"])[1].startswith(f"{NOT_FINITE}: ")
    assert all(math.isfinite(x) and math.isfinite(y) for x, y, _ in report["plot"]["path"])
    assert {(one["row"], one["seed"], one["what"]) for one in report["failed"]} >= {("none", 1, "update scaled down")}
    lines = [line for line in result.err.splitlines() if line.startswith("warning: SafeLoRA sweep, seed 1, ")]
    assert len(lines) == 2, "margin and drift, not again at each threshold"


@pytest.mark.parametrize(
    ("file", "path", "keys"),
    [
        ("kl/seed-1/margin.json", ("pairs", 3, "margin"), {"margin_rise"}),
        ("kl/seed-1/drift.json", ("narrow", 2, "loss"), {"learned", "learned_share"}),
        ("kl/seed-1/drift.json", ("general", 0, "divergence"), {"divergence"}),
        ("kl/seed-1/drift.json", ("general", 0, "loss"), {"general_loss"}),
    ],
)
def test_a_null_of_a_former_version_is_one_failed_cell(copied, call, file, path, keys):
    before = copied.cells("KL")
    edit(copied.output / file, lambda content: content[path[0]][path[1]].update({path[2]: None}))
    assert call(*copied.words("--report-only", "-q")).code == 1
    cells = copied.cells("KL")
    assert {key for key, cell in cells.items() if any(reasons(cell))} == keys
    for key in keys:
        assert reasons(cells[key]) == [None, NOT_FINITE]
        assert cells[key]["value"] == before[key]["seeds"][0]["value"]
    assert NOT_FINITE in (copied.output / "report.html").read_text()


def test_a_null_of_the_reference_is_said_to_be_the_references(copied, call):
    edit(copied.output / "reference" / "drift.json", lambda content: content["narrow"][0].update(loss=None))
    assert call(*copied.words("--report-only", "-q")).code == 1
    for run in ("none", "KL"):
        assert reasons(copied.cells(run)["learned"]) == [f"the reference: {NOT_FINITE}"] * 2
        assert reasons(copied.cells(run)["divergence"]) == [None, None]


def test_a_share_of_a_run_that_is_not_there_says_so(copied, call):
    """Otherwise the share would look like a mean over all seeds."""
    edit(copied.output / "none" / "seed-0" / "drift.json", lambda content: content["narrow"][0].update(loss=None))
    assert call(*copied.words("--report-only", "-q")).code == 1
    cells = copied.cells("KL")
    assert reasons(cells["learned"]) == [None, None]
    assert reasons(cells["learned_share"]) == [f"none: {NOT_FINITE}", None]
    assert cells["learned_share"]["value"] == cells["learned_share"]["seeds"][1]["value"]


def test_nulls_in_the_curves_leave_the_rest_of_them(copied, call):
    before = copied.report()
    edit(
        copied.output / "none" / "seed-0" / "sweep.json",
        lambda content: content["points"][0]["drift"]["narrow"][0].update(loss=None),
    )
    edit(
        copied.output / "none" / "seed-0" / "scaled.json",
        lambda content: content["shares"]["0.5"]["general"][0].update(divergence=None),
    )
    assert call(*copied.words("--report-only", "-q")).code == 1
    report = copied.report()
    low, high = report["sweep"]
    assert reasons(low["cells"]["learned"]) == [NOT_FINITE, None]
    assert reasons(low["cells"]["divergence"]) == [None, None]
    assert high == before["sweep"][1]
    start, half, end = report["plot"]["path"]
    assert (start, end) == (before["plot"]["path"][0], before["plot"]["path"][2])
    assert half[1] is None


@pytest.mark.parametrize("measure", ["scaled", "sweep"])
def test_curves_that_are_missing_are_told_and_make_the_report_incomplete(copied, call, measure):
    title = {"scaled": "update scaled down", "sweep": "SafeLoRA by threshold"}[measure]
    (copied.output / "none" / "seed-1" / f"{measure}.json").unlink()
    result = call(*copied.words("--report-only"))
    assert result.code == 1
    assert f"none, seed 1, {title}: not measured yet" in result.err
    assert result.err.count("not measured yet") == 1
    assert copied.report()["complete"] is False
    assert f"- none, seed 1: not measured yet ({title})" in (copied.output / "report.md").read_text()
    if measure == "sweep":
        for point in copied.report()["sweep"]:
            assert reasons(point["cells"]["learned"]) == [None, "not measured yet"]
            assert point["cells"]["learned"]["value"] == point["cells"]["learned"]["seeds"][0]["value"]
    (copied.output / "none" / "seed-0" / f"{measure}.json").unlink()
    result = call(*copied.words("--report-only"))
    assert result.code == 1
    assert f"none, seed 0, {title}: not measured yet" in result.err


def test_a_run_that_is_not_trained_is_told_once(copied, call):
    shutil.rmtree(copied.output / "none" / "seed-1")
    result = call(*copied.words("--report-only"))
    assert result.code == 1
    assert [line for line in result.err.splitlines() if line.startswith("none, seed 1")] == [
        "none, seed 1, all measures: not trained yet"
    ]
