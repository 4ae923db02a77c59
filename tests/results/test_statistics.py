"""Means and intervals against other implementations."""

import numpy as np
import pytest
from scipy import stats

from lib import statistics


def uneven():
    rng = np.random.default_rng(3)
    return [rng.normal(mean, 2, n) for mean, n in ((0, 5), (10, 4), (30, 7))]


def test_interval_is_that_of_another_stratified_bootstrap():
    def mean(*x, axis):
        return sum(v.mean(axis) for v in x) / len(x)

    def middle_half(*x, axis):
        x = np.sort(np.concatenate(x, axis), axis)
        return x[..., 4:12].mean(axis)  # 16 runs

    for ours, other in ((statistics.mean_of_tasks, mean), (statistics.iqm, middle_half)):
        expected = stats.bootstrap(uneven(), other, n_resamples=20_000, method="percentile")
        found = statistics.bootstrap(uneven(), ours)
        assert found == pytest.approx(tuple(expected.confidence_interval), abs=0.12)
        assert ours(uneven()) == pytest.approx(other(*uneven(), axis=-1))
    for strata in ([uneven()[0], np.ones(1)], []):
        assert statistics.bootstrap(strata, ours) is None and statistics.t_interval(strata) is None


def test_t_interval():
    first, second, third = uneven()
    found = statistics.t_interval([first])
    low, high = stats.t.interval(0.95, 4, first.mean(), stats.sem(first))
    assert found == pytest.approx((low, high))
    welch = stats.ttest_ind(second, -third, equal_var=False).confidence_interval(0.95)
    found = statistics.t_interval([second, third])  # of the mean of both, half of a difference
    assert found == pytest.approx((welch.low / 2, welch.high / 2))
    assert statistics.t_interval([np.ones(3), np.full(2, 5.0)]) == (3, 3)


@pytest.mark.parametrize("tasks, seeds", [(1, 2), (1, 5), (5, 5)])
def test_t_interval_covers_what_it_says(tasks, seeds):
    """Of normal differences 95% are to be covered; a percentile bootstrap covers 50, 84, 91%."""
    rng = np.random.default_rng(tasks * seeds)
    scale = np.linspace(1, 3, tasks)[:, None]
    draws = (list(rng.normal(size=(tasks, seeds)) * scale) for _ in range(2000))
    found = [statistics.t_interval(draw) for draw in draws]
    assert 0.935 < np.mean([low < 0 < high for low, high in found]) < 0.975


def test_statistics_of_two_methods():
    strata = [np.array([[11, 10], [35, 30]]), np.array([[84, 70], [100, 90]])]  # [runs, methods]
    assert statistics.gain(strata) == pytest.approx(100 * (115 / 100 - 1))
    assert statistics.share_highest(strata) == 0.5
    assert statistics.share_highest([np.array([[1, 2]]), np.array([[3, 3]])]) == -0.5  # a tie
    assert statistics.spread(strata) == pytest.approx((10 - 12 + 10 - 8) / 2)
    assert statistics.spread([np.array([[0.0, 0.0], [2.0, 6.0]])]) == 2  # deviations 1 and 3


def test_the_bootstrap_draws_each_stratum_by_itself():
    """With the same draws these two would cancel."""
    x = np.array([0.0, 1.0, 5.0])
    low, high = statistics.bootstrap([x, -x], statistics.mean_of_tasks)
    assert low < -0.5 and high > 0.5
