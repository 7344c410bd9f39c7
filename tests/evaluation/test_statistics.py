import numpy as np
import pytest

from offline_cai.evaluation.statistics import summarise


def test_mean_error_and_interquartile_mean() -> None:
    s = summarise(np.array([0.0, 1.0, 2.0, 3.0, 100.0, 4.0, 5.0, 6.0]))
    assert (s.n, s.mean) == (8, pytest.approx(121 / 8))
    assert s.se == pytest.approx(np.std([0, 1, 2, 3, 100, 4, 5, 6], ddof=1) / np.sqrt(8))
    assert s.iqm == pytest.approx((2 + 3 + 4 + 5) / 4), "the outlier is trimmed"
    assert s.low < s.iqm < s.high


def test_the_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    trials = 300
    covered = 0
    for _ in range(trials):
        s = summarise(rng.normal(3, 1, size=60), resamples=400)
        covered += s.low <= 3 <= s.high
    assert abs(covered / trials - 0.95) < 4 * np.sqrt(0.95 * 0.05 / trials)


def test_few_and_equal_scores_have_no_width() -> None:
    assert summarise(np.array([2.0])).se is None and summarise(np.array([2.0])).iqm == 2
    same = summarise(np.array([1.0, 1.0, 1.0]))
    assert (same.low, same.high, same.se) == (1, 1, 0)
