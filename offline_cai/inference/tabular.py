"""Exact control as inference in a finite MDP: messages, posteriors, bounds (Levine 2018; NumPy only).

    p(tau | O) ∝ p(s_1) Π_t p(a_t | s_t) p(s_{t+1} | s_t, a_t) · exp( Σ_t r(s_t, a_t) / temperature )

Everything is in nats: q and v are log-messages, log beta_t(s, a) = q[t, s, a] and log beta_t(s) = v[t, s]. Two backups,
named for what they are:

- "posterior":   q = r / temperature + log E exp v'. Exact conditioning. Under chance it also conditions the chance on
  success, so its policy seeks risk (`lottery` shows how much).
- "variational": q = r / temperature + E v'. The best policy when start and dynamics are kept true: maximum-entropy RL.

Both agree when start and dynamics are deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from offline_cai.inference import discounted
from offline_cai.inference.bounds import (
    elbo,
    kl_regularised_objective,
    kl_to_posterior,
    maximum_entropy_objective,
    state_action_marginals,
)
from offline_cai.inference.mdp import MDP, Array, expect, log, positive, softmax
from offline_cai.inference.messages import (
    Backup,
    backward_messages,
    finite_horizon,
    forward_messages,
    possible,
    push_forward,
)

__all__ = [
    "MDP",
    "Solution",
    "Trajectory",
    "elbo",
    "forward_messages",
    "kl_regularised_objective",
    "kl_to_posterior",
    "maximum_entropy_objective",
    "most_probable_trajectory",
    "policy_iteration",
    "solve",
    "state_action_marginals",
    "value_iteration",
]

Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Solution:
    """Messages and the trajectory law they define: `posterior_initial`, `policy`, `posterior_dynamics`.

    Attributes:
        q: log beta_t(s, a), `[T, S, A]` (`[S, A]` when discounted), nats.
        v: log beta_t(s), `[T, S]` (`[S]`), nats.
        policy: p(a_t | s_t, O_{t:T}) = prior · exp(q - v), `[T, S, A]` (`[S, A]`). In a state from which success is
            impossible (v = -inf) there is nothing to condition on, and the row is the prior.
        log_evidence: "posterior": log p(O_{1:T}), a log-partition where rewards are positive. "variational": the
            largest ELBO, E v_1 over the start.
    """

    mdp: MDP
    temperature: float
    backup: Backup
    q: Array
    v: Array
    policy: Array
    log_evidence: float

    @cached_property
    def posterior_initial(self) -> Array:
        """p(s_1 | O), `[S]`; the true start under the variational backup."""
        if self.backup == "variational":
            return self.mdp.initial
        return softmax(log(self.mdp.initial) + self.v[0], self.mdp.initial)

    @cached_property
    def posterior_dynamics(self) -> Array:
        """p(s_{t+1} | s_t, a_t, O), `[T-1, S, A, S]`; the true ones (`[S, A, S]` if discounted) if variational."""
        if self.mdp.horizon is None:
            return self.mdp.transition
        shape = (self.mdp.horizon - 1, *self.mdp.transition.shape)
        if self.backup == "variational":
            return np.broadcast_to(self.mdp.transition, shape)
        return np.array([self.dynamics_at(t) for t in range(self.mdp.horizon - 1)]).reshape(shape)

    def dynamics_at(self, t: int) -> Array:
        """One step of `posterior_dynamics`, `[S, A, S]`, for horizons whose whole table would not fit."""
        if self.backup == "variational":
            return self.mdp.transition
        return softmax(log(self.mdp.transition) + self.v[t + 1], self.mdp.transition)

    def marginals(self) -> Array:
        """p(s_t, a_t | O_{1:T}), `[T, S, A]`; the normalised discounted occupancy `[S, A]` when discounted."""
        if self.mdp.horizon is None:
            return state_action_marginals(self.mdp, self.policy)
        return np.array(list(push_forward(self.posterior_initial, self.policy, self.dynamics_at)))

    def sample(self, n: int, seed: int | np.random.Generator) -> tuple[Indices, Indices]:
        """n trajectories of the law: states `[n, T]` and actions `[n, T]`."""
        horizon = finite_horizon(self.mdp, "sample")
        rng = np.random.default_rng(seed)
        states, actions = np.empty((2, n, horizon), np.int64)
        state = _draw(np.broadcast_to(self.posterior_initial, (n, self.mdp.states)), rng)
        for t in range(horizon):
            states[:, t] = state
            actions[:, t] = action = _draw(self.policy[t, state], rng)
            if t < horizon - 1:
                state = _draw(self.dynamics_at(t)[state, action], rng)
        return states, actions

    def log_prob(self, states: ArrayLike, actions: ArrayLike) -> Array:
        """log p(tau | O) in nats of trajectories `[..., T]` under the law; -inf where it has no mass."""
        horizon = finite_horizon(self.mdp, "log_prob")
        s, a = _checked_indices(self.mdp, states, actions)
        total = log(self.posterior_initial)[s[..., 0]]
        for t in range(horizon):
            total = total + log(self.policy[t, s[..., t], a[..., t]])
            if t < horizon - 1:
                total = total + log(self.dynamics_at(t)[s[..., t], a[..., t], s[..., t + 1]])
        return total


class Trajectory(NamedTuple):
    """states `[T]`, actions `[T]` and log p(tau, O) in nats; subtract log_evidence for log p(tau | O)."""

    states: Indices
    actions: Indices
    log_joint: float


def solve(mdp: MDP, temperature: float = 1.0, backup: Backup = "variational") -> Solution:
    """Backward messages over the horizon, O(T · S² · A); when the MDP is discounted, `policy_iteration`.

    Temperature is in units of reward per nat. Levine 2018: "posterior" is exact inference (section 2.3), "variational"
    is the structured family that keeps the dynamics (section 3).

    Raises:
        ValueError: impossible evidence (p(O) = 0; or, for "variational", a -inf that no policy can avoid), a
            temperature that is not positive or too small, an unknown backup, or "posterior" with a discount.
    """
    mdp.checked_temperature(temperature)
    if backup not in ("variational", "posterior"):
        raise ValueError(f'backup: expected "variational" or "posterior", got "{backup}"')
    if mdp.horizon is None:
        if backup == "posterior":
            raise ValueError(
                "backup: a discounted value is the log-probability of no event, so there is nothing to condition on; "
                'use backup="variational", or a finite horizon (an absorbing state reached with probability '
                "1 - discount makes the same preference an event)"
            )
        return policy_iteration(mdp, temperature)
    q, v, log_evidence = backward_messages(mdp, temperature, backup)
    return _solution(mdp, temperature, backup, q, v, log_evidence)


def value_iteration(mdp: MDP, temperature: float = 1.0, tolerance: float = 1e-12) -> Solution:
    """Discounted soft value iteration, within tolerance · max(1, |v|) of the fixed point by the contraction bound.

    About log(1 / tolerance) / (1 - discount) sweeps. Rounding adds up as well: v is no closer than about
    2e-16 / (1 - discount) · |v| however small the tolerance. `policy_iteration` is faster with a discount near one.

    Raises:
        ValueError: a temperature or tolerance that is not positive, no discount, a -inf that no policy can avoid.
    """
    v = discounted.iterate_values(mdp, mdp.checked_temperature(temperature), positive("tolerance", tolerance))
    return _discounted_solution(mdp, temperature, v)


def policy_iteration(mdp: MDP, temperature: float = 1.0, tolerance: float = 1e-12) -> Solution:
    """Discounted soft policy iteration to the same fixed point: few rounds, each with an `[S, S]` linear solve.

    Raises:
        ValueError: a temperature or tolerance that is not positive, no discount, a -inf that no policy can avoid.
    """
    v = discounted.iterate_policies(mdp, mdp.checked_temperature(temperature), positive("tolerance", tolerance))
    return _discounted_solution(mdp, temperature, v)


def most_probable_trajectory(mdp: MDP, temperature: float = 1.0) -> Trajectory:
    """argmax over tau of p(tau | O) by max-product messages; ties go to the lower index.

    Raises:
        ValueError: impossible evidence, or a discounted MDP.
    """
    horizon = finite_horizon(mdp, "most_probable_trajectory")
    mdp.checked_temperature(temperature)
    best_action = np.empty((horizon, mdp.states), np.int64)
    best_next = np.zeros((horizon, mdp.states, mdp.actions), np.int64)
    log_transition, best = log(mdp.transition), np.zeros(mdp.states)
    for t in reversed(range(horizon)):
        onward = log_transition + best if t < horizon - 1 else np.zeros((*mdp.table_shape[1:], 1))
        best_next[t] = onward.argmax(-1)
        score = mdp.log_prior[t] + mdp.reward[t] / temperature + onward.max(-1)
        best_action[t], best = score.argmax(-1), score.max(-1)
    start = log(mdp.initial) + best
    states, actions = np.empty((2, horizon), np.int64)
    state = int(start.argmax())
    for t in range(horizon):
        states[t], actions[t] = state, best_action[t, state]
        state = int(best_next[t, state, actions[t]])
    return Trajectory(states, actions, possible(mdp, best, float(start.max()), "posterior"))


def _discounted_solution(mdp: MDP, temperature: float, v: Array) -> Solution:
    q, v = discounted.backup(mdp, v, temperature)
    log_evidence = possible(mdp, v, float(expect(mdp.initial, v)), "variational")
    return _solution(mdp, temperature, "variational", q, v, log_evidence)


def _solution(mdp: MDP, temperature: float, backup: Backup, q: Array, v: Array, log_evidence: float) -> Solution:
    policy = softmax(mdp.log_prior + q, np.exp(mdp.log_prior))
    return Solution(mdp, temperature, backup, q, v, policy, log_evidence)


def _draw(p: Array, rng: np.random.Generator) -> Indices:
    """One index per row of probabilities `[n, K]`; an index of probability zero is never drawn."""
    ladder = p.cumsum(-1)
    return (ladder <= rng.random((len(p), 1)) * ladder[:, -1:]).sum(-1)


def _checked_indices(mdp: MDP, states: ArrayLike, actions: ArrayLike) -> tuple[Indices, Indices]:
    tables = []
    for name, given, count in (("states", states, mdp.states), ("actions", actions, mdp.actions)):
        table = np.asarray(given, np.int64)
        if table.ndim == 0 or table.shape[-1] != mdp.horizon:
            raise ValueError(f"{name}: expected shape [..., T] with T = {mdp.horizon}, got {list(table.shape)}")
        if table.size and not (table.min() >= 0 and table.max() < count):
            raise ValueError(f"{name}: indices must lie in 0..{count - 1}, got {table.min()}..{table.max()}")
        tables.append(table)
    return tables[0], tables[1]
