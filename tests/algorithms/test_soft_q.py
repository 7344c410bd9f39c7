"""Soft Q-learning against sums over a grid of actions."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from scipy.stats import wasserstein_distance
from torch import Tensor, nn

from offline_cai import seeding
from offline_cai.algorithms.soft_q import SoftQ, SoftQConfig
from offline_cai.core import Batch, Box, Discrete, Field, Spec
from offline_cai.errors import UserError
from offline_cai.inference import soft
from offline_cai.training.experiment import TrainingConfig
from offline_cai.training.state import TrainingState

ONE = Spec((Field("state", 1),), Box((-1.0,), (1.0,)))
GRID = torch.linspace(-1, 1, 401, dtype=torch.float64)
WIDTHS = torch.full((401,), 1 / 200, dtype=torch.float64)
WIDTHS[[0, -1]] /= 2  # the trapezoidal rule


def transitions(obs: Tensor, action: Tensor, reward: Tensor, after: Tensor, step: int) -> Batch:
    """A batch of single steps: obs [B, O], action [B, A], reward [B]."""
    n, key = len(obs), seeding.keys(0, step, torch.arange(len(obs)))
    one, two = torch.ones(n, 1, dtype=torch.bool), torch.stack([obs, after], 1)
    return Batch(two, action[:, None, None], reward[:, None], ~one, one, reward[:, None], None, key)


def train(soft_q: SoftQ, batches: Callable[[int], Batch], steps: int, phase: str | None = None) -> None:
    """As the loop does, or only one phase."""
    settings = TrainingConfig(steps=steps, ema=0, clip=None, learning_rate=1e-2)
    state = TrainingState(soft_q, settings, Accelerator(cpu=True))
    for step in range(steps):
        state.set_learning_rates(step)
        state(batches(step), phase) if phase else soft_q.update(batches(step), state)


def masses(log_density: Tensor) -> np.ndarray:
    """Of the bins of GRID."""
    return (log_density + WIDTHS.log()).softmax(0).numpy()


def distance(soft_q: SoftQ, obs: np.ndarray, log_density: Tensor) -> tuple[float, float, float]:
    """Wasserstein distance of 4000 samples from a density on GRID, and the shares of both above 0.05."""
    with torch.no_grad():
        unit, _ = soft_q.pi(np.repeat(obs, 4000, 0)).sample(seeding.keys(9, 9, torch.arange(4000)))
    found, p = unit[:, 0].numpy(), masses(log_density)
    return wasserstein_distance(found, GRID, None, p), (found > 0.05).mean(), p[GRID > 0.05].sum()


# The whole algorithm -------------------------------------------------------------------------------------------------


def test_it_agrees_with_soft_q_iteration_on_a_grid() -> None:
    """Two states; the further to the right the action, the likelier is the second. Q is within 3 % of its range (8 % at
    the worst) of the soft Q-iteration's on 401 bins, and the samples within 0.06 of exp(Q / temperature), when uniform
    ones are 0.15 away."""
    discount, temperature = 0.7, 0.5

    def reward(state: Tensor, a: Tensor) -> Tensor:
        return torch.where(state == 0, 1 - (a - 0.3).square(), torch.sin(3 * a))

    rewards, right = torch.stack([reward(torch.tensor(s), GRID) for s in (0, 1)]), (1 + GRID) / 2
    value = torch.zeros(2, dtype=torch.float64)
    for _ in range(100):
        q = rewards + discount * ((1 - right) * value[0] + right * value[1])
        value = temperature * torch.logsumexp(q / temperature + WIDTHS.log(), -1)

    def batches(step: int) -> Batch:
        draws = seeding.uniform(seeding.keys(1, step, torch.arange(128)), (2,)).float()
        state, action = torch.arange(128) % 2, 2 * draws[:, :1] - 1
        after = (draws[:, 1] < (1 + action[:, 0]) / 2).long()
        return transitions(torch.eye(2)[state], action, reward(state, action[:, 0]), torch.eye(2)[after], step)

    spec = Spec((Field("state", 2),), Box((-1.0,), (1.0,)))
    torch.manual_seed(0)
    soft_q = SoftQ(
        spec, SoftQConfig(hidden=(32, 32), temperature=temperature, discount=discount, particles=8, tau=0.05)
    )
    train(soft_q, batches, 700)
    with torch.no_grad():
        found = soft_q.critic(torch.eye(2), GRID.float()[:, None, None].expand(-1, 2, 1))[0].T
    error = (found - q) / (q.max() - q.min())
    assert error.square().mean().sqrt() < 0.03 and error.abs().max() < 0.08
    for state in (0, 1):
        away, *_ = distance(soft_q, np.eye(2)[[state]], q[state] / temperature)
        assert away < 0.06
        assert wasserstein_distance(GRID, GRID, None, masses(q[state] / temperature)) > 0.15, "it is not uniform"


# The sampler ---------------------------------------------------------------------------------------------------------


class Exact(nn.Module):
    """A critic that knows the reward of an action; the parameter is for an optimiser that wants one."""

    def __init__(self, reward: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.reward, self.unused = reward, nn.Parameter(torch.zeros(1))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return self.reward(action)[None]


def two_modes(at: float, std: float) -> Callable[[Tensor], Tensor]:
    """An unnormalised log-density over actions: 60 % around -at, 40 % around at."""
    log_shares = torch.tensor([0.6, 0.4]).log()
    return lambda a: (log_shares - 0.5 * ((a - torch.tensor([-at, at])) / std).square()).logsumexp(-1)


def sampler_of(log_density: Callable[[Tensor], Tensor]) -> tuple[float, float, float]:
    """Trains the sampler alone; its distance and shares as above."""
    torch.manual_seed(0)
    soft_q = SoftQ(ONE, SoftQConfig(hidden=(32, 32), temperature=1.0, particles=32))
    soft_q.critic = Exact(log_density)  # type: ignore[assignment]
    obs = torch.zeros(64, 1)
    train(soft_q, lambda step: transitions(obs, obs, obs[:, 0], obs, step), 400, "actor")
    return distance(soft_q, np.zeros((1, 1)), log_density(GRID[:, None]))


def test_the_sampler_has_the_law_of_overlapping_modes() -> None:
    """Wasserstein distance below 0.03 (0.013 here), and the right mode's share to 0.03 (0.418 for 0.413 here)."""
    away, share, wanted = sampler_of(two_modes(0.35, 0.25))
    assert away < 0.03 and share == pytest.approx(wanted, abs=0.03)


