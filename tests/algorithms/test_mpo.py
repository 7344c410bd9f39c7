"""MPO's E-step and M-step against sums, its duals against their budgets, its targets by hand, and Riccati's gain."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch

from offline_cai import seeding
from offline_cai.algorithms.mpo import MPO, MPOConfig
from offline_cai.core import Batch, Episode, Spec
from offline_cai.data import arrays
from offline_cai.data.trajectories import Trajectories
from offline_cai.environments.make import env_spec
from offline_cai.errors import UserError
from offline_cai.inference import soft
from offline_cai.training import checkpoint, experiment, loop, trackers

Q = torch.tensor([[0.0, 1.0, -0.5, 0.3], [2.0, 1.0, 3.0, -1.0]])
PRIOR = torch.tensor([[0.1, 0.2, 0.6, 0.1], [0.4, 0.3, 0.1, 0.2]])
NO_LIMITS = {"mean_limit": None, "std_limit": None, "choice_limit": None}


def table(small: SimpleNamespace, **settings: object) -> tuple[MPO, Batch]:
    """Two states and four actions, with PRIOR as the previous policy and Q as its critic; one step from each state."""
    torch.manual_seed(0)
    algorithm = MPO(small.choices(2, 4), MPOConfig(hidden=(), **settings))  # type: ignore[arg-type]
    with torch.no_grad():
        for network, values in ((algorithm.old.body, PRIOR.log()), (algorithm.target.each[0], Q)):
            ((weight, bias),) = network.layers
            weight.copy_(values)
            bias.zero_()
        algorithm.actor.load_state_dict(algorithm.old.state_dict())
    return algorithm, small.bandit(np.ones((2, 4), dtype=int), Q.numpy())


@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_both_steps_give_prior_times_exp_q(temperature: float, small: SimpleNamespace) -> None:
    """Without limits: the E-step's weights, their nats, and the policy that the M-step fits to them."""
    algorithm, batch = table(small, temperature=temperature, **NO_LIMITS)
    exact = PRIOR * torch.exp(Q / temperature)
    exact = exact / exact.sum(-1, keepdim=True)
    weight, spent = algorithm.posterior(algorithm.old(torch.eye(2)).draw(torch.zeros(2, dtype=torch.int64)), Q.T)
    torch.testing.assert_close(weight.T, exact)
    torch.testing.assert_close(spent, (exact * (exact / PRIOR).log()).sum(-1))
    state = small.state_of(algorithm, learning_rate=0.1, steps=500)
    for step in range(500):
        state.set_learning_rates(step)
        state(batch, "actor")
    torch.testing.assert_close(algorithm.actor(torch.eye(2)).log_p.exp(), exact, rtol=0, atol=2e-3)


def test_its_temperature_spends_the_budget(small: SimpleNamespace) -> None:
    """The nats of the E-step meet the budget within 1 %; for equal priors that is the root of its own equation."""
    algorithm, batch = table(small, kl_budget=0.2, **NO_LIMITS)
    state = small.state_of(algorithm, learning_rate=0.05, steps=200)
    for equal in (False, True):
        if equal:
            algorithm.old.body.layers[-1][0].zero_()
        for step in range(200):
            state.set_learning_rates(step)
            spent = state(batch, "actor")["kl"]
            state(batch, "dual")
        assert spent == pytest.approx(0.2, rel=0.01)
    assert algorithm.dial.temperature == pytest.approx(float(soft.temperature_for_kl(Q, 0.2)), rel=0.01)


@pytest.mark.parametrize(("kind", "limits"), [("box", {"mean": 0.02, "std": 0.003}), ("choices", {"choice": 0.02})])
def test_the_m_step_stays_within_its_limits(kind: str, limits: dict[str, float], small: SimpleNamespace) -> None:
    """A fixed E-step that wants more than they allow: each KL ends at its limit, and without limits far beyond."""
    reached = {}
    for on in (True, False):
        torch.manual_seed(0)
        own = {f"{part}_limit": limit for part, limit in limits.items()} if on else NO_LIMITS
        algorithm = MPO(getattr(small, kind)(1, 2), MPOConfig(hidden=(8,), temperature=0.01, **own))  # type: ignore
        batch = small.random_batch(algorithm.spec, 64)
        batch = batch._replace(obs=torch.ones_like(batch.obs))
        state = small.state_of(algorithm, learning_rate=0.03, steps=300)
        for step in range(300):
            state.set_learning_rates(step)
            metrics = state(batch, "actor")
            if on:
                state(batch, "dual")
        reached[on] = {part: metrics[f"{part}_kl"] for part in limits}
    for part, limit in limits.items():
        assert reached[True][part] < 1.15 * limit and reached[False][part] > 1.5 * limit, (part, reached)


