"""Tests of the report's numbers and sentences, and of the runs and files that its values came from."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
from made_comparisons import COLUMNS, EVERY, OUT_OF_MEMORY, failed, usual

from safelora_fast.compare import cell_sources
from safelora_fast.compare.measures.tasks import task_metric
from safelora_fast.compare.report import (
    NOT_MEASURED,
    NOT_TRAINED,
    SWEEP_TITLE,
    Cell,
    Column,
    ComparisonReport,
    Failure,
    SeedValue,
    SweepPoint,
)
from safelora_fast.compare.report_texts import conclusions, facts_of
from safelora_fast.compare.statistics import Summary, pool, shares
from safelora_fast.compare.words import format_ends, format_interval, format_number, format_quantity, words

RISE, MISALIGNED = COLUMNS[:2]
WHOLE = Cell(0.12, 0.1, 0.14, tuple(SeedValue(seed, 0.12, "file") for seed in (1, 2, 3)))


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.1234, "%", "12.3"),
        (-0.0314, "nats", "−0.031"),
        (0.0, "nats", "0.000"),
        (-0.0, "nats", "0.000"),
        (0.00043, "nats", "0.00043"),
        (0.00012, "%", "0.012"),
        (-0.0000123, "nats", "−1.2·10⁻⁵"),
        (2.5e8, "GB", "2.5·10⁸"),
        (1.315, "×", "1.31"),
        (17.0, "", "17"),
        (0.5, "", "0.500"),
        (None, "%", "–"),
        (math.nan, "%", "–"),
        (math.inf, "nats", "–"),
    ],
)
def test_numbers(value, unit, text):
    assert format_number(value, unit) == text


@pytest.mark.parametrize(
    ("values", "unit", "texts"),
    [
        ((0.00058, 0.00015, 0.00101), "nats", ("0.00058", "0.00015", "0.00101")),
        ((0.078, 0.0004, 0.141), "nats", ("0.078", "0.00040", "0.141")),
        ((-0.0078, -0.0146, -0.001), "nats", ("−0.0078", "−0.0146", "−0.0010")),
        ((0.125, 0.0102, 0.24), "%", ("12.5", "1.0", "24.0")),
        ((math.nan, math.nan, math.nan), "nats", ("–", "–", "–")),
        ((1e-5, 1e-6, 0.02), "nats", ("1.0·10⁻⁵", "1.0·10⁻⁶", "0.020")),
    ],
)
def test_a_value_and_its_ends_have_as_many_decimals(values, unit, texts):
    assert format_ends(*values, unit) == texts


def test_units_and_intervals():
    assert [format_quantity(*one) for one in ((0.1234, "%"), (1.2, "×"), (None, "nats"))] == ["12.3 %", "1.20×", "–"]
    assert format_interval(-0.1, 0.1, "nats") == "[−0.100, 0.100]"
    assert format_interval(None, 0.1, "nats") == format_interval(0.1, math.nan, "nats") == ""


@pytest.mark.parametrize(
    ("cell", "column", "text"),
    [
        (WHOLE, RISE, "0.120 [0.100, 0.140]"),
        (failed(WHOLE, 2), RISE, "0.120 [0.100, 0.140] (2 of 3 runs)"),
        (failed(WHOLE, 2, reason=NOT_TRAINED), RISE, "0.120 [0.100, 0.140] (2 of 3 runs so far)"),
        (failed(failed(WHOLE, 1), 2, reason=NOT_TRAINED), RISE, "0.120 [0.100, 0.140] (1 of 3 runs)"),
        (failed(WHOLE, 1, 2, 3), RISE, "failed"),
        (failed(WHOLE, 1, 2, 3, reason=NOT_TRAINED), RISE, NOT_TRAINED),
        (failed(failed(WHOLE, 2, 3, reason=NOT_TRAINED), 1, reason=f"the reference: {NOT_MEASURED}"), RISE, "not done yet"),
        (failed(failed(WHOLE, 2, 3, reason=NOT_TRAINED), 1), RISE, "failed"),
        (replace(WHOLE, low=None), MISALIGNED, "12.0"),
        (replace(WHOLE, value=math.nan, low=None), RISE, "–"),
        (None, RISE, "–"),
    ],
)  # fmt: skip
def test_a_cell_in_one_line(cell, column, text):
    assert words().cell(cell, column) == text


def test_headings_and_counts():
    assert words().heading(RISE) == "margin rise (nats) ↓"
    assert words().heading(replace(RISE, unit="", better=None)) == "margin rise"
    assert words().projected(SweepPoint(0.3, 12 + 1 / 3, 210, {})) == "12.3 of 210"
    assert words().projected(SweepPoint(0.3, 12.0, 210, {})) == "12 of 210"
    assert words().run(failed(WHOLE, 1, reason=f"the reference: {NOT_MEASURED}").seeds[0], RISE) == NOT_MEASURED


def test_a_failure_is_named_once_for_each_run():
    [lost] = cell_sources.failures(usual())
    assert (lost.place, lost.seed, lost.what, lost.scope) == ("interleaving+", 2, OUT_OF_MEMORY, "all measures")
    assert lost.measures == tuple(column.title for column in COLUMNS)


def test_failures_of_the_sweep_stand_together():
    """A failure shared by thresholds is listed once; a failure of a whole run is listed with the run's others."""
    report = usual()
    rise, kl = report.sweep[0].cells["rise"], report.sweep[0].cells["kl"]
    points = [
        replace(point, cells={"rise": failed(rise, 1, reason="odd"), "kl": failed(kl, 3, reason="gone")})
        for point in report.sweep
    ]
    points[2:4] = [
        replace(point, cells={**point.cells, "kl": failed(kl, 2, 3, reason="gone")}) for point in points[2:4]
    ]
    report = replace(report, sweep=tuple(points), failed=(Failure("no defense", 3, SWEEP_TITLE, "gone"),))
    found = [(one.place, one.seed, one.measures, one.what) for one in cell_sources.failures(report)]
    assert found[0] == ("no defense", 3, ("SafeLoRA by threshold",), "gone")
    assert found[2:] == [
        ("SafeLoRA sweep", 1, ("margin rise",), "odd"),
        ("SafeLoRA sweep, τ = 0.2, 0.3", 2, ("KL to reference",), "gone"),
    ]


