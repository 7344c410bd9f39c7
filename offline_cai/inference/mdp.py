"""A finite Markov decision process, checked once, and the log-space arithmetic of exact sums over it (NumPy only)."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
PriorLike = ArrayLike | Literal["counting"] | None

ROW_SUM_TOLERANCE = 1e-6  # what float32 tables need; accepted rows are renormalised in float64


class MDP:
    """A finite MDP with an action prior; everything `tabular` computes is about this object.

    A trajectory is tau = (s_1, a_1, ..., s_T, a_T). Row t of an array with a leading T belongs to step t + 1 of the
    literature; the reward of step T is counted and nothing after it is.

    Args:
        transition: p(s' | s, a), `[S, A, S]`.
        reward: `[S, A]`, or `[T, S, A]` (its length is then the horizon); -inf marks what must not happen.
        initial: p(s_1), `[S]`.
        horizon: T; needed with a `[S, A]` reward unless `discount` is given.
        discount: in [0, 1), for the infinite horizon; give either this or a horizon.
        prior: p(a | s) as `[A]`, `[S, A]` or `[T, S, A]`, zeros allowed. None is the normalised uniform prior
            (1/|A|). "counting" is the unnormalised one, 1 for every action, whose soft value is plain entropy:
            log p(O) is then larger by T · log|A|, and the posterior is the same.

    Raises:
        ValueError: a shape, a row that does not sum to one, a negative probability, a NaN or +inf reward; the
            message names the argument and the index.
    """

    def __init__(
        self,
        transition: ArrayLike,
        reward: ArrayLike,
        initial: ArrayLike,
        *,
        horizon: int | None = None,
        discount: float | None = None,
        prior: PriorLike = None,
    ) -> None:
        self.transition = distribution("transition", transition)
        if self.transition.ndim != 3 or self.transition.shape[0] != self.transition.shape[2]:
            raise ValueError(f"transition: expected shape [S, A, S], got {list(self.transition.shape)}")
        self.states, self.actions, _ = self.transition.shape
        self.initial = distribution("initial", initial)
        if self.initial.shape != (self.states,):
            raise ValueError(f"initial: expected shape [S] = [{self.states}], got {list(self.initial.shape)}")
        reward = _checked_reward(reward, self.states, self.actions)
        self.horizon, self.discount = _checked_length(reward, horizon, discount)
        self.table_shape = reward.shape if self.horizon is None else (self.horizon, self.states, self.actions)
        self.reward = np.broadcast_to(reward, self.table_shape)
        self.prior = prior
        self.log_prior = np.broadcast_to(self._log_prior(prior), self.table_shape)

    def with_prior(self, prior: PriorLike) -> MDP:
        """The same process with another action prior."""
        return MDP(
            self.transition, self.reward, self.initial, horizon=self.horizon, discount=self.discount, prior=prior
        )

    def checked_policy(self, policy: ArrayLike, name: str = "policy") -> Array:
        """A policy as float64 `[T, S, A]` (`[S, A]` when discounted); `[A]` and `[S, A]` are repeated over time."""
        table = distribution(name, policy)
        try:
            return np.broadcast_to(table, self.table_shape)
        except ValueError:
            wanted = "[S, A]" if self.horizon is None else "[T, S, A] or [S, A]"
            message = f"{name}: expected {wanted} = {list(self.table_shape)}, got shape {list(table.shape)}"
            raise ValueError(message) from None

    def checked_temperature(self, temperature: float) -> float:
        """A positive finite temperature at which messages stay finite, or a ValueError."""
        steps = self.horizon or 1 / (1 - (self.discount or 0.0))
        largest = float(abs(self.reward[np.isfinite(self.reward)]).max(initial=0.0))
        if largest / (float(np.finfo(np.float64).max) / (4 * steps)) > positive("temperature", temperature):
            raise ValueError(
                f"temperature: {temperature} is so small that rewards of {largest:.3g} over it overflow; raise it"
            )
        return float(temperature)

    def _log_prior(self, prior: PriorLike) -> Array:
        if prior is None:
            return np.full(self.actions, -np.log(self.actions))
        if isinstance(prior, str):
            if prior != "counting":
                raise ValueError(f'prior: expected None, "counting" or probabilities, got "{prior}"')
            return np.zeros(self.actions)
        return log(self.checked_policy(prior, "prior"))


def _checked_reward(reward: ArrayLike, states: int, actions: int) -> Array:
    table = numbers("reward", reward)
    if table.ndim not in (2, 3) or table.shape[-2:] != (states, actions):
        wanted = f"[S, A] = [{states}, {actions}] or [T, S, A]"
        raise ValueError(f"reward: expected shape {wanted}, got {list(table.shape)}")
    bad = np.isnan(table) | (table == np.inf)
    if bad.any():
        at = first(bad)
        raise ValueError(f"reward: {table[at]} at index {list(at)}; use finite numbers, or -inf to forbid a pair")
    return table


def _checked_length(reward: Array, horizon: int | None, discount: float | None) -> tuple[int | None, float | None]:
    if discount is not None:
        if horizon is not None or reward.ndim == 3:
            raise ValueError("discount: a horizon is given as well; give one of them (discount means infinite horizon)")
        if not 0 <= discount < 1:
            raise ValueError(f"discount: expected a number in [0, 1), got {discount}")
        return None, float(discount)
    length = horizon if horizon is not None else (len(reward) if reward.ndim == 3 else None)
    if length is None:
        raise ValueError("horizon: missing; give horizon, discount, or a reward of shape [T, S, A]")
    if not 1 <= length < np.inf or length != int(length) or (reward.ndim == 3 and length != len(reward)):
        steps = f" (the reward has {len(reward)} steps)" if reward.ndim == 3 else ""
        raise ValueError(f"horizon: expected a whole number of at least 1{steps}, got {length}")
    return int(length), None


def distribution(name: str, table: ArrayLike) -> Array:
    """Probabilities over the last axis, checked and renormalised in float64; ValueError names the first bad index."""
    p = numbers(name, table)
    if p.ndim == 0 or p.size == 0:
        raise ValueError(f"{name}: expected probabilities over the last axis, got shape {list(p.shape)}")
    bad = ~((p >= 0) & np.isfinite(p))
    if bad.any():
        at = first(bad)
        raise ValueError(f"{name}: {p[at]} at index {list(at)} is no probability; use finite numbers of at least 0")
    total = p.sum(-1, keepdims=True)
    off = abs(total[..., 0] - 1) > ROW_SUM_TOLERANCE
    if off.any():
        at = first(off)
        row = f"row {list(at)}" if at else "the distribution"
        raise ValueError(f"{name}: {row} sums to {total[..., 0][at]:.9g}, not to 1; divide each row by its sum")
    return p / total


def numbers(name: str, given: ArrayLike) -> Array:
    """A float64 array; ValueError names it when it is ragged or holds no numbers."""
    try:
        return np.array(given, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected an array of numbers with rows of one length ({error})") from None


def positive(name: str, value: float) -> float:
    """A positive finite number, or ValueError."""
    if isinstance(value, str) or not (np.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a positive finite number, got {value!r}")
    return float(value)


def first(mask: NDArray[np.bool_]) -> tuple[int, ...]:
    """The index of the first True."""
    return tuple(int(i) for i in np.unravel_index(int(mask.argmax()), mask.shape)) if mask.ndim else ()


def log(p: Array) -> Array:
    """log p with log 0 = -inf and no warning."""
    return np.log(p, out=np.full(np.shape(p), -np.inf), where=np.asarray(p) > 0)


def logsumexp(x: Array) -> Array:
    """log Σ exp(x) over the last axis; rows of -inf give -inf."""
    top = x.max(-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    return log(np.exp(x - top).sum(-1)) + top[..., 0]


def softmax(logits: Array, fallback: Array) -> Array:
    """exp(logits) normalised over the last axis; rows of -inf take the fallback."""
    top = logits.max(-1, keepdims=True)
    possible = np.isfinite(top)
    p = np.where(possible, np.exp(logits - np.where(possible, top, 0.0)), fallback)
    return p / p.sum(-1, keepdims=True)


def log_softmax(logits: Array) -> Array:
    """logits - logsumexp(logits) over the last axis; rows of -inf stay -inf."""
    total = logsumexp(logits)[..., None]
    return logits - np.where(np.isfinite(total), total, 0.0)


def expect(p: Array, x: Array) -> Array:
    """Σ p x over the last axis, with 0 · (±inf) = 0."""
    shape = np.broadcast_shapes(p.shape, x.shape)
    return np.multiply(p, x, out=np.zeros(shape), where=np.broadcast_to(p > 0, shape)).sum(-1)


def kl(p: Array, log_q: Array) -> Array:
    """KL(p ‖ q) over the last axis in nats; inf where p has mass and q has none."""
    return expect(p, np.where(p > 0, log(p) - np.where(p > 0, log_q, 0.0), 0.0))
