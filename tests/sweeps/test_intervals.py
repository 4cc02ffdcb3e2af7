"""Differences over two levels of seeds: against slow restatements with scipy, and by simulation."""

import numpy as np
import pytest
from scipy import optimize, stats

from region_pretrain.sweeps.intervals import Difference, difference, pair, pairs_of_two_machines


def grid(table):
    return {(p, f): v for p, row in enumerate(table) for f, v in enumerate(row)}


def test_pairs_have_equal_seeds():
    random = {(None, 0): 1.0, (None, 1): 2.0, (None, 2): None}
    soco = {(5, 0): 11.0, (5, 1): 13.0, (6, 0): 15.0, (6, 2): 17.0, (6, 3): 19.0}
    # Without pre-training: one run is the partner of both pre-trainings.
    assert pair(soco, random) == {(5, 0): 10.0, (5, 1): 11.0, (6, 0): 14.0, (6, 2): None}
    assert pair(random, soco) == {(5, 0): -10.0, (5, 1): -11.0, (6, 0): -14.0, (6, 2): None}
    moco = {(5, 0): 1.0, (7, 0): 9.0, (6, 3): 4.0}
    assert pair(soco, moco) == {(5, 0): 10.0, (6, 3): 15.0}
    file = {(None, 1): 5.0, (None, 0): 5.0}
    assert pair(file, random) == {(None, 1): 3.0, (None, 0): 4.0}


def test_pairs_share_a_machine_where_they_can():
    random = {(None, 0, "x"): 1.0, (None, 0, "y"): 4.0, (None, 1, "y"): 2.0}
    soco = {(5, 0, "x"): 11.0, (5, 0, "y"): 16.0, (5, 1, "x"): 13.0, (6, 0, "z"): 9.0}
    # Both machines: the mean of 10 and 12. No common one: 13 - 2, and the mean of 9 - 1 and 9 - 4.
    assert pair(soco, random) == {(5, 0): 11.0, (5, 1): 11.0, (6, 0): 6.5}
    assert pair(random, soco) == {(5, 0): -11.0, (5, 1): -11.0, (6, 0): -6.5}
    assert pairs_of_two_machines(soco, random) == pairs_of_two_machines(random, soco) == 2
    assert pair({**soco, (5, 0, "y"): None}, random)[5, 0] is None
    unknown = {seeds[:2]: value for seeds, value in soco.items()}
    assert pairs_of_two_machines(unknown, random) == 0


@pytest.mark.parametrize("pretrained", [True, False])
def test_one_fine_tuning_per_pre_training_is_the_paired_t_test(pretrained):
    rng = np.random.default_rng(0)
    a, b = rng.normal(20, 3, 4), rng.normal(18, 3, 4)
    seeds = [(seed if pretrained else None, seed) for seed in range(4)]
    values = dict(zip(seeds, a, strict=True))
    found = difference(pair(values, {(None, s): v for s, v in enumerate(b)}))
    test = stats.ttest_rel(a, b)
    interval = test.confidence_interval(0.95)
    assert found.mean == pytest.approx(np.mean(a - b), rel=1e-12)
    assert found.standard_error == pytest.approx(found.mean / test.statistic, rel=1e-9)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)


def slow_difference(table):
    """Two-way analysis of variance, one sum of squares at a time."""
    k, m = len(table), len(table[0])
    every = sum(map(sum, table)) / (k * m)
    rows = [sum(row) / m for row in table]
    columns = [sum(row[j] for row in table) / k for j in range(m)]
    pretrain = sum(m * (r - every) ** 2 for r in rows) / (k - 1)
    finetune = sum(k * (c - every) ** 2 for c in columns) / (m - 1)
    residual = 0.0
    for i in range(k):
        for j in range(m):
            residual += (table[i][j] - rows[i] - columns[j] + every) ** 2
    freedom = (k - 1) * (m - 1)
    residual /= freedom
    assert min(pretrain, finetune) > residual  # no component of variance is negative
    total = pretrain + finetune - residual
    parts = pretrain**2 / (k - 1) + finetune**2 / (m - 1) + residual**2 / freedom
    error = (total / (k * m)) ** 0.5
    return every, error, stats.t.interval(0.95, total**2 / parts, every, error)


def test_a_grid_of_seeds_is_a_two_way_analysis_of_variance():
    table = [[4.0, 1.0, 6.5], [6.0, 3.5, 7.0], [8.5, 4.0, 11.0]]
    mean, error, interval = slow_difference(table)
    found = difference(grid(table))
    assert (found.mean, found.standard_error) == pytest.approx((mean, error), rel=1e-6)
    assert (found.low, found.high) == pytest.approx(interval, rel=1e-6)
    # Mean squares 12.11, 21.78 and 0.82: sqrt(33.07 / 9), with 3.5 degrees of freedom.
    assert found.standard_error == pytest.approx(1.9169, abs=1e-4)
    assert str(found) == "+5.7 ± 1.9 [+0.1, +11.3]"
    wide = [[1.0, 2.5], [2.0, 4.5], [7.0, 9.0], [6.0, 7.0]]
    mean, error, interval = slow_difference(wide)
    found = difference(grid(wide))
    assert (found.mean, found.standard_error, found.low, found.high) == pytest.approx(
        (mean, error, *interval), rel=1e-6
    )


