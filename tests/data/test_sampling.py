import numpy as np
import pytest
import torch

from offline_cai import seeding
from offline_cai.core import Batch, Episode, Spec
from offline_cai.data.sampling import Hindsight, Mixture, Sampler, Weighted, return_weights, return_weights_for_kl
from offline_cai.data.trajectories import Trajectories
from offline_cai.data.windows import Windows
from offline_cai.errors import UserError
from offline_cai.training.sources import OfflineSource

RNG = np.random.default_rng


def near(achieved: torch.Tensor, desired: torch.Tensor) -> torch.Tensor:
    return ((achieved - desired).norm(dim=-1) < 1e-3).float()


def test_weights_decide_how_often_a_step_is_drawn(store: Trajectories) -> None:
    windows, weights, n = Windows(store, 1), np.array([1.0, 3.0, 0.0]), 40_000
    rows = Weighted(windows, weights).draw(RNG(0), n)
    counts = np.bincount(np.searchsorted(store.offsets, rows, side="right") - 1, minlength=3)
    expected = weights * store.lengths / (weights * store.lengths).sum()
    assert (np.abs(counts / n - expected) <= 4 * np.sqrt(expected * (1 - expected) / n)).all()
    assert counts[2] == 0 and set(rows) <= set(windows.starts)


def test_return_weights_are_exponential_in_the_standardised_return() -> None:
    w = return_weights(np.array([0.0, 1.0, 2.0]), 0.5)
    assert w.mean() == pytest.approx(1) and np.allclose(np.diff(np.log(w)), 1 / np.std([0, 1, 2]) / 0.5)
    assert np.allclose(return_weights(np.ones(4), 0.1), 1)
    with pytest.raises(UserError, match="has to be positive"):
        return_weights(np.ones(4), 0.0)


def test_weights_for_a_budget_are_that_far_from_all_alike() -> None:
    """Of a Gaussian return the posterior is moved by sqrt(2 · budget) standard deviations."""
    returns = RNG(0).normal(size=100_000) * 300 + 1000
    w = return_weights_for_kl(returns, 0.5)
    assert w.sum() == pytest.approx(1) and (w * np.log(len(w) * w)).sum() == pytest.approx(0.5, rel=1e-6)
    assert (w @ returns - returns.mean()) / returns.std() == pytest.approx(1.0, abs=0.02)
    for wrong in (np.log(3), -1.0):
        with pytest.raises(UserError, match=r"kl_budget is .* positive and below log\(3\) = 1\.1"):
            return_weights_for_kl(np.array([1.0, 2.0, 3.0]), wrong)


@pytest.mark.parametrize("weights", [np.ones(2), np.array([1.0, -1.0, 1.0]), np.array([1.0, np.nan, 1.0]), np.zeros(3)])
def test_weights_that_make_no_sense_are_refused(store: Trajectories, weights: np.ndarray) -> None:
    with pytest.raises(UserError, match="weight"):
        Weighted(Windows(store, 1), weights)


def test_a_mixture_gives_each_dataset_its_share_and_keeps_positions(store: Trajectories, spec: Spec) -> None:
    shifted = Trajectories.from_episodes(spec, [e._replace(obs=e.obs + 100) for e in store.episodes()])
    mixture = Mixture([Windows(store, 2), Windows(shifted, 2)], [1, 3])
    items, n = mixture.draw(RNG(0), 20_000), 20_000
    assert abs(items[:, 0].mean() - 0.75) < 4 * np.sqrt(0.75 * 0.25 / n)
    batch = mixture.gather(items[:50], seeding.keys(0, 0, torch.arange(50)))
    assert torch.equal(batch.key, seeding.keys(0, 0, torch.arange(50)))
    assert ((batch.obs[:, 0, 0] > 50).numpy() == (items[:50, 0] == 1)).all()
    for i in range(50):
        data = (store, shifted)[items[i, 0]]
        assert np.allclose(batch.obs[i, 0], data.obs[items[i, 1]])
    for shares in ([1.0], [0.0, 0.0], [1.0, -1.0]):
        with pytest.raises(UserError, match="do not fit"):
            Mixture([Windows(store, 2), Windows(shifted, 2)], shares)


