"""The shared mathematics against sums, conjugate identities, autograd and torch.distributions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.distributions.transforms import TanhTransform

from offline_cai.inference import soft, tabular, temperatures

F64 = torch.float64
EXACT = {"rtol": 1e-9, "atol": 1e-12}
seeds = st.integers(0, 10_000)
quick = settings(max_examples=20, derandomize=True, deadline=None)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(seed, *shape):
    return torch.randn(*shape, dtype=F64, generator=generator(seed))


# ---- values and weights


def test_the_soft_value_is_the_exact_message(ref):
    mdp = ref.random_mdp(0, states=5, actions=4, horizon=3)
    exact = tabular.solve(mdp, 0.7)
    q, log_prior = torch.tensor(exact.q) * 0.7, torch.tensor(mdp.log_prior)
    torch.testing.assert_close(soft.soft_value(q, 0.7, log_prior) / 0.7, torch.tensor(exact.v), **EXACT)
    uniform = tabular.solve(mdp.with_prior(None), 0.7)
    torch.testing.assert_close(soft.soft_value(torch.tensor(uniform.q)), torch.tensor(uniform.v), **EXACT)
    counting = tabular.solve(mdp.with_prior("counting"), 0.7)
    value = soft.soft_value(torch.tensor(counting.q), log_prior="counting")
    torch.testing.assert_close(value, torch.tensor(counting.v), **EXACT)
    torch.testing.assert_close(soft.soft_value(q.movedim(-1, 0), 0.7, dim=0), soft.soft_value(q, 0.7), **EXACT)
    with pytest.raises(ValueError, match="log_prior: expected None"):
        soft.soft_value(q, log_prior="uniform")


def test_the_counting_value_is_expected_q_plus_entropy():
    q, temperature = normal(0, 6, 4), 0.3
    policy = soft.posterior_weights(q, temperature, dim=-1)
    plain = (policy * (q - temperature * policy.log())).sum(-1)
    torch.testing.assert_close(soft.soft_value(q, temperature, "counting"), plain, **EXACT)


def test_importance_weighted_samples_estimate_the_soft_value():
    """q quadratic, prior N(0, 1), proposal N(1, 1.5): log E exp(q / temperature) has a closed form."""
    temperature, n, proposal, prior = 0.5, 40_000, Normal(1.0, 1.5), Normal(0.0, 1.0)
    a = proposal.mean + proposal.stddev * normal(1, n)
    q = a - 0.25 * a.square()
    log_weight = prior.log_prob(a) - proposal.log_prob(a)
    curve, pull = 1 + 0.5 / temperature, 1 / temperature
    exact = temperature * (0.5 * pull**2 / curve - 0.5 * math.log(curve))
    ratio = (q / temperature + log_weight).exp()
    error = float(temperature * ratio.std() / ratio.mean() / math.sqrt(n))
    value = float(soft.soft_value_from_samples(q, temperature, log_weight))
    assert abs(value - exact) < 4 * error < 0.02
    everything = soft.soft_value_from_samples(q, temperature, dim=0)
    assert float(everything) == pytest.approx(float(soft.soft_value(q, temperature)), rel=1e-12)


def test_uniform_samples_of_the_box_under_the_counting_prior():
    """Soft Q-learning's estimator: + |A| log 2 turns the mean over the box into the integral."""
    grid = torch.linspace(-1, 1, 20_001, dtype=F64)
    q = 3 * grid - grid.square()
    estimate = soft.soft_value_from_samples(q, 0.5, log_weight=math.log(2))
    assert float(estimate) == pytest.approx(0.5 * math.log(torch.trapezoid((q / 0.5).exp(), grid)), abs=1e-3)


