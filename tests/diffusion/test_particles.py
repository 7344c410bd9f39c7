"""Weighted particles against the exact posterior and its log-evidence."""

from functools import partial

import pytest
import torch
from torch import Tensor

from offline_cai import seeding
from offline_cai.diffusion import guidance
from offline_cai.diffusion.constraints import Inside
from offline_cai.diffusion.evidence import Learned, Return
from offline_cai.diffusion.particles import Population, sequential
from offline_cai.diffusion.residual import wiener
from offline_cai.diffusion.sampler import Belief, Denoise, Guided, Step, unguided
from offline_cai.diffusion.schedule import Schedule
from offline_cai.errors import UserError
from tests.diffusion.conftest import F64, HORIZON, WIDTH, Problem, make_problem


def run(problem: Problem, guide: object, plans: int, particles: int, steps: int = 16, **options: object) -> Population:
    d = problem.denoiser
    known, key = d.known(plans), seeding.keys(4, 0, torch.arange(plans))
    chosen = {"guide": guide, "residual": d.residual, **problem.evidence, **options}
    return sequential(d, problem.schedule, known, key, steps, particles, None, **chosen)  # type: ignore[arg-type]


def halfway(denoise: Denoise, x: Tensor, step: Step, *, problem: Problem) -> Guided:
    """A proposal that is wrong on purpose: half of the correction, and half of its worth."""
    whole = guidance.corrected(denoise, x, step, **problem.evidence)  # type: ignore[arg-type]
    belief = Belief((whole.prior.mean + whole.posterior.mean) / 2, whole.prior.spread)
    return Guided(whole.prior, belief, whole.log_evidence / 2)


def test_an_exact_proposal_has_equal_weights_and_the_exact_evidence(problem: Problem) -> None:
    out = run(problem, partial(guidance.corrected, **problem.evidence), 4, 5)
    assert (out.effective > 4.99).all() and (out.resampled == 0).all()
    torch.testing.assert_close(out.log_evidence, problem.posterior.log_evidence.expand(4), atol=5e-3, rtol=0)
    torch.testing.assert_close(out.log_weight.exp().sum(1), torch.ones(4, dtype=F64))


def test_weights_mend_a_proposal_that_is_wrong(problem: Problem) -> None:
    """Evidence unbiased, mean and spent nats of the posterior, with resampling on the way."""
    plans, particles = 48, 24
    out = run(problem, partial(halfway, problem=problem), plans, particles, keep=0.9)
    assert (out.resampled > 0).all() and (out.effective < particles).all()
    ratio = (out.log_evidence - problem.posterior.log_evidence).exp()
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / plans**0.5 and float(ratio.std()) < 2
    weight = (ratio[:, None] * out.log_weight.exp() / ratio.sum()).flatten()
    x, f = out.x.flatten(0, 1).flatten(1), problem.free
    away = (weight @ x - problem.posterior.mean.flatten())[f] / problem.posterior.covariance.diagonal().sqrt()[f]
    raw = (x.mean(0) - problem.posterior.mean.flatten())[f] / problem.posterior.covariance.diagonal().sqrt()[f]
    assert away.square().mean() < 0.15**2
    assert raw.isfinite().all()
    assert (ratio @ out.kl / ratio.sum()) == pytest.approx(5.0, abs=0.5)


@pytest.mark.parametrize("name", guidance.GUIDES)
def test_weights_mend_every_guide(name: str) -> None:
    """A linear reward, whose evidence and posterior mean are known: unbiased, within four standard errors."""
    problem, plans, particles = make_problem(last=False), 48, 32
    d, weight = problem.denoiser, torch.zeros(HORIZON, WIDTH, dtype=F64)
    weight[1:, 0] = 0.4
    flat, law = weight.flatten(), d.law
    reward = {"evidence": Return(lambda x: (x * weight).sum((1, 2)), quadratic=True), "temperature": 1.0}
    guide = unguided if name == "none" else partial(guidance.GUIDES[name], **reward)
    out = run(problem, guide, plans, particles, steps=8, **reward)
    exact = flat @ law.mean.flatten() + 0.5 * flat @ law.covariance @ flat
    ratio = (out.log_evidence - exact).exp()
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / plans**0.5 + 1e-3
    each = (ratio[:, None, None] * out.log_weight.exp()[..., None] * out.x.flatten(2)).sum(1) / ratio.mean()
    away = each.mean(0) - (law.mean.flatten() + law.covariance @ flat)
    error = (each - ratio[:, None] / ratio.mean() * each.mean(0)).std(0) / plans**0.5
    assert (away.abs() < 4 * error + 1e-6)[problem.free].all()


def test_unguided_particles_are_importance_sampling(problem: Problem) -> None:
    out = run(problem, unguided, 2, 64)
    torch.testing.assert_close(out.log_weight, out.evidence.log_softmax(1))
    torch.testing.assert_close(out.log_evidence, out.evidence.logsumexp(1) - torch.tensor(64.0, dtype=F64).log())


def test_plans_are_populations_of_their_own(problem: Problem) -> None:
    guide = partial(halfway, problem=problem)
    both, d = run(problem, guide, 2, 6), problem.denoiser
    key = seeding.keys(4, 0, torch.arange(2))[1:]
    one = sequential(
        d, problem.schedule, d.known(1), key, 16, 6, None, guide=guide, residual=d.residual, **problem.evidence  # type: ignore[arg-type]
    )  # fmt: skip
    torch.testing.assert_close(one.x[0], both.x[1])
    torch.testing.assert_close(one.log_evidence[0], both.log_evidence[1])