def test_the_score_has_the_jacobian_of_tanh() -> None:
    """No preference gives uniform actions; without the Jacobian they would pile up at the bounds."""
    away, share, wanted = sampler_of(lambda a: 0 * a[..., 0])
    assert away < 0.03 and share == pytest.approx(wanted, abs=0.03)


def test_modes_that_lie_far_apart_are_beyond_it() -> None:
    """Stein's direction is local: from where the sampler begins it finds one of two modes, and misses the other."""
    away, share, wanted = sampler_of(two_modes(0.6, 0.08))
    assert wanted == pytest.approx(0.4, abs=0.01) and min(share, 1 - share) < 0.1 and away > 0.3


# Values --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("proposal", ["uniform", "policy"])
def test_soft_values_are_integrals(proposal: Any, float64: None) -> None:
    """Of 100,000 actions in two dimensions, against a sum over a grid; so is the KL from uniform."""
    spec = Spec((Field("state", 1),), Box((-1.0, -1.0), (1.0, 1.0)))
    torch.manual_seed(0)
    soft_q = SoftQ(spec, SoftQConfig(hidden=(), temperature=0.5, samples=100_000, proposal=proposal)).double()
    with torch.no_grad():
        for p, values in zip(soft_q.actor.parameters(), ([[0, 0], [1.4, 0.3], [0, 1.3]], [0.1, -0.2]), strict=True):
            p.copy_(torch.tensor(values, dtype=torch.float64))
    soft_q.target = Exact(lambda a: (a[..., 0] - 0.2).square() + a.prod(-1))  # type: ignore[assignment]
    q, area = (a := GRID[:, None] - 0.2) ** 2 + (a + 0.2) * GRID, WIDTHS[:, None] * WIDTHS
    value = 0.5 * torch.logsumexp((q / 0.5 + area.log()).flatten(), 0)
    kl = (area * ((q - value) / 0.5).exp() * (q - value) / 0.5).sum() + 2 * math.log(2)
    found, found_kl = soft_q.soft_value(torch.zeros(1, 1), torch.tensor([5]))
    assert found.item() == pytest.approx(value.item(), abs=0.01)
    assert found_kl.item() == pytest.approx(kl.item(), abs=0.02)


