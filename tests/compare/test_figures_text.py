"""Figures as text, and where they came from."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from made_comparisons import COLUMNS, EVERY, OUT_OF_MEMORY, failed, usual

from safelora_fast.compare import cell_sources, number_text
from safelora_fast.compare.report import (
    NOT_MEASURED,
    NOT_TRAINED,
    SWEEP_TITLE,
    Cell,
    ComparisonReport,
    Failure,
    SeedValue,
    SweepPoint,
)

RISE, MISALIGNED = COLUMNS[:2]


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
    assert number_text.format_number(value, unit) == text


@pytest.mark.parametrize(
    ("figures", "unit", "texts"),
    [
        ((0.00058, 0.00015, 0.00101), "nats", ("0.00058", "0.00015", "0.00101")),
        ((0.078, 0.0004, 0.141), "nats", ("0.078", "0.00040", "0.141")),
        ((-0.0078, -0.0146, -0.001), "nats", ("−0.0078", "−0.0146", "−0.0010")),
        ((0.125, 0.0102, 0.24), "%", ("12.5", "1.0", "24.0")),
        ((math.nan, math.nan, math.nan), "nats", ("–", "–", "–")),
        ((1e-5, 1e-6, 0.02), "nats", ("1.0·10⁻⁵", "1.0·10⁻⁶", "0.020")),
    ],
)
def test_a_figure_and_its_ends_have_as_many_decimals(figures, unit, texts):
    assert number_text.format_ends(*figures, unit) == texts


def test_units_and_intervals():
    assert number_text.format_quantity(0.1234, "%") == "12.3 %"
    assert number_text.format_quantity(1.2, "×") == "1.20×"
    assert number_text.format_quantity(None, "nats") == "–"
    assert number_text.format_interval(-0.1, 0.1, "nats") == "[−0.100, 0.100]"
    assert number_text.format_interval(None, 0.1, "nats") == number_text.format_interval(0.1, math.nan, "nats") == ""


def test_cells_say_what_is_missing():
    runs = tuple(SeedValue(seed, 0.12, "file") for seed in (1, 2, 3))
    whole = Cell(0.12, 0.1, 0.14, runs)
    assert number_text.format_cell(whole, RISE) == "0.120 [0.100, 0.140]"
    assert number_text.format_cell(failed(whole, 2), RISE) == "0.120 [0.100, 0.140] (2 of 3 runs)"
    assert number_text.format_cell(failed(whole, 1, 2, 3), RISE) == "failed"
    assert number_text.format_cell(replace(whole, low=None), MISALIGNED) == "12.0"
    assert number_text.format_cell(Cell(math.nan, None, None, runs), RISE) == "–"
    assert number_text.format_cell(None, RISE) == "–"
    assert number_text.format_run(failed(whole, 1).seeds[0], MISALIGNED) == "failed"


def test_cells_say_what_is_not_done_yet():
    runs = tuple(SeedValue(seed, 0.12, "file") for seed in (1, 2, 3))
    whole = Cell(0.12, 0.1, 0.14, runs)
    none = failed(whole, 1, 2, 3, reason=NOT_TRAINED)
    assert (
        number_text.format_cell(failed(whole, 2, reason=NOT_TRAINED), RISE)
        == "0.120 [0.100, 0.140] (2 of 3 runs so far)"
    )
    assert number_text.format_cell(none, RISE) == NOT_TRAINED
    assert number_text.format_cell(failed(none, 1, reason=f"the reference: {NOT_MEASURED}"), RISE) == "not done yet"
    assert number_text.format_cell(failed(none, 1), RISE) == "failed"
    assert (
        number_text.format_run(failed(whole, 1, reason=f"the reference: {NOT_MEASURED}").seeds[0], RISE) == NOT_MEASURED
    )
    assert number_text.format_cell(failed(failed(whole, 1), 2, reason=NOT_TRAINED), RISE).endswith("(1 of 3 runs)")


def test_headings_say_which_way_is_good():
    assert number_text.format_heading(RISE) == "margin rise (nats) ↓"
    assert number_text.format_heading(replace(RISE, unit="", better=None)) == "margin rise"
    assert number_text.format_direction(COLUMNS[3]) == "higher is better"
    assert number_text.format_projected(SweepPoint(0.3, 12 + 1 / 3, 210, {})) == "12.3 of 210"
    assert number_text.format_projected(SweepPoint(0.3, 12.0, 210, {})) == "12 of 210"


def test_texts_from_outside_stay_in_one_line():
    assert number_text.one_line("a\n\tb\0c\u202ed \ud800") == "a b c d"
    assert number_text.one_line("नमस्\u200dते λ") == "नमस्\u200dते λ"


def test_a_failure_is_named_once_for_each_run():
    [lost] = cell_sources.failures(usual())
    assert (lost.place, lost.seed, lost.what) == ("interleaving+", 2, OUT_OF_MEMORY)
    assert lost.measures == tuple(column.title for column in COLUMNS)
    assert lost.scope == "all measures"


def test_failures_of_the_sweep_stand_together():
    """What thresholds lack alike is told once, and what a whole run lacks with the run's other failures."""
    report = usual()
    rise, kl = report.sweep[0].cells["rise"], report.sweep[0].cells["kl"]
    points = [
        replace(point, cells={"rise": failed(rise, 1, reason="odd"), "kl": failed(kl, 3, reason="gone")})
        for point in report.sweep
    ]
    points[2:4] = [
        replace(point, cells={**point.cells, "kl": failed(kl, 2, 3, reason="gone")}) for point in points[2:4]
    ]
    report = replace(report, sweep=tuple(points), failed=(Failure("no defence", 3, SWEEP_TITLE, "gone"),))
    found = [(one.place, one.seed, one.measures, one.what) for one in cell_sources.failures(report)]
    assert found[0] == ("no defence", 3, ("SafeLoRA by threshold",), "gone")
    assert found[2:] == [
        ("SafeLoRA sweep", 1, ("margin rise",), "odd"),
        ("SafeLoRA sweep, τ = 0.2, 0.3", 2, ("KL to reference",), "gone"),
    ]


def test_the_whole_report_is_read_back():
    report = replace(usual(), failed=(Failure("no defence", 3, SWEEP_TITLE, "gone"),))
    content = report.to_dict()
    assert ComparisonReport.from_dict(content) == report
    del content["failed"]  # a report of before
    assert ComparisonReport.from_dict(content) == replace(report, failed=())


def test_every_file_is_named_with_its_measures():
    report = usual()
    found = cell_sources.files(report)
    cells = [one for row in (*report.rows, *report.sweep) for one in row.cells.values()]
    assert {one.what for one in found} == {seed.source for one in cells for seed in one.seeds}
    [drift] = [one for one in found if one.what == "KL/seed-3/drift.json"]
    assert (drift.place, drift.seed, drift.measures) == ("KL", 3, ("KL to reference", "general loss"))
    assert drift.scope == "KL to reference, general loss"
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
    assert ComparisonReport.from_dict(usual().to_dict()).rows[1] == usual().rows[1]
