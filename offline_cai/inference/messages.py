"""Messages over the horizon of a finite MDP, in log space, and the laws they push forward (NumPy only)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np

from offline_cai.inference.mdp import MDP, Array, expect, first, log, logsumexp

Backup = Literal["variational", "posterior"]


def backward_messages(mdp: MDP, temperature: float, backup: Backup) -> tuple[Array, Array, float]:
    """log beta_t(s, a) `[T, S, A]`, log beta_t(s) `[T, S]` and log p(O) (or the best ELBO), in nats.

    Raises:
        ValueError: impossible evidence; a temperature that is not positive or too small; for "variational", a reward
            of -inf that no policy can surely avoid.
    """
    horizon = finite_horizon(mdp, "backward_messages")
    mdp.checked_temperature(temperature)
    q, v = np.empty(mdp.table_shape), np.empty(mdp.table_shape[:-1])
    log_transition = log(mdp.transition)
    ahead = np.zeros(mdp.transition.shape[:2])
    for t in reversed(range(horizon)):
        q[t] = mdp.reward[t] / temperature + ahead
        v[t] = logsumexp(mdp.log_prior[t] + q[t])
        ahead = logsumexp(log_transition + v[t]) if backup == "posterior" else expect(mdp.transition, v[t])
    start = logsumexp(log(mdp.initial) + v[0]) if backup == "posterior" else expect(mdp.initial, v[0])
    return q, v, possible(mdp, v[0], float(start), backup)


def forward_messages(mdp: MDP, temperature: float = 1.0) -> Array:
    """log p(s_t, O_{1:t-1}), `[T, S]`, in nats; adding v_t of the "posterior" backup gives log p(s_t, O_{1:T})."""
    horizon = finite_horizon(mdp, "forward_messages")
    mdp.checked_temperature(temperature)
    messages = np.empty((horizon, mdp.states))
    messages[0] = log(mdp.initial)
    log_transition = log(mdp.transition).reshape(-1, mdp.states).T
    for t in range(horizon - 1):
        joint = messages[t][:, None] + mdp.log_prior[t] + mdp.reward[t] / temperature
        messages[t + 1] = logsumexp(log_transition + joint.ravel())
    return messages


def push_forward(initial: Array, policy: Array, dynamics: Callable[[int], Array]) -> Iterator[Array]:
    """p(s_t, a_t), `[S, A]`, step by step, from p(s_1), a policy `[T, S, A]` and dynamics(t), `[S, A, S]`."""
    state = initial
    for t, row in enumerate(policy):
        joint = state[:, None] * row
        yield joint
        if t < len(policy) - 1:
            state = np.tensordot(joint, dynamics(t), 2)


def finite_horizon(mdp: MDP, caller: str) -> int:
    """The horizon, or a ValueError that says why a discounted MDP has none."""
    if mdp.horizon is None:
        raise ValueError(
            f"mdp: {caller} needs a finite horizon, and this MDP is discounted (a discounted value is the "
            "log-probability of no event, so there is no posterior over trajectories); give horizon, not discount"
        )
    return mdp.horizon


def possible(mdp: MDP, v: Array, log_evidence: float, backup: Backup) -> float:
    """The log-evidence, unless it is -inf: then a ValueError that names a start state."""
    if log_evidence > -np.inf:
        return log_evidence
    state = first((mdp.initial > 0) & (v == -np.inf))[0]
    if backup == "posterior":
        raise ValueError(
            f"reward: impossible evidence, p(O) = 0: from every start state (the first is {state}) each trajectory "
            "that the prior allows meets a reward of -inf; allow one, or use a large finite penalty"
        )
    raise ValueError(
        f"reward: from start state {state} no policy surely avoids a reward of -inf while dynamics and start stay "
        'true, so every ELBO is -inf; use a large finite penalty, or backup="posterior" if p(O) > 0'
    )
