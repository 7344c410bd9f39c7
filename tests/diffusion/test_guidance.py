"""Guides against the exact posterior of a linear-Gaussian process, by moment propagation."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from offline_cai import seeding
from offline_cai.core import Known
from offline_cai.diffusion import guidance
from offline_cai.diffusion.constraints import Constraint, HalfSpace, Inside, Outside
from offline_cai.diffusion.evidence import Goal, Learned, Return
from offline_cai.diffusion.exact import ExactDenoiser, propagate
from offline_cai.diffusion.residual import Residual
from offline_cai.diffusion.sampler import Guide, ddim, ddpm, dpm_solver, unguided, walk
from offline_cai.diffusion.schedule import Schedule
from offline_cai.errors import UserError
from tests.diffusion.conftest import HORIZON, WIDTH, Problem, make_problem

F64 = torch.float64


def guided(problem: Problem, guide: Guide, steps: int = 64, residual: Residual | None = None) -> float:
    """KL of a guided sampler's law to the posterior."""
    d = problem.denoiser
    options = {"reverse_variance": "analytic", "guide": guide, "residual": residual or d.residual}
    return problem.kl(*propagate(d, problem.schedule, d.known(1), steps, **options), problem.posterior)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "steps"), [("corrected", 4), ("corrected", 64), ("jacobian", 4), ("jacobian", 16)])
def test_weighed_by_its_covariance_evidence_gives_the_exact_posterior(problem: Problem, name: str, steps: int) -> None:
    assert guided(problem, partial(guidance.GUIDES[name], **problem.evidence), steps) < 1e-5


def test_newton_and_one_solve_agree_where_the_reward_is_quadratic(problem: Problem) -> None:
    reward = Return(problem.reward, quadratic=False)
    guide = partial(guidance.corrected, evidence=reward, temperature=problem.temperature, newton=1)
    assert guided(problem, guide, 16) < 1e-5


def test_the_worth_of_a_noised_trajectory_is_exact(problem: Problem) -> None:
    """log E[exp J | x_k] is the ratio of the posterior's and the prior's densities of x_k, times the evidence."""
    d, level = problem.denoiser, 20
    step = next(s for s in walk(problem.schedule, d.known(3), 64, residual=d.residual) if s.level == level)
    x = d.known(3).impose(seeding.normal(seeding.keys(0, 0, torch.arange(3)), (HORIZON, WIDTH), dtype=F64))
    worth = guidance.corrected(d, x, step, **problem.evidence).log_evidence  # type: ignore[arg-type]
    abar = float(problem.schedule.abar[level])
    law, posterior = d.law, problem.posterior
    exact = posterior.noised_log_prob(x, abar) - law.noised_log_prob(x, abar) + posterior.log_evidence
    torch.testing.assert_close(worth, exact, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["at_noisy", "at_mean", "through_denoiser"])
def test_gradients_alone_steer_to_it_but_stay_biased(problem: Problem, name: str) -> None:
    """With gentle evidence: nearer than no guide, and no nearer with four times the steps."""
    d, temperature = problem.denoiser, 10 * problem.temperature
    posterior = d.law.posterior(problem.reward, temperature=temperature)
    guide = partial(guidance.GUIDES[name], evidence=problem.evidence["evidence"], temperature=temperature)
    found = []
    for levels, steering in ((64, unguided), (64, guide), (256, guide)):
        schedule = Schedule(levels).double()
        denoiser = ExactDenoiser(problem.prior, schedule, d.value, d.mask)
        options = {"reverse_variance": "analytic", "guide": steering, "residual": denoiser.residual}
        law = propagate(denoiser, schedule, denoiser.known(1), levels, **options)  # type: ignore[arg-type]
        found.append(problem.kl(*law, posterior))
    assert found[1] < 0.6 * found[0] and 0.01 < 0.7 * found[1] < found[2]