def test_the_m_step_fits_mean_and_spread_each_by_itself(small: SimpleNamespace) -> None:
    """One state, no limits: the weighted mean of u, and its weighted spread about the previous mean."""
    torch.manual_seed(0)
    algorithm = MPO(small.box(1, 1), MPOConfig(hidden=(), temperature=0.05, **NO_LIMITS))  # type: ignore[arg-type]
    batch = small.random_batch(algorithm.spec, 256)
    batch = batch._replace(obs=torch.ones_like(batch.obs))
    old, draw, weight, _ = algorithm._e_step(batch.obs[:, 0], batch.key)
    u = torch.atanh(draw.action.clamp(-1 + 1e-6, 1 - 1e-6))[..., 0]
    mean, spread = (weight * u).sum() / 256, ((weight * (u - old.mean[:, 0]).square()).sum() / 256).sqrt()  # type: ignore
    state = small.state_of(algorithm, learning_rate=0.05, steps=300)
    for step in range(300):
        state.set_learning_rates(step)
        state(batch, "actor")
    pi = algorithm.actor(torch.ones(1, 1))
    assert pi.mean.item() == pytest.approx(float(mean), abs=2e-3) and abs(mean - old.mean[0, 0]) > 0.1  # type: ignore
    assert pi.std.item() == pytest.approx(float(spread), rel=2e-3)  # type: ignore[union-attr]


def window(small: SimpleNamespace, spec: Spec) -> Batch:
    """Four windows of three steps: whole, with a true end, cut after two steps, and cut after one."""
    batch = small.random_batch(spec, 4, horizon=3)
    terminal, valid = torch.zeros(4, 3, dtype=torch.bool), torch.ones(4, 3, dtype=torch.bool)
    terminal[1, 1], valid[1, 2], valid[2, 2], valid[3, 1:] = True, False, False, False
    obs = batch.obs.clone()
    obs[2, 3], obs[3, 2:] = obs[2, 2], obs[3, 1]
    return batch._replace(obs=obs, terminal=terminal, valid=valid)


@pytest.mark.parametrize("kind", ["box", "choices"])
def test_its_targets_are_those_written_by_hand(kind: str, small: SimpleNamespace, float64: None) -> None:
    """n steps: up to a true end or a cut. Retrace: one step where the behaviour is unknown, else cut ratios."""
    torch.manual_seed(0)
    algorithm = MPO(getattr(small, kind)(3, 2), MPOConfig(hidden=(8,), horizon=3, discount=0.9, critic="n_step"))
    batch = window(small, algorithm.spec)
    obs, r, action = batch.obs, batch.reward, algorithm.spec.to_unit(batch.action[:, :, 0])

    def value(b: int, t: int, key: torch.Tensor) -> torch.Tensor:
        return algorithm._expected(obs[b : b + 1, t], key[None])[0]

    n_step = algorithm._n_step(batch, obs, action)[:, 0]
    after = [value(b, t, batch.key[b]) for b, t in ((0, 3), (1, 2), (2, 2), (3, 1))]
    torch.testing.assert_close(n_step[0], r[0] @ torch.tensor([1, 0.9, 0.81]) + 0.729 * after[0])
    torch.testing.assert_close(n_step[1], r[1, 0] + 0.9 * r[1, 1])
    torch.testing.assert_close(n_step[2], r[2, 0] + 0.9 * r[2, 1] + 0.81 * after[2])
    torch.testing.assert_close(n_step[3], r[3, 0] + 0.9 * after[3])

    keys = seeding.split(batch.key, 3)
    one = algorithm._retrace(batch, obs, action)
    for b, t in ((0, 0), (0, 1), (0, 2), (2, 1), (3, 0)):
        torch.testing.assert_close(one[b, t], r[b, t] + 0.9 * value(b, t + 1, keys[b, t]))
    torch.testing.assert_close(one[1, 1], r[1, 1])
    assert not one[~batch.valid].any()

    own = algorithm.old(obs[:, :-1]).log_prob(action)
    known = algorithm._retrace(batch._replace(log_prob=(own + 0.5)[:, :, None]), obs, action)
    q, c = algorithm.target(obs[:, :-1], action)[0], math.exp(-0.5)
    torch.testing.assert_close(known[2, 0], one[2, 0] + 0.9 * c * (one[2, 1] - q[2, 1]))
    surer = algorithm._retrace(batch._replace(log_prob=(own - 0.5)[:, :, None]), obs, action)
    torch.testing.assert_close(surer[2, 0], one[2, 0] + 0.9 * (one[2, 1] - q[2, 1]))


