"""The tabular core against brute-force enumeration of every trajectory, and its invariances."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from offline_cai.inference import tabular
from offline_cai.inference.tabular import MDP, elbo, kl_to_posterior, solve

EXACT = {"rtol": 1e-9, "atol": 1e-11}
CASES = [
    {"seed": 0},
    {"seed": 1, "prior": None, "actions": 3},
    {"seed": 2, "prior": "counting"},
    {"seed": 3, "actions": 3, "forbid": 0.25},
    {"seed": 4, "deterministic": True},
    {"seed": 5, "horizon": 1},
    {"seed": 6, "states": 2, "horizon": 4, "scale": 30.0},
]
some_seed = st.integers(0, 10_000)
quick = settings(max_examples=25, derandomize=True, deadline=None)


@pytest.fixture(params=CASES, ids=lambda case: f"seed{case['seed']}")
def small(request, ref):
    """An MDP, a temperature, every trajectory, and log p(tau, O)."""
    mdp = ref.random_mdp(**request.param)
    temperature = 0.6 + 0.2 * request.param["seed"]
    return mdp, temperature, *ref.enumerate_trajectories(mdp, temperature)


def counted(mdp, states, actions, log_weight):
    """p(s_t, a_t | O) by summing trajectories."""
    table = np.zeros(mdp.table_shape)
    p = np.exp(log_weight - logsumexp(log_weight))
    for t in range(mdp.horizon):
        np.add.at(table[t], (states[:, t], actions[:, t]), p)
    return table


def test_evidence_and_marginals_are_sums_over_trajectories(small):
    mdp, temperature, states, actions, log_joint = small
    exact = solve(mdp, temperature, "posterior")
    np.testing.assert_allclose(exact.log_evidence, logsumexp(log_joint), **EXACT)
    marginals = counted(mdp, states, actions, log_joint)
    np.testing.assert_allclose(exact.marginals(), marginals, **EXACT)
    np.testing.assert_allclose(exact.posterior_initial, marginals[0].sum(-1), **EXACT)
    np.testing.assert_allclose(exact.log_prob(states, actions), log_joint - logsumexp(log_joint), **EXACT)


def test_policy_and_dynamics_are_conditionals_of_the_posterior(small):
    mdp, temperature, states, actions, log_joint = small
    exact = solve(mdp, temperature, "posterior")
    p = np.exp(log_joint - logsumexp(log_joint))
    for t in range(mdp.horizon):
        for s in range(mdp.states):
            here = states[:, t] == s
            for a in range(mdp.actions):
                both = here & (actions[:, t] == a)
                if p[here].sum() > 1e-12:
                    np.testing.assert_allclose(
                        exact.policy[t, s, a], p[both].sum() / p[here].sum(), rtol=1e-9, atol=1e-9
                    )
                if t + 1 < mdp.horizon and p[both].sum() > 1e-12:
                    onward = [p[both & (states[:, t + 1] == x)].sum() / p[both].sum() for x in range(mdp.states)]
                    np.testing.assert_allclose(exact.posterior_dynamics[t, s, a], onward, rtol=1e-9, atol=1e-9)


def test_forward_times_backward_is_the_joint(small):
    mdp, temperature, states, actions, log_joint = small
    exact = solve(mdp, temperature, "posterior")
    joint = tabular.forward_messages(mdp, temperature) + exact.v
    np.testing.assert_allclose(logsumexp(joint, axis=1), exact.log_evidence, **EXACT)
    smoothed = np.exp(joint - exact.log_evidence)
    np.testing.assert_allclose(smoothed, counted(mdp, states, actions, log_joint).sum(-1), **EXACT)


def test_most_probable_trajectory_is_the_best_of_all(small):
    mdp, temperature, states, actions, log_joint = small
    best = tabular.most_probable_trajectory(mdp, temperature)
    assert best.log_joint == pytest.approx(log_joint.max(), rel=1e-12)
    at = np.flatnonzero((states == best.states).all(1) & (actions == best.actions).all(1))
    assert log_joint[at] == pytest.approx(log_joint.max(), rel=1e-12)


def test_elbo_and_kl_are_sums_over_trajectories(small, ref):
    mdp, temperature, _, _, log_joint = small
    policy = solve(mdp, temperature, "posterior").policy
    mixed = 0.5 * policy + 0.5 * ref.random_policy(1, mdp) * (np.exp(mdp.log_prior) > 0)
    for table in (policy, mixed / mixed.sum(-1, keepdims=True)):
        log_q = ref.enumerate_law(mdp, table)
        q = np.exp(log_q)
        with np.errstate(invalid="ignore"):
            bound = np.where(q > 0, q * (log_joint - log_q), 0).sum()
            gap = np.where(q > 0, q * (log_q - log_joint + logsumexp(log_joint)), 0).sum()
        np.testing.assert_allclose(elbo(mdp, table, temperature), bound, **EXACT)
        np.testing.assert_allclose(kl_to_posterior(mdp, table, temperature), gap, **EXACT)


@pytest.mark.parametrize("seed", range(4))
def test_evidence_is_elbo_plus_kl_for_any_law(ref, seed):
    mdp = ref.random_mdp(seed, states=6, actions=3, horizon=40, scale=5.0)
    exact, other = solve(mdp, 0.7, "posterior"), ref.random_mdp(seed + 50, states=6, actions=3, horizon=40)
    allowed = ref.random_policy(seed, mdp) * (np.exp(mdp.log_prior) > 0)
    laws = {
        "its own policy": {"policy": solve(mdp, 0.7).policy},
        "any policy": {"policy": allowed / allowed.sum(-1, keepdims=True)},
        "another start and dynamics": {
            "policy": exact.policy,
            "initial": other.initial * 0.5 + 0.5 * mdp.initial,
            "dynamics": other.transition * 0.5 + 0.5 * mdp.transition,
        },
    }
    for law in laws.values():
        bound, gap = elbo(mdp, temperature=0.7, **law), kl_to_posterior(mdp, temperature=0.7, **law)
        assert np.isfinite(bound)
        assert bound + gap == pytest.approx(exact.log_evidence, rel=1e-9)


def test_the_whole_family_reaches_zero_and_the_policy_alone_leaves_the_stated_gap(ref):
    mdp = ref.random_mdp(7, states=4, actions=3, horizon=6, scale=2.0)
    exact, best = solve(mdp, 1.0, "posterior"), solve(mdp, 1.0, "variational")
    whole = {"initial": exact.posterior_initial, "dynamics": exact.posterior_dynamics}
    assert kl_to_posterior(mdp, exact.policy, **whole) == pytest.approx(0, abs=1e-12)
    assert elbo(mdp, exact.policy, **whole) == pytest.approx(exact.log_evidence, rel=1e-12)
    gap = exact.log_evidence - best.log_evidence
    assert gap > 0.1
    assert kl_to_posterior(mdp, best.policy) == pytest.approx(gap, rel=1e-9)
    assert kl_to_posterior(mdp, exact.policy) > gap + 1e-3
    for seed in range(20):
        assert elbo(mdp, ref.random_policy(seed, mdp)) < best.log_evidence


@pytest.mark.parametrize("backup", ["variational", "posterior"])
def test_the_derivative_by_the_reward_is_the_marginal(ref, backup):
    """d log_evidence / d r[t, s, a] = p(s_t, a_t) / temperature, by central differences."""
    mdp, step, temperature = ref.random_mdp(8, states=3, actions=2, horizon=4), 1e-5, 0.8
    marginals = solve(mdp, temperature, backup).marginals()
    for at in np.ndindex(mdp.table_shape):
        sides = []
        for sign in (1, -1):
            reward = mdp.reward.copy()
            reward[at] += sign * step
            moved = MDP(mdp.transition, reward, mdp.initial, prior=mdp.prior)
            sides.append(solve(moved, temperature, backup).log_evidence)
        assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(marginals[at] / temperature, abs=1e-8)


def test_objectives_agree_with_the_bound_and_peak_at_the_variational_policy(ref):
    mdp, temperature = ref.random_mdp(9, states=4, actions=3, horizon=5, prior=None), 0.5
    best, policy = solve(mdp, temperature), ref.random_policy(3, mdp)
    assert tabular.kl_regularised_objective(mdp, policy, temperature) == pytest.approx(
        temperature * elbo(mdp, policy, temperature), rel=1e-12
    )
    assert tabular.kl_regularised_objective(mdp, best.policy, temperature) == pytest.approx(
        temperature * best.log_evidence, rel=1e-12
    )
    log_policy = np.log(policy)
    joint = tabular.state_action_marginals(mdp, policy)
    plain = (joint * (mdp.reward - temperature * log_policy)).sum()
    assert tabular.maximum_entropy_objective(mdp, policy, temperature) == pytest.approx(plain, rel=1e-12)
    counting = solve(mdp.with_prior("counting"), temperature)
    assert tabular.maximum_entropy_objective(mdp, counting.policy, temperature) == pytest.approx(
        temperature * counting.log_evidence, rel=1e-12
    )
    entropic = tabular.kl_regularised_objective(mdp, policy, temperature, prior="counting")
    assert entropic == pytest.approx(plain, rel=1e-12)
    old = ref.random_policy(4, mdp)  # a time-varying policy as the prior
    assert tabular.kl_regularised_objective(mdp, policy, temperature, prior=old) == pytest.approx(
        (joint * (mdp.reward - temperature * (log_policy - np.log(old)))).sum(), rel=1e-12
    )
    improved = solve(mdp.with_prior(old), temperature)
    assert tabular.kl_regularised_objective(mdp, improved.policy, temperature, prior=old) == pytest.approx(
        temperature * improved.log_evidence, rel=1e-12
    )
    assert tabular.kl_regularised_objective(mdp, policy, temperature, prior=old) < temperature * improved.log_evidence


def test_samples_follow_the_posterior(ref):
    mdp = ref.random_mdp(10, states=3, actions=3, horizon=4)
    exact, n = solve(mdp, 0.7, "posterior"), 20_000
    states, actions = exact.sample(n, seed=0)
    assert states.shape == actions.shape == (n, 4)
    for t, expected in enumerate(exact.marginals()):
        seen = np.zeros_like(expected)
        np.add.at(seen, (states[:, t], actions[:, t]), 1 / n)
        error = np.sqrt(expected * (1 - expected) / n)
        assert (abs(seen - expected) <= 4.5 * error + 1e-12).all()
    pairs = np.zeros((3, 3))
    np.add.at(pairs, (states[:, 0], states[:, 1]), 1 / n)
    joint = np.einsum("sa,sax->sx", exact.marginals()[0], exact.posterior_dynamics[0])
    assert (abs(pairs - joint) <= 4.5 * np.sqrt(joint * (1 - joint) / n) + 1e-12).all()
    assert (exact.sample(5, seed=3)[0] == exact.sample(5, seed=3)[0]).all()


def test_a_start_that_cannot_succeed_keeps_the_prior_row():
    transition = np.tile(np.eye(2)[:, None, :], (1, 2, 1))
    mdp = MDP(transition, [[0.0, 1.0], [-np.inf, -np.inf]], [0.5, 0.5], horizon=3, prior=[0.3, 0.7])
    exact = solve(mdp, backup="posterior")
    assert exact.posterior_initial.tolist() == [1.0, 0.0]
    assert exact.policy[:, 1].tolist() == [[0.3, 0.7]] * 3
    assert kl_to_posterior(mdp, exact.policy) == np.inf
    assert elbo(mdp, exact.policy) == -np.inf
    with pytest.raises(ValueError, match=r"reward: from start state 1 no policy surely avoids"):
        solve(mdp, backup="variational")


@quick
@given(seed=some_seed, shift=st.floats(-50, 50), backup=st.sampled_from(["variational", "posterior"]))
def test_adding_a_constant_to_the_reward_changes_only_the_evidence(ref, seed, shift, backup):
    mdp, temperature = ref.random_mdp(seed, horizon=5), 0.8
    moved = MDP(mdp.transition, mdp.reward + shift, mdp.initial, prior=mdp.prior)
    before, after = solve(mdp, temperature, backup), solve(moved, temperature, backup)
    np.testing.assert_allclose(after.policy, before.policy, rtol=1e-9, atol=1e-12)
    expected = before.log_evidence + 5 * shift / temperature
    assert after.log_evidence == pytest.approx(expected, rel=1e-9, abs=1e-9)


@quick
@given(seed=some_seed, backup=st.sampled_from(["variational", "posterior"]))
def test_names_of_states_and_actions_do_not_matter(ref, seed, backup):
    mdp, rng = ref.random_mdp(seed, states=5, actions=3, horizon=4), np.random.default_rng(seed)
    s, a = rng.permutation(5), rng.permutation(3)
    renamed = MDP(
        mdp.transition[s][:, a][:, :, s],
        mdp.reward[:, s][:, :, a],
        mdp.initial[s],
        prior=np.asarray(mdp.prior)[:, s][:, :, a],
    )
    before, after = solve(mdp, 0.9, backup), solve(renamed, 0.9, backup)
    np.testing.assert_allclose(after.policy, before.policy[:, s][:, :, a], **EXACT)
    assert after.log_evidence == pytest.approx(before.log_evidence, rel=1e-9)


@quick
@given(seed=some_seed)
def test_both_backups_coincide_without_chance(ref, seed):
    mdp = ref.random_mdp(seed, states=4, actions=3, horizon=6, deterministic=True)
    one, other = solve(mdp, 0.5, "variational"), solve(mdp, 0.5, "posterior")
    np.testing.assert_allclose(one.q, other.q, **EXACT)
    np.testing.assert_allclose(one.policy, other.policy, **EXACT)
    assert one.log_evidence == pytest.approx(other.log_evidence, rel=1e-9)
    assert kl_to_posterior(mdp, one.policy, 0.5) == pytest.approx(0, abs=1e-9)


@quick
@given(seed=some_seed)
def test_a_cold_policy_is_greedy_and_a_hot_one_is_the_prior(ref, seed):
    mdp = ref.random_mdp(seed, states=4, actions=3, horizon=5, prior=None)
    v, greedy = np.zeros(4), []
    for t in reversed(range(5)):
        q = mdp.reward[t] + mdp.transition @ v
        greedy.append(np.eye(3)[q.argmax(1)])
        v = q.max(1)
    np.testing.assert_allclose(solve(mdp, 1e-7).policy, greedy[::-1], atol=1e-9)
    for backup in ("variational", "posterior"):
        np.testing.assert_allclose(solve(mdp, 1e9, backup).policy, 1 / 3, atol=1e-7)


@quick
@given(seed=some_seed)
def test_the_counting_prior_adds_log_actions_per_step(ref, seed):
    mdp = ref.random_mdp(seed, actions=3, horizon=7, prior=None)
    for backup in ("variational", "posterior"):
        uniform, counting = solve(mdp, 1.3, backup), solve(mdp.with_prior("counting"), 1.3, backup)
        assert counting.log_evidence == pytest.approx(uniform.log_evidence + 7 * np.log(3), rel=1e-9)
        np.testing.assert_allclose(counting.policy, uniform.policy, **EXACT)


@pytest.mark.parametrize("backup", ["variational", "posterior"])
def test_a_long_horizon_and_large_rewards_neither_overflow_nor_warn(ref, backup):
    rng = np.random.default_rng(0)
    small = ref.random_mdp(11, states=3, actions=2, horizon=1)
    reward = rng.choice([-1e4, 0.0, 1e4], (10_000, 3, 2))
    mdp = MDP(small.transition, reward, small.initial)
    with warnings.catch_warnings(), np.errstate(all="raise", under="ignore"):
        warnings.simplefilter("error")
        answer = solve(mdp, 1.0, backup)
        marginals = answer.marginals()
        total = elbo(mdp, answer.policy) + kl_to_posterior(mdp, answer.policy)
        tabular.most_probable_trajectory(mdp)
        forward = tabular.forward_messages(mdp)
    for array in (answer.q, answer.v, answer.policy, marginals):
        assert np.isfinite(array).all()
    np.testing.assert_allclose(answer.policy.sum(-1), 1, rtol=1e-12)
    np.testing.assert_allclose(marginals.sum((1, 2)), 1, rtol=1e-9)
    exact = solve(mdp, 1.0, "posterior")
    assert total == pytest.approx(exact.log_evidence, rel=1e-9)
    np.testing.assert_allclose(logsumexp(forward + exact.v, axis=1), exact.log_evidence, rtol=1e-9)


# ---- discounted


def discounted(ref, seed, discount=0.95, forbid=False):
    mdp = ref.random_mdp(seed, states=6, actions=3, horizon=1)
    reward = mdp.reward[0].copy()
    if forbid:
        reward[:, 0] = -np.inf
    return MDP(mdp.transition, reward, mdp.initial, discount=discount, prior=mdp.prior[0])


@pytest.mark.parametrize("discount", [0.0, 0.5, 0.99, 0.999])
def test_value_and_policy_iteration_reach_the_fixed_point(ref, discount):
    mdp, temperature = discounted(ref, 12, discount), 0.7
    values, policies = tabular.value_iteration(mdp, temperature), tabular.policy_iteration(mdp, temperature)
    for answer in (values, policies):
        assert answer.v.shape == (6,)
        assert answer.policy.shape == answer.q.shape == (6, 3)
        q = mdp.reward / temperature + discount * mdp.transition @ answer.v
        np.testing.assert_allclose(answer.q, q, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(answer.v, logsumexp(q + mdp.log_prior, axis=1), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(values.v, policies.v, rtol=1e-9)
    np.testing.assert_allclose(values.policy, policies.policy, rtol=1e-7)
    assert elbo(mdp, values.policy, temperature) == pytest.approx(values.log_evidence, rel=1e-9)
    objective = tabular.kl_regularised_objective(mdp, values.policy, temperature)
    assert objective == pytest.approx(temperature * values.log_evidence, rel=1e-9)
    assert values.marginals().sum() == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_the_stopping_bound_holds(ref, scale):
    mdp = discounted(ref, 13, 0.97)
    mdp = MDP(mdp.transition, scale * mdp.reward, mdp.initial, discount=0.97)
    exact = tabular.policy_iteration(mdp).v
    for tolerance in (1e-1, 1e-3, 1e-6):
        rough = tabular.value_iteration(mdp, tolerance=tolerance).v
        error = abs(rough - exact).max() / max(1, abs(rough).max())
        assert error <= tolerance
        assert error > 1e-4 * tolerance  # it did stop early


def test_a_forbidden_pair_far_ahead_ruins_a_discounted_policy():
    transition = np.zeros((4, 2, 4))
    transition[[0, 1, 2, 3], 0, [1, 2, 2, 3]] = 1.0  # 0 -> 1 -> 2, where nothing is allowed
    transition[:, 1, 3] = 1.0
    reward = np.zeros((4, 2))
    reward[2] = -np.inf
    mdp = MDP(transition, reward, [1.0, 0.0, 0.0, 0.0], discount=0.9)
    assert elbo(mdp, [1.0, 0.0]) == -np.inf
    assert elbo(mdp, [0.0, 1.0]) == pytest.approx(-10 * np.log(2))
    with pytest.raises(ValueError, match="no policy surely avoids"):
        solve(MDP(transition, reward, [0.0, 0.0, 1.0, 0.0], discount=0.9))


def test_a_forbidden_state_at_the_end_of_a_long_chain():
    """Every state of the chain may step off it; nothing is lost before the last one, however far away that is."""
    n = 80
    transition, reward = np.zeros((n + 1, 2, n + 1)), np.zeros((n + 1, 2))
    transition[np.arange(n), 0, np.minimum(np.arange(n) + 1, n - 1)] = 1.0
    transition[:, 1, n] = 1.0  # the safe state, for a price
    transition[n, 0, n] = 1.0
    reward[:n, 1], reward[n - 1] = -1.0, -np.inf
    escape = MDP(transition, reward, np.eye(n + 1)[0], discount=0.3)
    values, policies = tabular.value_iteration(escape), tabular.policy_iteration(escape)
    assert np.isfinite(values.v).tolist() == [True] * (n - 1) + [False, True]
    np.testing.assert_allclose(policies.v, values.v, rtol=1e-9)
    trapped = transition.copy()
    trapped[:n, 1] = trapped[:n, 0]
    start = MDP(trapped, reward, np.eye(n + 1)[n], discount=0.3)
    for solver in (tabular.value_iteration, tabular.policy_iteration, solve):
        assert np.isfinite(solver(start).v).tolist() == [False] * n + [True]
        with pytest.raises(ValueError, match="from start state 0 no policy surely avoids"):
            solver(MDP(trapped, reward, np.eye(n + 1)[0], discount=0.3))


def test_a_discount_near_one_is_solved_in_few_rounds(ref):
    mdp = discounted(ref, 18, 1 - 1e-9)
    exact = solve(mdp, 0.7)
    q = mdp.reward / 0.7 + mdp.discount * mdp.transition @ exact.v
    np.testing.assert_allclose(logsumexp(q + mdp.log_prior, axis=1), exact.v, rtol=1e-9)
    assert elbo(mdp, exact.policy, 0.7) == pytest.approx(exact.log_evidence, rel=1e-6)


def test_a_discounted_optimum_beats_other_policies(ref):
    mdp = discounted(ref, 14)
    best = solve(mdp, 0.5)
    for seed in range(20):
        policy = 0.9 * best.policy + 0.1 * ref.random_policy(seed, mdp)
        assert elbo(mdp, policy, 0.5) < best.log_evidence


def test_forbidden_actions_are_avoided_when_discounted(ref):
    mdp = discounted(ref, 15, forbid=True)
    values, policies = tabular.value_iteration(mdp), tabular.policy_iteration(mdp)
    assert (values.policy[:, 0] == 0).all()
    np.testing.assert_allclose(values.v, policies.v, rtol=1e-9)


def test_a_discounted_value_is_no_conditioning(ref):
    mdp = discounted(ref, 16)
    with pytest.raises(ValueError, match="log-probability of no event"):
        solve(mdp, backup="posterior")
    for call in (lambda: kl_to_posterior(mdp, solve(mdp).policy), lambda: solve(mdp).sample(2, 0)):
        with pytest.raises(ValueError, match="needs a finite horizon"):
            call()
    with pytest.raises(ValueError, match="dynamics: a discounted objective keeps"):
        elbo(mdp, solve(mdp).policy, dynamics=mdp.transition)


# ---- bad input

CHAIN, REWARD, START = np.tile(np.eye(2)[:, None, :], (1, 2, 1)), np.zeros((2, 2)), [1.0, 0.0]


def changed(array, at, value):
    array = np.array(array, float)
    array[at] = value
    return array


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"transition": changed(CHAIN, (1, 0, 0), 0.5)}, r"transition: row \[1, 0\] sums to 1\.5, .* divide"),
        ({"transition": changed(CHAIN, (0, 1, 1), -0.1)}, r"transition: -0\.1 at index \[0, 1, 1\]"),
        ({"transition": np.eye(2)}, r"transition: expected shape \[S, A, S\]"),
        ({"initial": [0.2, 0.2]}, r"initial: the distribution sums to 0\.4"),
        ({"initial": []}, r"initial: expected probabilities over the last axis, got shape \[0\]"),
        ({"initial": [1.0]}, r"initial: expected shape \[S\] = \[2\]"),
        ({"reward": changed(REWARD, (1, 1), np.nan)}, r"reward: nan at index \[1, 1\]"),
        ({"reward": changed(REWARD, (0, 1), np.inf)}, r"reward: inf at index \[0, 1\]"),
        ({"reward": np.zeros(2)}, r"reward: expected shape \[S, A\] = \[2, 2\]"),
        ({"reward": np.zeros((4, 2, 2))}, r"horizon: expected .*\(the reward has 4 steps\), got 3"),
        ({"horizon": None}, r"horizon: missing; give"),
        ({"horizon": 0}, r"horizon: expected a whole number"),
        ({"horizon": np.nan}, r"horizon: expected a whole number .* got nan"),
        (
            {"transition": [[[1, 0], [1]], [[1, 0], [0, 1]]]},
            r"transition: expected an array of numbers with rows of one",
        ),
        ({"reward": "high"}, r"reward: expected an array of numbers"),
        ({"discount": 0.9}, r"discount: a horizon is given as well"),
        ({"horizon": None, "discount": 1.0}, r"discount: expected a number in \[0, 1\), got 1"),
        ({"prior": [0.5, 0.6]}, r"prior: row|prior: the distribution sums to 1\.1"),
        ({"prior": np.full((3, 2), 0.5)}, r"prior: expected \[T, S, A\]"),
        ({"prior": "uniform"}, r'prior: expected None, "counting" or probabilities'),
    ],
)
def test_a_malformed_mdp_is_refused_by_name_and_index(arguments, message):
    with pytest.raises(ValueError, match=message):
        MDP(**{"transition": CHAIN, "reward": REWARD, "initial": START, "horizon": 3, **arguments})


def test_impossible_evidence_and_bad_arguments_are_refused():
    doomed = MDP(CHAIN, [[-np.inf, -np.inf], [0.0, 0.0]], START, horizon=3)
    for call in (
        lambda: solve(doomed, backup="posterior"),
        lambda: kl_to_posterior(doomed, np.full((2, 2), 0.5)),
        lambda: tabular.most_probable_trajectory(doomed),
    ):
        with pytest.raises(ValueError, match=r"reward: impossible evidence, p\(O\) = 0: .* \(the first is 0\)"):
            call()
    fine = MDP(CHAIN, REWARD, START, horizon=3)
    with pytest.raises(ValueError, match="temperature: expected a positive"):
        solve(fine, 0.0)
    for tiny in (1e-320, 1e-306):
        for call in (solve, tabular.most_probable_trajectory, tabular.forward_messages):
            with pytest.raises(ValueError, match=r"temperature: 1e-\d+ is so small that rewards of 1e\+04 .* overflow"):
                call(MDP(CHAIN, [[1e4, 0.0], [0.0, 0.0]], START, horizon=3), tiny)
    with pytest.raises(ValueError, match="temperature: expected a positive finite number, got 'auto'"):
        solve(fine, "auto")
    with pytest.raises(ValueError, match="policy: expected an array of numbers"):
        elbo(fine, "counting")
    with pytest.raises(ValueError, match='backup: expected "variational" or "posterior", got "soft"'):
        solve(fine, backup="soft")
    with pytest.raises(ValueError, match=r"policy: row \[1\] sums to 0\.9"):
        elbo(fine, [[0.5, 0.5], [0.5, 0.4]])
    with pytest.raises(ValueError, match=r"policy: expected \[T, S, A\]"):
        elbo(fine, np.full((2, 3, 2), 0.5))
    with pytest.raises(ValueError, match=r"states: indices must lie in 0\.\.1, got 0\.\.5"):
        solve(fine).log_prob([0, 1, 5], [0, 0, 0])


def test_float32_tables_are_accepted_and_the_identity_still_holds(ref):
    mdp = ref.random_mdp(17, horizon=30, prior=None)
    single = MDP(mdp.transition.astype(np.float32), mdp.reward, mdp.initial.astype(np.float32))
    policy = solve(single).policy
    total = elbo(single, policy) + kl_to_posterior(single, policy)
    assert total == pytest.approx(solve(single, backup="posterior").log_evidence, rel=1e-9)


def test_the_tabular_core_needs_no_torch():
    code = (
        "import sys; from offline_cai.inference import tabular, lottery; print({'torch', 'scipy'} & set(sys.modules))"
    )
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "set()"
