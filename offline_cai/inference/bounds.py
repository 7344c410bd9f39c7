"""What a policy is worth as an approximate posterior: ELBO, KL to the posterior, regularised returns (NumPy only).

    log p(O) = ELBO(q) + KL(q(tau) ‖ p(tau | O))        for every trajectory law q of a finite horizon

The two sides are computed by different routes (a backward pass; forward marginals and the chain rule).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from offline_cai.inference.discounted import evaluate
from offline_cai.inference.mdp import MDP, Array, PriorLike, distribution, expect, kl, log, log_softmax
from offline_cai.inference.messages import backward_messages, finite_horizon, push_forward


def state_action_marginals(mdp: MDP, policy: ArrayLike) -> Array:
    """p(s_t, a_t) of a policy under the true start and dynamics, `[T, S, A]`, no evidence.

    When discounted: the occupancy (1 - discount) Σ_t discount^t p(s_t, a_t), `[S, A]`.
    """
    table = mdp.checked_policy(policy)
    if mdp.discount is not None:
        flow = np.eye(mdp.states) - mdp.discount * np.einsum("sa,sax->sx", table, mdp.transition)
        return (1 - mdp.discount) * np.linalg.solve(flow.T, mdp.initial)[:, None] * table
    return np.array(list(push_forward(mdp.initial, table, lambda t: mdp.transition)))


def elbo(
    mdp: MDP,
    policy: ArrayLike,
    temperature: float = 1.0,
    *,
    initial: ArrayLike | None = None,
    dynamics: ArrayLike | None = None,
) -> float:
    """E_q[ Σ r / temperature + log p(tau) - log q(tau) ] in nats: below log p(O) by KL(q ‖ p(tau | O)).

    q keeps the true start and dynamics unless `initial` `[S]` or `dynamics` `[T-1, S, A, S]` (or `[S, A, S]`) replace
    them. Discounted: the discounted objective whose optimum is `solve(mdp).log_evidence`, for a policy only.

    Raises:
        ValueError: q is malformed, or `initial` / `dynamics` are given with a discount.
    """
    mdp.checked_temperature(temperature)
    table = mdp.checked_policy(policy)
    if mdp.horizon is None:
        if initial is not None or dynamics is not None:
            raise ValueError("dynamics: a discounted objective keeps the true start and dynamics; leave both out")
        return float(expect(mdp.initial, evaluate(mdp, table, temperature)))
    q_initial, q_dynamics = _checked_law(mdp, initial, dynamics)
    ahead: Array = np.zeros(mdp.transition.shape[:2])
    log_transition = log(mdp.transition)
    for t in reversed(range(mdp.horizon)):
        v = expect(table[t], mdp.reward[t] / temperature + ahead) - kl(table[t], mdp.log_prior[t])
        if t > 0:
            ahead = expect(q_dynamics[t - 1], v) - kl(q_dynamics[t - 1], log_transition)
    return float(expect(q_initial, v) - kl(q_initial, log(mdp.initial)))


def kl_to_posterior(
    mdp: MDP,
    policy: ArrayLike,
    temperature: float = 1.0,
    *,
    initial: ArrayLike | None = None,
    dynamics: ArrayLike | None = None,
) -> float:
    """KL(q(tau) ‖ p(tau | O)) in nats by the chain rule over start, actions and transitions; inf where p has no mass.

    q as in `elbo`. Zero is reached by `policy`, `posterior_initial` and `posterior_dynamics` of
    `solve(mdp, temperature, "posterior")` together; a policy alone leaves a gap when there is chance.

    Raises:
        ValueError: impossible evidence, a malformed q, or a discounted MDP (which has no posterior).
    """
    horizon = finite_horizon(mdp, "kl_to_posterior")
    table = mdp.checked_policy(policy)
    q_initial, q_dynamics = _checked_law(mdp, initial, dynamics)
    q, v, _ = backward_messages(mdp, temperature, "posterior")
    log_transition = log(mdp.transition)
    total = kl(q_initial, log_softmax(log(mdp.initial) + v[0]))
    for t, joint in enumerate(push_forward(q_initial, table, lambda t: q_dynamics[t])):
        total = total + expect(joint.sum(-1), kl(table[t], log_softmax(mdp.log_prior[t] + q[t])))
        if t < horizon - 1:
            total = total + expect(joint, kl(q_dynamics[t], log_softmax(log_transition + v[t + 1]))).sum()
    return float(total)


def kl_regularised_objective(mdp: MDP, policy: ArrayLike, temperature: float = 1.0, prior: PriorLike = None) -> float:
    """E[ Σ_t r_t - temperature · KL(policy ‖ prior) ] in units of reward, from the policy's own state marginals.

    `prior` (an old policy, a behaviour, "counting") replaces that of the MDP, which None keeps. Equal to
    temperature · ELBO; the best policy is that of the "variational" backup. Discounted when the MDP is.
    """
    mdp.checked_temperature(temperature)
    table = mdp.checked_policy(policy)
    log_prior = mdp.log_prior if prior is None else mdp.with_prior(prior).log_prior
    weights = state_action_marginals(mdp, table)
    if mdp.discount is not None:
        weights = weights / (1 - mdp.discount)
    return float(expect(weights, mdp.reward).sum() - temperature * expect(weights.sum(-1), kl(table, log_prior)).sum())


def maximum_entropy_objective(mdp: MDP, policy: ArrayLike, temperature: float = 1.0) -> float:
    """E[ Σ_t r_t + temperature · entropy of the policy ] in units of reward: the objective with prior="counting"."""
    return kl_regularised_objective(mdp.with_prior("counting"), policy, temperature)


def _checked_law(mdp: MDP, initial: ArrayLike | None, dynamics: ArrayLike | None) -> tuple[Array, Array]:
    """q(s_1) `[S]` and q(s_{t+1} | s_t, a_t) `[T-1, S, A, S]`, the true ones where None."""
    start = mdp.initial if initial is None else distribution("initial", initial)
    table = mdp.transition if dynamics is None or np.size(dynamics) == 0 else distribution("dynamics", dynamics)
    shape = (finite_horizon(mdp, "a trajectory law") - 1, *mdp.transition.shape)
    if start.shape != mdp.initial.shape:
        raise ValueError(f"initial: expected shape {list(mdp.initial.shape)}, got {list(start.shape)}")
    if table.shape not in (shape, shape[1:]):
        raise ValueError(f"dynamics: expected [T-1, S, A, S] = {list(shape)} or [S, A, S], got {list(table.shape)}")
    return start, np.broadcast_to(table, shape)
