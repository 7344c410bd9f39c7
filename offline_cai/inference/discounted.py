"""Fixed points of the discounted soft backup (NumPy only): q = r / temperature + discount · E v, v = log Σ prior exp q.

The backup contracts by the discount in the sup-norm, so both iterations below know how far from v* they are. -inf marks
states that no policy leads surely around a reward of -inf.
"""

from __future__ import annotations

import math

import numpy as np

from offline_cai.inference.mdp import MDP, Array, expect, kl, logsumexp, softmax

EPS = float(np.finfo(np.float64).eps)


def backup(mdp: MDP, v: Array, temperature: float) -> tuple[Array, Array]:
    """One soft backup: q `[S, A]` and the new v `[S]`, nats."""
    q = mdp.reward / temperature + discount_of(mdp) * expect(mdp.transition, v)
    return q, logsumexp(mdp.log_prior + q)


def iterate_values(mdp: MDP, temperature: float, tolerance: float) -> Array:
    """v* by repeating the backup until discount / (1 - discount) · |last change| ≤ tolerance · max(1, |v|).

    Never more sweeps than the contraction needs to bring the change down to rounding.
    """
    discount = discount_of(mdp)
    v = np.zeros(mdp.states)
    for _ in range(mdp.states + math.ceil(math.log(EPS) / math.log(max(discount, 0.5)))):
        _, new = backup(mdp, v, temperature)
        change, v = distance(new, v), new
        if discount * change <= tolerance * (1 - discount) * size(v):
            break
    return v


def iterate_policies(mdp: MDP, temperature: float, tolerance: float) -> Array:
    """v* by evaluating (a linear solve) and improving until |backup(v) - v| / (1 - discount) ≤ tolerance · max(1, |v|).

    Few rounds even with a discount near one; also stops when rounding ends the improvement.
    """
    v = np.zeros(mdp.states)
    for _ in range(mdp.states):  # settles which states cannot avoid a reward of -inf
        q, v = backup(mdp, v, temperature)
    error = np.inf
    while True:
        evaluated = evaluate(mdp, softmax(mdp.log_prior + q, np.exp(mdp.log_prior)), temperature)
        q, improved = backup(mdp, evaluated, temperature)
        previous, error = error, distance(improved, evaluated) / (1 - discount_of(mdp))
        if error <= tolerance * size(evaluated) or error >= previous:
            return evaluated


def evaluate(mdp: MDP, policy: Array, temperature: float) -> Array:
    """E Σ_t discount^t (r / temperature - KL(policy ‖ prior)) from each state, `[S]`, nats, by a linear solve."""
    gain = expect(policy, np.broadcast_to(mdp.reward / temperature, policy.shape)) - kl(policy, mdp.log_prior)
    flow = np.einsum("sa,sax->sx", policy, mdp.transition)
    bad = ~np.isfinite(gain)
    for _ in range(mdp.states):
        bad = bad | (flow[:, bad].sum(-1) > 0)
    v, good = np.full(mdp.states, -np.inf), ~bad
    system = np.eye(int(good.sum())) - discount_of(mdp) * flow[np.ix_(good, good)]
    v[good] = np.linalg.solve(system, gain[good])
    return v


def discount_of(mdp: MDP) -> float:
    """The discount, or a ValueError."""
    if mdp.discount is None:
        raise ValueError("mdp: this iteration is for a discounted MDP; use solve for a finite horizon")
    return mdp.discount


def distance(new: Array, old: Array) -> float:
    """The sup-norm of the change; inf while the set of -inf states still grows."""
    finite = np.isfinite(new)
    if (finite != np.isfinite(old)).any():
        return np.inf
    return float(abs(new[finite] - old[finite]).max(initial=0.0))


def size(v: Array) -> float:
    """max(1, |v|), what a relative tolerance is relative to."""
    return float(abs(v[np.isfinite(v)]).max(initial=1.0))
