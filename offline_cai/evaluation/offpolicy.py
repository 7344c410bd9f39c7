"""What a policy would earn, estimated from data alone: fitted Q evaluation and weighted importance sampling.

These are estimates, and no substitute for a simulator: fitted Q evaluation trusts a network where data are few, and
importance sampling rests on the few episodes that the policy might have made, as its effective sample size says.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from offline_cai import seeding
from offline_cai.data.codec import Normaliser
from offline_cai.data.trajectories import Trajectories
from offline_cai.errors import Notice, UserError
from offline_cai.evaluation.statistics import Estimate, bootstrapped, standard_error
from offline_cai.networks.mlp import mlp

Act = Callable[[np.ndarray], np.ndarray]
"""Raw actions [N, A] at raw observations [N, O], a function of nothing else."""
_PART = 4096


@dataclass(frozen=True)
class OffPolicy:
    """How a policy is judged from data."""

    discount: float | None = None
    """Discount per step; null: the one that the algorithm was trained with."""
    steps: int = 10000
    """Optimiser steps of fitted Q evaluation."""
    batch_size: int = 256
    """Transitions per step."""
    hidden: tuple[int, ...] = (256, 256)
    """Widths of the Q network's layers; none: linear."""
    learning_rate: float = 1e-3
    """Adam's learning rate at first; it falls to 2 % by half a cosine."""
    target_rate: float = 0.05
    """How far the network of the targets follows in each step. What is left of the first error after all steps is about
    exp(-steps · target_rate · (1 - discount)): 0.7 % with these and a discount of 0.99."""
    seed: int = 0
    """Seed of weights and batches."""

    def __post_init__(self) -> None:
        if self.discount is not None and not 0 <= self.discount < 1:
            raise UserError(f"discount is {self.discount}; an estimate from data needs one in [0, 1).")
        if self.steps < 1 or self.batch_size < 1 or not 0 < self.target_rate <= 1 or not self.learning_rate > 0:
            raise UserError("steps and batch_size have to be at least 1, learning_rate and target_rate positive.")


@dataclass(frozen=True)
class FittedQ:
    """The estimated discounted return from the first states of the data's n episodes; `se` is over these alone.

    `residual` is the root of the mean squared Bellman error on the data, in units of the return.
    """

    n: int
    mean: float
    se: float | None
    residual: float


def fitted_q(data: Trajectories, act: Act, c: OffPolicy, discount: float, quiet: bool = True) -> FittedQ:
    """Fitted Q evaluation (Le, Voloshin & Yue 2019): Q(s, a) regressed on r + discount Q'(s', act(s')).

    Only true ends end a sum; Q' follows Q slowly, and no target is beyond what the data's rewards allow for ever. Q
    begins at the mean return of the data. Batches and weights are functions of the seed.
    """
    left = math.exp(-c.steps * c.target_rate * (1 - discount))
    if left > 0.05:
        text = f"fitted Q evaluation has not settled: {left:.0%} of its first error may be left; take more steps."
        warnings.warn(text, Notice, stacklevel=2)
    first = data.step_rows()
    ends = np.zeros(len(data.rows), dtype=bool)
    ends[data.offsets[1:] - 2] = data.terminal
    obs, reward = torch.from_numpy(np.array(data.obs)), torch.from_numpy(np.array(data.reward))
    onward = torch.from_numpy(discount * ~ends[first]).float()
    taken = data.spec.to_unit(torch.from_numpy(np.array(data.action[first])))
    chosen = data.spec.to_unit(torch.from_numpy(_acts(act, np.asarray(data.obs))).float())
    starts = torch.from_numpy(data.offsets[:-1])
    low, high = (x / (1 - discount) for x in (min(0.0, float(reward.min())), max(0.0, float(reward.max()))))
    normaliser = Normaliser(data.spec.obs_width, "gaussian")
    normaliser.fit(chunk.obs for chunk in data.chunks())
    returns = data.return_to_go(discount)[first]
    centre, scale = float(returns.mean()), float(returns.std()) or 1.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeding.seed_of(c.seed, 0))
        q, slow = (mlp(data.spec.obs_width + data.spec.unit_width, c.hidden, 1) for _ in range(2))
    slow.load_state_dict(q.state_dict())
    optimiser = torch.optim.Adam(q.parameters(), c.learning_rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, c.steps, 0.02 * c.learning_rate)

    def value(network: nn.Module, rows: Tensor, action: Tensor) -> Tensor:
        return centre + scale * network(torch.cat([normaliser.encode(obs[rows]), action], -1))[:, 0]

    def error(items: Tensor) -> Tensor:
        rows = torch.from_numpy(first)[items]
        with torch.no_grad():
            target = reward[rows] + onward[items] * value(slow, rows + 1, chosen[rows + 1])
        return (value(q, rows, taken[items]) - target.clamp(low, high)) / scale

    for step in tqdm(range(c.steps), desc="fitted Q", unit="step", disable=quiet, dynamic_ncols=True):
        items = torch.from_numpy(seeding.rng(c.seed, 1, step).integers(len(first), size=c.batch_size))
        optimiser.zero_grad()
        error(items).square().mean().backward()
        optimiser.step()
        decay.step()
        with torch.no_grad():
            for ours, new in zip(slow.parameters(), q.parameters(), strict=True):
                ours.lerp_(new, c.target_rate)
    with torch.no_grad():
        values = value(slow, starts, chosen[starts]).double().numpy()
        every = torch.arange(len(first)).split(_PART)
        squares = sum(float(error(items).square().sum()) for items in every)
    residual = scale * float(np.sqrt(squares / len(first)))
    return FittedQ(len(values), float(values.mean()), standard_error(values), residual)


