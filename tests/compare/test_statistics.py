"""Tests of means over seeds and differences of runs, against written-out formulas and simulations."""

from __future__ import annotations

import math
import random
import statistics
from statistics import NormalDist

import pytest

from safelora_fast.compare.statistics import Sample, Summary, pool, pool_differences, shares
from safelora_fast.scoring.intervals import student_quantile, wilson


def plain(values, clusters=None, weights=None):
    names = clusters or [str(number) for number in range(len(values))]
    return Sample(tuple(values), tuple(weights or [1.0] * len(values)), tuple(names))


def answers(hits, unscored=()):
    """Return ten answers to each question, of which `hits` are misaligned, without the unscored ones."""
    all_of_them = [(str(question), place < count) for question, count in enumerate(hits) for place in range(10)]
    scored = [pair for place, pair in enumerate(all_of_them) if place not in unscored]
    return shares([hit for _, hit in scored], [question for question, _ in scored])


def ends(pooled):
    return pooled.interval.low, pooled.interval.high


def width(pooled):
    return pooled.interval.high - pooled.interval.low


def test_one_seed_is_students_interval_of_the_items():
    values = [0.3, -1.2, 2.5, 0.7, 0.1]
    pooled = pool([plain(values)])
    half = student_quantile(4) * statistics.stdev(values) / math.sqrt(5)
    assert pooled.value == pytest.approx(statistics.mean(values))
    assert ends(pooled) == pytest.approx((pooled.value - half, pooled.value + half))


def test_a_ratio_of_sums_is_linearized():
    """Loss per token: completions are weighted by their number of tokens."""
    losses, tokens = [4.0, 9.0, 2.0, 7.0], [2.0, 3.0, 2.0, 5.0]
    pooled = pool([plain(losses, weights=tokens)])
    mean = sum(losses) / sum(tokens)
    residuals = [loss - mean * count for loss, count in zip(losses, tokens, strict=True)]
    error = math.sqrt(sum(value**2 for value in residuals) * 4 / 3) / sum(tokens)
    assert pooled.value == pytest.approx(mean)
    assert pooled.interval.high - pooled.value == pytest.approx(student_quantile(3) * error)


