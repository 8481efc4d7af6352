"""Intervals compared with plain formulas and known quantiles, and their coverage in simulations."""

from __future__ import annotations

import math

import numpy as np
import pytest

from safelora_fast.scoring.intervals import bootstrap_mean, clustered_wilson, student_quantile, wilson


def ends(interval):
    return pytest.approx((interval.low, interval.high), abs=5e-5)


def test_wilson_against_published_values():
    assert ends(wilson(0, 10)) == (0.0, 0.27753)  # Newcombe 1998, and the closed forms z²/(n + z²)
    assert ends(wilson(10, 10)) == (0.72247, 1.0)
    assert ends(wilson(81, 263)) == (0.25529, 0.36621)
    assert ends(wilson(1, 29)) == (0.00611, 0.17176)
    assert math.isnan(wilson(0, 0).low)
    assert wilson(0, 0).to_list() == [None, None]


@pytest.mark.parametrize("count", [7, 100, 263, 800])
def test_nothing_found_and_everything_found_reach_the_ends(count):
    assert wilson(0, count).low == 0
    assert wilson(count, count).high == 1


def test_quantiles_of_student():
    known = {1: 12.7062, 4: 2.7764, 5: 2.5706, 7: 2.3646, 11: 2.2010, 30: 2.0423, 1000: 1.9623}
    for degrees, quantile in known.items():
        assert student_quantile(degrees) == pytest.approx(quantile, abs=5e-5)


def test_alike_clusters_widen_the_interval():
    clusters = [name for name in "abcdefgh" for _ in range(100)]
    alike = [name in "ab" for name in clusters]
    mixed = [number % 4 == 0 for number in range(800)]
    whole, spread = clustered_wilson(alike, clusters), clustered_wilson(mixed, clusters)
    # all completions of a question are equal: 8 observations with variance p(1 − p)·8/7
    effective = 700 / 100 * (student_quantile(799) / student_quantile(7)) ** 2
    assert ends(whole) == (wilson(effective / 4, effective).low, wilson(effective / 4, effective).high)
    plain = wilson(200, 800)
    assert whole.high - whole.low > 5 * (plain.high - plain.low)
    assert plain.high - plain.low < spread.high - spread.low < 1.4 * (plain.high - plain.low)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    clusters = [name for name in range(16) for _ in range(20)]
    held, naive = 0, 0
    for _ in range(400):
        rates = random.beta(2, 6, size=16)  # mean 1/4, varying between questions
        hits = [bool(random.random() < rates[name]) for name in clusters]
        interval, plain = clustered_wilson(hits, clusters), wilson(sum(hits), len(hits))
        held += interval.low <= 0.25 <= interval.high
        naive += plain.low <= 0.25 <= plain.high
    assert 0.92 <= held / 400 <= 0.99
    assert naive / 400 < 0.85


def test_nothing_to_see_of_clusters():
    clusters = ["a"] * 5 + ["b"] * 5
    few = (student_quantile(9) / student_quantile(1)) ** 2
    assert ends(clustered_wilson([False] * 10, clusters)) == (0.0, wilson(0, 10 * few).high)
    assert clustered_wilson([True, False], ["a", "a"]) == wilson(1, 2)
    assert math.isnan(clustered_wilson([], []).high)


def test_the_bootstrap_draws_whole_clusters():
    random = np.random.default_rng(1)
    levels = random.standard_normal(30)
    values = [float(level) for level in levels for _ in range(50)]
    clusters = [name for name in range(30) for _ in range(50)]
    interval = bootstrap_mean(values, clusters, seed=0)
    error = float(np.std(levels) / math.sqrt(30))
    mean = float(levels.mean())
    # treating values as independent would make it seven times narrower
    assert interval.low == pytest.approx(mean - 1.96 * error, abs=0.2 * error)
    assert interval.high == pytest.approx(mean + 1.96 * error, abs=0.2 * error)
    assert bootstrap_mean(values, clusters, seed=0) == interval
    assert bootstrap_mean(values, clusters, seed=1) != interval


def test_clusters_of_unequal_size_weigh_by_their_members():
    interval = bootstrap_mean([1.0] * 9 + [0.0], ["a"] * 9 + ["b"], seed=0)
    assert (interval.low, interval.high) == (0.0, 1.0)
    alone = bootstrap_mean([0.0, 1.0] * 200, ["a"] * 400, seed=0)
    assert alone.low == pytest.approx(0.451, abs=0.01)
    assert alone.high == pytest.approx(0.549, abs=0.01)
    assert math.isnan(bootstrap_mean([], [], seed=0).low)
    assert bootstrap_mean([0.3], ["a"], seed=0).to_list() == [None, None]
