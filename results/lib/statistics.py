"""Means over runs and tasks, and their 95% intervals.

Intervals of means are Student's t, as few runs make percentile bootstraps too narrow; those of
other statistics are percentile bootstraps. Both let the runs within each task (a stratum)
vary, and take the tasks as given. Standard deviations are those of the population.
"""

import numpy as np
from scipy.stats import t, trim_mean


def mean_of_tasks(strata: list[np.ndarray]) -> np.ndarray:
    """Mean over the strata of the means over their last axis (runs)."""
    return np.mean([values.mean(-1) for values in strata], 0)


def iqm(strata: list[np.ndarray]) -> np.ndarray:
    """Interquartile mean of the runs of all strata (last axis) together."""
    return trim_mean(np.concatenate(strata, -1), 0.25, axis=-1)


def share_highest(strata: list[np.ndarray]) -> np.ndarray:
    """Share of strata (..., runs, methods) whose first method has the highest mean, less 1/2.

    A mean that another method has, too, is not the highest.
    """
    means = [values.mean(-2) for values in strata]
    return np.mean([m[..., 0] > m[..., 1:].max(-1) for m in means], 0) - 0.5


def gain(strata: list[np.ndarray]) -> np.ndarray:
    """Percent by which the first method's sum over strata (..., runs, 2) is above the other's."""
    total = np.sum([values.mean(-2) for values in strata], 0)
    return 100 * (total[..., 0] / total[..., 1] - 1)


def spread(strata: list[np.ndarray]) -> np.ndarray:
    """Deviation over runs of strata (..., runs, 2): the second method's less the first's."""
    return np.mean([values.std(-2) @ np.array([-1, 1]) for values in strata], 0)


def t_interval(strata: list[np.ndarray]) -> tuple[float, float] | None:
    """Student's t interval of mean_of_tasks, with Welch's degrees of freedom.

    None where a stratum has a single run, which tells no spread.
    """
    if not strata or min(map(len, strata)) < 2:
        return None
    mean = float(mean_of_tasks(strata))
    variances = np.array([np.var(values, ddof=1) / len(values) for values in strata])
    if not variances.any():
        return mean, mean
    freedom = variances.sum() ** 2 / sum(
        v**2 / (len(values) - 1) for v, values in zip(variances, strata, strict=True)
    )
    half = float(t.ppf(0.975, freedom) * np.sqrt(variances.sum()) / len(strata))
    return mean - half, mean + half


def bootstrap(strata: list[np.ndarray], statistic, draws=10_000) -> tuple[float, float] | None:
    """Percentile interval of a statistic of strata, each [runs, ...]; None as in t_interval."""
    if not strata or min(map(len, strata)) < 2:
        return None
    rng = np.random.default_rng(0)
    drawn = [values[rng.integers(len(values), size=(draws, len(values)))] for values in strata]
    return tuple(float(x) for x in np.percentile(statistic(drawn), [2.5, 97.5]))
