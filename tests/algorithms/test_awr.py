"""AWR against closed forms: weights, values, budgets, and whole episodes against the exact core."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from offline_cai import seeding
from offline_cai.algorithms.awr import AWR, AWRConfig
from offline_cai.core import Batch, Episode
from offline_cai.data import arrays
from offline_cai.data.sampling import Weighted
from offline_cai.data.trajectories import Trajectories
from offline_cai.data.windows import Windows
from offline_cai.errors import UserError
from offline_cai.inference import soft, tabular
from offline_cai.training import experiment, loop, sources

COUNTS = np.array([[6, 2, 1, 1], [1, 3, 3, 3], [2, 2, 5, 1]])
VALUE = np.array([[0.0, 1.0, -1.0, 2.0], [0.5, 0.0, 0.3, -0.4], [-1.0, 1.0, 0.0, 0.5]])
PRIOR = COUNTS / COUNTS.sum(1, keepdims=True)
PLAIN = {"hidden": (), "normaliser": "none", "clip": None, "normalise": False, "trace": 1.0}


def solved(small: SimpleNamespace, steps: int = 250, **config: object) -> tuple[AWR, dict[str, float]]:
    """AWR on a bandit whose every state and action the batch holds."""
    torch.manual_seed(0)
    awr = AWR(small.choices(3, 4), AWRConfig(**{**PLAIN, **config}))  # type: ignore[arg-type]
    batch, state = small.bandit(COUNTS, VALUE), small.state_of(awr, steps=steps, learning_rate=0.1)
    for step in range(steps):
        metrics = state.iterate(step, batch)
    return awr, metrics


def policy(awr: AWR, states: int = 3) -> np.ndarray:
    with torch.no_grad():
        return awr.pi(np.eye(states)).log_p.exp().numpy()


def distance(p: np.ndarray, q: np.ndarray) -> float:
    """Total variation, in the state where it is largest."""
    return float(0.5 * np.abs(p - q).sum(-1).max())


def test_its_projection_is_prior_times_exponentiated_advantage(small: SimpleNamespace, float64: None) -> None:
    """Without clip and normalisation; values are the means of the data's returns."""
    awr, _ = solved(small, temperature=0.7)
    mean = (PRIOR * VALUE).sum(1)
    with torch.no_grad():
        assert awr.value(torch.eye(3)).numpy() == pytest.approx(mean, abs=1e-3)
    wanted = PRIOR * np.exp((VALUE - mean[:, None]) / 0.7)
    assert distance(policy(awr), wanted / wanted.sum(1, keepdims=True)) < 0.002


def test_clipping_and_normalisation_are_what_they_say(small: SimpleNamespace, float64: None) -> None:
    awr, _ = solved(small, temperature=0.7, clip=2.0, normalise=True)
    advantage = VALUE - (PRIOR * VALUE).sum(1, keepdims=True)
    spread = np.sqrt((COUNTS * advantage**2).sum() / COUNTS.sum())
    wanted = PRIOR * np.minimum(np.exp(advantage / spread / 0.7), 2.0)
    assert distance(policy(awr), wanted / wanted.sum(1, keepdims=True)) < 0.002


def test_a_budget_is_met(small: SimpleNamespace, float64: None) -> None:
    """By the KL as it is measured, and by the temperature, against the root that is solved for."""
    awr, metrics = solved(small, steps=400, temperature="auto", kl_budget=0.3)
    advantage = np.repeat((VALUE - (PRIOR * VALUE).sum(1, keepdims=True)).reshape(-1), COUNTS.reshape(-1))
    assert metrics["kl"] == pytest.approx(0.3, rel=0.01)
    exact = float(soft.temperature_for_kl(torch.from_numpy(advantage), 0.3))
    assert float(awr.projection.dial.temperature) == pytest.approx(exact, rel=0.01)


def test_the_hotter_the_nearer_to_the_prior(small: SimpleNamespace) -> None:
    far = [distance(policy(solved(small, 200, temperature=t)[0]), PRIOR) for t in (0.3, 1.0, 10.0)]
    assert far[0] > 2 * far[1] and far[1] > 2 * far[2]


@pytest.mark.parametrize("terminal", [True, False])
def test_values_are_zero_after_true_ends_alone(small: SimpleNamespace, terminal: bool) -> None:
    """Three rewards of 1, V = 5 everywhere, discount .9, lambda .5: by the definition of the n-step mixture."""
    awr = AWR(small.choices(2, 2), AWRConfig(hidden=(), trace=0.5, horizon=3, discount=0.9, normaliser="none"))
    torch.nn.init.constant_(awr.value.body.layers[-1][1], 5.0)
    torch.nn.init.constant_(awr.value.body.layers[-1][0], 0.0)
    ends = torch.tensor([[False, False, terminal]])
    batch = small.windows(torch.zeros(1, 4, 2), torch.zeros(1, 3, 1), torch.ones(1, 3), ends)
    after = [5.0, 5.0, 0.0 if terminal else 5.0]
    n_step = [sum(0.9**i for i in range(n)) + 0.9**n * after[n - 1] for n in (1, 2, 3)]
    assert awr.targets(batch)[0, 0] == pytest.approx(0.5 * n_step[0] + 0.25 * n_step[1] + 0.25 * n_step[2])