def test_the_density_of_samples_is_told_by_the_jacobian(float64: None) -> None:
    """A linear sampler is a squashed Gaussian with a full covariance."""
    spec = Spec((Field("state", 1),), Box((-1.0, -1.0), (1.0, 1.0)))
    torch.manual_seed(0)
    sampler = SoftQ(spec, SoftQConfig(hidden=())).double().actor
    obs, noise = torch.ones(3, 1), torch.randn(5, 3, 2)
    action, log_density = sampler.with_density(obs, noise)
    weight, bias = sampler.body.layers[0]
    law = torch.distributions.MultivariateNormal(weight[0] + bias, weight[1:].T @ weight[1:])
    u = torch.atanh(action)
    assert torch.allclose(log_density, law.log_prob(u) - soft.log_det_tanh(u).sum(-1))


def test_the_dial_finds_the_temperature_of_its_budget() -> None:
    """With Q fixed: 0.5 nats, to 1 %, by sums over the grid at the temperature that was found."""
    torch.manual_seed(0)
    soft_q = SoftQ(ONE, SoftQConfig(hidden=(), kl_budget=0.5, samples=256))
    soft_q.target = Exact(two_modes(0.35, 0.25))  # type: ignore[assignment]
    obs = torch.zeros(256, 1)
    train(soft_q, lambda step: transitions(obs, obs, obs[:, 0], obs, step), 600, "critic")
    p = masses(two_modes(0.35, 0.25)(GRID[:, None]) / soft_q.dial.temperature)
    assert (p * np.log(2 * p / WIDTHS.numpy())).sum() == pytest.approx(0.5, rel=0.01)


def test_the_slow_critic_moves_at_its_interval() -> None:
    torch.manual_seed(0)
    soft_q = SoftQ(ONE, SoftQConfig(hidden=(8,), samples=4, particles=2, kl_budget=0.5, tau=1.0, interval=3))
    obs, same = torch.zeros(4, 1), []
    state = TrainingState(soft_q, TrainingConfig(), Accelerator(cpu=True))
    for step in range(6):
        soft_q.update(transitions(obs, obs, obs[:, 0], obs, step), state)
        pairs = zip(soft_q.critic.parameters(), soft_q.target.parameters(), strict=True)
        same.append(all(torch.equal(p, slow) for p, slow in pairs))
    assert same == [False, False, True] * 2


# The rest ------------------------------------------------------------------------------------------------------------


def test_what_it_cannot_do_is_said() -> None:
    choices = Spec((Field("state", 1),), Discrete((3,), (0,)))
    with pytest.raises(UserError, match="soft_q samples continuous actions, and here they are choices: sac sums over"):
        SoftQ(choices, SoftQConfig())
    with pytest.raises(UserError, match=r"model.samples is 8, and so few .* 3 nats from uniform \(log 8 is 2.1\)"):
        SoftQ(ONE, SoftQConfig(samples=8, kl_budget=3.0))
    with pytest.raises(UserError, match="samples and particles have to be at least 2"):
        SoftQConfig(samples=1)
