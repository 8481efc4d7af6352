"""Means over seeds: against formulas written out, and against what chance does when it is known."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from safelora_fast.compare.pooling import Sample, pool, shares
from safelora_fast.scoring.intervals import student_quantile, wilson


def plain(values, clusters=None):
    names = clusters or [str(number) for number in range(len(values))]
    return Sample(tuple(values), (1.0,) * len(values), tuple(names))


def test_one_seed_is_students_interval_of_the_items():
    values = [0.3, -1.2, 2.5, 0.7, 0.1]
    pooled = pool([plain(values)])
    half = student_quantile(4) * statistics.stdev(values) / math.sqrt(5)
    assert pooled.value == pytest.approx(statistics.mean(values))
    assert (pooled.interval.low, pooled.interval.high) == pytest.approx((pooled.value - half, pooled.value + half))


def test_a_ratio_of_sums_is_linearised():
    """Loss per token: answers of unequal length count by their tokens."""
    losses, tokens = [4.0, 9.0, 2.0, 7.0], [2.0, 3.0, 2.0, 5.0]
    pooled = pool([Sample(tuple(losses), tuple(tokens), ("a", "b", "c", "d"))])
    mean = sum(losses) / sum(tokens)
    residuals = [loss - mean * count for loss, count in zip(losses, tokens, strict=True)]
    error = math.sqrt(sum(value**2 for value in residuals) * 4 / 3) / sum(tokens)
    assert pooled.value == pytest.approx(mean)
    assert pooled.interval.high - pooled.value == pytest.approx(student_quantile(3) * error)


def test_items_of_one_cluster_count_as_one():
    """Ten copies of each of four values are four values."""
    values = [1.0, 2.0, 4.0, 8.0]
    copies = plain([value for value in values for _ in range(10)], [str(value) for value in values for _ in range(10)])
    one, ten = pool([plain(values)]), pool([copies])
    assert (ten.interval.low, ten.interval.high) == pytest.approx((one.interval.low, one.interval.high))


def test_seeds_that_differ_widen_the_interval():
    values = [0.1, 0.2, 0.3, 0.4]
    same = pool([plain(values)] * 3)
    other = pool([plain([value + shift for value in values]) for shift in (-0.5, 0.0, 0.5)])
    assert same.value == pytest.approx(other.value)
    assert other.interval.high - other.interval.low > 3 * (same.interval.high - same.interval.low)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Effects of items and of seeds, both drawn: 95 % to within what 600 draws can tell."""
    generator = random.Random(5)
    hits = 0
    for _ in range(600):
        items = [generator.gauss(0, 1) for _ in range(30)]
        seeds = [generator.gauss(0, 0.15) for _ in range(3)]
        pooled = pool([plain([item + seed + generator.gauss(0, 0.3) for item in items]) for seed in seeds])
        hits += pooled.interval.low <= 0 <= pooled.interval.high
    assert 0.93 <= hits / 600 <= 0.99


def test_a_divergence_has_no_interval_below_zero():
    """That of its logarithm: near the plain one where that is narrow, and never below zero."""
    values = [0.001, 0.002, 0.03, 0.001]
    plain_one = pool([plain(values)])
    assert plain_one.interval.low < 0
    pooled = pool([plain(values)], never_negative=True)
    factor = math.exp(student_quantile(3) * statistics.stdev(values) / 2 / pooled.value)
    assert pooled.value == plain_one.value
    assert pooled.interval.low == pytest.approx(pooled.value / factor)
    assert pooled.interval.high == pytest.approx(pooled.value * factor)
    close = [1.0, 1.01, 0.99, 1.02]
    narrow, usual = pool([plain(close)], never_negative=True).interval, pool([plain(close)]).interval
    assert (narrow.low, narrow.high) == pytest.approx((usual.low, usual.high), abs=(usual.high - usual.low) ** 2)
    assert pool([plain([0.0] * 4)], never_negative=True).interval.to_list() == [0.0, 0.0]
    rounding = pool([plain([-1e-9, 1e-10, -1e-9, 1e-10])], never_negative=True)
    assert (rounding.value, rounding.interval.low) == (0.0, 0.0)


def test_the_interval_of_a_divergence_holds_the_truth():
    """Squares of normal draws, whose mean is 1."""
    generator = random.Random(7)
    hits = 0
    for _ in range(600):
        pooled = pool([plain([generator.gauss(0, 1) ** 2 for _ in range(30)])], never_negative=True)
        hits += pooled.interval.low <= 1 <= pooled.interval.high
    assert 0.91 <= hits / 600 <= 0.99


def test_shares_have_wilsons_interval():
    hits = [True] * 7 + [False] * 33
    pooled = pool([shares(hits, [str(number) for number in range(40)])], share=True)
    assert pooled.value == 7 / 40
    few = wilson(7, 40)
    assert pooled.interval.low == pytest.approx(few.low, abs=0.01)
    assert pooled.interval.high == pytest.approx(few.high, abs=0.02)
    assert pooled.interval.low > 0


def test_shares_of_few_questions_are_known_less_well():
    hits = [True] * 10 + [False] * 30
    independent = pool([shares(hits, [str(number) for number in range(40)])], share=True)
    alike = pool([shares(hits, [str(number // 10) for number in range(40)])], share=True)
    assert alike.value == independent.value
    assert alike.interval.high - alike.interval.low > 2 * (independent.interval.high - independent.interval.low)


@pytest.mark.parametrize("hit", [False, True])
def test_shares_of_nothing_and_of_everything_have_an_interval(hit):
    pooled = pool([shares([hit] * 20, ["one", "two"] * 10)] * 2, share=True)
    expected = wilson(40 * hit, 40)
    assert (pooled.interval.low, pooled.interval.high) == (expected.low, expected.high)


def test_nothing_measured_is_no_number():
    for samples in ([], [Sample((), (), ())]):
        pooled = pool(samples)
        assert math.isnan(pooled.value)
        assert pooled.interval.to_list() == [None, None]


def test_a_single_item_has_no_interval():
    assert pool([plain([0.5])]).interval.to_list() == [None, None]