def test_without_an_effect_of_fine_tuning_seeds_the_pre_trainings_decide():
    table = [[1.0, 2.0, 0.0], [4.0, 3.0, 5.0], [7.0, 8.0, 6.5]]
    found, means = difference(grid(table)), np.mean(table, 1)
    expected = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-6)
    # More fine-tunings of the same three pre-trainings do not narrow the interval.
    more = difference(grid([row * 4 for row in table]))
    assert more.high - more.low == pytest.approx(found.high - found.low, rel=1e-6)


def residual_likelihood(pairs):
    """Variance of the mean at the maximum of the residual likelihood, components >= 0."""
    values, n = np.array(list(pairs.values())), len(pairs)
    same = [np.array([[float(a[i] == b[i]) for b in pairs] for a in pairs]) for i in (0, 1)]
    same.append(np.eye(n))

    def covariance(components):
        return sum(c * part for c, part in zip(components, same, strict=True))

    def loss(components):
        precision = np.linalg.inv(covariance(components))
        centred = values - (precision @ values).sum() / precision.sum()
        quadratic = centred @ precision @ centred + np.log(precision.sum())
        return quadratic + np.linalg.slogdet(covariance(components))[1]

    start = np.full(3, values.var())
    bounds = [(0, None), (0, None), (1e-6, None)]
    options = {"ftol": 1e-15, "gtol": 1e-9, "maxiter": 1000}
    found = optimize.minimize(loss, start, bounds=bounds, options=options)
    return covariance(found.x).sum() / n**2


def test_no_component_of_variance_is_negative():
    rng, independent = np.random.default_rng(0), 0
    for pretrain, finetune in [*[(0, 0)] * 20, (1, 0), (0, 1), (2, 2)]:
        table = rng.normal(0, 1, (4, 3))
        table += pretrain * rng.normal(0, 1, (4, 1)) + finetune * rng.normal(0, 1, 3)
        found = difference(grid(table))
        assert found.standard_error**2 == pytest.approx(residual_likelihood(grid(table)), rel=1e-3)
        # Without an effect of either seed, all pairs are independent.
        simple = stats.ttest_1samp(table.ravel(), 0).confidence_interval(0.95)
        independent += found.low == pytest.approx(simple.low, rel=1e-9)
    assert 3 <= independent <= 12


def test_pairs_may_be_missing():
    rng, covered, count = np.random.default_rng(0), 0, 300
    more = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (2, 3)]
    for i in range(count):
        pretrain, finetune = rng.normal(0, 1, 3), rng.normal(0, 1.5, 4)
        pairs = {(p, f): pretrain[p] + finetune[f] + rng.normal(0, 0.7) for p, f in more}
        found = difference(pairs)
        assert found.mean == pytest.approx(np.mean(list(pairs.values())), rel=1e-12)
        covered += found.low < 0 < found.high
        if i < 30:
            expected = residual_likelihood(pairs)
            assert found.standard_error**2 == pytest.approx(expected, rel=1e-3)
    assert 0.93 < covered / count < 0.99
    # One of nine runs: about the interval of the other eight, and of all nine.
    table = np.array([[4.0, 1.0, 6.5], [6.0, 3.5, 7.0], [8.5, 4.0, 11.0]])
    whole, pairs = difference(grid(table)), grid(table)
    del pairs[1, 1]
    assert difference(pairs).standard_error == pytest.approx(whole.standard_error, rel=0.15)


def test_coverage_with_three_times_three_seeds():
    """A reference without pre-training has one run per fine-tuning seed, which all share."""
    rng = np.random.default_rng(0)
    covered, naive, count = 0, 0, 1000
    for _ in range(count):
        pretrain, shared = rng.normal(0, 1, (3, 1)), rng.normal(0, 3, 3)
        table = pretrain + shared + rng.normal(0, 1, (3, 3))
        found = difference(grid(table))
        covered += found.low < 0 < found.high
        low, high = stats.t.interval(0.95, 2, table.mean(), stats.sem(table.mean(1)))
        naive += low < 0 < high
    assert 0.94 < covered / count < 0.985
    assert naive / count < 0.8  # a t interval over the pre-trainings' means


@pytest.mark.parametrize(
    "pairs",
    [
        {(0, 0): 3.0},
        {(0, 0): 2.0, (0, 1): 4.0},  # one pre-training
        {(0, 0): 2.0, (1, 0): 4.0},  # one fine-tuning seed, whose reference run is shared
        {(0, 0): 2.0, (0, 1): 3.0, (1, 0): 4.0},  # unfinished
    ],
)
def test_no_interval_where_the_seeds_do_not_allow_one(pairs):
    assert difference(pairs) == Difference(3.0) and str(difference(pairs)) == "+3.0"


def test_equal_and_undefined_differences():
    same = difference(grid([[2.0, 2.0], [2.0, 2.0]]))
    assert same == Difference(2.0, 0.0, 2.0, 2.0)
    assert difference({}) is None and difference({(0, 0): 1.0, (1, 1): None}) is None