def test_posterior_weights_clip_and_normalise():
    advantage = torch.tensor([-1.0, 0.0, 1.0, 1e4], dtype=F64)
    torch.testing.assert_close(soft.posterior_weights(advantage[:3], 0.5), (advantage[:3] / 0.5).exp(), **EXACT)
    clipped = soft.posterior_weights(advantage, 0.5, clip=20.0)
    torch.testing.assert_close(clipped[1:], torch.tensor([1.0, math.exp(2), 20.0], dtype=F64), **EXACT)
    normalised = soft.posterior_weights(advantage, 0.5, clip=20.0, dim=0)
    torch.testing.assert_close(normalised, clipped / clipped.sum(), **EXACT)
    assert soft.posterior_weights(advantage, 0.5, dim=0).sum() == 1
    with pytest.raises(ValueError, match="clip: expected a positive number"):
        soft.posterior_weights(advantage, clip=0.0)


def test_a_temperature_is_positive():
    q = normal(0, 4)
    for bad in (0, -1.0, math.nan, math.inf):
        for call in (soft.soft_value, soft.soft_value_from_samples, soft.posterior_weights, soft.posterior_kl):
            with pytest.raises(ValueError, match="temperature: expected a positive finite number, got"):
                call(q, bad)


# ---- divergences and densities


def spd(seed, *batch, n=3):
    a = normal(seed, *batch, n, n)
    return a @ a.mT + 0.2 * torch.eye(n, dtype=F64)


def test_gaussian_kls_agree_with_torch():
    (m, p), (C, D) = (normal(0, 4, 3), normal(1, 4, 3)), (spd(2, 4), spd(3, 4))
    expected = kl_divergence(MultivariateNormal(m, C), MultivariateNormal(p, D))
    torch.testing.assert_close(soft.gaussian_kl(m, C, p, D), expected, **EXACT)
    s, t = normal(4, 4, 3).exp(), normal(5, 4, 3).exp()
    each = kl_divergence(Normal(m, s), Normal(p, t))
    torch.testing.assert_close(soft.diagonal_gaussian_kl(m, s, p, t), each.sum(-1), **EXACT)
    torch.testing.assert_close(soft.diagonal_gaussian_kl(m[0], s[0], p[0], t[0]), each[0].sum(), **EXACT)
    full = soft.gaussian_kl(m, torch.diag_embed(s**2), p, torch.diag_embed(t**2))
    torch.testing.assert_close(full, each.sum(-1), **EXACT)
    of_mean, of_std = soft.decoupled_gaussian_kl(m, s, p, t)
    torch.testing.assert_close(of_mean, kl_divergence(Normal(m, s), Normal(p, s)), **EXACT)
    torch.testing.assert_close(of_std, kl_divergence(Normal(m, s), Normal(m, t)), **EXACT)


def test_a_bad_covariance_is_refused_by_name_and_index():
    m, C = normal(0, 2, 3), spd(1, 2)
    uneven, indefinite = C.clone(), C.clone()
    uneven[1, 0, 2] += 1.0
    indefinite[1] = -indefinite[1]
    with pytest.raises(ValueError, match=r"covariance: asymmetric at index \[1, 0, 2\]"):
        soft.gaussian_kl(m, uneven, m, C)
    with pytest.raises(ValueError, match=r"covariance_p: not positive definite at index \[1\]"):
        soft.gaussian_kl(m, C, m, indefinite)


def test_the_squashed_density_is_the_change_of_variables():
    u, mean, std = normal(0, 50, 2), normal(1, 50, 2), normal(2, 50, 2).exp()
    expected = Normal(mean, std).log_prob(u) - TanhTransform().log_abs_det_jacobian(u, u.tanh())
    torch.testing.assert_close(soft.squashed_gaussian_log_prob(u, mean, std), expected.sum(-1), **EXACT)
    torch.testing.assert_close(soft.squashed_gaussian_log_prob(u[0], mean[0], std[0]), expected[0].sum(), **EXACT)
    grid = torch.linspace(-12, 12, 40_001, dtype=F64)[:, None]
    density = soft.squashed_gaussian_log_prob(grid, torch.tensor([0.4]), torch.tensor([0.7])).exp()
    assert torch.trapezoid(density, grid[:, 0].tanh()) == pytest.approx(1, abs=1e-5)


