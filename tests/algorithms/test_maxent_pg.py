"""MaxEnt policy gradient on a small MDP of three steps: its gradient and its fixed point are the exact ones."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from offline_cai import seeding
from offline_cai.algorithms.maxent_pg import MaxEntPG, MaxEntPGConfig
from offline_cai.core import Batch
from offline_cai.errors import UserError
from offline_cai.inference import tabular
from offline_cai.inference.mdp import MDP
from offline_cai.policies import rollouts

STEPS, STATES, ACTIONS = 3, 2, 3


@pytest.fixture(scope="module")
def mdp() -> MDP:
    rng = np.random.default_rng(0)
    transition = rng.dirichlet(np.ones(STATES), (STATES, ACTIONS))
    return MDP(transition, rng.normal(size=(STEPS, STATES, ACTIONS)), rng.dirichlet(np.ones(STATES)))


def build(small: SimpleNamespace, **settings: object) -> MaxEntPG:
    """A table: one number for each time, state and action (and a bias)."""
    config = {"hidden": (), "discount": 1.0, "trace": 1.0, "standardise": False, **settings}
    torch.manual_seed(0)
    return MaxEntPG(small.choices(STEPS * STATES, ACTIONS), MaxEntPGConfig(**config))  # type: ignore[arg-type]


def policy(algorithm: MaxEntPG) -> Tensor:
    """[T, S, A]."""
    eye = torch.eye(STEPS * STATES)
    return algorithm.actor(eye).log_p.exp().view(STEPS, STATES, ACTIONS)


def episodes(mdp: MDP, algorithm: MaxEntPG, count: int, seed: int, small: SimpleNamespace) -> Batch:
    """Whole episodes by the algorithm's own exploration."""
    rng, eye = np.random.default_rng(seed), np.eye(STEPS * STATES)
    state, obs, action, reward = rng.choice(STATES, size=count, p=mdp.initial), [], [], []
    for t in range(STEPS):
        obs.append(eye[t * STATES + state])
        raw, _ = algorithm.explore(obs[-1], seeding.keys(seed, t, torch.arange(count)))
        a = raw[:, 0].astype(int)
        action.append(raw)
        reward.append(mdp.reward[t, state, a])
        state = (mdp.transition[state, a].cumsum(-1) < rng.random((count, 1))).sum(-1).clip(max=STATES - 1)
    terminal = torch.zeros(count, STEPS, dtype=torch.bool)
    terminal[:, -1] = True
    columns = (torch.as_tensor(np.stack(x, 1)) for x in ([*obs, obs[-1]], action, reward))
    return small.windows(*columns, terminal, seed)


def objective(mdp: MDP, pi: Tensor, temperature: float) -> Tensor:
    """E[Σ r] + temperature · E[Σ entropy], by sums."""
    reward, transition, initial = (torch.as_tensor(x.copy()) for x in (mdp.reward, mdp.transition, mdp.initial))
    value = torch.zeros(STATES)
    for t in reversed(range(STEPS)):
        q = reward[t] + transition @ value
        value = (pi[t] * (q - temperature * pi[t].log())).sum(-1)
    return initial @ value


def test_its_gradient_is_that_of_reward_and_entropy(mdp: MDP, small: SimpleNamespace, float64: None) -> None:
    """64 batches of 250 episodes: every component within 4.5 standard errors, with a baseline that is wrong."""
    algorithm = build(small, temperature=0.7)
    parameters = list(algorithm.actor.parameters())
    exact = torch.autograd.grad(objective(mdp, policy(algorithm), 0.7), parameters)
    found = []
    for seed in range(64):
        batch = episodes(mdp, algorithm, 250, seed, small)
        advantage, _ = algorithm.advantages(batch)
        loss = algorithm(rollouts.single_steps(batch, advantage), "actor")
        assert loss.entries == 250 * STEPS
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(-loss.terms["actor_loss"] / 250, parameters)]))
    wanted, mean = torch.cat([g.flatten() for g in exact]), torch.stack(found).mean(0)
    error = torch.stack(found).std(0) / len(found) ** 0.5
    assert ((mean - wanted).abs() < 4.5 * error + 1e-12).all()
    assert error.norm() < 0.1 * wanted.norm(), "and that says something"


def test_its_fixed_point_is_the_soft_optimal_policy(mdp: MDP, small: SimpleNamespace) -> None:
    """Within 2 % total variation in every state that is visited; and twice the bonus makes more entropy."""
    entropies = []
    for temperature in (0.4, 0.8):
        algorithm = build(small, temperature=temperature, value_epochs=1, minibatches=4)
        state = small.state_of(algorithm, steps=150, learning_rate={"actor": 0.1, "value": 0.05})
        for step in range(150):
            state.set_learning_rates(step)
            algorithm.update(episodes(mdp, algorithm, 500, step, small), state)
        pi, exact = policy(algorithm).detach().double(), tabular.solve(mdp, temperature).policy
        assert 0.5 * np.abs(pi.numpy() - exact).sum(-1).max() < 0.02
        entropies.append(float(-(pi * pi.log()).sum(-1).mean()))
    assert entropies[1] > entropies[0] + 0.1


def test_its_temperature_spends_the_budget(small: SimpleNamespace) -> None:
    """On a bandit: the KL from the uniform prior meets the budget within 1 %, and the policy is that posterior."""
    torch.manual_seed(0)
    spec, value = small.choices(1, 4), np.array([[0.0, 1.0, 2.0, -1.0]])
    config = MaxEntPGConfig(hidden=(), kl_budget=0.3, discount=0.0, standardise=False, value_epochs=1, minibatches=1)
    algorithm = MaxEntPG(spec, config)
    state = small.state_of(algorithm, steps=400, learning_rate={"actor": 0.05, "value": 0.05})
    for step in range(400):
        state.set_learning_rates(step)
        raw, _ = algorithm.explore(np.ones((1000, 1)), seeding.keys(0, step, torch.arange(1000)))
        counts = np.bincount(raw[:, 0].astype(int), minlength=4)[None]
        algorithm.update(small.bandit(counts, value), state)
    log_p = algorithm.actor(torch.ones(1, 1)).log_p.detach()[0]
    assert float((log_p.exp() * (log_p + np.log(4))).sum()) == pytest.approx(0.3, rel=0.01)
    posterior = (torch.tensor(value[0]) / algorithm.dial.temperature).softmax(0)
    assert 0.5 * (log_p.exp() - posterior).abs().sum() < 0.02


@pytest.mark.parametrize("kind", ["box", "choices"])
def test_its_gradients_are_those_of_its_losses(kind: str, small: SimpleNamespace, float64: None) -> None:
    algorithm = MaxEntPG(getattr(small, kind)(3, 2), MaxEntPGConfig(hidden=(8,), temperature=0.5))
    batch = small.random_batch(algorithm.spec, 16)
    for phase in ("actor", "value"):
        small.assert_gradients(algorithm, batch, phase, f"{phase}.")


def test_standardised_advantages_leave_out_what_is_not_valid(small: SimpleNamespace) -> None:
    valid = torch.tensor([[True, True], [True, False]])
    x = rollouts.standardised(torch.tensor([[1.0, 2.0], [6.0, 1e9]]), valid, lambda t: t)[valid]
    assert x.mean() == pytest.approx(0, abs=1e-6) and x.square().mean() == pytest.approx(1)


def test_wrong_settings_are_said() -> None:
    with pytest.raises(UserError, match=r"discount and trace have to be in \[0, 1\]"):
        MaxEntPGConfig(trace=1.1)
