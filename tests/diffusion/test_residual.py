"""Residual covariances against what the exact core says a denoiser leaves open."""

import math

import pytest
import torch

from offline_cai import seeding
from offline_cai.core import Known
from offline_cai.diffusion.residual import Residual, Spread, measure, wiener
from offline_cai.diffusion.schedule import Schedule
from offline_cai.errors import UserError
from tests.diffusion.conftest import HORIZON, WIDTH, Problem

F64 = torch.float64


def some_spread(batch: bool, outer: float = 0.3) -> Spread:
    """Two directions of five free numbers, of six."""
    g = torch.Generator().manual_seed(0)
    free = torch.tensor([1.0, 1, 1, 0, 1, 1], dtype=F64)
    basis = torch.zeros(6, 2, dtype=F64)
    basis[free > 0] = torch.linalg.qr(torch.randn(5, 2, dtype=F64, generator=g))[0]
    root = torch.randn(*([7] if batch else []), 2, 2, dtype=F64, generator=g)
    return Spread(basis.expand(7, 6, 2) if batch else basis, root, torch.tensor(outer, dtype=F64), free)


@pytest.mark.parametrize("batch", [False, True])
def test_draws_and_densities_are_those_of_the_matrix(batch: bool) -> None:
    spread, n = some_spread(batch), 7
    noise = torch.randn(n, 3, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    matrix, free = spread.matrix().expand(n, 6, 6), spread.free > 0
    assert (matrix[:, ~free] == 0).all()
    # linear in the noise, so its square is what the draws' covariance is
    units = torch.eye(6, dtype=F64).view(6, 3, 2)
    factor = torch.stack([spread.draw(unit.expand(n, 3, 2)).flatten(1) for unit in units], -1)
    torch.testing.assert_close(factor @ factor.mT, matrix)
    law = torch.distributions.MultivariateNormal(torch.zeros(5, dtype=F64), matrix[:, free][:, :, free])
    exact = law.log_prob(noise.flatten(1)[:, free]) + 2.5 * math.log(2 * math.pi)
    torch.testing.assert_close(spread.log_prob(noise), exact)


@pytest.mark.parametrize("variance", [0.0, 0.5])
def test_a_step_adds_and_scales(variance: float) -> None:
    spread = some_spread(batch=True)
    ours = spread.scaled(0.7, variance).matrix()
    torch.testing.assert_close(ours, 0.49 * spread.matrix() + variance * torch.diag(spread.free))
    chosen = spread.select(torch.tensor([3, 3])).matrix()
    torch.testing.assert_close(chosen, spread.matrix()[[3, 3]])


def test_measured_on_a_perfect_denoiser_it_is_the_conditional_covariance(problem: Problem) -> None:
    n, d = 6000, problem.denoiser
    x = problem.denoiser.law.sample(n, torch.Generator().manual_seed(0))
    found = measure(d, problem.schedule, x, d.mask, seeding.keys(0, 0, torch.arange(n)))
    assert found.basis.shape == (64, HORIZON * WIDTH, int(problem.free.sum()))
    for level in (0, 20, 45, 63):
        exact = d.residual.at(level).matrix()
        variances = exact.diagonal()
        error = ((variances[:, None] * variances + exact**2) / n).sqrt()
        assert ((found.at(level).matrix() - exact).abs() <= 4.5 * error + 1e-9).all()


def test_fewer_directions_keep_the_largest_and_the_mean_of_the_rest(problem: Problem) -> None:
    d, covariance = problem.denoiser, problem.denoiser.law.covariance
    whole = d.residual
    for rank in (0, 3):
        some = wiener(covariance, problem.schedule, d.mask, rank)
        assert some.variance.shape == (64, rank)
        torch.testing.assert_close(some.variance, whole.variance[:, :rank])
        for level in (0, 40):
            trace = some.at(level).matrix().trace()
            torch.testing.assert_close(trace, whole.at(level).matrix().trace())


def test_conditions_are_taken_out_of_the_data_s_covariance(problem: Problem) -> None:
    """Wiener's form of the unconditional covariance is that of the law given the known numbers."""
    d = problem.denoiser
    ours = wiener(problem.prior.covariance, problem.schedule, d.mask)
    for level in (0, 30, 63):
        torch.testing.assert_close(ours.at(level).matrix(), d.residual.at(level).matrix(), rtol=1e-7, atol=1e-9)


def test_a_column_without_variance_has_a_density_all_the_same() -> None:
    x = torch.randn(200, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    x[..., 1] = 0.0
    nothing = torch.zeros(2, 2, dtype=torch.bool)
    residual = measure(lambda y, k: 0 * y, Schedule(4), x, nothing, seeding.keys(0, 0, torch.arange(200)))
    spread = residual.at(2)
    noise = torch.randn(3, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    assert spread.draw(noise)[..., 1].abs().max() < 1e-3 and spread.log_prob(spread.draw(noise)).isfinite().all()


def test_it_says_what_it_was_measured_for(problem: Problem) -> None:
    d = problem.denoiser
    known = d.known(2)
    d.residual.check(problem.schedule, known)
    with pytest.raises(UserError, match="measured on 64 noise levels, but this schedule has 32"):
        d.residual.check(Schedule(32), known)
    with pytest.raises(UserError, match=r"measured on rows \[5, 3\], but these are \[4, 3\]"):
        d.residual.check(problem.schedule, Known(known.value[:, :4], known.mask[:, :4]))
    other = known.mask.clone()
    other[1, 2, 1] = True
    with pytest.raises(UserError, match="row 2, column 1 free, and in plan 1 it is known"):
        d.residual.check(problem.schedule, Known(known.value, other))


def test_it_moves_with_the_rows(problem: Problem) -> None:
    small = problem.denoiser.residual.to(torch.zeros(1))
    assert small.basis.dtype == torch.float32 and small.mask.dtype == torch.bool
    assert isinstance(small, Residual)
