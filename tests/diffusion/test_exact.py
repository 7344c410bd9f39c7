"""The exact denoiser is the exact core's; the propagated law is what the core says of the posterior."""

import pytest
import torch

from offline_cai import seeding
from offline_cai.diffusion.exact import ExactDenoiser, gaussian_kl, propagate
from offline_cai.diffusion.sampler import ReverseVariance, ddim
from tests.diffusion.conftest import BUDGET, HORIZON, WIDTH, Problem

F64 = torch.float64


def test_it_denoises_as_the_exact_core_does(problem: Problem) -> None:
    x = seeding.normal(seeding.keys(0, 0, torch.arange(4)), (HORIZON, WIDTH), dtype=F64)
    x = problem.denoiser.known(4).impose(x)
    for level in (0, 7, 40, 63):
        abar = float(problem.schedule.abar[level])
        ours = problem.denoiser(x, torch.full((4,), level))
        torch.testing.assert_close(ours, problem.denoiser.law.denoise(x, abar), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(
            problem.denoiser.residual.at(level).matrix(),
            problem.denoiser.law.denoised_covariance(abar),
            atol=1e-9,
            rtol=0,
        )


def test_the_evidence_is_as_far_as_it_should_be(problem: Problem) -> None:
    prior = problem.denoiser.law
    nats = problem.kl(problem.posterior.mean.flatten(), problem.posterior.covariance, prior)
    assert nats == pytest.approx(BUDGET)


@pytest.mark.parametrize(
    ("eta", "variance"), [(0.0, "posterior"), (0.5, "posterior"), (1.0, "posterior"), (1.0, "beta"), (1.0, "analytic")]
)
def test_samples_have_the_propagated_law(problem: Problem, eta: float, variance: ReverseVariance) -> None:
    """Every mean and covariance, within four standard errors."""
    n, denoiser, f = 20_000, problem.denoiser, problem.free
    options = {"reverse_variance": variance, "residual": denoiser.residual}
    mean, covariance = propagate(denoiser, problem.schedule, denoiser.known(1), 8, eta, **options)  # type: ignore[arg-type]
    key = seeding.keys(3, 0, torch.arange(n))
    x = ddim(denoiser, problem.schedule, denoiser.known(n), key, 8, eta, None, **options).flatten(1)  # type: ignore[arg-type]
    assert (x[:, ~f] == denoiser.value.flatten()[~f]).all() and (covariance[~f] == 0).all()
    variances = covariance.diagonal()
    assert ((x.mean(0) - mean).abs() <= 4 * (variances / n).sqrt() + 1e-9).all()
    spread = ((variances[:, None] * variances + covariance**2) / n).sqrt()
    assert ((x.T.cov() - covariance).abs() <= 4.5 * spread + 1e-9).all()


def test_the_kl_is_that_of_torch() -> None:
    a = torch.randn(2, 3, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    a, mean = a @ a.mT + torch.eye(3, dtype=F64), torch.tensor([[0.0, 1.0, 2.0], [0.5, 0.5, 0.0]], dtype=F64)
    p, q = (torch.distributions.MultivariateNormal(m, c) for m, c in zip(mean, a, strict=True))
    expected = float(torch.distributions.kl_divergence(p, q))
    assert gaussian_kl(mean[0], a[0], mean[1], a[1]) == pytest.approx(expected)


def test_nothing_known_is_the_law_itself(problem: Problem) -> None:
    whole = ExactDenoiser(problem.prior, problem.schedule)
    options = {"reverse_variance": "analytic", "residual": whole.residual}
    mean, covariance = propagate(whole, problem.schedule, whole.known(1), 16, **options)  # type: ignore[arg-type]
    assert gaussian_kl(mean, covariance, problem.prior.mean.flatten(), problem.prior.covariance) < 1e-6
