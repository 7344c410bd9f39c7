"""The linear-Gaussian core against dense conditioning, Riccati recursions, autograd and quadrature."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import solve_discrete_are

from offline_cai.inference.gaussian import LinearGaussian, QuadraticReward
from offline_cai.inference.gaussian_law import tilt
from offline_cai.inference.soft import gaussian_kl
from offline_cai.inference.tabular import MDP, solve

F64 = torch.float64
EXACT = {"rtol": 1e-9, "atol": 1e-9}
CASES = [
    {"seed": 0},
    {"seed": 1, "n": 3, "m": 2, "varying": True},
    {"seed": 2, "noise": 0.0},
    {"seed": 3, "noise": 0.0, "spread": 0.0, "varying": True},
    {"seed": 4, "horizon": 1},
]


def blocks(reward, law, temperature):
    """The reward / temperature as one quadratic of the flat trajectory."""
    weight, linear, constant = reward.over(law.horizon, law.dim)
    return torch.block_diag(*weight) / temperature, linear.flatten() / temperature, constant / temperature


def mask_of(law, *entries):
    mask = torch.zeros(law.horizon, law.dim, dtype=torch.bool)
    for entry in entries:
        mask[entry] = True
    return mask


@pytest.fixture(params=CASES, ids=lambda case: f"seed{case['seed']}")
def system(request, ref):
    """A prior, a reward, a temperature, and the dense prior."""
    law = ref.random_gaussian(**request.param)
    return law, ref.random_reward(request.param["seed"] + 100, law), 0.7, *ref.dense_prior(law)


def same_law(law, mean, covariance):
    torch.testing.assert_close(law.mean.flatten(), mean, **EXACT)
    torch.testing.assert_close(law.covariance, covariance, **EXACT)
    D = law.dim
    for t in range(law.horizon):
        torch.testing.assert_close(law.row_covariance[t], covariance[t * D : t * D + D, t * D : t * D + D], **EXACT)


def test_the_prior_is_its_dense_gaussian(system):
    law, _, _, mean, covariance = system
    same_law(law, mean, covariance)
    assert law.log_evidence == 0


def test_the_posterior_is_dense_conditioning(system, ref):
    law, reward, temperature, mean, covariance = system
    posterior = law.posterior(reward, temperature=temperature)
    mean, covariance, log_z = ref.dense_tilt(mean, covariance, *blocks(reward, law, temperature))
    same_law(posterior, mean, covariance)
    assert float(posterior.log_evidence) == pytest.approx(float(log_z), rel=1e-9)
    assert torch.equal(posterior.most_probable, posterior.mean)


def test_a_long_posterior_of_an_unstable_process_keeps_its_digits(ref):
    """Against the dense information form: the covariance form itself loses six digits here."""
    law = ref.random_gaussian(5, horizon=150)
    assert law.covariance.abs().max() > 1e6
    reward = ref.random_reward(105, law)
    posterior = law.posterior(reward, temperature=0.7)
    precision, pull = ref.dense_information(law)
    S, s, _ = blocks(reward, law, 0.7)
    torch.testing.assert_close(posterior.mean.flatten(), torch.linalg.solve(precision + S, pull + s), **EXACT)
    torch.testing.assert_close(posterior.covariance, torch.linalg.inv(precision + S), **EXACT)


KNOWN = {
    "first": lambda law: mask_of(law, (0, slice(0, law.state_dim))),
    "last": lambda law: mask_of(law, (-1, slice(0, law.state_dim))),
    "first and last": lambda law: mask_of(law, (0, slice(0, law.state_dim)), (-1, slice(0, law.state_dim))),
    "some numbers": lambda law: mask_of(law, (0, 0), (2, 1), (3, slice(0, law.state_dim)), (1, -1)),
    "all rows of one coordinate": lambda law: mask_of(law, (slice(None), 0)),
    "a whole row": lambda law: mask_of(law, 2),
}


@pytest.mark.parametrize("which", KNOWN)
@pytest.mark.parametrize("seed", [0, 1])
def test_known_numbers_are_dense_conditioning(ref, which, seed):
    law = ref.random_gaussian(seed, n=2, m=1 + seed, varying=bool(seed), horizon=6)
    reward, mask = ref.random_reward(seed + 5, law), KNOWN[which](law)
    value = torch.randn(law.horizon, law.dim, dtype=F64, generator=torch.Generator().manual_seed(seed))
    mean, covariance = ref.dense_prior(law)
    mean, covariance, _ = ref.dense_condition(mean, covariance, mask.flatten(), value.flatten())
    same_law(law.posterior(known=(value, mask)), mean, covariance)
    assert float(law.posterior(known=(value, mask)).log_evidence) == pytest.approx(0, abs=1e-9)
    mean, covariance, log_z = ref.dense_tilt(mean, covariance, *blocks(reward, law, 0.7))
    posterior = law.posterior(reward, temperature=0.7, known=(value, mask))
    same_law(posterior, mean, covariance)
    assert float(posterior.log_evidence) == pytest.approx(float(log_z), rel=1e-9)
    assert torch.equal(posterior.sample(3)[:, mask].round(decimals=7), value[mask].expand(3, -1).round(decimals=7))


@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_units_do_not_matter_to_known_numbers(unit):
    """The same bridge in metres and in micrometres."""

    def bridge(unit):
        law = LinearGaussian(
            [[0.9]], [[0.5]], horizon=6, initial_mean=[0.0], initial_covariance=[[unit**2]],
            action_covariance=[[0.3 * unit**2]], noise_covariance=[[0.1 * unit**2]],
        )  # fmt: skip
        value = torch.full((6, 2), 2 * unit, dtype=F64)
        return law.posterior(known=(value, mask_of(law, (0, 0), (5, 0)))).mean / unit

    torch.testing.assert_close(bridge(unit), bridge(1.0), **EXACT)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_known_numbers_count_their_density(ref, noise):
    """log p(known), the term that log_evidence subtracts, is the dense marginal density."""
    law = ref.random_gaussian(5, noise=noise, horizon=4)
    mask = mask_of(law, (0, 0), (-1, slice(0, 2)), (1, -1))
    value = torch.randn(4, 3, dtype=F64, generator=torch.Generator().manual_seed(2))
    _, _, density = ref.dense_condition(*ref.dense_prior(law), mask.flatten(), value.flatten())
    zero = torch.zeros(4, 3, 3, dtype=F64)
    assert float(tilt(law, zero, zero[:, 0], zero[0, 0, 0], (value, mask)).log_evidence) == pytest.approx(
        float(density), rel=1e-9
    )


def test_a_deterministic_process_is_steered_to_its_goal_by_its_actions_alone(ref):
    """No noise: goals are met through the actions, the rank of the known plane falling step by step."""
    law = ref.random_gaussian(6, n=3, m=1, noise=0.0, horizon=8)
    reward, mask = ref.random_reward(7, law, 0.3), KNOWN["first and last"](law)
    value = torch.randn(8, 4, dtype=F64, generator=torch.Generator().manual_seed(1))
    mean, covariance = ref.dense_prior(law)
    mean, covariance, _ = ref.dense_condition(mean, covariance, mask.flatten(), value.flatten())
    mean, covariance, log_z = ref.dense_tilt(mean, covariance, *blocks(reward, law, 1.0))
    for backup in ("posterior", "variational"):
        answer = law.posterior(reward, known=(value, mask), backup=backup)
        same_law(answer, mean, covariance)
        assert float(answer.log_evidence) == pytest.approx(float(log_z), rel=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_a_singular_start_that_is_known_leaves_no_noise_behind(ref, seed):
    """Two of three numbers determine a start of rank two: what is left of its noise is rounding, not noise."""
    g = torch.Generator().manual_seed(seed)
    G, A = torch.randn(3, 2, dtype=F64, generator=g), torch.randn(3, 3, dtype=F64, generator=g)
    B = torch.randn(3, 1, dtype=F64, generator=g)
    process = {"horizon": 3, "action_covariance": [[1.0]]}
    law = LinearGaussian(A, B, initial_mean=[0.0] * 3, initial_covariance=G @ G.T, **process)
    x, reward = law.sample(1, g)[0], QuadraticReward(torch.eye(4))
    mask = mask_of(law, (0, 0), (0, 1), (0, 3), (1, slice(0, 3)))
    fixed = LinearGaussian(A, B, initial_mean=x[0, :3], initial_covariance=torch.zeros(3, 3), **process)
    exact = fixed.posterior(reward, known=(x, mask_of(law, (0, 3))))
    answer = law.posterior(reward, known=(x, mask))
    torch.testing.assert_close(answer.mean, exact.mean, **EXACT)
    assert float(answer.log_evidence) == pytest.approx(float(exact.log_evidence), rel=1e-9)
    wrong = x.clone()
    wrong[1, 0] += 1.0
    with pytest.raises(ValueError, match="known: impossible evidence"):
        law.posterior(reward, known=(wrong, mask))


@pytest.mark.parametrize("horizon", [60, 1000])
def test_every_state_of_a_process_without_noise_may_be_known(horizon):
    """A double integrator: each known state follows from its neighbours, which leaves the actions no freedom."""
    law = LinearGaussian(
        [[1.0, 0.1], [0.0, 1.0]], [[0.0], [0.1]], horizon=horizon, initial_mean=[0.0, 0.0],
        initial_covariance=torch.eye(2), action_covariance=[[1.0]],
    )  # fmt: skip
    x = law.sample(1, torch.Generator().manual_seed(0))[0]
    mask = mask_of(law, (slice(None), slice(0, 2)))
    answer = law.posterior(QuadraticReward(torch.eye(3)), known=(x, mask))
    torch.testing.assert_close(answer.mean[:-1], x[:-1], rtol=1e-9, atol=1e-9)
    exact = -0.5 * x[:-1].square().sum() - 0.5 * x[-1, :2].square().sum() - 0.5 * math.log(2)  # the last action is free
    assert float(answer.log_evidence) == pytest.approx(float(exact), rel=1e-9)


def test_what_is_told_twice_is_told_once(ref):
    law, reward = ref.random_gaussian(27), ref.random_reward(28, ref.random_gaussian(27))
    x, mask = law.sample(1, torch.Generator().manual_seed(0))[0], KNOWN["some numbers"](law)
    once = law.posterior(known=(x, mask))
    twice = once.posterior(known=(x, mask))
    same_law(twice, once.mean.flatten(), once.covariance)
    exact = law.posterior(reward, known=(x, mask))
    answer = once.posterior(reward, known=(x, mask))
    assert float(answer.log_evidence) == pytest.approx(float(exact.log_evidence), rel=1e-9)


def test_redundant_numbers_count_once_and_must_agree():
    """A number that stays as it is, known twice: its density is that of sqrt(2) times it."""
    law = LinearGaussian(
        [[1.0]], [[0.0]], horizon=2, initial_mean=[0.0], initial_covariance=[[1.0]], action_covariance=[[1.0]]
    )
    zero, mask = torch.zeros(2, 2, 2, dtype=F64), mask_of(law, (0, 0), (1, 0))
    value = torch.tensor([[0.7, 0.0], [0.7, 0.0]], dtype=F64)
    exact = -0.5 * 0.7**2 - 0.5 * math.log(2 * math.pi) - 0.5 * math.log(2)
    told = tilt(law, zero, zero[:, 0], zero[0, 0, 0], (value, mask))
    assert float(told.log_evidence) == pytest.approx(exact, rel=1e-12)
    value[1, 0] = 0.8
    with pytest.raises(ValueError, match="known: impossible evidence"):
        tilt(law, zero, zero[:, 0], zero[0, 0, 0], (value, mask))


def test_evidence_may_come_in_parts(system):
    law, reward, temperature, _, _ = system
    half = QuadraticReward(reward.weight / 2, reward.linear / 2, reward.constant / 2)
    once = law.posterior(reward, temperature=temperature)
    first = law.posterior(half, temperature=temperature)
    second = first.posterior(half, temperature=temperature)
    torch.testing.assert_close(second.mean, once.mean, **EXACT)
    total = float(first.log_evidence + second.log_evidence)
    assert total == pytest.approx(float(once.log_evidence), rel=1e-9)


def test_bayes_rule_holds_for_the_densities(ref):
    law = ref.random_gaussian(8)
    reward, x = ref.random_reward(9, law), torch.randn(4, law.horizon, law.dim, dtype=F64)
    posterior = law.posterior(reward, temperature=0.7)
    joint = law.log_prob(x) + reward(x) / 0.7 - posterior.log_evidence
    torch.testing.assert_close(posterior.log_prob(x), joint, **EXACT)
    mean, covariance = ref.dense_prior(law)
    dense = torch.distributions.MultivariateNormal(mean, covariance).log_prob(x.flatten(1))
    torch.testing.assert_close(law.log_prob(x), dense, **EXACT)


def test_the_evidence_moves_with_the_reward_as_its_mean(ref):
    """d log p(O) / d linear[t] = E[x_t | O] / temperature, by autograd through the messages."""
    law = ref.random_gaussian(10)
    reward = ref.random_reward(11, law)
    linear = reward.linear.clone().requires_grad_()
    posterior = law.posterior(reward._replace(linear=linear), temperature=0.7)
    (gradient,) = torch.autograd.grad(posterior.log_evidence, linear)
    torch.testing.assert_close(gradient, posterior.mean.detach() / 0.7, **EXACT)


# ---- the two backups


def cost(law, state_weight, action_weight):
    """-½ (sᵀQ s + aᵀR a) in every row; the last action costs the same."""
    return QuadraticReward(torch.block_diag(state_weight, action_weight))


def plain(seed, noise, horizon=30):
    """A regulator around zero: no drift, no behaviour gain; a wide prior over actions."""
    g = np.random.default_rng(seed)
    A, B = np.eye(3) + 0.2 * g.normal(size=(3, 3)), g.normal(size=(3, 2))
    W = noise * np.diag([0.5, 1.0, 1.5])
    U = 4.0 * np.eye(2)
    law = LinearGaussian(
        A, B, horizon=horizon, initial_mean=[1.0, -1.0, 0.5], initial_covariance=np.eye(3), action_covariance=U,
        noise_covariance=W,
    )  # fmt: skip
    return A, B, W, U, law


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_the_variational_policy_is_lqr(noise):
    temperature, Q, R = 0.5, np.diag([1.0, 2.0, 0.5]), np.diag([0.3, 0.6])
    A, B, _, U, law = plain(0, noise)
    best = law.posterior(cost(law, torch.tensor(Q), torch.tensor(R)), temperature=temperature, backup="variational")
    P, cheap = np.zeros((3, 3)), R / temperature + np.linalg.inv(U)
    for t in reversed(range(law.horizon)):
        curve = cheap + B.T @ P @ B
        K = np.linalg.solve(curve, B.T @ P @ A)
        np.testing.assert_allclose(best.gain[t], -K, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(best.action_covariance[t], np.linalg.inv(curve), rtol=1e-9)
        P = Q / temperature + A.T @ P @ (A - B @ K)
    P = solve_discrete_are(A, B, Q / temperature, cheap)
    np.testing.assert_allclose(best.gain[0], -np.linalg.solve(cheap + B.T @ P @ B, B.T @ P @ A), rtol=1e-6)
    torch.testing.assert_close(best.noise_covariance, law.noise_covariance, **EXACT)
    torch.testing.assert_close(best.dynamics, law.dynamics, **EXACT)


def test_the_posterior_policy_under_noise_is_leqg():
    """Risk-seeking Riccati: the cost to go P becomes (P^-1 + W)^-1 before it is carried through the dynamics."""
    temperature, Q, R = 0.5, np.diag([1.0, 2.0, 0.5]), np.diag([0.3, 0.6])
    A, B, W, U, law = plain(1, 0.2)
    best = law.posterior(cost(law, torch.tensor(Q), torch.tensor(R)), temperature=temperature)
    P, cheap = np.zeros((3, 3)), R / temperature + np.linalg.inv(U)
    for t in reversed(range(law.horizon)):
        P = np.linalg.solve(np.eye(3) + P @ W, P)
        K = np.linalg.solve(cheap + B.T @ P @ B, B.T @ P @ A)
        np.testing.assert_allclose(best.gain[t], -K, rtol=1e-9, atol=1e-12)
        P = Q / temperature + A.T @ P @ (A - B @ K)
    lqr = law.posterior(cost(law, torch.tensor(Q), torch.tensor(R)), temperature=temperature, backup="variational")
    assert (best.gain[0] - lqr.gain[0]).abs().max() > 1e-2


@settings(max_examples=15, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_without_noise_the_backups_agree(ref, seed):
    law = ref.random_gaussian(seed, noise=0.0, spread=0.0)
    reward = ref.random_reward(seed + 1, law)
    one, other = law.posterior(reward, backup="variational"), law.posterior(reward, backup="posterior")
    torch.testing.assert_close(one.mean, other.mean, **EXACT)
    torch.testing.assert_close(one.covariance, other.covariance, **EXACT)
    assert float(one.log_evidence) == pytest.approx(float(other.log_evidence), rel=1e-9)


def test_under_noise_the_evidence_is_the_bound_plus_the_kl(ref):
    law = ref.random_gaussian(12)
    reward = ref.random_reward(13, law)
    value, first = torch.randn(law.horizon, law.dim, dtype=F64), KNOWN["first"](law)
    exact, bound = law.posterior(reward), law.posterior(reward, backup="variational")
    gap = gaussian_kl(bound.mean.flatten(), bound.covariance, exact.mean.flatten(), exact.covariance)
    assert gap > 0.01
    assert float(bound.log_evidence + gap) == pytest.approx(float(exact.log_evidence), rel=1e-9)
    exact = law.posterior(reward, known=(value, first))
    bound = law.posterior(reward, known=(value, first), backup="variational")
    free = ~first.flatten()
    gap = gaussian_kl(
        bound.mean.flatten()[free], bound.covariance[free][:, free],
        exact.mean.flatten()[free], exact.covariance[free][:, free],
    )  # fmt: skip
    assert float(bound.log_evidence + gap) == pytest.approx(float(exact.log_evidence), rel=1e-9)


def test_a_fine_grid_of_the_tabular_core_agrees(ref):
    """One state number, two steps: both cores solve the same problem, one by sums over a grid."""
    law = LinearGaussian(
        [[0.8]], [[1.0]], horizon=2, initial_mean=[0.4], initial_covariance=[[0.0]], action_covariance=[[0.5]],
        noise_covariance=[[0.3]],
    )  # fmt: skip
    reward = QuadraticReward(torch.tensor([[[0.0, 0.0], [0.0, 0.2]], [[1.5, 0.3], [0.3, 0.4]]], dtype=F64))
    grid = np.linspace(-6, 6, 121)
    normal = lambda x, v: np.exp(-0.5 * x**2 / v) / np.exp(-0.5 * (grid[:, None] - grid[60]) ** 2 / v).sum()  # noqa: E731
    start = np.eye(121)[64]  # grid[64] = 0.4
    transition = normal(grid - (0.8 * grid[:, None, None] + grid[None, :, None]), 0.3)
    transition /= transition.sum(-1, keepdims=True)
    prior = normal(grid, 0.5)
    s, a = np.meshgrid(grid, grid, indexing="ij")
    table = np.stack([-0.1 * a**2, -0.5 * (1.5 * s**2 + 0.6 * s * a + 0.4 * a**2)])
    mdp = MDP(transition, table, start, prior=prior / prior.sum())
    for backup in ("variational", "posterior"):
        exact = law.posterior(reward, backup=backup)
        tabular = solve(mdp, backup=backup)
        assert tabular.log_evidence == pytest.approx(float(exact.log_evidence), abs=1e-4)
        assert tabular.policy[0, 64] @ grid == pytest.approx(float(exact.mean[0, 1]), abs=1e-4)
        assert tabular.policy[0, 64] @ grid**2 - float(exact.mean[0, 1]) ** 2 == pytest.approx(
            float(exact.action_covariance[0]), abs=1e-4
        )


# ---- noised trajectories


@pytest.mark.parametrize("alpha_bar", [0.0, 1e-3, 0.4, 0.9, 0.9999])
@pytest.mark.parametrize("which", ["prior", "posterior", "deterministic and known"])
def test_noised_laws_are_dense_gaussians(ref, alpha_bar, which):
    law = ref.random_gaussian(14, m=2, noise=0.0 if "known" in which else 0.3)
    if which == "posterior":
        law = law.posterior(ref.random_reward(15, law))
    if "known" in which:
        value = torch.randn(law.horizon, law.dim, dtype=F64, generator=torch.Generator().manual_seed(3))
        law = law.posterior(ref.random_reward(15, law), known=(value, KNOWN["first and last"](law)))
    mean, covariance = ref.dense_prior(law)
    eye = torch.eye(len(mean), dtype=F64)
    noised = torch.distributions.MultivariateNormal(
        math.sqrt(alpha_bar) * mean, alpha_bar * covariance + (1 - alpha_bar) * eye
    )
    x = noised.sample((7,)).requires_grad_()
    log_p = noised.log_prob(x)
    (score,) = torch.autograd.grad(log_p.sum(), x)
    x_k = x.detach().reshape(7, law.horizon, law.dim)
    torch.testing.assert_close(law.noised_log_prob(x_k, alpha_bar), log_p.detach(), **EXACT)
    torch.testing.assert_close(law.score(x_k, alpha_bar).flatten(1), score, rtol=1e-9, atol=1e-8)
    gain = math.sqrt(alpha_bar) * covariance @ torch.linalg.inv(noised.covariance_matrix)
    mean_0 = mean + (x.detach() - noised.mean) @ gain.T
    torch.testing.assert_close(law.denoise(x_k, alpha_bar).flatten(1), mean_0, **EXACT)
    covariance_0 = covariance - math.sqrt(alpha_bar) * gain @ covariance
    torch.testing.assert_close(law.denoised_covariance(alpha_bar), covariance_0, **EXACT)


def test_perfect_guidance_is_the_difference_of_scores(ref):
    """∇ log E[exp(reward / temperature) | x_k], by autograd through the exact denoiser's posterior."""
    law, alpha_bar = ref.random_gaussian(16), 0.5
    reward = ref.random_reward(17, law)
    x_k = torch.randn(law.horizon, law.dim, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    given_x = law.given_noised(x_k, alpha_bar)
    evidence = given_x.posterior(reward, temperature=0.7).log_evidence
    (guidance,) = torch.autograd.grad(evidence, x_k)
    x_k = x_k.detach()
    posterior = law.posterior(reward, temperature=0.7)
    torch.testing.assert_close(posterior.score(x_k, alpha_bar) - law.score(x_k, alpha_bar), guidance, **EXACT)


def test_a_sampler_with_the_perfect_denoiser_reaches_the_posterior(ref):
    """The probability-flow map of a Gaussian is affine: run DDIM on the mean and on a basis, compare both moments."""
    law = ref.random_gaussian(18, horizon=3)
    law = law.posterior(ref.random_reward(19, law))
    size = law.horizon * law.dim
    levels = torch.cos(torch.linspace(math.pi / 2, 0.0, 1501, dtype=F64)[1:]).square()
    x = torch.cat([torch.zeros(1, size, dtype=F64), torch.eye(size, dtype=F64)]).reshape(-1, law.horizon, law.dim)
    for now, after in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
        clean = law.denoise(x, now)
        noise = (x - math.sqrt(now) * clean) / math.sqrt(1 - now)
        x = math.sqrt(after) * clean + math.sqrt(max(0.0, 1 - after)) * noise
    flat = x.flatten(1)
    G = (flat[1:] - flat[0]).T
    torch.testing.assert_close(flat[0], law.mean.flatten(), rtol=0, atol=1e-2)
    torch.testing.assert_close(G @ G.T, law.covariance, rtol=0, atol=1e-2)


# ---- samples, long horizons, bad input


def test_samples_have_the_law(ref):
    law = ref.random_gaussian(20, n=2, m=2)
    law = law.posterior(ref.random_reward(21, law))
    n = 20_000
    x = law.sample(n, torch.Generator().manual_seed(0)).flatten(1)
    variance = law.covariance.diagonal()
    assert ((x.mean(0) - law.mean.flatten()).abs() <= 4.5 * (variance / n).sqrt()).all()
    error = ((variance[:, None] * variance + law.covariance.square()) / n).sqrt()
    assert ((x.T.cov() - law.covariance).abs() <= 5 * error).all()
    again = [law.sample(2, torch.Generator().manual_seed(4)) for _ in range(2)]
    assert torch.equal(*again)
    batch = law.given_noised(torch.zeros(3, law.horizon, law.dim, dtype=F64), 0.5)
    assert batch.sample(5).shape == (5, 3, law.horizon, law.dim)


def test_a_horizon_of_ten_thousand_stays_finite_and_meets_its_goal():
    law = LinearGaussian(
        [[1.0, 0.1], [0.0, 1.0]], [[0.0], [0.1]], horizon=10_000, initial_mean=[0.0, 0.0],
        initial_covariance=torch.eye(2), action_covariance=[[1.0]], noise_covariance=1e-4 * torch.eye(2),
    )  # fmt: skip
    reward = QuadraticReward(torch.diag(torch.tensor([1e4, 1.0, 0.1])), torch.tensor([1e4, 0.0, 0.0]), 1e4)
    mask = mask_of(law, (0, slice(0, 2)), (-1, slice(0, 2)))
    value = torch.zeros(10_000, 3, dtype=F64)
    value[-1, :2] = torch.tensor([5.0, -1.0])
    posterior = law.posterior(reward, known=(value, mask))
    assert posterior.mean.isfinite().all()
    assert posterior.log_evidence.isfinite()
    assert posterior.row_covariance.isfinite().all()
    torch.testing.assert_close(posterior.mean[-1, :2], value[-1, :2], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(posterior.mean[5000, 0], torch.tensor(1.0, dtype=F64), rtol=1e-3, atol=0)


def test_the_partition_function_breaks_down_where_it_must():
    """E exp(½ w s²) under N(0, 2) is finite below w = ½ and infinite above."""
    law = LinearGaussian(
        [[1.0]], [[0.0]], horizon=2, initial_mean=[0.0], initial_covariance=[[0.0]], action_covariance=[[1.0]],
        noise_covariance=[[2.0]],
    )  # fmt: skip
    convex = lambda w: QuadraticReward(torch.diag(torch.tensor([-w, 0.0])))  # noqa: E731
    finite = law.posterior(convex(0.49))
    assert float(finite.log_evidence) == pytest.approx(-0.5 * math.log(1 - 2 * 0.49), rel=1e-6)
    with pytest.raises(ValueError, match=r"reward: the log-partition is infinite at the noise after row 0: .*LEQG"):
        law.posterior(convex(0.51))
    assert law.posterior(convex(0.51), backup="variational").log_evidence == pytest.approx(0.51, rel=1e-6)


@pytest.mark.parametrize("unit", [1e-9, 1e-3, 1.0, 1e6])
def test_a_contradiction_is_one_in_every_unit(unit):
    law = LinearGaussian(
        [[1.0]], [[0.0]], horizon=3, initial_mean=[unit], initial_covariance=[[0.0]], action_covariance=[[1.0]]
    )
    mask = mask_of(law, (2, 0))
    assert law.posterior(known=(torch.full((3, 2), unit * (1 + 1e-12)), mask)).log_evidence == 0
    with pytest.raises(ValueError, match="known: impossible evidence"):
        law.posterior(known=(torch.full((3, 2), unit * (1 + 1e-5), dtype=F64), mask))


def test_impossible_and_unpromisable_known_values_are_refused(ref):
    still = ref.random_gaussian(22, noise=0.0, spread=0.0)
    value = torch.zeros(still.horizon, still.dim, dtype=F64)
    with pytest.raises(ValueError, match=r"known: impossible evidence, p = 0: .* at the start"):
        still.posterior(known=(value, KNOWN["first"](still)))
    with pytest.raises(ValueError, match="known: impossible evidence"):
        still.posterior(known=(value, mask_of(still, (1, slice(0, 2)))))  # two numbers, one action
    reached = still.mean.clone()
    consistent = still.posterior(known=(reached, mask_of(still, (1, slice(0, 2)), (0, slice(0, 3)))))
    torch.testing.assert_close(consistent.mean[:2, :2], reached[:2, :2], **EXACT)
    noisy = ref.random_gaussian(23)
    with pytest.raises(ValueError, match=r"known: a known value depends on the noise after row 3, .*variational"):
        noisy.posterior(known=(value, KNOWN["last"](noisy)), backup="variational")
    quiet = ref.random_gaussian(23, noise=1e-16)  # little noise is still noise
    with pytest.raises(ValueError, match=r"known: a known value depends on the noise"):
        quiet.posterior(known=(value, KNOWN["last"](quiet)), backup="variational")
    with pytest.raises(ValueError, match=r"known: the value at index \[0, 0\] is nan"):
        noisy.posterior(known=(value * math.nan, KNOWN["first"](noisy)))
    with pytest.raises(ValueError, match=r"known: expected \(value, mask\), both \[H, D\] = \[5, 3\]"):
        noisy.posterior(known=(value[0], KNOWN["first"](noisy)))
    with pytest.raises(ValueError, match=r"known: this law is a batch"):
        noisy.given_noised(value.expand(2, -1, -1), 0.5).posterior(known=(value, KNOWN["first"](noisy)))
    with pytest.raises(ValueError, match=r"initial_covariance: singular"):
        still.log_prob(value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"initial_covariance": [[1.0, 0.5], [0.0, 1.0]]}, r"initial_covariance: asymmetric at index \[0, 1\]; use"),
        ({"noise_covariance": [[1.0, 2.0], [2.0, 1.0]]}, r"noise_covariance: indefinite, with eigenvalue -1"),
        ({"action_covariance": [[-1.0]]}, r"action_covariance: indefinite, with"),
        ({"action_covariance": [[[1.0]], [[1.0]], [[-1.0]], [[1.0]]]}, r"action_covariance: indefinite at row 2"),
        ({"noise_covariance": [[1.0, 0.5], [0.0, 1.0]]}, r"noise_covariance: asymmetric at index \[0, 1\]"),
        ({"action_matrix": [0.0, 1.0]}, r"action_matrix: expected shape \[n, m\] or \[H-1, n, m\], got \[2\]"),
        (
            {"action_matrix": [[0.0], [1.0, 2.0]]},
            r"action_matrix: expected an array of numbers with rows of one length",
        ),
        ({"drift": "none"}, r"drift: expected an array of numbers"),
        ({"horizon": math.nan}, r"horizon: expected a whole number"),
        ({"drift": [math.nan, 0.0]}, r"drift: nan at index \[0\]"),
        ({"gain": [[1.0]]}, r"gain: expected shape \[1, 2\] or \[4, 1, 2\], got \[1, 1\]"),
        ({"horizon": 0}, r"horizon: expected a whole number"),
    ],
)
def test_a_malformed_process_is_refused_by_name_and_index(arguments, message):
    fine = {
        "state_matrix": torch.eye(2), "action_matrix": [[0.0], [1.0]],
        "horizon": 4, "initial_mean": [0.0, 0.0], "initial_covariance": torch.eye(2), "action_covariance": [[1.0]],
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        LinearGaussian(**{**fine, **arguments})


def test_covariances_have_the_digits_of_their_dtype():
    """A singular G · Gᵀ is singular in float32 too; small variances on a diagonal are exact, and stay."""

    def noise(W):
        process = {"horizon": 2, "initial_mean": [0.0] * 4, "initial_covariance": torch.eye(4)}
        ones = torch.ones(4, 1)
        law = LinearGaussian(torch.eye(4), ones, action_covariance=[[1.0]], noise_covariance=W, **process)
        torch.testing.assert_close(law.noise_covariance[0], torch.as_tensor(W).double(), rtol=1e-5, atol=1e-5)
        return law.noise_factor[0]

    for seed in range(50):
        G = torch.randn(4, 2, generator=torch.Generator().manual_seed(seed))
        for W in (G @ G.T, (G @ G.T).numpy(), G.double() @ G.double().T):
            assert (noise(W).norm(dim=0) > 0).sum() == 2
    for W in (torch.diag(torch.tensor([1.0, 1e-8, 1e-12, 0.0])), [[1.0, 0, 0, 0], [0, 1e-14, 0, 0], [0] * 4, [0] * 4]):
        kept = torch.as_tensor(W).double().diagonal().sqrt()
        torch.testing.assert_close(noise(W).norm(dim=1), kept, rtol=1e-6, atol=0)


def test_lists_of_numbers_lose_no_digits():
    law = LinearGaussian(
        [[0.1]], [[0.3]], horizon=2, initial_mean=[0.7], initial_covariance=[[0.1]], action_covariance=[[0.2]]
    )  # fmt: skip
    assert law.mean.tolist() == [[0.7, 0.0], [0.1 * 0.7, 0.0]]
    assert law.dynamics.tolist() == [[[0.1, 0.3]]]
    assert float(law.initial_covariance) == pytest.approx(0.1, rel=1e-15)
    assert QuadraticReward(linear=[0.1, 0.0])(law.mean) == pytest.approx(0.07 + 0.007, rel=1e-15)


def test_bad_arguments_are_refused(ref):
    law = ref.random_gaussian(24)
    x = torch.zeros(law.horizon, law.dim, dtype=F64)
    with pytest.raises(ValueError, match=r"alpha_bar: expected a number in \[0, 1\), got 1"):
        law.denoise(x, 1.0)
    for call in (lambda: law.denoise(x[:-1], 0.5), lambda: law.score(x[..., :1].expand(2, -1, -1), 0.5)):
        with pytest.raises(ValueError, match=r"x_k: expected shape \[\.\.\., H, D\] = \[\.\.\., 5, 3\], got"):
            call()
    with pytest.raises(ValueError, match=r"x: expected shape \[\.\.\., H, D\] = \[\.\.\., 5, 3\], got \[4, 3\]"):
        law.log_prob(x[:-1])
    with pytest.raises(ValueError, match="temperature: expected a positive"):
        law.posterior(temperature=-1.0)
    with pytest.raises(ValueError, match="temperature: 1e-320 is so small that reward / temperature overflows"):
        law.posterior(ref.random_reward(0, law), temperature=1e-320)
    with pytest.raises(ValueError, match="reward: constant is nan"):
        law.posterior(QuadraticReward(constant=math.nan))
    mask = KNOWN["last"](law)
    listed = law.posterior(known=(x.tolist(), mask.tolist()))
    assert torch.equal(listed.mean, law.posterior(known=(x, mask)).mean)
    with pytest.raises(ValueError, match=r"known: expected \(value, mask\), got Tensor"):
        law.posterior(known=x)
    with pytest.raises(ValueError, match='backup: expected "variational" or "posterior"'):
        law.posterior(backup="exact")
    with pytest.raises(ValueError, match=r"reward: weight has shape \[2, 2\], expected \[5, 3, 3\] or \[3, 3\]"):
        law.posterior(QuadraticReward(torch.eye(2)))
    with pytest.raises(ValueError, match=r"reward: weight is not finite and symmetric at index \[0, 0, 1\]"):
        law.posterior(QuadraticReward(torch.tensor([[1.0, 1, 0], [0, 1, 0], [0, 0, 1]])))


def test_everything_is_made_on_the_device_of_what_was_given(ref):
    """With another default device, anything that is made without naming its device would clash."""
    law, x = ref.random_gaussian(25), torch.randn(2, 5, 3, dtype=F64)
    reward, first = ref.random_reward(26, law), KNOWN["first"](law)
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        again = LinearGaussian(
            law.dynamics[0, :, :2], law.dynamics[0, :, 2:], horizon=5, initial_mean=[0.0, 1.0],
            initial_covariance=law.initial_covariance, action_covariance=[[1.0]], drift=law.drift,
        )  # fmt: skip
        for prior in (law, again):
            prior.given_noised(x, 0.5).sample(2, generator)
            for backup in ("variational", "posterior"):
                posterior = prior.posterior(reward, known=(x[0], first), backup=backup)
                assert posterior.covariance.device == posterior.log_evidence.device == x.device
        law.log_prob(x)
        reward(x)
        law.posterior(QuadraticReward([[0.0] * 3] * 3, [1.0, 0.0, 0.0]))


def test_a_reward_toward_a_target_is_a_squared_distance():
    target, weight = torch.randn(4, 2, dtype=F64), torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F64)
    reward, x = QuadraticReward.toward(target, weight), torch.randn(3, 4, 2, dtype=F64)
    expected = -0.5 * torch.einsum("bti,ij,btj->b", x - target, weight, x - target)
    torch.testing.assert_close(reward(x), expected)
