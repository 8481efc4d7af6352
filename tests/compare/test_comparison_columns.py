"""From the files of measurements to figures: benchmarks whose errors, values or metrics are odd, and what is not finite."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from safelora_fast.compare.cells import cell_of
from safelora_fast.compare.columns import task_columns
from safelora_fast.compare.conclusions import read_figures
from safelora_fast.compare.pooling import Summary, pool
from safelora_fast.compare.report import Column

CONFIG = SimpleNamespace(runs=[SimpleNamespace(name="none"), SimpleNamespace(name="KL")], seeds=(0,))


def benchmark(value, stderr=0.01, *, count=100, better=True):
    """A file of one benchmark."""
    metric = {
        "name": "acc",
        "filter": "none",
        "value": value,
        "stderr": stderr,
        "count": count,
        "higher_is_better": better,
    }
    return {"tasks": {"quiz": {"task": "quiz", "metrics": [metric]}}}


def read(*contents):
    """The column of the benchmark, and what each content came to."""
    [one] = task_columns(contents)
    return one, [one.sample(content, {}) for content in contents]


@pytest.mark.parametrize("stderr", [None, math.nan])
@pytest.mark.parametrize("value", [0.7, 1.0])
def test_an_unknown_error_gives_a_figure_without_an_interval(value, stderr):
    one, samples = read(benchmark(value, stderr))
    cell = cell_of(one.column, samples, [])
    assert (cell.value, cell.low, cell.high) == (value, None, None)
    assert cell_of(one.column, [*samples, *samples], []).low is None
    perplexity, samples = read(benchmark(12.5, stderr, better=False))
    cell = cell_of(perplexity.column, samples, [])
    assert (cell.value, cell.low, cell.high) == (12.5, None, None)


def test_a_known_error_gives_an_interval():
    one, samples = read(benchmark(0.7, 0.05))
    cell = cell_of(one.column, samples, [])
    assert 0.5 < cell.low < 0.65 < cell.value < cell.high < 0.8


def test_nothing_is_said_of_a_difference_whose_error_is_unknown():
    known, unknown = (
        Column("known", "benign", "known", "", "lower", ""),
        Column("odd", "benign", "odd", "", "lower", ""),
    )

    def reading(error):
        samples = {
            "none": {"known": {0: Summary(9.0, 0.1, 50)}, "odd": {0: Summary(9.0, error, 50)}},
            "KL": {"known": {0: Summary(5.0, 0.1, 50)}, "odd": {0: Summary(5.0, 0.1, 50)}},
        }
        return read_figures(CONFIG, [known, unknown], samples)[0]

    assert "known lower by 4 (" in reading(0.1)
    assert "odd lower by 4 (" in reading(0.1)
    said = reading(math.nan)
    assert "known lower by 4 (" in said
    assert "nothing can be said of odd, whose error is not known" in said
    assert "odd lower" not in said
    assert "no clear difference" not in said


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
def test_a_share_is_one_in_every_run(values, better, unit):
    one, _ = read(*(benchmark(value, better=better) for value in values))
    assert one.column.unit == unit


def test_a_pool_of_unknown_errors_knows_the_mean():
    pooled = pool([Summary(0.2, math.nan, 10), Summary(0.4, 0.1, 10)])
    assert pooled.value == pytest.approx(0.3)
    assert pooled.interval.to_list() == [None, None]