def test_the_tanh_correction_holds_where_the_naive_one_fails():
    u = torch.tensor([0.0, 3.0, -8.0, 8.0, 20.0, -300.0], dtype=torch.float32)
    exact = -2 * (u.double().abs() + torch.log1p((-2 * u.double().abs()).exp()) - math.log(2))
    torch.testing.assert_close(soft.log_det_tanh(u).double(), exact, rtol=1e-5, atol=1e-5)
    x = normal(0, 9).requires_grad_()
    (slope,) = torch.autograd.grad(x.tanh().sum(), x)
    torch.testing.assert_close(soft.log_det_tanh(x.detach()), slope.log(), **EXACT)


# ---- temperatures


@quick
@given(seed=seeds, share=st.floats(0.01, 0.98), scale=st.sampled_from([1e-3, 1.0, 1e4]))
def test_the_temperature_meets_its_budget_and_minimises_the_dual(seed, share, scale):
    advantage = scale * normal(seed, 5, 16)
    budget = share * math.log(16)
    temperature = soft.temperature_for_kl(advantage, budget)
    w = soft.posterior_weights(advantage, temperature, dim=-1)
    spent = (w * torch.where(w > 0, (16 * w).log(), 0.0)).sum(-1).mean()
    assert float(spent) == pytest.approx(budget, rel=1e-9)
    assert float(soft.posterior_kl(advantage, temperature).mean()) == pytest.approx(budget, rel=1e-9)
    x = temperature.clone().requires_grad_()
    (slope,) = torch.autograd.grad(soft.temperature_dual(advantage, x, budget), x)
    assert abs(float(slope)) < 1e-8
    for other in (0.9 * temperature, 1.1 * temperature):
        assert soft.temperature_dual(advantage, other, budget) > soft.temperature_dual(advantage, temperature, budget)


def test_the_temperature_is_found_in_a_few_newton_steps(monkeypatch):
    plain, calls = soft.posterior_kl, []
    monkeypatch.setattr(temperatures, "posterior_kl", lambda *given: calls.append(1) or plain(*given))
    for budget in (0.01, 0.5, 2.0):
        calls.clear()
        soft.temperature_for_kl(normal(0, 5, 16), budget)
        assert len(calls) < 20  # bisection alone needs fifty


def test_a_budget_that_the_samples_cannot_express_is_an_error():
    advantage = normal(0, 3, 8)
    with pytest.raises(ValueError, match=r"budget: 2\.1 nats cannot be met by 8 samples, .* log\(8\) = 2\.079"):
        soft.temperature_for_kl(advantage, 2.1)
    with pytest.raises(ValueError, match="budget: 0 nats cannot be met"):
        soft.temperature_for_kl(advantage, 0)
    tied = torch.tensor([1.0, 1.0, 0.0, 0.0])
    with pytest.raises(ValueError, match=r"the best samples tie and at most 0\.6931 nats"):
        soft.temperature_for_kl(tied, 0.7)
    assert soft.temperature_for_kl(tied, 0.69) > 0
    rows = torch.tensor([[1.0, 1.0, 0.0, 0.0], [5.0, 0.0, 0.0, -1.0]])  # at most log 2 and log 4 nats
    with pytest.raises(ValueError, match=r"the best samples tie and at most 1\.04 nats"):
        soft.temperature_for_kl(rows, 1.05)
    assert float(soft.posterior_kl(rows.double(), soft.temperature_for_kl(rows, 1.03)).mean()) == pytest.approx(1.03)
    with pytest.raises(ValueError, match=r"advantage: not finite at index \[1\]"):
        soft.temperature_for_kl(torch.tensor([0.0, math.nan, 1.0]), 0.5)


@pytest.mark.parametrize("unit", [1e-310, 1e-30, 1e30, 1e308])
def test_the_temperature_scales_with_the_advantage(unit):
    advantage = torch.tensor([-1.7, 0.1, 0.4, 1.7], dtype=F64)
    scaled = soft.temperature_for_kl(unit * advantage, 0.5) / unit
    assert float(scaled) == pytest.approx(float(soft.temperature_for_kl(advantage, 0.5)), rel=1e-9)