def test_known_rows_hold_in_every_particle(problem: Problem) -> None:
    out = run(problem, partial(halfway, problem=problem), 3, 8)
    assert (out.x.flatten(0, 1).flatten(1)[:, ~problem.free] == problem.denoiser.value.flatten()[~problem.free]).all()


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_a_last_step_without_noise_is_taken_unguided(problem: Problem, variance: str) -> None:
    """Its weights stay finite, and its evidence is that of the unguided sampler with this variance."""
    guide = partial(guidance.corrected, **problem.evidence)
    out = run(problem, guide, 32, 16, reverse_variance=variance)
    plain = run(problem, unguided, 8, 2048, reverse_variance=variance)
    ratio = out.log_evidence.exp() / plain.log_evidence.exp().mean()
    error = (ratio.var() / 32 + (plain.log_evidence.exp() / plain.log_evidence.exp().mean()).var() / 8).sqrt()
    assert out.log_weight.isfinite().all() and abs(float(ratio.mean()) - 1) < 4 * float(error)


def test_two_bundles_get_the_mass_that_the_evidence_gives_them() -> None:
    """x_0 is -2 or 2, each with spread .3, in two numbers; evidence makes the right one e^1.5 times likelier."""
    schedule, centres, variance, nats = Schedule(64).double(), torch.tensor([-2.0, 2.0], dtype=F64), 0.09, 1.5

    def denoiser(x: Tensor, k: Tensor) -> Tensor:
        abar = schedule.abar_at(k)
        noised = abar * variance + 1 - abar
        share = (-0.5 * (x[..., None] - abar.sqrt()[..., None] * centres).square() / noised[..., None]).sum((1, 2))
        each = centres + (abar.sqrt() * variance / noised)[..., None] * (
            x[..., None] - abar.sqrt()[..., None] * centres
        )
        return (share.softmax(-1)[:, None, None] * each).sum(-1)

    covariance = torch.full((2, 2), 4.0, dtype=F64) + variance * torch.eye(2, dtype=F64)
    value, mask = torch.zeros(1, 1, 2, dtype=F64), torch.zeros(1, 1, 2, dtype=torch.bool)
    from offline_cai.core import Known
    from offline_cai.diffusion.residual import measure

    g = torch.Generator().manual_seed(0)
    side = centres[torch.randint(0, 2, (4000, 1, 1), generator=g)]
    data = side + variance**0.5 * torch.randn(4000, 1, 2, dtype=F64, generator=g)
    residual = measure(denoiser, schedule, data, mask[0], seeding.keys(1, 0, torch.arange(4000)))
    reward = Return(lambda x: nats * torch.sigmoid(4 * x.mean((1, 2))))
    plans, particles = 24, 64
    known = Known(value.expand(plans, 1, 2), mask.expand(plans, 1, 2))
    guide = partial(guidance.corrected, evidence=reward, temperature=1.0)
    out = sequential(
        denoiser, schedule, known, seeding.keys(2, 0, torch.arange(plans)), 64, particles, None,
        guide=guide, evidence=reward, temperature=1.0, residual=residual,
    )  # fmt: skip
    weight = out.log_weight.exp() * (out.log_evidence - out.log_evidence.logsumexp(0)).exp()[:, None]
    right = float((weight * (out.x.mean((2, 3)) > 0)).sum())
    exact = float(torch.tensor(nats).sigmoid())
    assert right == pytest.approx(exact, abs=0.05)
    assert wiener(covariance, schedule, mask[0]).variance[-1, 0] == pytest.approx(8 + variance, rel=0.01)


def test_what_cannot_be_weighed_is_said(problem: Problem) -> None:
    learned = Learned(lambda x, k, temperature: x.sum((1, 2)), made_for="a")
    with pytest.raises(UserError, match="weights need evidence about x_0"):
        run(problem, unguided, 1, 4, evidence=learned)
    with pytest.raises(UserError, match="0 particles were asked for"):
        run(problem, unguided, 1, 0)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match=r"temperature is .*positive"):
            run(problem, unguided, 1, 4, temperature=temperature)
    box = Inside(columns=(0,), low=(-1.0,), high=(1.0,), width=0.1)
    with pytest.raises(UserError, match="it projects"):
        run(problem, partial(guidance.projected, guide=unguided, constraints=[box]), 1, 4)
    never = Return(lambda x: torch.full_like(x[:, 0, 0], -float("inf")))
    with pytest.raises(UserError, match="no particle of plan 0 explains the evidence"):
        run(problem, unguided, 1, 4, evidence=never)


def test_the_evidence_of_a_reward_that_is_not_quadratic_is_found(problem: Problem) -> None:
    """A rounded distance of the last position, whose posterior is a sum over a grid; Newton's steps have converged."""
    d, at = problem.denoiser, (HORIZON - 2) * WIDTH

    def distance(x: Tensor) -> Tensor:
        return -(0.02 + (x[..., -2, 0] - 1).square()).sqrt()

    grid = torch.linspace(-8, 8, 4001, dtype=F64)
    rows = torch.zeros(len(grid), HORIZON, WIDTH, dtype=F64)
    rows[:, -2, 0] = d.law.mean.flatten()[at] + d.law.covariance[at, at].sqrt() * grid
    joint = (-0.5 * grid.square()).log_softmax(0) + distance(rows) / 0.1
    reward = {"evidence": Return(distance), "temperature": 0.1}
    out = run(problem, partial(guidance.corrected, **reward), 24, 8, **reward)  # type: ignore[arg-type]
    ratio = (out.log_evidence - joint.logsumexp(0)).exp()
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / 24**0.5 < 0.3
