"""Densities integrate to one, draws follow them, KLs are expectations, edges are finite."""

import math

import pytest
import torch
from torch import Tensor

from offline_cai import seeding
from offline_cai.core import Box, Discrete, Field, Spec
from offline_cai.policies.distributions import Categorical, Gaussian, SquashedGaussian, log_uniform

MEAN, STD = torch.tensor([[0.3], [-1.2]]).double(), torch.tensor([[0.7], [0.4]]).double()
KINDS = {"gaussian": Gaussian(MEAN, STD), "squashed": SquashedGaussian(MEAN, STD)}
GRIDS = {
    "gaussian": torch.linspace(-6, 6, 4001, dtype=torch.float64),
    "squashed": torch.linspace(-1, 1, 400_001, dtype=torch.float64)[1:-1],
}
KEYS = seeding.keys(0, 0, torch.arange(2))


def density(kind: str) -> tuple[Tensor, Tensor]:
    """Actions [m] and the mass [m, 2] around each."""
    grid = GRIDS[kind]
    return grid, KINDS[kind].log_prob(grid[:, None, None].expand(-1, 2, 1)).exp() * (grid[1] - grid[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_density_adds_up_to_one_and_draws_follow_it(kind: str) -> None:
    grid, mass = density(kind)
    assert torch.allclose(mass.sum(0), torch.ones(2).double(), atol=1e-3)
    draw = KINDS[kind].draw(KEYS, 20_000)
    se = draw.action.std(0)[:, 0] / math.sqrt(20_000)
    assert ((draw.action.mean(0)[:, 0] - grid @ mass).abs() < 4 * se).all()
    inside = draw.action.abs()[..., 0] < 1 - 1e-6  # beyond, an action in float64 has lost its u too
    again = KINDS[kind].log_prob(draw.action)
    assert torch.allclose(again[inside], draw.log_prob[inside], atol=1e-6) and inside.double().mean() > 0.5
    assert torch.allclose(draw.weight.sum(0), torch.ones(2).double())


@pytest.mark.parametrize("kind", [*KINDS, "categorical"])
def test_a_kl_is_the_mean_log_ratio(kind: str) -> None:
    p, q = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]).double(), torch.tensor([[0.2, 0.2, 0.6]] * 2).double()
    if kind == "categorical":
        one, other, tolerance = Categorical(p.log()), Categorical(q.log()), torch.full((2,), 1e-12).double()
        draw = one.draw(KEYS)
        ratio = draw.log_prob - other.log_prob(draw.action)
    else:
        one, other = KINDS[kind], type(KINDS[kind])(MEAN * 0.5, STD * 1.5)
        draw = one.draw(KEYS, 20_000)
        ratio = draw.log_prob - other.log_prob(draw.action)
        tolerance = 4 * ratio.std(0) / math.sqrt(20_000)
    assert ((draw.mean(ratio) - one.kl(other)).abs() < tolerance).all()


def test_entropies_in_closed_form() -> None:
    draw = KINDS["gaussian"].draw(KEYS, 20_000)
    se = draw.log_prob.std(0) / math.sqrt(20_000)
    assert ((KINDS["gaussian"].entropy() + draw.mean(draw.log_prob)).abs() < 4 * se).all()
    p = torch.tensor([[0.5, 0.5, 1e-9]])
    assert Categorical(p.log()).entropy().item() == pytest.approx(math.log(2), abs=1e-6)


def test_samples_of_choices_have_their_frequencies() -> None:
    p = torch.tensor([0.1, 0.6, 0.0, 0.3])
    action, log_prob = Categorical(p.log().expand(20_000, 4)).sample(seeding.keys(1, 0, torch.arange(20_000)))
    share = action.mean(0)
    assert ((share - p).abs() <= 4 * (p * (1 - p) / 20_000).sqrt()).all() and share[2] == 0
    assert torch.equal(log_prob, (p.log().nan_to_num(neginf=0) * action).sum(-1))


def test_streams_of_a_key_differ() -> None:
    pi = KINDS["squashed"]
    assert torch.equal(pi.draw(KEYS).action[0], pi.sample(KEYS)[0])
    assert not torch.equal(pi.draw(KEYS, 1, stream=1).action[0], pi.sample(KEYS)[0])


def test_an_action_at_the_bound_has_a_finite_density_with_a_gradient() -> None:
    mean = MEAN.clone().requires_grad_()
    log_prob = SquashedGaussian(mean, STD).log_prob(torch.tensor([[1.0], [-1.0]]).double())
    log_prob.sum().backward()
    assert log_prob.isfinite().all() and mean.grad is not None and mean.grad.isfinite().all()


def test_the_uniform_prior_has_the_density_of_the_space() -> None:
    box, choices = (Spec((Field("o", 1),), a) for a in (Box((-3.0,) * 2, (3.0,) * 2), Discrete((3, 4), (0, 0))))
    assert log_uniform(box) == pytest.approx(math.log(0.25)) and log_uniform(choices) == pytest.approx(-math.log(12))
