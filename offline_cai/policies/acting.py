"""What algorithms with an actor have in common: a normaliser, pi(a | s), and how it acts."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offline_cai import seeding
from offline_cai.core import Batch, Chunks, Explorer, Spec
from offline_cai.data.codec import Normaliser, NormaliserKind
from offline_cai.errors import UserError
from offline_cai.policies.distributions import Distribution
from offline_cai.policies.networks import Actor


def check_bootstrap(discount: float, tau: float) -> None:
    """For the `__post_init__` of a config with critics that bootstrap from slow copies.

    Raises:
        UserError: a discount out of [0, 1), or a share out of (0, 1].
    """
    if not 0 <= discount < 1 or not 0 < tau <= 1:
        raise UserError("discount has to be in [0, 1), tau in (0, 1].")


def check_trace(discount: float, trace: float) -> None:
    """For the `__post_init__` of a config with returns or advantages that a trace (lambda) weighs.

    Raises:
        UserError: one of the two is out of [0, 1].
    """
    if not 0 <= discount <= 1 or not 0 <= trace <= 1:
        raise UserError("discount and trace have to be in [0, 1].")


class ActorAlgorithm(Explorer):
    """An algorithm that acts by `actor`, from observations that `normaliser` encodes."""

    normaliser: Normaliser
    actor: Actor
    no_density: str | None = None
    """Why pi(a | s) has no density to judge it by, in words; None: it has one."""

    def __init__(self, spec: Spec, config: Any, normaliser: NormaliserKind) -> None:
        super().__init__(spec, config)
        self.normaliser = Normaliser(spec.obs_width, normaliser)

    def fit(self, chunks: Chunks) -> None:
        self.normaliser.fit(chunk.obs for chunk in chunks())

    def now(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What a window begins with: encoded observations [B, O] and unit actions [B, U]."""
        return self.normaliser.encode(batch.obs[:, 0]), self.spec.to_unit(batch.action[:, 0, 0])

    def pi(self, obs: np.ndarray) -> Distribution:
        """pi(a | s) at raw observations [N, O]."""
        like = next(self.actor.parameters())
        return self.actor(self.normaliser.encode(torch.as_tensor(obs, dtype=like.dtype, device=like.device)))

    @torch.no_grad()
    def explore(self, obs: np.ndarray, key: Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        return _raw(self.spec, *self.pi(obs).sample(key.to(self.normaliser.shift.device)))

    def policy(self, seed: int = 0, stochastic: bool = False, **options: Any) -> "ActorPolicy":
        """A policy that acts by the mode of pi, or by its samples."""
        return ActorPolicy(self.spec, self.pi, seed, stochastic)


class OfflineActorAlgorithm(ActorAlgorithm):
    """One that learns values from data, in units of the data's returns.

    A network of values gives z, and the value is mean + spread · z, by the data's discounted returns-to-go. So it
    begins at the mean return: a critic that bootstraps from zero needs thousands of updates to come near it.
    """

    returns: Normaliser

    def __init__(self, spec: Spec, config: Any, normaliser: NormaliserKind) -> None:
        super().__init__(spec, config, normaliser)
        self.returns = Normaliser(1, "gaussian")

    def fit(self, chunks: Chunks) -> None:
        super().fit(chunks)
        self.returns.fit(chunk.returns[:, None] for chunk in chunks(self.needs.discount))


class ActorPolicy:
    """A `Policy` that acts by the mode of a distribution, or by samples of it.

    Samples are functions of (seed, environment, episode, step), whatever runs beside them.

    Args:
        pi: the distribution at raw observations [N, O].
        stochastic: by samples, with their log-probabilities if pi knows them.
    """

    def __init__(
        self, spec: Spec, pi: Callable[[np.ndarray], Distribution], seed: int = 0, stochastic: bool = False
    ) -> None:
        self._spec, self._pi, self._seed, self._stochastic = spec, pi, seed, stochastic
        self._episode = self._time = np.zeros(0, dtype=np.int64)

    def reset(self, done: np.ndarray | None = None) -> None:
        if done is None:
            self._episode = self._time = np.zeros(0, dtype=np.int64)
        elif len(self._episode):
            self._episode[done] += 1
            self._time[done] = 0

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        pi = self._pi(obs)
        if not self._stochastic:
            return self._spec.to_raw(pi.mode).cpu().numpy(), None
        if not len(self._episode):
            self._episode, self._time = np.zeros(len(obs), dtype=np.int64), np.zeros(len(obs), dtype=np.int64)
        numbers = zip(range(len(obs)), self._episode.tolist(), self._time.tolist(), strict=True)
        key = torch.tensor([seeding.key(self._seed, *parts) for parts in numbers], device=pi.mode.device)
        self._time += 1
        return _raw(self._spec, *pi.sample(key))


def _raw(spec: Spec, unit: Tensor, log_prob: Tensor | None) -> tuple[np.ndarray, np.ndarray | None]:
    return spec.to_raw(unit).cpu().numpy(), None if log_prob is None else log_prob.cpu().numpy()
