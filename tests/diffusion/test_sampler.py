"""Samplers against diffusers' own steps, and against the law that a closed form gives."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from offline_cai import seeding
from offline_cai.core import Known
from offline_cai.diffusion.exact import ExactDenoiser, propagate
from offline_cai.diffusion.residual import Residual
from offline_cai.diffusion.sampler import ReverseVariance, ddim, ddpm, dpm_solver, levels_of
from offline_cai.diffusion.schedule import Schedule
from offline_cai.errors import UserError
from offline_cai.inference.gaussian import LinearGaussian
from tests.diffusion.conftest import Problem, make_problem

SHAPE = (3, 4, 2)
KEY = seeding.keys(0, 0, torch.arange(SHAPE[0]))
NOTHING = Known(torch.zeros(SHAPE, dtype=torch.float64), torch.zeros(SHAPE, dtype=torch.bool))


def bend(x: Tensor, k: Tensor) -> Tensor:
    """Some smooth denoiser."""
    return torch.tanh(0.7 * x + 0.01 * k[:, None, None]) * 0.9


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_takes_diffusers_steps(kind: str, steps: int, eta: float) -> None:
    name = {"cosine": "squaredcos_cap_v2", "linear": "linear"}[kind]
    ends = {"beta_start": 0.1 / 20, "beta_end": 0.999}
    theirs = DDIMScheduler(20, beta_schedule=name, prediction_type="sample", timestep_spacing="trailing", **ends)
    theirs.set_timesteps(steps)
    assert levels_of(Schedule(20), steps) == theirs.timesteps.tolist()
    x = seeding.normal(KEY, SHAPE[1:], dtype=torch.float64)
    for number, t in enumerate(theirs.timesteps):
        noise = seeding.normal(KEY, SHAPE[1:], stream=number + 1, dtype=torch.float64)
        clean = bend(x, torch.full((3,), int(t)))
        x = theirs.step(clean, t, x, eta=eta, variance_noise=noise).prev_sample
    ours = ddim(bend, Schedule(20, kind), NOTHING, KEY, steps, eta)  # type: ignore[arg-type]
    assert torch.allclose(ours, x, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "variance", "steps"),
    [("fixed_small", "posterior", 20), ("fixed_small", "posterior", 5), ("fixed_large", "beta", 20)],
)
def test_ddpm_takes_diffusers_steps(
    monkeypatch: pytest.MonkeyPatch, kind: str, variance: ReverseVariance, steps: int
) -> None:
    options = {"prediction_type": "sample", "variance_type": kind, "timestep_spacing": "trailing"}
    theirs = DDPMScheduler(20, beta_schedule="squaredcos_cap_v2", **options)
    theirs.set_timesteps(steps)
    x, stream = seeding.normal(KEY, SHAPE[1:], dtype=torch.float64), iter(range(1, 21))

    def noise(*args: object, **kwargs: object) -> Tensor:
        return seeding.normal(KEY, SHAPE[1:], stream=next(stream), dtype=torch.float64)

    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", noise)
    for t in theirs.timesteps:
        x = theirs.step(bend(x, torch.full((3,), int(t))), int(t), x).prev_sample
    ours = ddpm(bend, Schedule(20), NOTHING, KEY, steps=steps, reverse_variance=variance)
    assert torch.allclose(ours, x, atol=1e-5)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_dpm_solver_takes_diffusers_steps(kind: str, steps: int) -> None:
    name = {"cosine": "squaredcos_cap_v2", "linear": "linear"}[kind]
    ends = {"beta_start": 0.1 / 20, "beta_end": 0.999}
    options = {"prediction_type": "sample", "timestep_spacing": "trailing", "final_sigmas_type": "zero"}
    theirs = DPMSolverMultistepScheduler(20, beta_schedule=name, **ends, **options)
    theirs.set_timesteps(steps)
    assert levels_of(Schedule(20), steps) == theirs.timesteps.tolist()
    x = seeding.normal(KEY, SHAPE[1:], dtype=torch.float64)
    for t in theirs.timesteps:
        x = theirs.step(bend(x, torch.full((3,), int(t))), t, x).prev_sample
    ours = dpm_solver(bend, Schedule(20, kind), NOTHING, KEY, steps, clip=None)  # type: ignore[arg-type]
    assert torch.allclose(ours, x, atol=2e-4)


@pytest.mark.parametrize(("steps", "eta"), [(2, 0.0), (16, 0.0), (16, 1.0), (64, 1.0)])
def test_on_gaussian_data_samples_have_the_sampler_s_own_law(steps: int, eta: float) -> None:
    """With the exact denoiser of N(m, s^2) every step is affine, so mean and variance propagate in closed form."""
    m, s2, n = 0.5, 0.09, 40_000
    schedule = Schedule(64)

    def gain(abar: Tensor) -> Tensor:
        return abar.sqrt() * s2 / (abar * s2 + 1 - abar)

    def exact(x: Tensor, k: Tensor) -> Tensor:
        abar = schedule.abar_at(k)
        return m + gain(abar) * (x - abar.sqrt() * m)

    mean, variance = 0.0, 1.0
    levels = levels_of(schedule, steps)
    for level, following in zip(levels, [*levels[1:], -1], strict=True):
        a, b = (schedule.abar_at(torch.tensor([k])).double().flatten() for k in (level, following))
        sigma2 = eta**2 * (1 - b) / (1 - a) * (1 - a / b)
        slope = (1 - b - sigma2).sqrt() / (1 - a).sqrt()  # of x in the next x, besides what goes through x_0
        clean = b.sqrt() - slope * a.sqrt()
        factor, offset = float(clean * gain(a) + slope), float(clean * m * (1 - gain(a) * a.sqrt()))
        mean, variance = factor * mean + offset, factor**2 * variance + float(sigma2) * (following >= 0)

    none = Known(torch.zeros(n, 1, 1, dtype=torch.float64), torch.zeros(n, 1, 1, dtype=torch.bool))
    key = seeding.keys(1, 1, torch.arange(n))
    x = ddim(exact, schedule, none, key, steps, eta, clip=None).flatten().numpy()
    assert abs(x.mean() - mean) < 4 * np.sqrt(variance / n)
    assert abs(x.var() - variance) < 4 * variance * np.sqrt(2 / n)
    if steps == 64:
        assert mean == pytest.approx(m, abs=0.01) and variance == pytest.approx(s2, rel=0.15), "near the data's law"


@pytest.mark.parametrize(("steps", "eta"), [(4, 0.0), (64, 0.0), (64, 1.0)])
def test_with_a_perfect_denoiser_the_law_of_samples_is_the_computed_one(steps: int, eta: float) -> None:
    """Trajectories of a linear-Gaussian process, denoised by the exact core: each step is affine in x.

    Mean and covariance of what the sampler should give are propagated through those steps; the samples have to agree
    within four standard errors, and that law has to be near the process's own where the steps are many.
    """
    prior = LinearGaussian(
        [[1.0, 0.2], [0.0, 0.9]],
        [[0.0], [0.3]],
        horizon=4,
        initial_mean=[0.3, -0.2],
        initial_covariance=0.2 * torch.eye(2),
        action_covariance=[[0.3]],
        noise_covariance=0.05 * torch.eye(2),
    )
    schedule, n, size = Schedule(64), 20_000, 4 * 3
    exact = ExactDenoiser(prior, schedule)

    mean, covariance, one = torch.zeros(size).double(), torch.eye(size).double(), torch.eye(size).double()
    levels = levels_of(schedule, steps)
    for level, following in zip(levels, [*levels[1:], -1], strict=True):
        k = torch.tensor([level])
        a, b = (schedule.abar_at(torch.tensor([i])).double().flatten() for i in (level, following))
        sigma2 = eta**2 * (1 - b) / (1 - a) * (1 - a / b) * (following >= 0)
        at_zero = exact(torch.zeros(1, 4, 3).double(), k).reshape(size)
        jacobian = (exact(one.reshape(size, 4, 3), k).reshape(size, size) - at_zero).T
        slope = (1 - b - sigma2).sqrt() / (1 - a).sqrt()
        through = b.sqrt() - slope * a.sqrt()
        step = through * jacobian + slope * one
        mean, covariance = step @ mean + through * at_zero, step @ covariance @ step.T + sigma2 * one

    nothing = Known(torch.zeros(n, 4, 3).double(), torch.zeros(n, 4, 3, dtype=torch.bool))
    x = ddim(exact, schedule, nothing, seeding.keys(2, 0, torch.arange(n)), steps, eta, clip=None).reshape(n, size)
    variance = covariance.diagonal()
    assert ((x.mean(0) - mean).abs() < 4 * (variance / n).sqrt()).all()
    spread = ((variance[:, None] * variance[None] + covariance**2) / n).sqrt()
    assert ((x.T.cov() - covariance).abs() < 4 * spread).all()
    if steps == 64:
        assert torch.allclose(mean, prior.mean.reshape(size), atol=0.02)
        assert torch.allclose(covariance, prior.covariance, atol=0.06)


def test_the_analytic_variance_is_right_at_any_number_of_steps_and_the_others_are_not(problem: Problem) -> None:
    """KL of the sampler's law to the data's: one number per level (Analytic-DPM) helps, the whole matrix is exact."""
    d = problem.denoiser
    whole = d.residual
    one = whole._replace(basis=whole.basis[:, :, :0], variance=whole.variance[:, :0], outer=whole.variance.mean(1))

    def kl(steps: int, variance: ReverseVariance, residual: Residual | None = None, eta: float = 1.0) -> float:
        options = {"reverse_variance": variance, "residual": residual, "eta": eta}
        return problem.kl(*propagate(d, problem.schedule, d.known(1), steps, **options), d.law)  # type: ignore[arg-type]

    for steps in (1, 4, 64):
        assert kl(steps, "analytic", whole) < 1e-6
        assert kl(steps, "analytic", whole, eta=0.3) < 1e-6
    assert 1e-4 < kl(64, "analytic", one) < 0.5 * kl(64, "posterior") and kl(64, "beta") < kl(64, "posterior")
    assert kl(64, "analytic", one) < kl(16, "analytic", one)


def test_dpm_solver_converges_faster_than_ddim(problem: Problem) -> None:
    """Both solve one equation; its solution by a thousand steps is the reference. Known rows do not disturb it."""
    fine, coarse = make_problem(False, 1000).denoiser, problem.denoiser
    denoiser = ExactDenoiser(problem.prior, fine.schedule, coarse.value, coarse.mask)
    key, known = seeding.keys(5, 0, torch.arange(50)), coarse.known(50)
    solution = ddim(denoiser, fine.schedule, known, key, 1000, clip=None)
    for steps in (10, 20):
        second = dpm_solver(denoiser, fine.schedule, known, key, steps, clip=None) - solution
        first = ddim(denoiser, fine.schedule, known, key, steps, clip=None) - solution
        assert second.square().mean() < 0.25 * first.square().mean()
        assert (second.flatten(1)[:, ~problem.free] == 0).all()


@pytest.mark.parametrize("steps", [5, 20])
def test_dpm_solver_s_law_is_the_computed_one(problem: Problem, steps: int) -> None:
    """Each step is affine in x and in the estimate before it (2M): its law is that of the first noise, propagated."""
    d, f, n = problem.denoiser, problem.free, 20_000
    size, levels = f.numel(), levels_of(problem.schedule, steps)
    rows = torch.cat([torch.zeros(1, size), torch.eye(size)]).double()  # zero, and each unit of the first noise
    value = d.known(1).value.flatten(1)
    x, last, last_h = torch.where(f, rows, value), None, None
    for level, following in zip(levels, [*levels[1:], -1], strict=True):
        a, b = (problem.schedule.abar_at(torch.tensor([k])).flatten() for k in (level, following))
        clean = d(x.view(-1, *d.value.shape), torch.full((len(x),), level)).flatten(1)
        h = (b / (1 - b)).log() / 2 - (a / (1 - a)).log() / 2
        ahead = clean if last is None or following < 0 else clean + (clean - last) * h / (2 * last_h)
        ratio = ((1 - b) / (1 - a)).sqrt()
        x = torch.where(f, ratio * x + (b.sqrt() - ratio * a.sqrt()) * ahead, value)  # equation 17, alpha (e^-h - 1)
        last, last_h = clean, h
    mean, slope = x[0], (x[1:] - x[0]).T
    covariance = (slope * f) @ slope.T
    drawn = dpm_solver(d, problem.schedule, d.known(n), seeding.keys(6, 0, torch.arange(n)), steps, None).flatten(1)
    variance = covariance.diagonal()
    assert ((drawn.mean(0) - mean).abs() <= 4 * (variance / n).sqrt() + 1e-9).all()
    spread = ((variance[:, None] * variance[None] + covariance**2) / n).sqrt()
    assert ((drawn.T.cov() - covariance).abs() <= 4.5 * spread + 1e-9).all()


def test_imposing_what_is_known_on_an_unconditional_model_is_biased(problem: Problem) -> None:
    """The denoiser has to have been told: with one that was not, no number of steps mends the law of the rest."""
    d = problem.denoiser
    options = {"reverse_variance": "analytic", "residual": d.residual}
    for steps in (16, 64):
        told = propagate(d, problem.schedule, d.known(1), steps, **options)  # type: ignore[arg-type]
        whole = ExactDenoiser(problem.prior, problem.schedule)
        replaced = propagate(whole, problem.schedule, d.known(1), steps, **options)  # type: ignore[arg-type]
        assert problem.kl(*told, d.law) < 1e-6 and problem.kl(*replaced, d.law) > 0.2


def test_known_rows_hold_at_every_step_and_are_seen_by_the_denoiser() -> None:
    value = torch.full(SHAPE, 0.25, dtype=torch.float64)
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[:, 0] = mask[:, -1, :1] = True
    seen, trace = [], []  # type: ignore[var-annotated]

    def spy(x: Tensor, k: Tensor) -> Tensor:
        seen.append(x.clone())
        return bend(x, k)

    out = ddim(spy, Schedule(20), Known(value, mask), KEY, 5, trace=trace)
    assert len(seen) == 5 and len(trace) == 6 and torch.equal(trace[-1], out)
    assert all((x[mask] == 0.25).all() for x in [*seen, *trace])
    assert (out[~mask] != 0.25).all()


def test_a_plan_depends_on_its_own_key_only() -> None:
    both = ddpm(bend, Schedule(8), NOTHING, KEY)
    one = Known(NOTHING.value[1:2], NOTHING.mask[1:2])
    assert torch.equal(ddpm(bend, Schedule(8), one, KEY[1:2]), both[1:2])


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_plans_may_know_different_numbers(variance: ReverseVariance) -> None:
    """Each has noise in what it does not know, whatever its company knows."""
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[0, :3] = mask[1, 0, 1] = True
    together = ddpm(bend, Schedule(8), Known(NOTHING.value, mask), KEY, reverse_variance=variance)
    for i in range(3):
        alone = Known(NOTHING.value[i : i + 1], mask[i : i + 1])
        assert torch.equal(ddpm(bend, Schedule(8), alone, KEY[i : i + 1], reverse_variance=variance)[0], together[i])


def test_the_reverse_variance_is_one_of_three(problem: Problem) -> None:
    d, key = problem.denoiser, seeding.keys(0, 0, torch.arange(1))
    with pytest.raises(UserError, match="reverse_variance is 'optimal'; take posterior, beta or analytic"):
        ddpm(d, problem.schedule, d.known(1), key, reverse_variance="optimal")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"beta is the noise of ddpm's steps, but eta is 0\.5"):
        ddim(d, problem.schedule, d.known(1), key, 4, 0.5, reverse_variance="beta")
    with pytest.raises(UserError, match="analytic, but no residual covariance is given"):
        ddpm(d, problem.schedule, d.known(1), key, reverse_variance="analytic")
    with pytest.raises(UserError, match="measured on 64 noise levels, but this schedule has 32"):
        ddpm(d, Schedule(32), d.known(1), key, reverse_variance="analytic", residual=d.residual)
    with pytest.raises(UserError, match="on another noise schedule of as many levels"):
        ddpm(d, Schedule(64, "linear"), d.known(1), key, reverse_variance="analytic", residual=d.residual)


@pytest.mark.parametrize("steps", [0, 9, -1])
def test_impossible_numbers_of_steps_are_refused(steps: int) -> None:
    with pytest.raises(UserError, match="8 levels"):
        ddim(bend, Schedule(8), NOTHING, KEY, steps)