def test_every_file_is_named_with_its_measures():
    report = usual()
    found = cell_sources.files(report)
    cells = [one for row in (*report.rows, *report.sweep) for one in row.cells.values()]
    assert {one.what for one in found} == {seed.source for one in cells for seed in one.seeds}
    [drift] = [one for one in found if one.what == "KL/seed-3/drift.json"]
    assert (drift.place, drift.seed, drift.scope) == ("KL", 3, "KL to reference, general loss")
    assert [one.place for one in found].count("SafeLoRA sweep") == 9, (
        "three files of three seeds, whatever the threshold"
    )


@pytest.mark.parametrize(
    ("source", "address"),
    [
        ("kl/seed-1/margin.json", "./kl/seed-1/margin.json"),
        ("../runs/a b (1)|.json", "../runs/a%20b%20%281%29%7C.json"),
        ("javascript:alert(1)", "./javascript%3Aalert%281%29"),
        ("//elsewhere.example/x", "./elsewhere.example/x"),
        ("/runs/x.json", "/runs/x.json"),
        ("..\\x\udcff", "./..%5Cx%FF"),
    ],
)
def test_addresses_stay_on_this_machine(source, address):
    assert cell_sources.link(source) == address


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_a_report_survives_its_file(make):
    content = make().to_dict()
    assert ComparisonReport.from_dict(content).to_dict() == content


def test_the_whole_report_is_read_back():
    report = replace(usual(), failed=(Failure("no defense", 3, SWEEP_TITLE, "gone"),))
    content = report.to_dict()
    assert ComparisonReport.from_dict(content) == report
    del content["failed"]  # a report of an older version
    assert ComparisonReport.from_dict(content) == replace(report, failed=())


def test_no_path_of_the_machine_is_published():
    measure = SimpleNamespace(operator_swap=None, judge=None, sweep=SimpleNamespace(base="some-org/base"))
    bench = SimpleNamespace(
        config=SimpleNamespace(recipe={"data": {"path": "/home/somebody/rows.jsonl"}}, seeds=(0, 1), measure=measure),
        settings=SimpleNamespace(model="/home/somebody/models/tiny", dtype="float32", device="cpu"),
        row_sources={"narrow": "/home/somebody/narrow.jsonl"},
    )
    facts = facts_of(bench, [], {"narrow": 3})
    assert (facts["model"], facts["task"], facts["SafeLoRA's base"]) == ("tiny", "rows.jsonl", "some-org/base")
    assert facts["narrow rows"] == "3 of narrow.jsonl"
    assert not any("/home" in text for text in facts.values())


@pytest.mark.parametrize(("count", "expected"), [(2, "0.1"), (6, "0.3"), (40, "2")])
def test_so_many_comparisons_look_clear_by_chance(count, expected):
    said = words().by_chance(count)
    assert f"These are {count} comparisons at 95 %, of which {expected} would look clear by chance alone" in said