def test_a_budget_that_rounding_hides_is_an_error():
    advantage = normal(0, 16)
    for tiny in (1e-16, 1e-300):
        with pytest.raises(ValueError, match=r"budget: 1e-.* nats is below the rounding of a KL"):
            soft.temperature_for_kl(advantage, tiny)
        with pytest.raises(ValueError, match=r"budget: 1e-.* nats is below the rounding of a KL"):
            soft.gaussian_temperature(torch.ones(2), torch.eye(2), tiny, torch.eye(2))
    assert float(soft.posterior_kl(advantage, soft.temperature_for_kl(advantage, 1e-11))) == pytest.approx(
        1e-11, rel=1e-3
    )
    nearly = torch.tensor([0.0, -1e-310, -1.0], dtype=F64)
    with pytest.raises(ValueError, match="budget: too large: no temperature"):
        soft.temperature_for_kl(nearly, 1.09)
    with pytest.raises(ValueError, match="budget: too large: no temperature"):
        soft.gaussian_temperature(torch.zeros(2), torch.eye(2), 1e4, torch.eye(2))


def test_a_sample_that_cannot_be_has_weight_zero():
    advantage = torch.tensor([[0.0, -math.inf], [0.0, -1e9]], requires_grad=True)
    kl = soft.posterior_kl(advantage, 1.0)
    torch.testing.assert_close(kl, torch.full((2,), math.log(2)))
    (slope,) = torch.autograd.grad(kl.sum(), advantage)
    assert slope.eq(0).all()


def test_the_dual_sends_no_gradient_into_the_advantages():
    advantage, temperature = normal(0, 4, 8).requires_grad_(), torch.tensor(0.7, dtype=F64, requires_grad=True)
    soft.temperature_dual(advantage, temperature, 0.5).backward()
    assert advantage.grad is None
    assert temperature.grad is not None


@pytest.mark.parametrize("bent", [False, True, "convex"])
def test_the_gaussian_temperature_puts_the_posterior_on_its_budget(bent):
    mean, covariance, gradient = normal(0, 3), spd(1), normal(2, 3)
    curvature = {False: None, True: spd(3), "convex": -spd(3)}[bent]
    for budget in (0.01, 1.0, 8.0):
        temperature = soft.gaussian_temperature(gradient, covariance, budget, curvature)
        H = torch.zeros(3, 3, dtype=F64) if curvature is None else curvature
        posterior = torch.linalg.inv(torch.linalg.inv(covariance) + H / temperature)
        shifted = mean + posterior @ gradient / temperature
        spent = soft.gaussian_kl(shifted, posterior, mean, covariance)
        assert float(spent) == pytest.approx(budget, rel=1e-8)


