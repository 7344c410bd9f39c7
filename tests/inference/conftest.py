"""Independent references: brute-force sums and dense Gaussians, sharing no arithmetic with the package."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from offline_cai.inference.gaussian import LinearGaussian, QuadraticReward
from offline_cai.inference.tabular import MDP

torch.set_num_threads(1)
F64 = torch.float64


def random_mdp(seed, states=3, actions=2, horizon=3, deterministic=False, scale=1.0, forbid=0.0, prior="random"):
    """A small MDP with zeros in its transition, prior and start, and a time-varying reward and prior."""
    rng = np.random.default_rng(seed)

    def rows(*shape):
        p = rng.dirichlet(np.full(shape[-1], 0.7), shape[:-1])
        return np.eye(shape[-1])[p.argmax(-1)] if deterministic else p

    transition, initial = rows(states, actions, states), rows(1, states)[0]
    reward = scale * rng.normal(size=(horizon, states, actions))
    if forbid:
        reward[rng.random(reward.shape) < forbid] = -np.inf
    if prior == "random":
        prior = rng.dirichlet(np.ones(actions), (horizon, states))
        if actions > 2:  # in state 0 one action is never taken, another one in each step
            for t in range(horizon):
                prior[t, 0, t % actions] = 0.0
            prior /= prior.sum(-1, keepdims=True)
    return MDP(transition, reward, initial, prior=prior)


def random_policy(seed, mdp):
    return np.random.default_rng(seed).dirichlet(np.ones(mdp.actions), mdp.table_shape[:-1])


def enumerate_trajectories(mdp, temperature=1.0):
    """Every trajectory `[N, T]` of states and of actions with log p(tau) + reward / temperature, by plain products."""
    horizon = mdp.horizon
    states, actions, weights = [], [], []
    for s in itertools.product(range(mdp.states), repeat=horizon):
        for a in itertools.product(range(mdp.actions), repeat=horizon):
            p = mdp.initial[s[0]]
            reward = 0.0
            for t in range(horizon):
                p *= math.exp(mdp.log_prior[t, s[t], a[t]])
                reward += mdp.reward[t, s[t], a[t]]
                if t + 1 < horizon:
                    p *= mdp.transition[s[t], a[t], s[t + 1]]
            states.append(s)
            actions.append(a)
            weights.append(math.log(p) + reward / temperature if p > 0 else -math.inf)
    return np.array(states), np.array(actions), np.array(weights)


def enumerate_law(mdp, policy, initial=None, dynamics=None):
    """log q(tau) for the same trajectories, in the same order."""
    initial = mdp.initial if initial is None else initial
    values = []
    for s in itertools.product(range(mdp.states), repeat=mdp.horizon):
        for a in itertools.product(range(mdp.actions), repeat=mdp.horizon):
            q = initial[s[0]]
            for t in range(mdp.horizon):
                q *= policy[t, s[t], a[t]]
                if t + 1 < mdp.horizon:
                    step = mdp.transition if dynamics is None else dynamics[t]
                    q *= step[s[t], a[t], s[t + 1]]
            values.append(math.log(q) if q > 0 else -math.inf)
    return np.array(values)


def random_gaussian(seed, n=2, m=1, horizon=5, noise=0.3, spread=1.0, varying=False):
    """A linear-Gaussian process with every term present; noise = 0 makes it deterministic."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=F64, generator=g)

    def spd(*shape):
        a = normal(*shape, shape[-1])
        return a @ a.mT + 0.3 * torch.eye(shape[-1], dtype=F64)

    lead, late = ((horizon,), (horizon - 1,)) if varying else ((), ())
    return LinearGaussian(
        0.9 * torch.eye(n, dtype=F64) + 0.2 * normal(*late, n, n),
        normal(*late, n, m),
        horizon=horizon,
        initial_mean=normal(n),
        initial_covariance=spread * spd(n),
        action_covariance=0.5 * spd(*lead, m),
        noise_covariance=noise * spd(*late, n),
        drift=0.3 * normal(*late, n),
        gain=0.3 * normal(*lead, m, n),
        offset=0.3 * normal(*lead, m),
    )