def said_of(first, **others):
    """Return the conclusions on other runs compared with a first one; results are given by column and seed."""
    keys = dict.fromkeys(key for outcomes in (first, *others.values()) for key in outcomes)
    titles = {"misaligned": ("misaligned answers", "%"), "rise": ("rise", "nats")}
    columns = [Column(key, "aligned", *titles.get(key, (key, "")), "lower", "") for key in keys]  # type: ignore[arg-type]
    return conclusions(columns, {"none": first, **others}, seeds=3)


def test_conclusions_count_answers_that_were_scored():
    def answers(hits, skip=0):
        items = [(str(question), place < count) for question, count in enumerate(hits) for place in range(10)][skip:]
        return shares([hit for _, hit in items], [question for question, _ in items])

    first, own = answers([5, 6, 4, 7, 5, 3, 6, 5]), answers([1, 2, 0, 2, 1, 0, 3, 1], skip=1)
    said = said_of({"misaligned": {0: first}}, KL={"misaligned": {0: own}})
    assert said[0].startswith("KL compared with none: misaligned answers lower by 39")


def test_conclusions_name_the_seeds_that_both_have_and_what_has_none():
    """The table's means are over other seeds, so a sentence that does not name its seeds would contradict them."""
    high, low, half = Summary(2.0, 0.1, 50), Summary(1.0, 0.1, 50), Summary(0.5, 0.1, 50)
    first = {"rise": {0: high, 1: high}, "misaligned": {0: half}}
    own = {"rise": {0: low, 2: high}, "misaligned": {1: half}}
    kl, apart = said_of(
        first, KL=own, waiting={"rise": {}, "misaligned": {}}, apart={"rise": {2: high}, "misaligned": {}}
    )
    assert kl.startswith("KL compared with none: rise lower by 1.000 nats a token (0.7")
    assert kl.endswith("; seed 0 only); no seed has both values of misaligned answers.")
    assert apart == "apart compared with none: no seed has values of both."
    kl, *_ = said_of(first, KL={**own, "rise": {0: high, 1: high, 2: high}})
    assert "no clear difference in rise (seeds 0, 1 only)" in kl


def test_nothing_is_said_of_a_difference_whose_error_is_unknown():
    def said(error):
        first = {"known": {0: Summary(9.0, 0.1, 50)}, "odd": {0: Summary(9.0, error, 50)}}
        return said_of(first, KL={"known": {0: Summary(5.0, 0.1, 50)}, "odd": {0: Summary(5.0, 0.1, 50)}})[0]

    assert "known lower by 4 (" in said(0.1)
    assert "odd lower by 4 (" in said(0.1)
    unknown = said(math.nan)
    assert "known lower by 4 (" in unknown
    assert "nothing can be said of odd, whose error is not known" in unknown
    assert "odd lower" not in unknown
    assert "no clear difference" not in unknown


def benchmark(value, stderr=0.01, *, better=True):
    """Return the first metric of a benchmark."""
    return {"name": "acc", "filter": "none", "value": value, "stderr": stderr, "count": 100, "higher_is_better": better}


def pooled_task(*metrics):
    one = task_metric("quiz", metrics)
    outcomes = [one.read({"tasks": {"quiz": {"task": "quiz", "metrics": [metric]}}}, {}) for metric in metrics]
    return pool(outcomes, share=one.column.unit == "%")


@pytest.mark.parametrize("stderr", [None, math.nan])
@pytest.mark.parametrize(("value", "better"), [(0.7, True), (1.0, True), (12.5, False)])
def test_a_benchmark_whose_error_is_unknown_has_no_interval(value, better, stderr):
    metric = benchmark(value, stderr, better=better)
    assert (pooled_task(metric).value, *pooled_task(metric).interval.to_list()) == (value, None, None)
    assert pooled_task(metric, metric).interval.to_list() == [None, None]


def test_a_benchmark_whose_error_is_known_has_an_interval():
    pooled = pooled_task(benchmark(0.7, 0.05))
    assert 0.5 < pooled.interval.low < 0.65 < pooled.value < pooled.interval.high < 0.8


@pytest.mark.parametrize(
    ("values", "better", "unit"),
    [
        ([0.4, 0.6], True, "%"),
        ([0.0, 1.0], True, "%"),
        ([0.4, 3.5], True, ""),
        ([3.5, 0.4], True, ""),
        ([0.4, 0.6], False, ""),
        ([0.4, 0.6], None, ""),
        ([-0.2, 0.6], True, ""),
        ([0.4, None], True, "%"),
        ([None, None], True, ""),
    ],
)
def test_a_benchmark_is_a_share_if_it_is_one_in_every_run(values, better, unit):
    assert task_metric("quiz", [benchmark(value, better=better) for value in values]).column.unit == unit