def test_items_of_one_cluster_count_as_one():
    """Ten copies of each of four values count as four values; shares over few questions are less certain."""
    values = [1.0, 2.0, 4.0, 8.0]
    copies = plain([value for value in values for _ in range(10)], [str(value) for value in values for _ in range(10)])
    assert ends(pool([copies])) == pytest.approx(ends(pool([plain(values)])))
    hits = [True] * 10 + [False] * 30
    independent, alike = (
        pool([shares(hits, [str(number // size) for number in range(40)])], share=True) for size in (1, 10)
    )
    assert alike.value == independent.value
    assert width(alike) > 2 * width(independent)


def test_seeds_that_differ_widen_the_interval_with_satterthwaites_degrees():
    values, shifts = [0.1, 0.2, 0.3, 0.4], (-0.5, 0.0, 0.5)
    same = pool([plain(values)] * 3)
    other = pool([plain([value + shift for value in values]) for shift in shifts])
    assert same.value == pytest.approx(other.value)
    of_items, of_seeds = statistics.variance(values) / 4, statistics.variance(shifts) / 3
    degrees = (of_items + of_seeds) ** 2 / (of_items**2 / 3 + of_seeds**2 / 2)
    assert width(other) == pytest.approx(2 * student_quantile(degrees) * math.sqrt(of_items + of_seeds))
    assert width(other) > 3 * width(same)


@pytest.mark.parametrize("kind", ["effects of items and seeds", "squares, whose mean is 1"])
def test_the_interval_holds_the_truth_as_often_as_it_says(kind):
    """95 %, within the precision of 600 draws."""
    draw = random.Random(5)
    hits = 0
    for _ in range(600):
        if kind.startswith("squares"):
            pooled, truth = pool([plain([draw.gauss(0, 1) ** 2 for _ in range(30)])], never_negative=True), 1
        else:
            items, seeds = ([draw.gauss(0, spread) for _ in range(count)] for count, spread in ((30, 1), (3, 0.15)))
            pooled = pool([plain([item + seed + draw.gauss(0, 0.3) for item in items]) for seed in seeds])
            truth = 0
        hits += pooled.interval.low <= truth <= pooled.interval.high
    assert 0.91 <= hits / 600 <= 0.99


def test_a_divergence_has_no_interval_below_zero():
    """The interval is computed on the logarithm: close to the plain one if narrow, and never below zero."""
    values = [0.001, 0.002, 0.03, 0.001]
    plain_one = pool([plain(values)])
    assert plain_one.interval.low < 0
    pooled = pool([plain(values)], never_negative=True)
    factor = math.exp(student_quantile(3) * statistics.stdev(values) / 2 / pooled.value)
    assert pooled.value == plain_one.value
    assert ends(pooled) == pytest.approx((pooled.value / factor, pooled.value * factor))
    close = [1.0, 1.01, 0.99, 1.02]
    narrow, usual = pool([plain(close)], never_negative=True), pool([plain(close)])
    assert ends(narrow) == pytest.approx(ends(usual), abs=width(usual) ** 2)
    assert ends(pool([plain([0.0] * 4)], never_negative=True)) == (0.0, 0.0)
    rounding = pool([plain([-1e-9, 1e-10, -1e-9, 1e-10])], never_negative=True)
    assert (rounding.value, rounding.interval.low) == (0.0, 0.0)


def test_shares_have_wilsons_interval():
    hits = [True] * 7 + [False] * 33
    pooled = pool([shares(hits, [str(number) for number in range(40)])], share=True)
    assert pooled.value == 7 / 40
    assert pooled.interval.low == pytest.approx(wilson(7, 40).low, abs=0.01)
    assert pooled.interval.high == pytest.approx(wilson(7, 40).high, abs=0.02)
    assert pooled.interval.low > 0


@pytest.mark.parametrize("hit", [False, True])
def test_shares_of_nothing_and_of_everything_have_an_interval(hit):
    pooled = pool([shares([hit] * 20, ["one", "two"] * 10)] * 2, share=True)
    assert pooled.interval == wilson(40 * hit, 40)


@pytest.mark.parametrize("samples", [[], [Sample((), (), ())], [plain([0.5])]])
def test_nothing_measured_and_a_single_item_have_no_interval(samples):
    assert pool(samples).interval.to_list() == [None, None]
    assert math.isnan(pool(samples).value) == (not samples or not samples[0].values)


def test_unknown_errors_leave_the_mean():
    pooled = pool([Summary(0.2, math.nan, 10), Summary(0.4, 0.1, 10)])
    assert pooled.value == pytest.approx(0.3)
    assert pooled.interval.to_list() == [None, None]


def test_the_same_items_are_paired_one_by_one():
    one, other = [1.0, 2.0, 3.5, 4.0], [0.9, 1.6, 2.7, 4.4]
    pooled = pool_differences({0: plain(one)}, {0: plain(other)})
    changes = [own - theirs for own, theirs in zip(one, other, strict=True)]
    half = student_quantile(3) * statistics.stdev(changes) / 2
    assert pooled.value == pytest.approx(statistics.mean(changes))
    assert ends(pooled) == pytest.approx((pooled.value - half, pooled.value + half))


def test_what_the_questions_share_cancels():
    """Questions differ in difficulty, so each share is uncertain, but their difference is not."""
    first, own = {0: answers([0, 3, 6, 9, 2, 8])}, {0: answers([0, 2, 5, 8, 1, 7])}
    pooled = pool_differences(own, first, share=True)
    assert pooled.value == pytest.approx(-5 / 60)
    assert pooled.interval.high < 0
    assert width(pooled) < width(pool(list(own.values()), share=True)) / 4


def test_answers_without_a_score_leave_the_difference():
    """An unscored answer changes the difference only by its own weight; the shares match those of the table."""
    first, whole = answers([5, 6, 4, 7, 5, 3, 6, 5]), answers([1, 2, 0, 2, 1, 0, 3, 1])
    less = answers([1, 2, 0, 2, 1, 0, 3, 1], unscored={0, 33, 79})
    before, after = (pool_differences({0: one}, {0: first}, share=True) for one in (whole, less))
    assert after.value == pytest.approx(less.value - first.value)
    assert abs(after.value - before.value) < 0.02
    assert after.interval.high < 0
    assert width(after) == pytest.approx(width(before), rel=0.2)


def test_a_question_that_one_run_lacks_is_left_out_of_both():
    first, own = answers([9, 1, 2, 1, 0]), answers([9, 1, 2, 1, 0], unscored=set(range(10)))
    pooled = pool_differences({0: own}, {0: first}, share=True)
    assert pooled.value == pytest.approx(0)
    assert pooled.interval.low <= 0 <= pooled.interval.high


def test_unequal_weights_are_ratios():
    """Token counts of two tokenizers: the difference of the two ratios, with each completion in both."""
    own, first = plain([4.0, 9.0, 2.0], weights=[2.0, 3.0, 2.0]), plain([3.0, 5.0, 4.0], weights=[3.0, 2.0, 4.0])
    pooled = pool_differences({0: own}, {0: first})
    assert pooled.value == pytest.approx(15 / 7 - 12 / 9)
    parts = [
        (a - 15 / 7 * v) / 7 - (b - 12 / 9 * w) / 9
        for a, v, b, w in zip(own.values, own.weights, first.values, first.weights, strict=True)
    ]
    half = student_quantile(2) * math.sqrt(sum(part * part for part in parts) * 3 / 2)
    assert pooled.interval.high - pooled.value == pytest.approx(half)


def test_one_question_alone_is_not_paired():
    first, own = answers([6]), answers([1], unscored={9})
    pooled = pool_differences({0: own}, {0: first}, share=True)
    error = math.hypot(*(statistics.stdev(one.values) / math.sqrt(len(one.values)) for one in (own, first)))
    assert pooled.value == pytest.approx(1 / 9 - 6 / 10)
    assert pooled.interval.high - pooled.value == pytest.approx(student_quantile(8) * error)


@pytest.mark.parametrize("whole", [plain([0.0] * 20), Summary(0.0, 0.0, 20)], ids=["answers", "benchmark"])
def test_all_against_nothing_is_clear_and_not_exact(whole):
    """All answers of a run are alike, so the error of the shares follows from their counts alone."""
    other = plain([1.0] * 20) if isinstance(whole, Sample) else Summary(1.0, 0.0, 20)
    pooled = pool_differences({0: whole}, {0: other}, share=True)
    assert pooled.value == -1
    assert -1.2 < pooled.interval.low <= -1
    assert -0.85 < pooled.interval.high < -0.6
    assert pool_differences({0: whole}, {0: other}).interval.to_list() == [None, None]


def test_nothing_is_compared_with_another_seed():
    assert pool_differences({1: plain([1.0, 2.0])}, {0: plain([1.0, 2.0])}) is None


@pytest.mark.parametrize(
    ("seeds", "noise", "rates"), [(1, 0.0, (-1.0, -2.5)), (3, 0.4, (-1.0, -2.5)), (1, 0.0, (-2.5, -2.5))]
)
def test_the_interval_of_a_difference_holds_the_truth_as_often_as_it_says(seeds, noise, rates):
    """Simulates judged answers: nineteen questions shared by both runs, ten answers each, one in twenty unscored.

    Each run adds noise by seed. `rates` are the log odds of both runs; the true difference follows by integration.
    """
    draw, logistic = random.Random(11), lambda value: 1 / (1 + math.exp(-value))
    spread = math.hypot(1.0, 0.5, noise)  # shared question effect, question effect of one run, and seed noise
    grid = [NormalDist(0, spread).inv_cdf((place + 0.5) / 500) for place in range(500)]
    first, own = (statistics.mean(logistic(rate + value) for value in grid) for rate in rates)

    def run(rate, shared):
        apart = [value + draw.gauss(0, 0.5) for value in shared]
        found = {}
        for seed in range(seeds):
            moved = rate + draw.gauss(0, noise)
            items = [
                (str(question), draw.random() < logistic(moved + value))
                for question, value in enumerate(apart)
                for _ in range(10)
                if draw.random() > 0.05
            ]
            found[seed] = shares([hit for _, hit in items], [question for question, _ in items])
        return found

    hits = 0
    for _ in range(400):
        shared = [draw.gauss(0, 1) for _ in range(19)]
        undefended, defended = (run(rate, shared) for rate in rates)
        interval = pool_differences(defended, undefended, share=True).interval
        hits += interval.low <= own - first <= interval.high
    assert 0.92 <= hits / 400 <= 0.98
