"""A Gaussian law over trajectories that is Markov: a start, an affine policy, affine dynamics (torch).

Priors and posteriors of a linear-Gaussian process are both of this kind, so both have the methods below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from offline_cai.inference.quadratic import Noise, QuadraticReward, expect, nothing, numbers, settle, soften

Backup = Literal["variational", "posterior"]
Known = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class GaussianLaw:
    """p(tau) over rows x_t = [state_t, action_t], `[H, D]` with D = n + m, t = 0..H-1.

        s_0 ~ N(initial_mean, ·),   a_t ~ N(gain_t s_t + offset_t, ·),   s_{t+1} ~ N(dynamics_t x_t + drift_t, ·)

    Covariances are kept as factors, cov = factor · factorᵀ, and may be singular. The last action is the last number.
    Means may carry leading batch dimensions `...`.

    Attributes:
        initial_mean: `[..., n]`.   initial_factor: `[n, n]`.
        gain: `[H, m, n]`, of the policy.   offset: `[..., H, m]`.   action_factor: `[H, m, m]`.
        dynamics: `[H-1, n, D]`.   drift: `[..., H-1, n]`.   noise_factor: `[H-1, n, n]`.
        log_evidence: `[...]`, log p(O | known) of the evidence that made this law out of another, nats; 0 for a prior.
    """

    initial_mean: Tensor
    initial_factor: Tensor
    gain: Tensor
    offset: Tensor
    action_factor: Tensor
    dynamics: Tensor
    drift: Tensor
    noise_factor: Tensor
    log_evidence: Tensor

    @property
    def horizon(self) -> int:
        return self.gain.shape[0]

    @property
    def state_dim(self) -> int:
        return self.gain.shape[2]

    @property
    def dim(self) -> int:
        return self.gain.shape[1] + self.gain.shape[2]

    @property
    def initial_covariance(self) -> Tensor:
        """`[n, n]`: of the (posterior) start."""
        return self.initial_factor @ self.initial_factor.T

    @property
    def action_covariance(self) -> Tensor:
        """`[H, m, m]`: of the (posterior) policy."""
        return self.action_factor @ self.action_factor.mT

    @property
    def noise_covariance(self) -> Tensor:
        """`[H-1, n, n]`: of the (posterior) dynamics."""
        return self.noise_factor @ self.noise_factor.mT

    @cached_property
    def mean(self) -> Tensor:
        """`[..., H, D]`; of a Gaussian this is also the most probable trajectory."""
        return self._roll(self.initial_mean, self.offset, self.drift)

    @property
    def most_probable(self) -> Tensor:
        """argmax over tau of the density, `[..., H, D]`: the mean."""
        return self.mean

    @cached_property
    def row_covariance(self) -> Tensor:
        """Cov[x_t] of each row, `[H, D, D]`, in O(H)."""
        rows, state = [], self.initial_covariance
        moved = (*self.dynamics, None)
        for K, action, F, noise in zip(
            self.gain, self.action_covariance, moved, (*self.noise_covariance, None), strict=True
        ):
            below = K @ state
            rows.append(torch.cat([torch.cat([state, below.T], 1), torch.cat([below, below @ K.T + action], 1)]))
            if F is not None:
                state = F @ rows[-1] @ F.T + noise
        return torch.stack(rows)

    @cached_property
    def covariance(self) -> Tensor:
        """Cov[tau], `[H·D, H·D]`, row-major in (t, coordinate); made when first asked for, in O(H²)."""
        D, n = self.dim, self.state_dim
        total = self.gain.new_zeros(self.horizon * D, self.horizon * D)
        cross = self.gain.new_zeros(n, 0)  # Cov[s_t, earlier rows]
        for t in range(self.horizon):
            here = slice(t * D, (t + 1) * D)
            below = torch.cat([cross, self.gain[t] @ cross])
            total[here, : t * D] = below
            total[: t * D, here] = below.T
            total[here, here] = self.row_covariance[t]
            if t < self.horizon - 1:
                cross = self.dynamics[t] @ torch.cat([below, self.row_covariance[t]], 1)
        return total

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n trajectories, `[n, ..., H, D]`."""

        def shake(mean: Tensor, factor: Tensor) -> Tensor:
            noise = torch.randn(n, *mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
            return mean + (factor @ noise[..., None])[..., 0]

        return self._roll(
            shake(self.initial_mean, self.initial_factor),
            shake(self.offset, self.action_factor),
            shake(self.drift, self.noise_factor),
        )

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(tau) in nats of x `[..., H, D]`, `[...]`.

        Raises:
            ValueError: x has another shape, or a covariance of the law is singular.
        """
        x = _checked_trajectory(self, "x", x)
        state, action = x[..., : self.state_dim], x[..., self.state_dim :]
        moved = torch.einsum("tnd,...td->...tn", self.dynamics, x[..., :-1, :])
        acted = torch.einsum("tmn,...tn->...tm", self.gain, state)
        return (
            _log_normal(state[..., 0, :] - self.initial_mean, self.initial_factor, "initial_covariance")
            + _log_normal(action - acted - self.offset, self.action_factor, "action_covariance").sum(-1)
            + _log_normal(state[..., 1:, :] - moved - self.drift, self.noise_factor, "noise_covariance").sum(-1)
        )

    def posterior(
        self,
        reward: QuadraticReward | None = None,
        *,
        temperature: float = 1.0,
        known: Known | None = None,
        backup: Backup = "posterior",
    ) -> GaussianLaw:
        """The law given optimality and known numbers: p(tau | O, known) ∝ p(tau | known) exp(reward / temperature).

        "posterior" is exact; under noise it is risk-seeking control (LEQG), because the noise is conditioned too.
        "variational" keeps the true noise and start: its policy is LQR's, its log_evidence the best ELBO.

        Args:
            reward: None for no reward.
            temperature: units of reward per nat.
            known: (value `[H, D]`, mask `[H, D]` bool), tensors or lists: any numbers of any rows, exactly. Of the
                first state they condition the start, under both backups; what noise can move, only "posterior" can
                hold.

        Raises:
            ValueError: an infinite log-partition (the breakdown of LEQG), known values that cannot occur (or that the
                variational backup cannot promise), a shape, a temperature that is not positive or too small.
        """
        if backup not in ("variational", "posterior"):
            raise ValueError(f'backup: expected "variational" or "posterior", got "{backup}"')
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature: expected a positive finite number, got {temperature}")
        law = self
        if known is not None:
            value, mask = _checked_known(self, known)
            law, mask = _start_given(law, value[0, : self.state_dim], mask[0, : self.state_dim]), mask.clone()
            mask[0, : self.state_dim] = False
            known = (value, mask)
        S, s, c = (
            x / temperature for x in (reward or QuadraticReward()).over(self.horizon, self.dim, self.gain.device)
        )
        if not (S.isfinite().all() and s.isfinite().all() and c.isfinite()):
            raise ValueError(f"temperature: {temperature} is so small that reward / temperature overflows; raise it")
        result = tilt(law, S, s, c, known, backup)
        if known is not None:
            density = tilt(law, 0 * S, 0 * s, 0 * c, known).log_evidence
            result = _with(result, log_evidence=result.log_evidence - density)
        return result

    def given_noised(self, x_k: Tensor, alpha_bar: float) -> GaussianLaw:
        """The law of x_0 given x_k = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps, for x_k `[..., H, D]`.

        Its mean is the exact denoiser, its covariance Cov[x_0 | x_k] (the same for every x_k), its log_evidence
        log p_k(x_k). O(H).

        Raises:
            ValueError: alpha_bar outside [0, 1), or x_k of another shape.
        """
        if not 0 <= alpha_bar < 1:
            raise ValueError(f"alpha_bar: expected a number in [0, 1), got {alpha_bar}; at 1 nothing is noised")
        x_k, variance = _checked_trajectory(self, "x_k", x_k), 1 - alpha_bar
        S = torch.eye(self.dim, dtype=x_k.dtype, device=x_k.device).expand(self.horizon, -1, -1) * (
            alpha_bar / variance
        )
        size = self.horizon * self.dim
        c = -0.5 * x_k.square().sum((-2, -1)) / variance - 0.5 * size * math.log(2 * math.pi * variance)
        return tilt(self, S, x_k * (math.sqrt(alpha_bar) / variance), c)

    def denoise(self, x_k: Tensor, alpha_bar: float) -> Tensor:
        """E[x_0 | x_k], `[..., H, D]`: the perfect denoiser of this law."""
        return self.given_noised(x_k, alpha_bar).mean

    def denoised_covariance(self, alpha_bar: float) -> Tensor:
        """Cov[x_0 | x_k], `[H·D, H·D]`, the same for every x_k."""
        return self.given_noised(self.mean.new_zeros(self.horizon, self.dim), alpha_bar).covariance

    def noised_log_prob(self, x_k: Tensor, alpha_bar: float) -> Tensor:
        """log p_k(x_k), `[...]`: the log-density of the noised law."""
        return self.given_noised(x_k, alpha_bar).log_evidence

    def score(self, x_k: Tensor, alpha_bar: float) -> Tensor:
        """∇ log p_k(x_k), `[..., H, D]` (Tweedie). Under a posterior this is prior score plus perfect guidance."""
        return (math.sqrt(alpha_bar) * self.denoise(x_k, alpha_bar) - x_k) / (1 - alpha_bar)

    def _roll(self, state: Tensor, offset: Tensor, drift: Tensor) -> Tensor:
        rows = []
        for t in range(self.horizon):
            row = torch.cat([state, state @ self.gain[t].T + offset[..., t, :]], -1)
            rows.append(row)
            if t < self.horizon - 1:
                state = row @ self.dynamics[t].T + drift[..., t, :]
        return torch.stack(rows, -2)


def tilt(
    law: GaussianLaw, S: Tensor, s: Tensor, c: Tensor, known: Known | None = None, backup: Backup = "posterior"
) -> GaussianLaw:
    """The law ∝ law(x) · exp(Σ_t -½ x_tᵀS_t x_t + x_tᵀs_t + c), known numbers pinned, in one backward pass, O(H).

    S `[H, D, D]`, s `[..., H, D]`, c `[...]`; log_evidence counts the density of what is known. "variational" leaves
    start and noise as they are and tilts only the policy.
    """
    chance = soften if backup == "posterior" else expect
    n, dim = law.state_dim, law.dim
    eye = torch.eye(n, dtype=law.gain.dtype, device=law.gain.device)
    actions: list[tuple[Tensor, Tensor, Tensor]] = []
    moves: list[tuple[Tensor, Tensor, Tensor]] = []
    message = nothing(dim, law.gain)
    for t in reversed(range(law.horizon)):
        if t < law.horizon - 1:
            F, f = law.dynamics[t], law.drift[..., t, :]
            message, noise = chance(message, law.noise_factor[t], f"the noise after row {t}")
            moves.append((noise.T @ F, f @ noise.T.T + noise.t, _full(noise, n)))
            message = message.pull(F, f)
        message = message.plus(S[t], s[..., t, :])
        if known is not None:
            message = message.known(known[1][t], known[0][t])
        F = torch.cat([eye, law.gain[t]])
        f = pad(law.offset[..., t, :], (n, 0))
        message, noise = soften(message, pad(law.action_factor[t], (0, 0, n, 0)), f"the action of row {t}")
        rows = noise.T[n:]
        actions.append((rows @ F, f @ rows.T + noise.t[..., n:], _full(noise, dim - n)[n:]))
        message = message.pull(F, f)
    message, noise = chance(message, law.initial_factor, "the start")
    log_evidence = settle(message, law.initial_mean, "the start") + c
    gain, offset, action_factor = (list(reversed(x)) for x in zip(*actions, strict=True))
    dynamics, drift, noise_factor = law.dynamics, law.drift, law.noise_factor
    if moves:
        dynamics, noise_factor = (torch.stack([m[i] for m in reversed(moves)]) for i in (0, 2))
        drift = torch.stack([m[1] for m in reversed(moves)], -2)
    return GaussianLaw(
        initial_mean=law.initial_mean @ noise.T.T + noise.t,
        initial_factor=_full(noise, n),
        gain=torch.stack(gain),
        offset=torch.stack(offset, -2),
        action_factor=torch.stack(action_factor),
        dynamics=dynamics,
        drift=drift,
        noise_factor=noise_factor,
        log_evidence=log_evidence,
    )


def _with(law: GaussianLaw, **changes: Tensor) -> GaussianLaw:
    return GaussianLaw(**{field.name: getattr(law, field.name) for field in fields(GaussianLaw)} | changes)


def _full(noise: Noise, columns: int) -> Tensor:
    """The factor with zero columns where known values took the noise."""
    return pad(noise.factor, (0, columns - noise.factor.shape[1]))


def _start_given(law: GaussianLaw, value: Tensor, mask: Tensor) -> GaussianLaw:
    """The law given numbers of its first state: the start conditioned, the rest as it was."""
    message = nothing(law.state_dim, law.gain).known(mask, value)
    message, noise = soften(message, law.initial_factor, "the start")
    settle(message, law.initial_mean, "the start")
    mean = law.initial_mean @ noise.T.T + noise.t
    return _with(law, initial_mean=mean, initial_factor=_full(noise, law.state_dim))


def _log_normal(residual: Tensor, factor: Tensor, name: str) -> Tensor:
    """log N(residual; 0, factor · factorᵀ) over the last axis."""
    log_det = torch.linalg.slogdet(factor).logabsdet
    if log_det.isneginf().any():
        raise ValueError(f"{name}: singular, so this law has no density; give every number some noise, or use noised_*")
    white = torch.linalg.solve(factor, residual[..., None])[..., 0]
    return -0.5 * white.square().sum(-1) - log_det - 0.5 * residual.shape[-1] * math.log(2 * math.pi)


def _checked_trajectory(law: GaussianLaw, name: str, x: Tensor) -> Tensor:
    """x with the law's dtype and device, or a ValueError unless its shape is `[..., H, D]`."""
    if x.shape[-2:] != (law.horizon, law.dim):
        raise ValueError(f"{name}: expected shape [..., H, D] = [..., {law.horizon}, {law.dim}], got {list(x.shape)}")
    return x.to(law.gain)


def _checked_known(law: GaussianLaw, known: Any) -> Known:
    """value and mask as tensors `[H, D]` on the law's device, or a ValueError that says what is wrong."""
    if not isinstance(known, tuple | list) or len(known) != 2:
        raise ValueError(f"known: expected (value, mask), got {type(known).__name__}")
    value, mask = (numbers("known", known[0], law.gain.device), torch.as_tensor(known[1], device=law.gain.device))
    shape = (law.horizon, law.dim)
    if tuple(value.shape) != shape or tuple(mask.shape) != shape or mask.dtype != torch.bool:
        raise ValueError(
            f"known: expected (value, mask), both [H, D] = {list(shape)} and mask of bool, got {list(value.shape)} and "
            f"{list(mask.shape)} of {mask.dtype}"
        )
    if law.initial_mean.ndim > 1:
        raise ValueError("known: this law is a batch (it was made from several x_k); condition the law it came from")
    bad = mask & ~value.isfinite()
    if bad.any():
        at = bad.nonzero()[0].tolist()
        raise ValueError(f"known: the value at index {at} is {float(value[tuple(at)])}; give a number or unmask it")
    return value, mask
