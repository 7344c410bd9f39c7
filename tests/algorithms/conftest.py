"""Small problems whose answers are known, as batches: states are one-hot, actions are choices."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from offline_cai import seeding
from offline_cai.core import Algorithm, Batch, Box, Discrete, Field, Spec
from offline_cai.training.experiment import TrainingConfig
from offline_cai.training.state import TrainingState
from offline_cai.training.vectors import Vector


def choices(states: int, actions: int) -> Spec:
    return Spec((Field("observation", states),), Discrete((actions,), (0,)))


def box(width: int, actions: int, bound: float = 1.0) -> Spec:
    return Spec((Field("observation", width),), Box((-bound,) * actions, (bound,) * actions))


def windows(obs: Tensor, action: Tensor, reward: Tensor, terminal: Tensor, seed: int = 0) -> Batch:
    """Windows of H steps, all valid: obs [B, H+1, O], action [B, H, A], reward and terminal [B, H]."""
    dtype = torch.get_default_dtype()
    return Batch(
        obs=obs.to(dtype),
        action=action.to(dtype)[:, :, None],
        reward=reward.to(dtype),
        terminal=terminal,
        valid=torch.ones_like(terminal),
        returns=reward.to(dtype),
        log_prob=None,
        key=seeding.keys(seed, 0, torch.arange(len(obs))),
    )


def bandit(counts: np.ndarray, value: np.ndarray) -> Batch:
    """One step in state s with action a, `counts[s, a]` times, for a reward of `value[s, a]`; then the end."""
    state, action = (np.repeat(i, counts.reshape(-1)) for i in np.indices(counts.shape).reshape(2, -1))
    obs = torch.eye(len(counts))[state][:, None].expand(-1, 2, -1)
    reward = torch.as_tensor(value[state, action])[:, None]
    return windows(obs, torch.as_tensor(action)[:, None, None], reward, torch.ones(len(obs), 1, dtype=torch.bool))


def random_batch(spec: Spec, count: int, horizon: int = 1, seed: int = 0) -> Batch:
    """Normal observations and rewards, any actions, a true end now and then."""
    rng = torch.Generator().manual_seed(seed)
    low, high = torch.tensor(spec.action.low), torch.tensor(spec.action.high)
    u = torch.rand(count, horizon, spec.action_width, generator=rng)
    span = high - low + (1 if isinstance(spec.action, Discrete) else 0)
    action = (low + u * span).floor() if isinstance(spec.action, Discrete) else low + u * span
    obs = torch.randn(count, horizon + 1, spec.obs_width, generator=rng)
    reward, terminal = torch.randn(count, horizon, generator=rng), torch.zeros(count, horizon, dtype=torch.bool)
    terminal[:, -1] = torch.rand(count, generator=rng) < 0.3
    return windows(obs, action, reward, terminal, seed)


def state_of(algorithm: Algorithm, **training: Any) -> TrainingState:
    settings = {"warmup": 0, "clip": None, "ema": 0, **training}
    return TrainingState(algorithm, TrainingConfig(**settings), Accelerator(cpu=True))


def assert_gradients(
    algorithm: Algorithm, batch: Batch, phase: str, prefix: str, h: float = 1e-6, term: str | None = None
) -> None:
    """In float64: the gradient of a phase's loss along random directions of the parameters, by central differences.

    Those of one `term`, if it is named: then the others have to leave these parameters alone.
    """

    def loss(term: str | None = None) -> Tensor:
        terms = algorithm(batch, phase).terms
        return sum(terms.values()) if term is None else terms[term]  # type: ignore[return-value]

    parameters = [p for name, p in algorithm.named_parameters() if name.startswith(prefix)]
    assert parameters and all(p.dtype == torch.float64 for p in parameters)
    gradient = torch.autograd.grad(loss(), parameters)
    rng = torch.Generator().manual_seed(0)
    for _ in range(5):
        direction = [torch.randn(p.shape, generator=rng, dtype=p.dtype) for p in parameters]
        ends = []
        for sign in (1, -1):
            torch._foreach_add_([p.data for p in parameters], direction, alpha=sign * h)
            ends.append(float(loss(term).detach()))
            torch._foreach_add_([p.data for p in parameters], direction, alpha=-sign * h)
        slope = sum(float((g * d).sum()) for g, d in zip(gradient, direction, strict=True))
        assert slope == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-5, abs=1e-6) and abs(slope) > 1e-3


def assert_by_hand(algorithm: Algorithm, batch: Batch) -> bool:
    """In float64: what an algorithm sets by hand is what autograd finds. Gives whether it does so in all phases."""
    n, found_all = len(batch.key), True
    for phase, prefixes in algorithm.needs.groups.items():
        own = [p for key, p in algorithm.named_parameters() if key.startswith(prefixes) and p.requires_grad]
        vector, loss = Vector(own), algorithm(batch, phase)
        (sum(loss.terms.values()) / n).backward(inputs=own)  # type: ignore[union-attr]
        wanted = vector.gradient.clone()
        for p in own:
            p.grad.fill_(math.nan)  # type: ignore[union-attr]  # each has to be set
        with torch.no_grad():
            found = algorithm.by_hand(batch, phase, n)
        if found is None:
            found_all = False
            continue
        assert torch.allclose(vector.gradient, wanted, rtol=1e-10, atol=1e-12) and wanted.abs().max() > 1e-3
        assert found.entries == loss.entries and list(found.terms) == list(loss.terms)
        for ours, theirs in ((found.terms, loss.terms), (found.metrics, loss.metrics)):
            assert all(torch.allclose(ours[key], theirs[key], rtol=1e-10, atol=1e-10) for key in theirs)
    return found_all


@pytest.fixture(scope="session")
def small() -> SimpleNamespace:
    return SimpleNamespace(
        choices=choices,
        box=box,
        windows=windows,
        bandit=bandit,
        random_batch=random_batch,
        state_of=state_of,
        assert_gradients=assert_gradients,
        assert_by_hand=assert_by_hand,
    )
