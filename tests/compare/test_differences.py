"""What one run came to less another: against pairs worked out by hand, and against what chance does when it is known."""

from __future__ import annotations

import math
import random
import statistics
from statistics import NormalDist
from types import SimpleNamespace

import pytest

from safelora_fast.compare.conclusions import read_figures
from safelora_fast.compare.differences import pool_differences
from safelora_fast.compare.pooling import Sample, Summary, pool, shares
from safelora_fast.compare.report import Column
from safelora_fast.scoring.intervals import student_quantile

MISALIGNED = Column("misaligned", "aligned", "misaligned answers", "%", "lower", "")


def plain(values, clusters=None, weights=None):
    names = clusters or [str(number) for number in range(len(values))]
    return Sample(tuple(values), tuple(weights or [1.0] * len(values)), tuple(names))


def answers(hits, unscored=()):
    """Ten answers to each of several questions, so many of them misaligned, without those that were not scored."""
    all_of_them = [(str(question), place < count) for question, count in enumerate(hits) for place in range(10)]
    scored = [pair for place, pair in enumerate(all_of_them) if place not in unscored]
    return shares([hit for _, hit in scored], [question for question, _ in scored])


def test_the_same_items_are_paired_one_by_one():
    one, other = [1.0, 2.0, 3.5, 4.0], [0.9, 1.6, 2.7, 4.4]
    pooled = pool_differences({0: plain(one)}, {0: plain(other)})
    changes = [own - theirs for own, theirs in zip(one, other, strict=True)]
    half = student_quantile(3) * statistics.stdev(changes) / 2
    assert pooled.value == pytest.approx(statistics.mean(changes))
    assert (pooled.interval.low, pooled.interval.high) == pytest.approx((pooled.value - half, pooled.value + half))


def test_what_the_questions_share_cancels():
    """Hard and easy questions: each share is known badly, their difference well."""
    first, own = {0: answers([0, 3, 6, 9, 2, 8])}, {0: answers([0, 2, 5, 8, 1, 7])}
    pooled = pool_differences(own, first, share=True)
    wide = pool(list(own.values()), share=True).interval
    assert pooled.value == pytest.approx(-5 / 60)
    assert pooled.interval.high < 0
    assert pooled.interval.high - pooled.interval.low < (wide.high - wide.low) / 4


def test_answers_without_a_score_leave_the_difference():
    """One unscored answer moves the difference by its own weight, and no more; shares are those that the table shows."""
    first, whole = answers([5, 6, 4, 7, 5, 3, 6, 5]), answers([1, 2, 0, 2, 1, 0, 3, 1])
    less = answers([1, 2, 0, 2, 1, 0, 3, 1], unscored={0, 33, 79})
    before, after = (pool_differences({0: one}, {0: first}, share=True) for one in (whole, less))
    assert after.value == pytest.approx(less.figure - first.figure)
    assert abs(after.value - before.value) < 0.02
    assert after.interval.high < 0
    width = [one.interval.high - one.interval.low for one in (before, after)]
    assert width[1] == pytest.approx(width[0], rel=0.2)


def test_the_reading_speaks_of_runs_with_unscored_answers():
    config = SimpleNamespace(runs=[SimpleNamespace(name="none"), SimpleNamespace(name="KL")], seeds=(0,))
    first, own = answers([5, 6, 4, 7, 5, 3, 6, 5]), answers([1, 2, 0, 2, 1, 0, 3, 1], unscored={0})
    said = read_figures(config, [MISALIGNED], {"none": {"misaligned": {0: first}}, "KL": {"misaligned": {0: own}}})
    assert said[0].startswith("KL beside none: misaligned answers lower by 39")


def test_the_reading_names_the_seeds_that_both_have_and_what_has_none():
    """The table's means are over other seeds, and a sentence that does not say so would contradict it."""
    runs = [SimpleNamespace(name=name) for name in ("none", "KL", "lost")]
    rise = Column("rise", "aligned", "rise", "nats", "lower", "")
    config = SimpleNamespace(runs=runs, seeds=(0, 1, 2))
    high, low = Summary(2.0, 0.1, 50), Summary(1.0, 0.1, 50)
    samples = {
        "none": {"rise": {0: high, 1: high}, "misaligned": {0: Summary(0.5, 0.1, 50)}},
        "KL": {"rise": {0: low, 2: high}, "misaligned": {1: Summary(0.5, 0.1, 50)}},
        "lost": {"rise": {}, "misaligned": {}},
    }
    kl, lost, _ = (*read_figures(config, [rise, MISALIGNED], samples), "")
    assert kl.startswith("KL beside none: rise lower by 1.000 nats a token (0.7")
    assert kl.endswith("; seed 0 alone); no seed has both figures of misaligned answers.")
    assert lost == "lost beside none: no seed has figures of both."
    samples["KL"]["rise"] = {0: high, 1: high, 2: high}
    kl, *_ = read_figures(config, [rise, MISALIGNED], samples)
    assert "no clear difference in rise (seeds 0, 1 alone)" in kl


def test_a_question_that_one_run_has_not_is_left_out_of_both():
    first = answers([9, 1, 2, 1, 0])
    own = answers([9, 1, 2, 1, 0], unscored=set(range(10)))
    pooled = pool_differences({0: own}, {0: first}, share=True)
    assert pooled.value == pytest.approx(0)
    assert pooled.interval.low <= 0 <= pooled.interval.high


def test_unequal_weights_are_ratios():
    """Tokens of two tokenizers: the difference of the two figures, with each answer's part in both."""
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
    """No answer differs from another: how far chance carries shares is then known from their counts alone."""
    other = plain([1.0] * 20) if isinstance(whole, Sample) else Summary(1.0, 0.0, 20)
    pooled = pool_differences({0: whole}, {0: other}, share=True)
    assert pooled.value == -1
    assert -1.2 < pooled.interval.low <= -1
    assert -0.85 < pooled.interval.high < -0.6
    assert pool_differences({0: whole}, {0: other}).interval.to_list() == [None, None]


def test_nothing_is_held_against_another_seed():
    assert pool_differences({1: plain([1.0, 2.0])}, {0: plain([1.0, 2.0])}) is None


@pytest.mark.parametrize(
    ("seeds", "noise", "rates"), [(1, 0.0, (-1.0, -2.5)), (3, 0.4, (-1.0, -2.5)), (1, 0.0, (-2.5, -2.5))]
)
def test_the_interval_of_a_difference_holds_the_truth_as_often_as_it_says(seeds, noise, rates):
    """Judged answers: nineteen questions that are alike in both runs, ten answers to each, one in twenty unscored.

    Each run has noise of its own by seed; log odds of the two rates are given, and the truth follows by integration.
    """
    draw, logistic = random.Random(11), lambda value: 1 / (1 + math.exp(-value))
    spread = math.hypot(1.0, 0.5, noise)  # of what questions share, of what they do not, and of the seeds
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