def test_weighing_whole_episodes_gives_the_exact_posterior_policy(small: SimpleNamespace) -> None:
    """Every path of a deterministic process once, and states that know the time: the exact core's policy given O."""
    states, actions, horizon, temperature = 3, 2, 3, 0.8
    rng = np.random.default_rng(0)
    after, reward = rng.integers(states, size=(states, actions)), rng.normal(size=(states, actions))
    mdp = tabular.MDP(np.eye(states)[after], reward, np.eye(states)[0], horizon=horizon)
    episodes = []
    for path in itertools.product(range(actions), repeat=horizon):
        visited = [0]
        for action in path:
            visited.append(int(after[visited[-1], action]))
        times = [min(t, horizon - 1) * states + s for t, s in enumerate(visited)]
        rewards = np.array([reward[s, a] for s, a in zip(visited, path, strict=False)])
        episodes.append(Episode(np.eye(states * horizon)[times], np.array(path)[:, None], rewards, True))
    exact = tabular.solve(mdp, temperature).policy.reshape(-1, actions)
    store = Trajectories.from_episodes(small.choices(states * horizon, actions), episodes)
    awr = AWR(store.spec, AWRConfig(hidden=(), baseline="mean", temperature=temperature, normaliser="none"))
    weighted = Weighted(Windows(store, 1), awr.weigh(store.returns))
    items = weighted.draw(np.random.default_rng(0), 200_000)
    batch = weighted.gather(items, seeding.keys(0, 0, torch.arange(len(items))))
    seen = batch.obs[:, 0].numpy().T @ np.eye(actions)[batch.action[:, 0, 0, 0].long()]
    known = seen.sum(1) > 0
    share = seen[known] / seen[known].sum(1, keepdims=True)
    assert (np.abs(share - exact[known])[:, 0] < 4 * np.sqrt(0.25 / seen[known].sum(1))).all() and known.sum() >= 5
    assert np.abs(share - 0.5).max() > 0.2, "the prior is another"


def test_whole_episodes_meet_a_budget_and_the_actor_is_their_likelihood(small: SimpleNamespace) -> None:
    returns = np.random.default_rng(0).normal(size=50) * 300 + 1000
    awr = AWR(small.choices(3, 4), AWRConfig(baseline="mean", kl_budget=1.2, hidden=()))
    weight = awr.weigh(returns)
    assert (weight * np.log(50 * weight)).sum() == pytest.approx(1.2, rel=1e-6)
    assert np.corrcoef(np.log(weight), returns)[0, 1] == pytest.approx(1.0), "better ones weigh more"
    assert returns[weight.argmax()] == returns.max()
    batch = small.bandit(COUNTS, VALUE)
    loss = awr(batch, "actor")
    log_prob = awr.actor(batch.obs[:, 0]).log_prob(awr.spec.to_unit(batch.action[:, 0, 0]))
    assert torch.allclose(loss.terms["actor_loss"], -log_prob.sum())


@pytest.mark.parametrize("phase", ["value", "actor"])
@pytest.mark.parametrize("kind", ["box", "choices"])
def test_gradients(small: SimpleNamespace, float64: None, kind: str, phase: str) -> None:
    """Of the value, at trace 1, where what it learns does not depend on it."""
    torch.manual_seed(0)
    config = AWRConfig(hidden=(6,), trace=1.0, temperature=1.5, std=None, normaliser="none", clip=None)
    awr = AWR(small.box(3, 2) if kind == "box" else small.choices(3, 4), config)
    batch: Batch = small.random_batch(awr.spec, 7)
    small.assert_gradients(awr, batch, phase, f"{phase}.")


def test_settings_that_cannot_be_are_said() -> None:
    with pytest.raises(UserError, match=r"trace have to be in \[0, 1\]"):
        AWRConfig(trace=1.5)
    with pytest.raises(UserError, match="std positive, or null"):
        AWRConfig(std=0.0)


def test_training_draws_episodes_by_their_weight(store: Trajectories, tmp_path: Path) -> None:
    """Almost cold, so the best of the three episodes is all that is drawn."""
    data = str(arrays.write(tmp_path / "own.npz", store))
    about = {"name": "a", "algorithm": "awr", "dataset": data, "training": {"batch_size": 32}}
    model = {"baseline": "mean", "temperature": 1e-3, "hidden": [4]}
    exp = experiment.parse({**about, "model": model}, "a test")
    source = sources.build(exp, loop.build(exp, store), store, Accelerator(cpu=True), tmp_path)
    best = store.episode(int(store.returns.argmax())).obs
    drawn = source(0).obs[:, 0].numpy()
    assert len(drawn) == 32 and (drawn[:, None] == best[None]).all(-1).any(1).all()