def test_mixtures_hold_any_sampler(store: Trajectories) -> None:
    windows = Windows(store, 2)
    mixture = Mixture([Hindsight(windows, 0.5, near), Mixture([windows, windows], [1, 1]), windows], [1, 1, 1])
    batch = mixture.gather(mixture.draw(RNG(0), 64), seeding.keys(0, 0, torch.arange(64)))
    assert batch.obs.shape == (64, 3, 8) and torch.isfinite(batch.obs).all()


@pytest.fixture(scope="module")
def walk(spec: Spec) -> Trajectories:
    """Two episodes of 6 steps that achieve their time, with goals far away, rewards of 9 and a true end."""
    episodes = []
    for start in (0.0, 100.0):
        obs = np.zeros((7, 8))
        obs[:, :2] = (start + np.arange(7))[:, None]
        obs[:, 2:4] = -1
        episodes.append(Episode(obs, np.zeros((6, 2)), np.full(6, 9.0), True))
    return Trajectories.from_episodes(spec, episodes)


def test_hindsight_goals_come_from_later_in_the_same_episode(walk: Trajectories) -> None:
    sampler = Hindsight(Windows(walk, 3), 0.7, near)
    items = sampler.draw(RNG(0), 20_000)
    new = items[:, 1] >= 0
    assert abs(new.mean() - 0.7) < 4 * np.sqrt(0.21 / 20_000)
    row, goal = items[new].T
    assert (goal > row).all() and (goal <= walk.end[row]).all()
    from_first = goal[row == 0]
    counts = np.bincount(from_first, minlength=7)[1:]
    assert len(counts) == 6 and (np.abs(counts / len(from_first) - 1 / 6) < 4 * np.sqrt(5 / 36 / len(from_first))).all()


def test_hindsight_rewards_are_those_of_the_new_goal(walk: Trajectories) -> None:
    windows = Windows(walk, 3, discount=0.5)
    batch = Hindsight(windows, 1.0, near).gather(np.array([[1, 3], [1, -1], [5, 6]]), torch.arange(3))
    assert batch.obs[0, :, 2].tolist() == [3, 3, 3, 3] and batch.obs[0, :, 0].tolist() == [1, 2, 3, 4]
    assert batch.reward[0].tolist() == [0, 1, 0] and batch.returns[0].tolist() == [0.5, 1, 0]
    assert not batch.terminal[0].any() and batch.valid[0].all()
    plain = windows.gather(np.array([1]), torch.arange(1))
    for name in ("obs", "reward", "returns", "terminal", "valid"):
        assert torch.equal(getattr(batch, name)[1], getattr(plain, name)[0]), "a window with its own goal is left alone"
    assert batch.reward[2].tolist() == [1, 0, 0] and batch.valid[2].tolist() == [True, False, False]
    assert not batch.terminal[2].any()


def test_hindsight_refuses_what_it_cannot_do(walk: Trajectories, store: Trajectories) -> None:
    for windows, probability in ((Windows(walk, 2, stride=2), 0.5), (Windows(walk, 2), 1.5)):
        with pytest.raises(UserError, match="hindsight needs"):
            Hindsight(windows, probability, near)
    with pytest.raises(UserError, match="hindsight needs goals of one width"):
        Hindsight(Windows(walk, 2), 0.5, near, desired="observation")


def test_every_sampler_is_sliced_by_rank(store: Trajectories, walk: Trajectories) -> None:
    windows = Windows(store, 2)
    samplers: list[Sampler] = [
        windows,
        Weighted(windows, np.ones(3)),
        Mixture([windows, Windows(walk, 2)], [1, 1]),
        Hindsight(Windows(walk, 2), 0.5, near),
    ]
    for sampler in samplers:
        whole = OfflineSource(sampler, 8, seed=1)(5)
        parts = [OfflineSource(sampler, 8, seed=1, rank=rank, processes=2)(5) for rank in range(2)]
        for i, name in enumerate(Batch._fields):
            if whole[i] is not None:
                assert torch.equal(whole[i], torch.cat([part[i] for part in parts])), (type(sampler).__name__, name)