@pytest.mark.parametrize("kind", ["box", "choices"])
@pytest.mark.parametrize("critic", ["retrace", "n_step"])
def test_its_gradients_are_those_of_its_losses(kind: str, critic: str, small: SimpleNamespace, float64: None) -> None:
    torch.manual_seed(0)
    config = MPOConfig(hidden=(8,), horizon=3, temperature=0.5, critic=critic)  # type: ignore[arg-type]
    algorithm = MPO(getattr(small, kind)(3, 2), config)
    algorithm.old.body.layers[0][0].mul_(0.5)
    batch = window(small, algorithm.spec)
    small.assert_gradients(algorithm, batch, "critic", "critic.")
    small.assert_gradients(algorithm, batch, "actor", "actor.")
    small.assert_gradients(algorithm, batch, "dual", "multiplier.")


def test_it_approaches_the_stationary_riccati_policy(small: SimpleNamespace) -> None:
    """s' = s + a / 2 + noise: the return of the mode within 8 % of the optimal gain's on the same noise (4 % here)."""
    discount, cost, push, noise, riccati = 0.9, 0.1, 0.5, 0.05, 1.0
    for _ in range(500):
        gain = discount * push * riccati / (cost + discount * push**2 * riccati)
        riccati = 1 + discount * riccati * (1 - push * gain)
    torch.manual_seed(0)
    limits = {"mean_limit": 0.02, "std_limit": 0.0005, "period": 10}
    config = MPOConfig(hidden=(32, 32), discount=discount, critic="n_step", horizon=1, samples=10, **limits)  # type: ignore
    algorithm = MPO(small.box(1, 1, bound=3.0), config)
    rates = {"critic": 0.005, "actor": 0.005, "dual": 0.025}
    state, rng = small.state_of(algorithm, learning_rate=rates, steps=600), np.random.default_rng(0)
    for step in range(600):
        s, a = rng.uniform(-1.5, 1.5, (64, 1)), rng.uniform(-2.5, 2.5, (64, 1))
        after, reward = s + push * a + noise * rng.normal(size=s.shape), -(s**2) - cost * a**2
        columns = (torch.as_tensor(x) for x in (np.stack([s, after], 1), a[:, None], reward))
        state.set_learning_rates(step)
        algorithm.update(small.windows(*columns, torch.zeros(64, 1, dtype=torch.bool), step), state)

    def score(act: Callable[[np.ndarray], np.ndarray]) -> float:
        rng = np.random.default_rng(1)
        s, total = rng.uniform(-1, 1, (300, 1)), 0.0
        for t in range(60):
            a = act(s)
            total -= discount**t * float((s**2 + cost * a**2).mean())
            s = s + push * a + noise * rng.normal(size=s.shape)
        return total

    best, nothing = score(lambda s: -gain * s), score(lambda s: 0 * s)
    found = score(lambda s: algorithm.policy().act(s)[0])
    assert best >= found > 1.08 * best and nothing < 3 * best


def test_it_starts_from_a_dataset_in_its_buffer(tmp_path: Path) -> None:
    """Episodes without log-probabilities beside its own steps, which have them; the normaliser is the dataset's."""
    env, rng, episodes = gym.make("Pendulum-v1"), np.random.default_rng(0), []
    for seed in range(2):
        obs, action, reward = [env.reset(seed=seed)[0]], rng.uniform(-2, 2, (50, 1)).astype(np.float32), []
        for a in action:
            after, r, *_ = env.step(a)
            obs.append(after)
            reward.append(r)
        episodes.append(Episode(np.array(obs), action, np.array(reward), False))
    path = arrays.write(tmp_path / "pendulum.npz", Trajectories.from_episodes(env_spec(env), episodes))
    flags = {"dataset": str(path), "model.normaliser": "gaussian", "training.trackers": "[]", "training.log_every": "1"}
    debug = experiment.load("debug-mpo", flags)
    run = loop.train(debug, tmp_path / "run", quiet=True).parents[1]
    mean = np.concatenate([episode.obs for episode in episodes]).mean(0)
    assert np.allclose(checkpoint.load(run).normaliser.shift, mean, atol=0.2)  # type: ignore[union-attr]
    assert all(np.isfinite(row["critic_loss"]) for row in trackers.read(run / "metrics.jsonl") if "critic_loss" in row)


def test_wrong_settings_are_said() -> None:
    with pytest.raises(UserError, match="std_limit is 0; it has to be positive, or null for no limit"):
        MPOConfig(std_limit=0)
    with pytest.raises(UserError, match="samples, period and horizon"):
        MPOConfig(period=0)