def _acts(act: Act, obs: np.ndarray) -> np.ndarray:
    return np.concatenate([act(obs[start : start + _PART]) for start in range(0, len(obs), _PART)])


# Importance sampling -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Importance:
    """Weighted importance sampling over n episodes: the discounted return, weighed by whole episodes and per decision.

    `effective` is the effective sample size of the episodes' weights, from 1 to n: how many episodes the estimate rests
    on. The intervals resample episodes; with an effective size of a few they say nothing.
    """

    n: int
    effective: float
    episodes: Estimate
    decisions: Estimate


def importance(
    log_ratio: Sequence[np.ndarray], reward: Sequence[np.ndarray], discount: float, seed: int = 0, resamples: int = 1000
) -> Importance:
    """Weighted importance sampling (Precup, Sutton & Singh 2000; Thomas 2015).

    Args:
        log_ratio: for each episode log pi(a | s) - log beta(a | s) of its steps [T_i], nats.
        reward: their rewards [T_i]. An episode that has ended keeps its weight, and earns nothing more.
    """
    n, longest = len(reward), max(map(len, reward))
    log_weight, earned = np.zeros((n, longest)), np.zeros((n, longest))
    for i, (ratios, rewards) in enumerate(zip(log_ratio, reward, strict=True)):
        log_weight[i] = np.cumsum(np.pad(np.asarray(ratios, dtype=float), (0, longest - len(ratios))))
        earned[i, : len(rewards)] = np.asarray(rewards, dtype=float) * discount ** np.arange(len(rewards))
    weight = np.exp(log_weight - log_weight.max(0))
    whole, returns = weight[:, -1], earned.sum(1)

    def by_episode(chosen: np.ndarray) -> np.ndarray:
        return _ratio((whole * returns)[chosen].sum(-1), whole[chosen].sum(-1))

    def by_decision(chosen: np.ndarray) -> np.ndarray:
        times = np.stack([np.bincount(row, minlength=n) for row in chosen.reshape(-1, n)])
        found = _ratio(times @ (weight * earned), times @ weight).sum(-1)
        return found.reshape(chosen.shape[:-1])

    effective = float(whole.sum() ** 2 / np.square(whole).sum())
    numbers = np.arange(n)
    return Importance(
        n,
        effective,
        bootstrapped(by_episode, [numbers], seed, resamples),
        bootstrapped(by_decision, [numbers], seed, resamples),
    )


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """0 where all weights of a resample have vanished."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
