import numpy as np
import pytest
from scipy import stats

from offline_cai.evaluation import statistics
from offline_cai.evaluation.statistics import caution, paired, summarise


def test_mean_error_and_interquartile_mean() -> None:
    s = summarise(np.array([0.0, 1.0, 2.0, 3.0, 100.0, 4.0, 5.0, 6.0]))
    assert (s.n, s.mean) == (8, pytest.approx(121 / 8))
    assert s.se == pytest.approx(stats.sem([0, 1, 2, 3, 100, 4, 5, 6]))
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


def coverage(draw: str, n: int, tasks: int = 1, trials: int = 400) -> float:
    """How often the stratified interval of the interquartile mean holds the true one."""
    rng, covered = np.random.default_rng(n), 0
    some = {
        "normal": lambda size: rng.normal(size=size),
        "exponential": lambda size: rng.exponential(size=size),
        "two humps": lambda size: np.where(rng.random(size) < 0.3, rng.normal(100, 5, size), rng.normal(30, 5, size)),
    }[draw]
    true = stats.trim_mean(some(400_000), 0.25)
    for trial in range(trials):
        e = statistics.interquartile_mean([some(n) for _ in range(tasks)], trial, resamples=300)
        covered += e.low <= true <= e.high
    return covered / trials


@pytest.mark.parametrize("draw", ["normal", "exponential", "two humps"])
def test_what_is_said_of_few_scores_was_measured(draw: str) -> None:
    """Two standard errors of a share from 400 trials are 2 to 4.6 %."""
    assert 0.60 < coverage(draw, 3) < 0.84, "said: 65 to 80 %"
    assert 0.81 < coverage(draw, 5) < 0.93, "said: 84 to 91 %"
    assert 0.89 < coverage(draw, 10) < 0.955, "said: about 92 %"
    assert 0.92 < coverage(draw, 40) < 0.975, "nothing is said"


@pytest.mark.parametrize(("seeds", "said"), [(2, 0.70), (3, 0.85)])
def test_what_a_scoreboard_says_of_few_seeds_was_measured(seeds: int, said: float) -> None:
    """Over three tasks; the law of the scores moves it by some 8 % for two seeds."""
    for draw in ("normal", "two humps"):
        assert abs(coverage(draw, seeds, tasks=3) - said) < 0.12


def test_words_stand_where_n_is_small_only() -> None:
    assert caution(1) == "n = 1: one score says nothing about the spread."
    for n, worth in ((2, "half"), (3, "65 to 80 %"), (9, "84 to 91 %"), (19, "about 92 %")):
        assert caution(n).endswith(f"hold the truth {worth} of the time.")
    assert caution(20) == ""


def test_strata_are_resampled_by_themselves() -> None:
    """Two tasks far apart: an interval that mixed them would span the gap."""
    rng = np.random.default_rng(0)
    low, high = rng.normal(0, 1, 30), rng.normal(100, 1, 30)
    stratified = statistics.interquartile_mean([low, high])
    assert stratified.n == 60 and stratified.value == pytest.approx(stats.trim_mean([*low, *high], 0.25))
    mixed = summarise(np.concatenate([low, high]))
    assert stratified.high - stratified.low < 2 < mixed.high - mixed.low
    assert coverage("normal", 15, tasks=3, trials=300) == pytest.approx(0.945, abs=4 * np.sqrt(0.05 * 0.95 / 300))


def test_one_stratum_is_scipy_s_bootstrap() -> None:
    scores = np.random.default_rng(3).gamma(2.0, 10.0, size=50)
    ours, theirs = statistics.interquartile_mean([scores], resamples=20_000), summarise(scores, resamples=20_000)
    assert ours.value == theirs.iqm
    width = theirs.high - theirs.low
    assert abs(ours.low - theirs.low) < 0.03 * width and abs(ours.high - theirs.high) < 0.03 * width


def test_the_probability_of_improvement_is_mann_whitney_s() -> None:
    rng = np.random.default_rng(1)
    ours, other = rng.integers(0, 9, 12).astype(float), rng.integers(0, 8, 15).astype(float)
    u = stats.mannwhitneyu(ours, other).statistic / (12 * 15)
    e = statistics.probability_of_improvement([ours], [other])
    assert e.value == pytest.approx(u) and e.low < u < e.high and e.n == 27
    two = statistics.probability_of_improvement([ours, np.array([1.0])], [other, np.array([0.0])])
    assert two.value == pytest.approx((u + 1) / 2), "tasks count alike"


def test_the_probability_of_improvement_covers_the_known_one() -> None:
    """N(1, 1) against N(0, 1): P = Phi(1 / sqrt 2)."""
    rng, true, covered, trials = np.random.default_rng(2), stats.norm.cdf(1 / np.sqrt(2)), 0, 200
    for trial in range(trials):
        ours, other = rng.normal(1, 1, (2, 25)), rng.normal(0, 1, (2, 25))
        e = statistics.probability_of_improvement(list(ours), list(other), trial, resamples=200)
        covered += e.low <= true <= e.high
    assert abs(covered / trials - 0.94) < 4 * np.sqrt(0.06 * 0.94 / trials)


def test_a_paired_difference_is_scipy_s_and_covers() -> None:
    rng, covered, trials = np.random.default_rng(4), 0, 500
    for _ in range(trials):
        start = rng.normal(0, 50, 8)  # what both share is far larger than what differs
        ours, other = start + rng.normal(2, 1, 8), start + rng.normal(0, 1, 8)
        p = paired(ours, other)
        assert p.low is not None and p.high is not None
        covered += p.low <= 2 <= p.high
    theirs = stats.ttest_rel(ours, other).confidence_interval(0.95)
    assert (p.n, p.low, p.high) == (8, pytest.approx(theirs.low), pytest.approx(theirs.high))
    assert p.se == pytest.approx(stats.sem(ours - other)) and p.se < 1 < float(stats.sem(ours))
    assert abs(covered / trials - 0.95) < 4 * np.sqrt(0.95 * 0.05 / trials)
    assert paired(np.array([3.0]), np.array([1.0])) == statistics.Paired(1, 2.0, None, None, None)


def test_a_profile_is_one_minus_the_distribution_over_tasks() -> None:
    rng = np.random.default_rng(5)
    tasks, thresholds = [rng.normal(size=9), rng.normal(1, 1, size=4)], np.linspace(-3, 4, 15)
    each = [stats.ecdf(scores).sf.evaluate(thresholds) for scores in tasks]
    assert np.allclose(statistics.performance_profile(tasks, thresholds), np.mean(each, axis=0))
