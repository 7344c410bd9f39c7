"""SAC against exact answers: a tabular MDP, a bandit on a grid, a linear system with quadratic costs."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from scipy.linalg import solve_discrete_are
from scipy.optimize import minimize
from torch import Tensor, nn

from offline_cai import commands, seeding
from offline_cai.algorithms.sac import SAC, SACConfig
from offline_cai.core import Batch, Box, Discrete, Episode, Field, Spec
from offline_cai.data import arrays
from offline_cai.data.trajectories import Trajectories
from offline_cai.environments.make import env_spec, make
from offline_cai.errors import UserError
from offline_cai.inference.tabular import MDP, policy_iteration
from offline_cai.policies.networks import Critic
from offline_cai.training import experiment
from offline_cai.training.experiment import TrainingConfig
from offline_cai.training.state import TrainingState

BANDIT = Spec((Field("nothing", 1),), Box((-1.0,), (1.0,)))


def transitions(obs: Tensor, action: Tensor, reward: Tensor, after: Tensor, step: int, terminal: bool = False) -> Batch:
    """A batch of single steps: obs [B, O], action [B, A], reward [B]."""
    n, key = len(obs), seeding.keys(0, step, torch.arange(len(obs)))
    end = torch.full((n, 1), terminal)
    two, one = torch.stack([obs, after], 1), torch.ones(n, 1, dtype=torch.bool)
    return Batch(two, action[:, None, None], reward[:, None], end, one, reward[:, None], None, key)


def train(sac: SAC, batches: Callable[[int], Batch], steps: int, **training: Any) -> None:
    """As the loop does."""
    state = TrainingState(sac, TrainingConfig(steps=steps, ema=0, clip=None, **training), Accelerator(cpu=True))
    for step in range(steps):
        state.set_learning_rates(step)
        sac.update(batches(step), state)


# Choices: a tabular MDP ----------------------------------------------------------------------------------------------


def small_mdp() -> tuple[MDP, Spec, Callable[[int], Batch]]:
    """Probabilities are quarters, so that a batch holds each transition as often as it occurs."""
    rng, states, actions = np.random.default_rng(0), 4, 3
    counts = rng.multinomial(4, np.full(states, 1 / states), (states, actions))
    reward = rng.normal(size=(states, actions))
    mdp = MDP(counts / 4, reward, np.full(states, 0.25), discount=0.8, prior="counting")
    s, a, x = (np.repeat(index, counts.reshape(-1)) for index in np.indices(counts.shape).reshape(3, -1))
    one_hot = torch.eye(states)
    action = torch.from_numpy(a)[:, None].float()
    rewards = torch.from_numpy(reward[s, a]).float()
    spec = Spec((Field("state", states),), Discrete((actions,), (0,)))
    return mdp, spec, lambda step: transitions(one_hot[s], action, rewards, one_hot[x], step)


@pytest.mark.parametrize("form", ["twin", "value"])
def test_choices_reach_the_soft_optimum_of_a_tabular_mdp(form: Any) -> None:
    """Networks without hidden layers are tables here. Policies differ by less than 2 % in total variation."""
    mdp, spec, batches = small_mdp()
    exact = policy_iteration(mdp, temperature=0.5)
    torch.manual_seed(0)
    sac = SAC(spec, SACConfig(form=form, hidden=(), temperature=0.5, discount=0.8, tau=0.3))
    train(sac, batches, 400, learning_rate=0.1)
    states = torch.eye(4)
    policy = sac.pi(states.numpy()).log_p.exp().detach().numpy()  # type: ignore[attr-defined]
    assert 0.5 * abs(policy - exact.policy).sum(-1).max() < 0.02
    assert 0.5 * abs(exact.policy - 1 / 3).sum(-1).max() > 0.3, "the answer is not the prior"
    q = sac.critic(states, torch.eye(3)[:, None].expand(3, 4, 3)).detach().numpy()  # [2, A, S]
    assert abs(q - 0.5 * exact.q.T).max() < 0.02


@pytest.mark.parametrize("form", ["twin", "value"])
def test_targets_are_the_tabular_backup(form: Any, float64: None) -> None:
    _, spec, batches = small_mdp()
    torch.manual_seed(0)
    sac = SAC(spec, SACConfig(form=form, hidden=(), temperature=0.3, discount=0.8)).double()
    batch = Batch(*(x.double() if x is not None and x.is_floating_point() else x for x in batches(0)))  # type: ignore[arg-type]
    states, choices = torch.eye(4), torch.eye(3)[:, None].expand(3, 4, 3)
    policy = sac.pi(states.numpy()).log_p.exp().detach()  # type: ignore[attr-defined]
    if form == "twin":
        q = sac.target(states, choices).amin(0).detach()
        value = (policy.T * (q - 0.3 * policy.T.log())).sum(0)
    else:
        value = sac.target(states).detach()
    after = batch.transition.next_obs @ value
    assert torch.allclose(sac.after(batch.transition, batch.key), after, atol=1e-12)
    assert torch.equal(sac.backup(batch.transition, after), batch.transition.reward + 0.8 * after)
    ended = batch._replace(terminal=torch.ones_like(batch.terminal))
    assert torch.equal(sac.backup(ended.transition, after), batch.transition.reward)


# A bandit with two overlapping modes ---------------------------------------------------------------------------------


class Exact(Critic):
    """A critic that knows the reward of an action; the parameter is for the optimiser, which wants one."""

    def __init__(self, reward: Callable[[Tensor], Tensor]) -> None:
        nn.Module.__init__(self)
        self.reward, self.unused = reward, nn.Parameter(torch.zeros(1))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return self.reward(action[..., 0])[None]


def log_modes(a: Tensor) -> Tensor:
    """An unnormalised log-density over actions: 60 % around -0.3, 40 % around 0.4, standard deviation 0.25."""
    return torch.logaddexp(math.log(0.6) - (a + 0.3).square() / 0.125, math.log(0.4) - (a - 0.4).square() / 0.125)


def learned(**config: Any) -> SAC:
    """The actor alone, on a reward of log_modes."""
    torch.manual_seed(0)
    sac = SAC(BANDIT, SACConfig(hidden=(), **config))
    sac.critic = sac.target = Exact(log_modes)  # type: ignore[assignment]
    sac.by_hand = lambda *_: None  # type: ignore[method-assign]  # it has no layers to go back through
    obs = torch.zeros(1024, 1)
    train(sac, lambda step: transitions(obs, obs, obs[:, 0], obs, step), 600, learning_rate=0.05)
    return sac


NODES = (torch.arange(4001, dtype=torch.float64) - 2000) / 250  # of a standard normal, from -8 to 8
WEIGHTS = torch.exp(-0.5 * NODES.square()) / torch.exp(-0.5 * NODES.square()).sum()


def parameters(sac: SAC) -> tuple[float, float]:
    """Mean and log standard deviation before the tanh."""
    pi = sac.pi(np.zeros((1, 1))).detach()
    return float(pi.mean), float(pi.std.log())  # type: ignore[attr-defined]


def negative_entropy(mean: float, log_std: float) -> float:
    """E log pi of a squashed Gaussian, by a sum over a grid."""
    u = mean + math.exp(log_std) * NODES
    log_prob = -0.5 * NODES.square() - log_std - 0.5 * math.log(2 * math.pi)
    return float((WEIGHTS * (log_prob - 2 * (math.log(2) - u - nn.functional.softplus(-2 * u)))).sum())


def test_the_actor_is_the_best_squashed_gaussian_by_reverse_kl() -> None:
    """Of all of them the one of least KL to exp(Q / temperature), found by sums over a grid."""

    def divergence(x: np.ndarray) -> float:
        a = torch.tanh(x[0] + math.exp(x[1]) * NODES)
        return negative_entropy(*x) - float((WEIGHTS * log_modes(a)).sum())

    starts = [(mean, log_std) for mean in (-0.5, 0.0, 0.5) for log_std in (-2.0, 0.0)]
    best = min((minimize(divergence, start, method="Nelder-Mead") for start in starts), key=lambda found: found.fun)
    found = np.array(parameters(learned(temperature=1.0)))
    assert abs(found - best.x).max() < 0.03
    assert divergence(found) - best.fun < 1e-3 < divergence(found + 0.1) - best.fun


def test_a_higher_temperature_gives_more_entropy() -> None:
    entropies = [-negative_entropy(*parameters(learned(temperature=x))) for x in (0.3, 1.0, 3.0)]
    assert entropies[0] + 0.1 < entropies[1] < entropies[2] - 0.1 < math.log(2) - 0.1


def test_the_dial_spends_its_budget() -> None:
    """0.3 nats from the uniform prior, to 1 %, at the temperature that gives them."""
    sac = learned(kl_budget=0.3)
    assert negative_entropy(*parameters(sac)) + math.log(2) == pytest.approx(0.3, rel=0.01)
    fixed = learned(temperature=float(sac.dial.temperature))
    assert negative_entropy(*parameters(fixed)) + math.log(2) == pytest.approx(0.3, rel=0.02)


# A linear system -----------------------------------------------------------------------------------------------------


def test_it_approaches_the_riccati_policy_of_a_discounted_linear_system() -> None:
    """s' = 0.9 s + 0.5 a with cost s² + 0.2 a² and actions that are far from their bounds: the return of the mode is
    within 4 % of the best linear policy's, and that of doing nothing is not."""
    discount, bound = 0.9, 8.0
    root, cost = math.sqrt(discount), np.array([[0.2]])
    a, b = np.array([[0.9 * root]]), np.array([[0.5 * root]])
    p = solve_discrete_are(a, b, np.eye(1), cost)
    gain = float(np.linalg.solve(cost + b.T @ p @ b, b.T @ p @ a)[0, 0])
    spec = Spec((Field("state", 1),), Box((-bound,), (bound,)))
    torch.manual_seed(0)
    sac = SAC(spec, SACConfig(hidden=(32, 32), temperature=0.5, discount=discount, tau=0.05))

    def batches(step: int) -> Batch:
        draws = seeding.normal(seeding.keys(1, step, torch.arange(256)), (2,))
        state, action = 1.5 * draws[:, :1], 2 * draws[:, 1:]
        reward = -(state.square() + 0.2 * action.square())[:, 0]
        return transitions(state, action, reward, 0.9 * state + 0.5 * action, step)

    train(sac, batches, 800, learning_rate=1e-2)
    policy = sac.policy()

    def value(act: Callable[[np.ndarray], np.ndarray]) -> float:
        state, total = np.linspace(-2, 2, 9)[:, None], 0.0
        for t in range(80):
            action = act(state)
            total -= discount**t * (state**2 + 0.2 * action**2).mean()
            state = 0.9 * state + 0.5 * action
        return total

    best = value(lambda state: -gain * state)
    assert value(lambda state: policy.act(state)[0]) > 1.04 * best
    assert value(np.zeros_like) < 1.5 * best


