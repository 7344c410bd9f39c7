"""Estimates from data, against exact answers of small processes."""

import numpy as np
import pytest
import torch

from offline_cai.core import Discrete, Episode, Field, Spec
from offline_cai.data.trajectories import Trajectories
from offline_cai.errors import Notice, UserError
from offline_cai.evaluation.offpolicy import OffPolicy, fitted_q, importance

pytestmark = pytest.mark.filterwarnings("ignore::offline_cai.errors.Notice")
STATES, ACTIONS, GAMMA = 5, 2, 0.9
SPEC = Spec((Field("observation", STATES),), Discrete((ACTIONS,), (0,)))


class Chain:
    """A finite process: state 4 ends an episode truly; others are cut after `limit` steps."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.move = rng.dirichlet(np.full(STATES, 0.5), (STATES, ACTIONS))
        self.reward = rng.normal(size=(STATES, ACTIONS))
        self.target = np.array([1, 0, 1, 1, 0])  # the policy that is evaluated, by state

    def episodes(self, n: int, limit: int, behaviour: np.ndarray, seed: int) -> list[Episode]:
        """By `behaviour` [S, A], whose log-probabilities are kept."""
        rng, out = np.random.default_rng(seed), []
        for _ in range(n):
            state, states, actions = 0, [0], []
            while len(actions) < limit and state != 4:
                actions.append(int(rng.choice(ACTIONS, p=behaviour[state])))
                state = int(rng.choice(STATES, p=self.move[state, actions[-1]]))
                states.append(state)
            at, did = np.array(states[:-1]), np.array(actions)
            log_prob = np.log(behaviour[at, did])
            out.append(Episode(np.eye(STATES)[states], did[:, None], self.reward[at, did], state == 4, log_prob))
        return out


def exact(data: Trajectories, target: np.ndarray) -> float:
    """The value of the first states in the process that the data's own counts make: no sampling noise is left."""
    count, total = np.zeros((STATES, ACTIONS, STATES)), np.zeros((STATES, ACTIONS))
    for e in data.episodes():
        states, actions = e.obs.argmax(1), e.action[:, 0].astype(int)
        np.add.at(count, (states[:-1], actions, states[1:]), 1)
        np.add.at(total, (states[:-1], actions), e.reward)
    visits = count.sum(-1)
    at = np.arange(STATES - 1)
    move = (count / np.maximum(visits, 1)[..., None])[at, target[:-1]]
    reward = (total / np.maximum(visits, 1))[at, target[:-1]]
    value = np.linalg.solve(np.eye(STATES - 1) - GAMMA * move[:, :-1], reward)  # state 4 ends: nothing follows
    return float(value[0])


def test_fitted_q_gives_the_exact_value_of_the_data_s_own_process() -> None:
    """Cuts by time are no ends: with them as ends, the value would be off by far more."""
    chain = Chain()
    uniform = np.full((STATES, ACTIONS), 0.5)
    data = Trajectories.from_episodes(SPEC, chain.episodes(400, 8, uniform, seed=1))
    true = exact(data, chain.target)
    c = OffPolicy(steps=700, hidden=(32,), learning_rate=3e-3, target_rate=0.05)
    found = fitted_q(data, lambda obs: chain.target[obs.argmax(1)][:, None], c, GAMMA)
    assert found.n == 400 and found.se == pytest.approx(0, abs=1e-6), "all begin alike"
    spread = float(np.std(data.return_to_go(GAMMA)))
    assert abs(found.mean - true) < 0.05 * spread, (found, true, spread)
    other = fitted_q(data, lambda obs: 1 - chain.target[obs.argmax(1)][:, None], c, GAMMA)
    assert abs(other.mean - exact(data, 1 - chain.target)) < 0.05 * spread < abs(found.mean - other.mean)
    ended = Trajectories.from_episodes(SPEC, (e._replace(terminal=True) for e in data.episodes()))
    wrong = fitted_q(ended, lambda obs: chain.target[obs.argmax(1)][:, None], c, GAMMA)
    assert abs(wrong.mean - true) > 0.15 * spread


