"""Learned priors against an exact density with two modes that overlap."""

import math

import pytest
import torch
from torch import Tensor

from offline_cai import seeding
from offline_cai.core import Box, Field, Spec
from offline_cai.inference import soft
from offline_cai.policies import priors
from offline_cai.policies.priors import DensityPrior, Mixture, Prior, PriorKind

SPEC = Spec((Field("observation", 1),), Box((-1.0,), (1.0,)))
GRID = torch.linspace(-1, 1, 2001, dtype=torch.float64)
EACH = torch.stack([math.log(w) - 0.5 * ((GRID - m) / 0.18) ** 2 for w, m in ((0.65, -0.3), (0.35, 0.35))])
EXACT = EACH.logsumexp(0).softmax(0)
VALLEY = 0.05
DRAWS = 20_000


def quantile(mass: Tensor, u: Tensor) -> Tensor:
    return GRID[torch.searchsorted(mass.cumsum(0), u).clamp(max=len(GRID) - 1)]


def wasserstein(action: Tensor, mass: Tensor, weight: Tensor | None = None) -> float:
    """W1 between weighted actions [n] and the masses [2001] on the grid: the integral of |F - G|."""
    weight = torch.full_like(action, 1 / len(action)) if weight is None else weight
    order = action.double().argsort()
    ladder = torch.cat([torch.zeros(1).double(), weight[order].double().cumsum(0)])
    share = ladder[torch.searchsorted(action.double()[order], GRID, right=True)]
    return float((share - mass.cumsum(0)).abs().sum() * (GRID[1] - GRID[0]))


def trained(kind: PriorKind, steps: int) -> Prior:
    torch.manual_seed(0)
    prior = priors.build(kind, SPEC, (96, 96), components=4, levels=32, steps=16)
    optimiser, obs = torch.optim.Adam(prior.parameters()), torch.zeros(256, 1)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 3e-3 * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
        keys = seeding.keys(0, step, torch.arange(256))
        action = quantile(EXACT, seeding.uniform(keys, (), stream=9)).float()[:, None]
        optimiser.zero_grad()
        prior.loss(obs, action, keys).mean().backward()
        optimiser.step()
    return prior


@pytest.mark.parametrize(
    ("kind", "steps", "distance", "mass"), [("mixture", 500, 0.015, 0.02), ("diffusion", 1200, 0.04, 0.04)]
)
def test_two_overlapping_modes(kind: PriorKind, steps: int, distance: float, mass: float) -> None:
    """Wasserstein distance and mass of the left mode (.650), of the prior and of prior x exp(Q / temperature).

    The best single Gaussian is .07 away. The evidence, Q = 3 a at temperature 1, moves mass to the right mode: draws of
    the prior, weighed, are its posterior.
    """
    prior = trained(kind, steps)
    draw = prior.draw(torch.zeros(1, 1), seeding.keys(5, 0, torch.arange(1)), DRAWS)
    action, left = draw.action[:, 0, 0], GRID < VALLEY
    assert wasserstein(action, EXACT) < distance
    assert float((action < VALLEY).double().mean()) == pytest.approx(float(EXACT[left].sum()), abs=mass)
    weight, wanted = soft.posterior_weights(3 * action, 1.0, dim=0), (EXACT.log() + 3 * GRID).softmax(0)
    assert wasserstein(action, wanted, weight) < 1.5 * distance
    assert float(weight[action < VALLEY].sum()) == pytest.approx(float(wanted[left].sum()), abs=mass)
    assert abs(float(wanted[left].sum()) - float(EXACT[left].sum())) > 0.2, "the evidence matters"


def test_a_mixture_s_density_adds_up_and_its_draws_follow_it() -> None:
    log_weight = torch.tensor([[0.2, 0.8], [0.5, 0.5]]).double().log()
    mean, std = torch.tensor([[[-0.4], [0.3]], [[0.0], [0.5]]]).double(), torch.tensor([[[0.1], [0.2]]] * 2).double()
    mixture = Mixture(log_weight, mean, std)
    grid = torch.linspace(-3, 3, 6001).double()
    mass = mixture.log_prob(grid[:, None, None].expand(-1, 2, 1)).exp() * 1e-3
    assert torch.allclose(mass.sum(0), torch.ones(2).double(), atol=1e-6)
    draw = mixture.draw(seeding.keys(0, 0, torch.arange(2)), DRAWS)
    se = draw.action.std(0)[:, 0] / math.sqrt(DRAWS)
    assert ((draw.action.mean(0)[:, 0] - grid @ mass).abs() < 4 * se).all()
    share = (draw.action[:, 0, 0] < -0.15).double().mean()
    assert float(share) == pytest.approx(float(mass[grid < -0.15, 0].sum()), abs=4 * 0.5 / math.sqrt(DRAWS))


@pytest.mark.parametrize("kind", ["gaussian", "squashed", "mixture", "diffusion"])
def test_draws_are_functions_of_keys_alone(kind: PriorKind) -> None:
    torch.manual_seed(0)
    prior = priors.build(kind, SPEC, (8,), components=3, levels=8, steps=4)
    obs, keys = torch.randn(3, 1), seeding.keys(0, 0, torch.arange(3))
    whole, one = prior.draw(obs, keys, 5, stream=2), prior.draw(obs[1:2], keys[1:2], 5, stream=2)
    assert torch.allclose(whole.action[:, 1:2], one.action, atol=1e-6) and whole.action.shape == (5, 3, 1)
    assert not torch.allclose(whole.action, prior.draw(obs, keys, 5, stream=3).action)
    assert isinstance(prior, DensityPrior) == (kind != "diffusion")
    if isinstance(prior, DensityPrior):
        assert torch.allclose(prior.log_prob(obs, whole.action), whole.log_prob, atol=1e-4)