def test_two_guide_steps_move_twice_as_far(problem: Problem) -> None:
    d = problem.denoiser
    step = next(walk(problem.schedule, d.known(1), 64))
    linear = {"evidence": Return(lambda x: x.sum((1, 2))), "temperature": 1.0}
    x = d.known(1).impose(torch.zeros(1, HORIZON, WIDTH, dtype=F64))
    moved = []
    for repeats in (1, 2):
        belief = guidance.at_noisy(d, x, step, repeats=repeats, **linear)  # type: ignore[arg-type]
        moved.append(step.mean(x, belief.posterior.mean) - step.mean(x, d(x, step.k)))
    torch.testing.assert_close(moved[1], 2 * moved[0])
    assert moved[0].abs().sum() > 0


def test_a_network_s_gradient_is_the_chain_rule(problem: Problem) -> None:
    """Of a linear reward through the exact denoiser: its Jacobian is sqrt(abar) / (1 - abar) times the covariance."""
    d, weight = problem.denoiser, torch.arange(1.0, HORIZON * WIDTH + 1, dtype=F64)
    step = list(walk(problem.schedule, d.known(2), 64, residual=d.residual))[30]
    x = d.known(2).impose(torch.ones(2, HORIZON, WIDTH, dtype=F64))
    evidence = Return(lambda y: y.flatten(1) @ weight)
    belief = guidance.through_denoiser(d, x, step, evidence=evidence, temperature=2.0)
    assert step.residual is not None
    slope = math.sqrt(step.abar) / (1 - step.abar) * step.residual.matrix() @ weight / 2.0
    moved = (step.mean(x, belief.posterior.mean) - step.mean(x, belief.prior.mean))[0].flatten()
    torch.testing.assert_close(moved, step.posterior_variance * slope, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["at_noisy", "at_mean", "through_denoiser", "corrected"])
def test_with_any_noise_a_linear_reward_moves_the_mean_as_far_as_bayes(name: str) -> None:
    """In many steps, given the exact evidence of x_k where a guide reads it there: DDIM at each eta, not DDPM alone."""
    problem, levels, temperature = make_problem(False, 256), 256, 0.5
    d, weight = problem.denoiser, torch.zeros(HORIZON, WIDTH, dtype=F64)
    weight[-1, 0] = 1.0
    wanted = d.law.covariance @ weight.flatten() / temperature

    def earned(x: Tensor) -> Tensor:
        return (x * weight).sum((1, 2))

    learned = Learned(lambda x, k, t: earned(d(x, k)) / t, made_for="")  # but for a constant
    evidence = learned if name in ("at_noisy", "at_mean") else Return(earned, quadratic=True)
    guide = partial(guidance.GUIDES[name], evidence=evidence, temperature=temperature)
    for eta in (0.0, 0.5, 1.0):
        options = {"residual": d.residual, "eta": eta}
        mean, plain = (
            propagate(d, problem.schedule, d.known(1), levels, guide=g, **options)[0]  # type: ignore[arg-type]
            for g in (guide, unguided)
        )
        assert float((mean - plain) @ wanted / wanted.square().sum()) == pytest.approx(1, abs=0.1), eta


@pytest.mark.parametrize("name", ["ddim", "dpm_solver"])
def test_deterministic_samplers_follow_the_guide_too(problem: Problem, name: str) -> None:
    d, n, f = problem.denoiser, 2000, problem.free
    options = {"guide": partial(guidance.corrected, **problem.evidence), "residual": d.residual}
    key, known = seeding.keys(1, 0, torch.arange(n)), d.known(n)
    if name == "ddim":
        x = ddim(d, problem.schedule, known, key, 64, 0.0, None, **options).flatten(1)  # type: ignore[arg-type]
    else:
        x = dpm_solver(d, problem.schedule, known, key, 32, None, **options).flatten(1)  # type: ignore[arg-type]
    mean, deviation = problem.posterior.mean.flatten(), problem.posterior.covariance.diagonal().sqrt()
    assert ((x.mean(0) - mean)[f].abs() < 4 * deviation[f] / n**0.5 + 0.03 * deviation[f]).all()
    assert ((x.std(0) / deviation)[f] - 1).abs().max() < 0.2