def test_fitted_q_is_a_function_of_its_seed_and_draws_from_no_generator() -> None:
    chain = Chain()
    data = Trajectories.from_episodes(SPEC, chain.episodes(20, 8, np.full((STATES, ACTIONS), 0.5), seed=1))
    before = torch.random.get_rng_state()

    def once(seed: int) -> float:
        c = OffPolicy(steps=20, hidden=(8,), seed=seed)
        return fitted_q(data, lambda obs: np.zeros((len(obs), 1)), c, GAMMA).mean

    assert once(0) == once(0) != once(1)
    assert torch.equal(before, torch.random.get_rng_state())


def test_importance_sampling_finds_the_value_of_another_policy_and_covers_it() -> None:
    """Six steps at most, a policy near the behaviour: the exact value is a sum over time of tables."""
    chain, limit, covered, trials = Chain(3), 6, np.zeros(2), 60
    behaviour, policy = (np.tile([p, 1 - p], (STATES, 1)) for p in (0.5, 0.65))
    state, value = np.eye(STATES)[0], 0.0
    for t in range(limit):
        live = state * (np.arange(STATES) != 4)
        value += GAMMA**t * np.einsum("s,sa,sa->", live, policy, chain.reward)
        state = np.einsum("s,sa,sax->x", live, policy, chain.move)
    found = []
    for trial in range(trials):
        episodes = chain.episodes(200, limit, behaviour, seed=trial)
        ratios = [np.log(policy[e.obs[:-1].argmax(1), e.action[:, 0]]) - e.log_prob for e in episodes]
        i = importance(ratios, [e.reward for e in episodes], GAMMA, resamples=200)
        covered += [e.low <= value <= e.high for e in (i.episodes, i.decisions)]
        found.append((i.episodes.value, i.decisions.value, i.effective))
    means, errors = np.mean(found, 0), np.std(found, 0) / np.sqrt(trials)
    assert abs(means[0] - value) < 4 * errors[0] and abs(means[1] - value) < 4 * errors[1]
    assert (np.abs(covered / trials - 0.94) < 4 * np.sqrt(0.06 * 0.94 / trials)).all()
    assert 50 < means[2] < 199
    plain = np.mean([(e.reward * GAMMA ** np.arange(len(e.reward))).sum() for e in episodes])
    assert abs(plain - value) > 5 * errors[0], "the weights matter"


def test_the_behaviour_itself_weighs_all_alike_and_one_heavy_episode_is_told() -> None:
    reward = [np.array([1.0, 2.0]), np.array([4.0])]
    same = importance([np.zeros(2), np.zeros(1)], reward, 0.5)
    assert same.effective == 2 and same.episodes.value == pytest.approx(3) == same.decisions.value
    heavy = importance([np.array([0.0, 500.0]), np.zeros(1)], reward, 0.5)
    assert heavy.effective == pytest.approx(1) and heavy.episodes.value == pytest.approx(2)
    assert heavy.decisions.value == pytest.approx((1 + 4) / 2 + 0.5 * 2), "before the heavy step all weigh alike"
    assert np.isfinite([heavy.decisions.low, heavy.decisions.high, heavy.episodes.low]).all()


def test_too_few_steps_for_the_discount_are_said() -> None:
    chain = Chain()
    data = Trajectories.from_episodes(SPEC, chain.episodes(5, 8, np.full((STATES, ACTIONS), 0.5), seed=1))
    with pytest.warns(Notice, match="has not settled: 37% of its first error may be left; take more steps"):
        fitted_q(data, lambda obs: np.zeros((len(obs), 1)), OffPolicy(steps=20, hidden=()), discount=0.0)


def test_a_discount_of_one_is_refused() -> None:
    with pytest.raises(UserError, match=r"needs one in \[0, 1\)"):
        OffPolicy(discount=1.0)
