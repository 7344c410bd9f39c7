"""What a set of scores says, and how surely.

Intervals are at 95 %: percentile bootstraps, stratified where scores belong to tasks (Agarwal et al. 2021, "Deep
reinforcement learning at the edge of the statistical precipice"), and Student's for a paired difference. `caution` says
what an interval from few scores is worth.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
Strata = Sequence[np.ndarray]
"""Scores by task: of each task one score per training seed, or per episode."""


@dataclass(frozen=True)
class Summary:
    """Mean and standard error (None if n is 1) over n episodes; interquartile mean with a 95 % percentile bootstrap."""

    n: int
    mean: float
    se: float | None
    iqm: float
    low: float
    high: float


def summarise(scores: np.ndarray, seed: int = 0, resamples: int = 5000) -> Summary:
    """Statistics of scores [n]. The interval is that of the interquartile mean."""
    scores = np.asarray(scores, dtype=float)
    n, iqm = len(scores), float(stats.trim_mean(scores, 0.25))
    low = high = iqm
    if n > 1 and np.ptp(scores) > 0:
        interval = stats.bootstrap(
            (scores,),
            lambda x, axis: stats.trim_mean(x, 0.25, axis=axis),
            n_resamples=resamples,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    return Summary(n, float(scores.mean()), standard_error(scores), iqm, low, high)


def standard_error(scores: np.ndarray) -> float | None:
    """Of the mean of scores [n]; None if n is 1."""
    return float(np.std(scores, ddof=1) / np.sqrt(len(scores))) if len(scores) > 1 else None


def caution(n: int) -> str:
    """What a 95 % bootstrap interval from n scores is worth, in words; empty from 20 on.

    The shares were measured on normal, exponential and two-humped scores (`tests/evaluation/test_statistics.py`).
    """
    if n >= 20:
        return ""
    if n == 1:
        return "n = 1: one score says nothing about the spread."
    worth = "half" if n == 2 else "65 to 80 %" if n < 5 else "84 to 91 %" if n < 10 else "about 92 %"
    return f"n = {n}: from so few scores, intervals that say 95 % hold the truth {worth} of the time."


# Pairs ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paired:
    """A difference of two policies over the same n starts: mean, standard error, 95 % interval (None if n is 1)."""

    n: int
    mean: float
    se: float | None
    low: float | None
    high: float | None


def paired(ours: np.ndarray, other: np.ndarray) -> Paired:
    """The difference `ours - other` of scores [n] that belong together one by one; Student's interval."""
    difference = np.asarray(ours, dtype=float) - np.asarray(other, dtype=float)
    n, mean, se = len(difference), float(difference.mean()), standard_error(difference)
    if se is None:
        return Paired(n, mean, None, None, None)
    reach = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * se
    return Paired(n, mean, se, mean - reach, mean + reach)


# Several tasks -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A statistic of n scores with its 95 % stratified bootstrap interval."""

    n: int
    value: float
    low: float
    high: float


def interquartile_mean(strata: Strata, seed: int = 0, resamples: int = 5000) -> Estimate:
    """The mean of the middle half of all scores together; each task is resampled by itself."""
    return bootstrapped(
        lambda *parts: stats.trim_mean(np.concatenate(parts, axis=-1), 0.25, axis=-1), strata, seed, resamples
    )


def probability_of_improvement(ours: Strata, other: Strata, seed: int = 0, resamples: int = 2000) -> Estimate:
    """P(a score of ours is higher than one of the other on the same task), ties counting half, averaged over tasks."""
    tasks = len(ours)

    def statistic(*parts: np.ndarray) -> np.ndarray:
        each = [_wins(a, b).mean(axis=(-1, -2)) for a, b in zip(parts[:tasks], parts[tasks:], strict=True)]
        return np.mean(each, axis=0)

    return bootstrapped(statistic, [*ours, *other], seed, resamples)


def _wins(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[..., n, m]: 1 where a [..., n] is higher than b [..., m], a half where they are equal."""
    return (np.sign(a[..., :, None] - b[..., None, :]) + 1) / 2


def performance_profile(strata: Strata, thresholds: np.ndarray) -> np.ndarray:
    """The share of scores above each threshold [T], averaged over tasks."""
    return np.mean([(np.asarray(scores)[:, None] > thresholds).mean(0) for scores in strata], axis=0)


def bootstrapped(statistic: Callable[..., np.ndarray], strata: Strata, seed: int, resamples: int) -> Estimate:
    """A statistic of score arrays [..., n_i], one per stratum, each resampled from its own scores."""
    rng = np.random.default_rng(seed)
    arrays = [np.asarray(scores) for scores in strata]
    drawn = statistic(*(a[rng.integers(0, len(a), (resamples, len(a)))] for a in arrays))
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(sum(map(len, arrays)), float(statistic(*arrays)), float(low), float(high))
