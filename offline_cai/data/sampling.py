"""Which windows a batch is made of: uniform, weighted, of several datasets, or with goals put in hindsight.

A sampler has two halves: `draw(rng, n)` chooses n items, a function of the generator alone, and `gather(items, key)`
makes a Batch of some of them. So every process can draw the same global batch and gather its slice. `Windows` is the
uniform sampler; the others stand on it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from offline_cai.core import Batch
from offline_cai.data.windows import Windows
from offline_cai.errors import UserError
from offline_cai.inference import soft


class Sampler(Protocol):
    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """n items, [n] or [n, ...]."""
        ...

    def gather(self, items: np.ndarray, key: Tensor) -> Batch:
        """The windows of some items [B], with their random keys [B]."""
        ...


def return_weights(returns: np.ndarray, temperature: float) -> np.ndarray:
    """Weights [E] ∝ exp(z / temperature) of whole episodes, z their standardised returns; mean one.

    Raises:
        UserError: a temperature that is not positive.
    """
    if not temperature > 0:
        raise UserError(f"the temperature of return weights is {temperature}; it has to be positive.")
    z = (returns - returns.mean()) / max(float(returns.std()), 1e-12)
    weights = np.exp((z - z.max()) / temperature)
    return weights / weights.mean()


def return_weights_for_kl(returns: np.ndarray, kl_budget: float) -> np.ndarray:
    """Weights [E] ∝ exp(return / temperature) of whole episodes, `kl_budget` nats from all alike; their sum is one.

    Raises:
        UserError: the budget is not positive, or more than this many episodes can express.
    """
    x = torch.from_numpy(returns).double()
    try:
        return soft.posterior_weights(x, soft.temperature_for_kl(x, kl_budget), dim=0).numpy()
    except ValueError as error:
        raise UserError(
            f"kl_budget is {kl_budget} nats between {len(x)} episodes and those of the posterior, which cannot be met: "
            f"it has to be positive and below log({len(x)}) = {math.log(len(x)):.3g}, less where the best returns tie."
        ) from error


class Weighted:
    """Windows drawn with probability ∝ the weight of their episode, for each of its steps.

    Args:
        weights: [E], one for each episode of the store, at least zero.

    Raises:
        UserError: weights of another shape, a negative one, or none above zero.
    """

    def __init__(self, windows: Windows, weights: np.ndarray) -> None:
        data, weights = windows.data, np.asarray(weights, dtype=np.float64)
        if weights.shape != (data.num_episodes,) or not np.isfinite(weights).all() or (weights < 0).any():
            raise UserError(
                f"weights of shape {weights.shape} should be {data.num_episodes} finite numbers, none negative."
            )
        self._windows = windows
        of_rows = np.repeat(weights, np.diff(data.offsets))[windows.starts]
        self._ladder = np.cumsum(of_rows, dtype=np.float64)
        if not self._ladder[-1] > 0:
            raise UserError("every window has weight zero: there is nothing to draw from.")

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        at = np.searchsorted(self._ladder, rng.random(n) * self._ladder[-1], side="right")
        return self._windows.starts[np.minimum(at, len(self._ladder) - 1)]

    def gather(self, items: np.ndarray, key: Tensor) -> Batch:
        return self._windows.gather(items, key)


class Mixture:
    """Several samplers, each giving its share of every batch on average: datasets put together without copying.

    Raises:
        UserError: as many shares as samplers are needed, none negative, one above zero.
    """

    def __init__(self, samplers: Sequence[Sampler], shares: Sequence[float]) -> None:
        if len(samplers) != len(shares) or not samplers or min(shares) < 0 or not sum(shares) > 0:
            raise UserError(
                f"shares {list(shares)} do not fit {len(samplers)} datasets: give each a number, none negative."
            )
        self._samplers = list(samplers)
        self._shapes = [sampler.draw(np.random.default_rng(0), 1).shape[1:] for sampler in samplers]
        self._ladder = np.cumsum(np.array(shares, dtype=float)) / sum(shares)

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """[n, 1 + c]: which sampler, and its item in a row as wide as the widest."""
        which = np.minimum(np.searchsorted(self._ladder, rng.random(n), side="right"), len(self._samplers) - 1)
        items = np.zeros((n, 1 + max(math.prod(shape) for shape in self._shapes)), dtype=np.int64)
        items[:, 0] = which
        for number, (sampler, shape) in enumerate(zip(self._samplers, self._shapes, strict=True)):
            drawn = sampler.draw(rng, n).reshape(n, -1)
            items[which == number, 1 : 1 + math.prod(shape)] = drawn[which == number]
        return items

    def gather(self, items: np.ndarray, key: Tensor) -> Batch:
        order, parts = [], []
        for number, sampler in enumerate(self._samplers):
            at = np.flatnonzero(items[:, 0] == number)
            if len(at):
                order.append(at)
                own = items[at, 1 : 1 + math.prod(self._shapes[number])].reshape(len(at), *self._shapes[number])
                parts.append(sampler.gather(own, key[torch.from_numpy(at)]))
        back = torch.from_numpy(np.argsort(np.concatenate(order)))
        return Batch(*(None if None in column else torch.cat(column)[back] for column in _columns(parts)))  # type: ignore[arg-type]


def _columns(parts: Sequence[Batch]) -> list[list[Tensor | None]]:
    return [[part[i] for part in parts] for i in range(len(Batch._fields))]


Reward = Callable[[Tensor, Tensor], Tensor]
"""Achieved and desired goals [..., G] to rewards [...]."""


class Hindsight:
    """Goals put in hindsight (Andrychowicz et al. 2017, strategy "future"): with some probability a window's goal is
    replaced by what its episode achieved at a later time, uniform from the window's second row to the episode's end.

    Rewards are those of the new goal, at the state after each step; reaching it is no true end. `returns` of a window
    with a new goal sum up to the end of the window. Only for windows of single steps (stride 1).

    Args:
        probability: of a new goal, in [0, 1].
        achieved, desired: names of the fields of the observation.
        reward: of achieved and desired goals.

    Raises:
        UserError: fields of different widths, a stride above one, or a probability outside [0, 1].
    """

    def __init__(
        self,
        windows: Windows,
        probability: float,
        reward: Reward,
        achieved: str = "achieved_goal",
        desired: str = "desired_goal",
    ) -> None:
        spec = windows.data.spec
        self._achieved, self._desired = spec.columns(achieved), spec.columns(desired)
        if len(self._achieved) != len(self._desired) or windows.stride != 1 or not 0 <= probability <= 1:
            raise UserError(
                f"hindsight needs goals of one width (here {len(self._achieved)} and {len(self._desired)}), stride 1 "
                f"(here {windows.stride}) and a probability in [0, 1] (here {probability})."
            )
        self._windows, self._probability, self._reward = windows, probability, reward

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """[n, 2]: the first row, and the row whose achievement becomes the goal, -1 for the goal it had."""
        rows = self._windows.draw(rng, n)
        end = self._windows.data.end[rows]
        future = rows + 1 + (rng.random(n) * (end - rows)).astype(np.int64)
        return np.stack([rows, np.where(rng.random(n) < self._probability, np.minimum(future, end), -1)], axis=1)

    def gather(self, items: np.ndarray, key: Tensor) -> Batch:
        batch = self._windows.gather(items[:, 0].copy(), key)
        new = torch.from_numpy(items[:, 1] >= 0)
        goals = torch.from_numpy(self._windows.data.obs[np.maximum(items[:, 1], 0)][:, self._achieved])
        obs = batch.obs.clone()
        obs[..., self._desired] = torch.where(new[:, None, None], goals[:, None], obs[..., self._desired])
        steps_left = torch.from_numpy(self._windows.data.end[items[:, 0]] - items[:, 0])[:, None]
        inside = torch.arange(batch.reward.shape[1]) < steps_left
        reward = self._reward(obs[:, 1:][..., self._achieved], obs[:, 1:][..., self._desired]) * inside
        to_go = torch.zeros_like(reward)
        total = torch.zeros_like(reward[:, 0])
        for step in reversed(range(reward.shape[1])):
            total = reward[:, step] + self._windows.discount * total
            to_go[:, step] = total
        relabelled = new[:, None]
        return batch._replace(
            obs=obs,
            reward=torch.where(relabelled, reward, batch.reward),
            returns=torch.where(relabelled, to_go, batch.returns),
            terminal=batch.terminal & ~relabelled,
            valid=torch.where(relabelled, inside, batch.valid),
        )