def test_low_rank_steers_where_the_denoiser_is_unsure(problem: Problem) -> None:
    """The directions that are kept carry most of it: far better than gradients, not as good as all of them."""
    d = problem.denoiser
    full = d.residual
    first, rest = full.variance[:, :8], full.variance[:, 8:]
    kept = full._replace(basis=full.basis[:, :, :8], variance=first, outer=rest.mean(1))
    guide = partial(guidance.corrected, **problem.evidence)
    assert 1e-4 < guided(problem, guide, residual=kept) < 0.5 * guided(problem, unguided)


def saturating(x: Tensor) -> Tensor:
    """-|last position - 1|, rounded at the tip: concave, far from quadratic."""
    return -4 * (0.05 + (x[:, -1, 0] - 1).square()).sqrt()


def posterior_of_last(problem: Problem, temperature: float) -> tuple[float, float]:
    """Mean and deviation of the last position given `saturating`, on a grid."""
    at = (HORIZON - 1) * WIDTH
    mean, deviation = problem.denoiser.law.mean.flatten()[at], problem.denoiser.law.covariance[at, at].sqrt()
    grid = mean + deviation * torch.linspace(-7, 7, 4001, dtype=F64)
    rows = torch.zeros(len(grid), HORIZON, WIDTH, dtype=F64)
    rows[:, -1, 0] = grid
    weight = (saturating(rows) / temperature - 0.5 * ((grid - mean) / deviation) ** 2).softmax(0)
    first = float(weight @ grid)
    return first, float(weight @ (grid - first) ** 2) ** 0.5


def test_newton_steps_reach_a_reward_that_is_not_quadratic() -> None:
    problem, n, temperature = make_problem(last=False), 1000, 0.8
    d, (mean, deviation) = problem.denoiser, posterior_of_last(make_problem(last=False), temperature)
    errors = []
    for newton in (1, 10):
        guide = partial(guidance.corrected, evidence=Return(saturating), temperature=temperature, newton=newton)
        options = {"reverse_variance": "analytic", "guide": guide, "residual": d.residual}
        key = seeding.keys(2, 0, torch.arange(n))
        x = ddpm(d, problem.schedule, d.known(n), key, None, steps=16, **options)[:, -1, 0]  # type: ignore[arg-type]
        errors.append(abs(float(x.mean()) - mean) / deviation)
    assert errors[1] < 0.25 and errors[1] < 0.7 * errors[0]