# The rest ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["twin", "value"])
@pytest.mark.parametrize("action", [Box((-1.0, -2.0), (1.0, 2.0)), Discrete((3,), (0,))])
def test_gradients_are_those_of_finite_differences(
    form: Any, action: Box | Discrete, small: SimpleNamespace, float64: None
) -> None:
    """Each network's are those of its own loss: in those of the others it counts as a constant."""
    spec = Spec((Field("state", 3),), action)
    torch.manual_seed(0)
    sac = SAC(spec, SACConfig(form=form, hidden=(8,))).double()
    batch = small.random_batch(spec, 6)
    terms = {"critic": "critic_loss", "actor": "actor_loss", "dial": "temperature_loss", "value": "value_loss"}
    for network in ("critic", "actor", "dial", *(["value"] if form == "value" else [])):
        small.assert_gradients(sac, batch, "all", f"{network}.", term=terms[network])


@pytest.mark.parametrize("hidden", [(), (16,), (16, 8)])
@pytest.mark.parametrize("temperature", ["auto", 0.3])
@pytest.mark.parametrize("form", ["twin", "value"])
def test_gradients_by_hand_are_the_same(
    form: Any, temperature: Any, hidden: tuple[int, ...], small: SimpleNamespace, float64: None
) -> None:
    spec = small.box(3, 2)
    torch.manual_seed(0)
    sac = SAC(spec, SACConfig(form=form, hidden=hidden, temperature=temperature)).double()
    assert small.assert_by_hand(sac, small.random_batch(spec, 12))


def test_it_starts_from_offline_data(tmp_path: Path) -> None:
    """The first batches hold the dataset's transitions, and its normaliser is fitted to them."""
    with make("Pendulum-v1", {}, None) as env:
        spec = env_spec(env)
    rng = np.random.default_rng(0)
    episodes = [
        Episode(5 + rng.normal(size=(51, 3)), rng.uniform(-2, 2, (50, 1)), rng.normal(size=50), False) for _ in range(4)
    ]
    path = arrays.write(tmp_path / "data.npz", Trajectories.from_episodes(spec, episodes))
    config = experiment.load("debug-sac", {"dataset": str(path), "model.normaliser": "gaussian"})
    run = commands.train(config, tmp_path / "run", quiet=True)
    sac = SAC.from_pretrained(run)
    assert torch.allclose(sac.normaliser.shift, torch.full((3,), 5.0), atol=0.3)


def test_wrong_settings_are_said() -> None:
    with pytest.raises(UserError, match=r"discount has to be in \[0, 1\)"):
        SACConfig(discount=1.0)