def test_the_gaussian_temperature_refuses_what_has_no_answer():
    eye = torch.eye(2)
    with pytest.raises(ValueError, match="gradient: zero"):
        soft.gaussian_temperature(torch.zeros(2), eye, 1.0)
    with pytest.raises(ValueError, match="gradient: the reward is constant"):
        soft.gaussian_temperature(torch.zeros(2), eye, 1.0, 0 * eye)
    with pytest.raises(ValueError, match="budget: expected a positive"):
        soft.gaussian_temperature(torch.ones(2), eye, 0.0)
    with pytest.raises(ValueError, match="covariance: not positive definite"):
        soft.gaussian_temperature(torch.ones(2), -eye, 1.0)
    with pytest.raises(ValueError, match=r"gradient: not finite at index \[1\]"):
        soft.gaussian_temperature(torch.tensor([0.0, math.nan]), eye, 1.0)
    with pytest.raises(ValueError, match=r"curvature: asymmetric at index \[0, 1\]"):
        soft.gaussian_temperature(torch.ones(2), eye, 1.0, torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    with pytest.raises(ValueError, match=r"curvature: not finite at index \[0, 0\]"):
        soft.gaussian_temperature(torch.ones(2), eye, 1.0, math.nan * eye)


# ---- multi-step returns


def windows(seed, B=6, H=7):
    """Rewards, values, true ends and paddings: some windows end truly, some are cut, some are whole."""
    g = generator(seed)
    reward, value = normal(seed, B, H), normal(seed + 1, B, H + 1)
    length = torch.randint(1, H + 1, (B,), generator=g)
    valid = torch.arange(H) < length[:, None]
    terminal = torch.zeros(B, H, dtype=torch.bool)
    ends = torch.rand(B, generator=g) < 0.5
    terminal[torch.arange(B)[ends], length[ends] - 1] = True
    return reward.masked_fill(~valid, math.nan), value, terminal, valid, length


def n_step(reward, value, terminal, discount, b, t, n, length):
    """The n-step return from row t, stopped at the window's end; no bootstrap after a true end."""
    total, factor = 0.0, 1.0
    for k in range(t, min(t + n, int(length[b]))):
        total += factor * float(reward[b, k])
        factor *= discount
        if terminal[b, k]:
            return total
    return total + factor * float(value[b, min(t + n, int(length[b]))])


@pytest.mark.parametrize("trace", [0.0, 0.6, 1.0])
def test_td_lambda_is_the_mixture_of_n_step_returns(trace):
    reward, value, terminal, valid, length = windows(0)
    returns = soft.td_lambda(reward, value, terminal, 0.9, trace, valid)
    advantages = soft.gae(reward, value, terminal, 0.9, trace, valid)
    for b in range(len(reward)):
        for t in range(int(length[b])):
            left = int(length[b]) - t
            steps = [n_step(reward, value, terminal, 0.9, b, t, n, length) for n in range(1, left + 1)]
            mixture = sum((1 - trace) * trace ** (n - 1) * steps[n - 1] for n in range(1, left))
            mixture += trace ** (left - 1) * steps[-1]
            assert float(returns[b, t]) == pytest.approx(mixture, rel=1e-9)
            assert float(advantages[b, t]) == pytest.approx(mixture - float(value[b, t]), rel=1e-9, abs=1e-12)
    assert (returns[~valid] == 0).all()
    assert (advantages[~valid] == 0).all()


def test_only_true_ends_stop_bootstrapping():
    reward, value = torch.ones(2, 1), torch.full((2, 2), 10.0)
    returns = soft.td_lambda(reward, value, torch.tensor([[True], [False]]), 0.5, 1.0)
    assert returns.tolist() == [[1.0], [6.0]]


@pytest.mark.parametrize("trace", [0.7, 1.0])
def test_retrace_is_its_sum(trace):
    reward, value, terminal, valid, length = windows(3)
    q, log_ratio = normal(9, *reward.shape), normal(10, *reward.shape)
    target = soft.retrace(reward, q, value, terminal, log_ratio, 0.9, trace, valid)
    for b in range(len(reward)):
        for t in range(int(length[b])):
            total, factor = float(q[b, t]), 1.0
            for k in range(t, int(length[b])):
                if k > t:
                    factor *= 0.9 * trace * min(1.0, math.exp(float(log_ratio[b, k])))
                ahead = 0.0 if terminal[b, k] else 0.9 * float(value[b, k + 1])
                total += factor * (float(reward[b, k]) + ahead - float(q[b, k]))
            assert float(target[b, t]) == pytest.approx(total, rel=1e-9)
    assert (target[~valid] == 0).all()


def test_retrace_is_unbiased_at_the_right_q(ref):
    """On a small MDP with Q exact, the expected target is Q whatever the behaviour was."""
    mdp = ref.random_mdp(5, states=3, actions=2, horizon=6)
    policy, behaviour = ref.random_policy(1, mdp), ref.random_policy(2, mdp)
    q, v = torch.zeros(7, 3, 2, dtype=F64), torch.zeros(7, 3, dtype=F64)
    for t in reversed(range(6)):
        q[t] = torch.tensor(mdp.reward[t] + mdp.transition @ v[t + 1].numpy())
        v[t] = (torch.tensor(policy[t]) * q[t]).sum(-1)
    run = tabular.solve(tabular.MDP(mdp.transition, 0 * mdp.reward, mdp.initial, prior=behaviour))
    n = 4000
    states, actions = (torch.tensor(x) for x in run.sample(n, 0))
    steps = torch.arange(6).expand(n, 6)
    log_ratio = (
        torch.tensor(policy).log()[steps, states, actions] - torch.tensor(behaviour).log()[steps, states, actions]
    )
    reward = torch.tensor(mdp.reward)[steps, states, actions]
    value = torch.cat([v[steps, states], torch.zeros(n, 1, dtype=F64)], 1)
    terminal = torch.zeros(n, 6, dtype=torch.bool)
    terminal[:, -1] = True
    error = soft.retrace(reward, q[steps, states, actions], value, terminal, log_ratio, 1.0) - q[steps, states, actions]
    assert (error.mean(0).abs() <= 4 * error.std(0) / math.sqrt(n) + 1e-12).all()
    assert error[:, 0].std() > 0.1


def test_padding_may_hold_anything():
    """NaN in the rows that are not valid, and in the state after a true end, changes nothing."""
    reward, value, terminal, valid, length = windows(6)
    q, log_ratio = normal(9, *reward.shape), normal(10, *reward.shape)
    rows = torch.arange(len(reward))
    ends = terminal.any(1)
    assert ends.any() and (length < reward.shape[1]).any()
    noisy_value = value.masked_fill(torch.arange(value.shape[1]) > length[:, None], math.nan)
    noisy_value[rows[ends], length[ends]] = math.nan
    noisy_q, noisy_ratio = q.masked_fill(~valid, math.nan), log_ratio.masked_fill(~valid, math.nan)
    clean = reward.nan_to_num()
    for call, plain, noisy in (
        (soft.gae, (clean, value, terminal), (reward, noisy_value, terminal)),
        (soft.td_lambda, (clean, value, terminal), (reward, noisy_value, terminal)),
        (soft.retrace, (clean, q, value, terminal, log_ratio), (reward, noisy_q, noisy_value, terminal, noisy_ratio)),
    ):
        torch.testing.assert_close(call(*noisy, 0.9, 0.8, valid), call(*plain, 0.9, 0.8, valid), **EXACT)


def test_wrong_shapes_of_windows_are_refused():
    flat, flags = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"value: expected \[B, H\+1\] = \[2, 4\]"):
        soft.gae(flat, flat, flags, 0.9, 0.9)
    with pytest.raises(ValueError, match=r"valid: expected \[B, H\] = \[2, 3\]"):
        soft.gae(flat, torch.zeros(2, 4), flags, 0.9, 0.9, flags[:1])
    with pytest.raises(ValueError, match=r"reward: expected \[B, H\] with H of at least 1, got \[3\]"):
        soft.td_lambda(flat[0], torch.zeros(4), flags[0], 0.9, 0.9)
    for name, q, log_ratio in (("q", flat[:, :2], flat), ("log_ratio", flat, flat[:1])):
        with pytest.raises(ValueError, match=rf"{name}: expected \[B, H\] = \[2, 3\]"):
            soft.retrace(flat, q, torch.zeros(2, 4), flags, log_ratio, 0.9)


# ---- conjugate gradients


def test_conjugate_gradients_solve_in_n_steps():
    A, b = spd(0, n=8), normal(1, 8)
    x = soft.conjugate_gradient(lambda v: A @ v, b, iterations=16, tolerance=1e-14)
    torch.testing.assert_close(x, torch.linalg.solve(A, b), rtol=1e-9, atol=1e-9)
    distinct = torch.diag(torch.tensor([1.0, 1.0, 5.0, 5.0], dtype=F64))  # two eigenvalues: two steps
    calls = []
    x = soft.conjugate_gradient(lambda v: calls.append(1) or distinct @ v, torch.ones(4, dtype=F64), iterations=9)
    torch.testing.assert_close(x, torch.tensor([1.0, 1.0, 0.2, 0.2], dtype=F64), **EXACT)
    assert len(calls) == 2
    assert soft.conjugate_gradient(lambda v: A @ v, torch.zeros(8, dtype=F64)).eq(0).all()
    with pytest.raises(ValueError, match="product: not positive definite"):
        soft.conjugate_gradient(lambda v: -v, b)