def test_a_plan_does_not_depend_on_its_company(problem: Problem) -> None:
    """Newton's steps of one sample end where they would without the others, who need more of them."""
    d, key = problem.denoiser, seeding.keys(2, 0, torch.arange(16))
    options = {"reverse_variance": "analytic", "residual": d.residual}
    options["guide"] = partial(guidance.corrected, evidence=Return(saturating), temperature=0.2)
    all_of_them = ddpm(d, problem.schedule, d.known(16), key, None, steps=8, **options)  # type: ignore[arg-type]
    one = ddpm(d, problem.schedule, d.known(1), key[3:4], None, steps=8, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(one[0], all_of_them[3], rtol=1e-9, atol=1e-9)


def test_convex_evidence_gives_finite_samples(problem: Problem) -> None:
    """A bump's flanks and a convex reward have no Gaussian approximation: precision is kept positive."""
    d = problem.denoiser
    for function in (lambda x: 50 * torch.exp(-(x[:, 2, 0] - 2).square()), lambda x: 30 * x[:, 2, 0].square()):
        guide = partial(guidance.corrected, evidence=Return(function), temperature=1.0)
        options = {"reverse_variance": "analytic", "guide": guide, "residual": d.residual}
        key = seeding.keys(2, 0, torch.arange(8))
        assert ddpm(d, problem.schedule, d.known(8), key, 3.0, steps=8, **options).isfinite().all()  # type: ignore[arg-type]


def test_free_guidance_lies_between_and_beyond() -> None:
    def denoiser(x: Tensor, k: Tensor, condition: Tensor | None = None) -> Tensor:
        return 0 * x if condition is None else 0 * x + condition[:, :, None]

    x, k, told = torch.zeros(2, 3, 1), torch.zeros(2, dtype=torch.int64), torch.tensor([[1.0], [2.0]])
    for weight, scale in ((0.0, 0.0), (1.0, 1.0), (1.5, 1.5)):
        out = guidance.classifier_free(denoiser, told, weight)(x, k)
        torch.testing.assert_close(out, scale * told[:, :, None].expand(2, 3, 1))


def test_the_best_of_some_has_the_most_evidence() -> None:
    x = torch.arange(24.0).view(2, 3, 2, 2) * torch.tensor([1.0, -1.0])[:, None, None, None]
    best = guidance.best_of(x, Return(lambda y: y.sum((1, 2))), 1.0)
    assert torch.equal(best, torch.stack([x[0, 2], x[1, 0]]))


def test_projected_samples_keep_the_constraint_and_what_is_known(problem: Problem) -> None:
    d, box = problem.denoiser, Inside(columns=(0,), low=(-0.9,), high=(0.7,), width=0.1)
    guide = partial(guidance.projected, guide=partial(guidance.corrected, **problem.evidence), constraints=[box])
    options = {"reverse_variance": "analytic", "guide": guide, "residual": d.residual}
    key = seeding.keys(2, 0, torch.arange(64))
    x = ddpm(d, problem.schedule, d.known(64), key, None, steps=16, **options)  # type: ignore[arg-type]
    assert float(box.violation(x).max()) <= 1e-12 and (x.flatten(1)[:, ~problem.free] == d.value[d.mask]).all()
    assert x[:, 2, 0].std() > 0.05


@pytest.mark.parametrize(
    "constraints",
    [
        [
            Inside(columns=(0, 1), low=(-1.0, -1.0), high=(1.0, 1.0), width=0.1),
            HalfSpace(columns=(0, 1), normal=(1.0, 1.0), offset=-0.9, width=0.1),
        ],
        [Outside(columns=(0, 1), centre=(x, 0.0), radius=0.6, width=0.1) for x in (0.0, 0.7)],
    ],
    ids=["convex", "circles"],
)
def test_projected_samples_keep_all_constraints_at_once(constraints: list[Constraint]) -> None:
    """Each alone is left again by projecting onto the next."""
    problem = make_problem(last=False)
    d, key = problem.denoiser, seeding.keys(2, 0, torch.arange(64))
    known = Known(0 * d.value.expand(64, -1, -1), torch.zeros(64, HORIZON, WIDTH, dtype=torch.bool))
    guide = partial(guidance.projected, guide=unguided, constraints=constraints)
    x = ddpm(d, problem.schedule, known, key, None, steps=8, guide=guide)
    assert max(float(c.violation(x).max()) for c in constraints) <= 1e-4
    once = x
    for constraint in constraints:
        once = constraint.project(ddpm(d, problem.schedule, known, key, None, steps=8))
    assert max(float(c.violation(once).max()) for c in constraints) > 0.1


def test_a_barrier_moves_samples_out_of_the_circle(problem: Problem) -> None:
    d, circle = problem.denoiser, Outside(columns=(0, 1), centre=(0.0, 0.3), radius=0.5, width=0.05)
    inside = []
    for guide in (unguided, partial(guidance.corrected, evidence=circle, temperature=1.0)):
        options = {"reverse_variance": "analytic", "guide": guide, "residual": d.residual}
        key = seeding.keys(2, 0, torch.arange(128))
        x = ddpm(d, problem.schedule, d.known(128), key, None, steps=16, **options)  # type: ignore[arg-type]
        inside.append(float((circle.violation(x) > 0.05).double().mean()))
    assert inside[0] > 0.1 and inside[1] < 0.35 * inside[0]


def test_guides_say_what_they_need(problem: Problem) -> None:
    d, key = problem.denoiser, seeding.keys(0, 0, torch.arange(1))
    learned = Learned(lambda x, k, temperature: x.sum((1, 2)), made_for="a")

    def sample(guide: Guide, **options: object) -> Tensor:
        return ddpm(d, problem.schedule, d.known(1), key, steps=2, guide=guide, **options)  # type: ignore[arg-type]

    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"temperature is .*positive"):
            sample(partial(guidance.at_noisy, evidence=learned, temperature=temperature))
    for name in ("through_denoiser", "corrected", "jacobian"):
        with pytest.raises(UserError, match="learned for noised rows"):
            sample(partial(guidance.GUIDES[name], evidence=learned, temperature=1.0), residual=d.residual)
    with pytest.raises(UserError, match=r"none is given: residual\.measure"):
        sample(partial(guidance.corrected, **problem.evidence))
    assert sample(partial(guidance.at_noisy, evidence=learned, temperature=1.0)).isfinite().all()
    assert sample(partial(guidance.at_mean, evidence=learned, temperature=1.0)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_sharp_goals_are_met_or_refused(problem: Problem, dtype: torch.dtype) -> None:
    d, key = problem.denoiser, seeding.keys(0, 0, torch.arange(4))
    known = Known(d.known(4).value.to(dtype), d.known(4).mask)

    def ends(width: float, target: float = 1.0) -> Tensor:
        guide = partial(guidance.corrected, evidence=Goal((target,), (0,), width=width, row=2), temperature=1.0)
        options = {"reverse_variance": "analytic", "residual": d.residual, "guide": guide}
        return ddpm(d, problem.schedule, known, key, None, steps=8, **options)[:, 2, 0]  # type: ignore[arg-type]

    assert (ends(1e-3) - 1).abs().max() < 5e-3
    for width in (1e-9, 1e-30):
        with pytest.raises(UserError, match=r"too sharp to be weighed|not a finite number"):
            ends(width)
    with pytest.raises(UserError, match="not a finite number"):
        ends(1e-3, 1e200 if dtype is F64 else 1e30)


@pytest.mark.parametrize("name", sorted(set(guidance.GUIDES) - {"none"}))
def test_rewards_that_are_no_number_are_refused(problem: Problem, name: str) -> None:
    d, key = problem.denoiser, seeding.keys(0, 0, torch.arange(2))
    for reward, words in (
        (lambda x: (x[:, 2, 0] - 1e3).sqrt(), "the reward is not a number"),
        (lambda x: (0 * x[:, 2, 0]).sqrt(), "its slope is not a finite number"),
        (lambda x: x[:, 2], r"shape \[2, 3\] for 2 trajectories"),
    ):
        guide = partial(guidance.GUIDES[name], evidence=Return(reward), temperature=1.0)
        with pytest.raises(UserError, match=words):
            ddpm(d, problem.schedule, d.known(2), key, None, steps=4, guide=guide, residual=d.residual)


def test_at_a_circle_s_very_centre_the_barrier_is_flat(problem: Problem) -> None:
    circle = Outside(columns=(0, 1), centre=(0.0, 0.0), radius=0.5, width=0.1)
    guide = partial(guidance.corrected, evidence=circle, temperature=1.0)
    known, key = problem.denoiser.known(2), seeding.keys(0, 0, torch.arange(2))
    options = {"reverse_variance": "analytic", "residual": problem.denoiser.residual, "guide": guide}
    x = ddpm(lambda x, k: 0 * x, problem.schedule, known, key, None, steps=4, **options)  # type: ignore[arg-type]
    assert x.isfinite().all()


def test_the_network_s_own_covariance_is_of_plans_that_know_the_same(problem: Problem) -> None:
    d, key = problem.denoiser, seeding.keys(0, 0, torch.arange(2))
    guide = partial(guidance.jacobian, **problem.evidence)
    known = d.known(2)
    mask = known.mask.clone()
    mask[1, 1] = True
    with pytest.raises(UserError, match="the same numbers are known"):
        ddpm(d, problem.schedule, Known(known.value, mask), key, None, steps=2, guide=guide)
    everything = Known(known.value, torch.ones_like(mask))
    assert torch.equal(ddpm(d, problem.schedule, everything, key, None, steps=2, guide=guide), known.value)


def test_known_rows_are_not_steered(problem: Problem) -> None:
    d, key = problem.denoiser, seeding.keys(0, 0, torch.arange(2))
    known = d.known(2)
    for name in ("at_noisy", "at_mean", "through_denoiser", "corrected", "jacobian"):
        guide = partial(guidance.GUIDES[name], **problem.evidence)
        trace: list[Tensor] = []
        ddpm(d, problem.schedule, known, key, None, trace, steps=4, guide=guide, residual=d.residual)
        assert all(torch.equal(Known(known.value, known.mask).impose(x), x) for x in trace)