def random_reward(seed, law, strength=1.0):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(law.horizon, law.dim, law.dim, dtype=F64, generator=g)
    linear = torch.randn(law.horizon, law.dim, dtype=F64, generator=g)
    return QuadraticReward(strength * (a @ a.mT) / law.dim, strength * linear, 0.7)


def dense_prior(law):
    """Mean `[H·D]` and covariance of a law, by pushing every unit of noise through the process one at a time."""
    n, m, H = law.state_dim, law.dim - law.state_dim, law.horizon
    sizes = [n] + [m] * H + [n] * (H - 1)

    def run(e):
        start, *rest = torch.split(e, sizes)
        s = law.initial_mean + law.initial_factor @ start
        rows = []
        for t in range(H):
            a = law.gain[t] @ s + law.offset[t] + law.action_factor[t] @ rest[t]
            rows.append(torch.cat([s, a]))
            if t + 1 < H:
                s = law.dynamics[t] @ rows[-1] + law.drift[t] + law.noise_factor[t] @ rest[H + t]
        return torch.cat(rows)

    total = sum(sizes)
    mean = run(torch.zeros(total, dtype=F64))
    G = torch.stack([run(e) - mean for e in torch.eye(total, dtype=F64)], 1)
    return mean, G @ G.T


def dense_information(law):
    """Precision and its product with the mean, from one row per unit of noise; for laws with no singular covariance."""
    n, D, H = law.state_dim, law.dim, law.horizon
    rows, offsets = [], []

    def unit_noise(factor, at, coefficients, offset):
        """factor^-1 (x[at] - coefficients · earlier - offset) is standard normal."""
        row = torch.zeros(len(offset), H * D, dtype=F64)
        row[:, at : at + len(offset)] = torch.eye(len(offset), dtype=F64)
        if coefficients is not None:
            start, matrix = coefficients
            row[:, start : start + matrix.shape[1]] -= matrix
        rows.append(torch.linalg.solve(factor, row))
        offsets.append(torch.linalg.solve(factor, offset))

    unit_noise(law.initial_factor, 0, None, law.initial_mean)
    for t in range(H):
        unit_noise(law.action_factor[t], t * D + n, (t * D, law.gain[t]), law.offset[t])
        if t + 1 < H:
            unit_noise(law.noise_factor[t], (t + 1) * D, (t * D, law.dynamics[t]), law.drift[t])
    R, r = torch.cat(rows), torch.cat(offsets)
    return R.T @ R, R.T @ r


def dense_condition(mean, covariance, mask, value):
    """p(x | x[mask] = value): mean, covariance and the log-density of the value."""
    inside, gap = covariance[mask][:, mask], value[mask] - mean[mask]
    gain = torch.linalg.solve(inside, covariance[mask]).T
    density = torch.distributions.MultivariateNormal(mean[mask], inside).log_prob(value[mask])
    return mean + gain @ gap, covariance - gain @ covariance[mask], density


def dense_tilt(mean, covariance, S, s, c):
    """The Gaussian times exp(-½ xᵀS x + sᵀx + c), and its log-partition; the covariance may be singular."""
    eye = torch.eye(len(mean), dtype=F64)
    left = torch.linalg.inv(eye + covariance @ S)
    new = left @ covariance
    shifted = s - S @ mean
    log_z = c - 0.5 * mean @ S @ mean + s @ mean + 0.5 * shifted @ new @ shifted
    return mean + new @ shifted, new, log_z - 0.5 * torch.linalg.slogdet(eye + covariance @ S).logabsdet


@pytest.fixture(scope="session")
def ref():
    """The helpers above, as one namespace."""
    names = (random_mdp, random_policy, enumerate_trajectories, enumerate_law, random_gaussian, random_reward)
    return SimpleNamespace(
        **{f.__name__: f for f in (*names, dense_prior, dense_information, dense_condition, dense_tilt)}
    )
