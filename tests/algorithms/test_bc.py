from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from offline_cai import commands
from offline_cai.algorithms.bc import BC, BCConfig
from offline_cai.core import Box, Discrete, Episode, Field, Spec
from offline_cai.data.trajectories import Trajectories
from offline_cai.data.windows import Windows
from offline_cai.inference.gaussian import LinearGaussian
from offline_cai.training import checkpoint, experiment, loop
from offline_cai.training.experiment import TrainingConfig
from offline_cai.training.state import TrainingState


def test_it_finds_the_mean_of_a_linear_gaussian_behaviour() -> None:
    """The behaviour prior p(a | s) = N(K s + k, U) of the exact core: least squares finds its mean, in raw units."""
    gain, offset = torch.tensor([[0.3, -0.2], [0.8, 0.5]]), torch.tensor([0.1, -0.3])
    prior = LinearGaussian(
        0.5 * torch.eye(2),
        0.3 * torch.eye(2),
        horizon=20,
        initial_mean=[0.0, 0.0],
        initial_covariance=0.5 * torch.eye(2),
        action_covariance=torch.diag(torch.tensor([0.04, 0.16])),
        noise_covariance=0.1 * torch.eye(2),
        gain=gain,
        offset=offset,
    )
    rows = prior.sample(600, torch.Generator().manual_seed(0)).numpy()
    spec = Spec((Field("observation", 2),), Box((-3.0, -6.0), (3.0, 6.0)))
    assert (np.abs(rows[..., 2:]) < spec.action.high).all(), "the bounds cut nothing off"
    data = [Episode(x[:, :2], x[:-1, 2:], np.zeros(19), False) for x in rows]
    store = Trajectories.from_episodes(spec, data)
    torch.manual_seed(0)
    bc = BC(spec, BCConfig(hidden=(64,)))
    bc.fit(store.chunks)
    config, windows, rng = TrainingConfig(steps=1500, clip=None), Windows(store, 1), np.random.default_rng(0)
    state = TrainingState(bc, config, Accelerator(cpu=True))
    for step in range(config.steps):
        state.set_learning_rates(step)
        bc.update(windows.gather(rng.choice(windows.starts, size=256), torch.zeros(256, dtype=torch.int64)), state)
    fresh = prior.sample(200, torch.Generator().manual_seed(1))[..., :2].reshape(-1, 2)
    wanted = (fresh.float() @ gain.T + offset).numpy()
    error = bc.policy().act(fresh.numpy())[0] - wanted
    assert (np.sqrt((error**2).mean(0)) < 0.2 * wanted.std(0)).all()


def trained(bc: BC, store: Trajectories, steps: int = 600) -> BC:
    bc.fit(store.chunks)
    config, windows = TrainingConfig(steps=steps, learning_rate=1e-2, ema=0.0, clip=None), Windows(store, 1)
    state, rng = TrainingState(bc, config, Accelerator(cpu=True)), np.random.default_rng(0)
    for step in range(steps):
        state.set_learning_rates(step)
        bc.update(windows.gather(windows.draw(rng, 256), torch.zeros(256, dtype=torch.int64)), state)
    return bc


def test_likelihood_finds_the_spread_of_a_behaviour_too() -> None:
    """Actions of standard deviation .1 and .2 in unit space around zero, in bounds of 2."""
    spec = Spec((Field("observation", 1),), Box((-2.0, -2.0), (2.0, 2.0)))
    rng = np.random.default_rng(0)
    action = rng.normal(size=(4000, 2)) * (0.2, 0.4)
    store = Trajectories.from_episodes(spec, [Episode(rng.normal(size=(4001, 1)), action, np.zeros(4000), False)])
    torch.manual_seed(0)
    gaussian, squashed = (trained(BC(spec, BCConfig((16,), f)), store) for f in ("gaussian", "squashed"))  # type: ignore[arg-type]
    assert gaussian.actor.log_std.exp().tolist() == pytest.approx([0.1, 0.2], rel=0.05)
    drawn, log_prob = squashed.policy(stochastic=True).act(np.zeros((4000, 1)))
    assert drawn.std(0).tolist() == pytest.approx([0.2, 0.4], rel=0.1) and log_prob is not None


def test_of_choices_it_finds_the_frequencies() -> None:
    spec = Spec((Field("observation", 2),), Discrete((3,), (0,)))
    p = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    rng = np.random.default_rng(0)
    state = rng.integers(2, size=4001)
    action = np.array([rng.choice(3, p=p[s]) for s in state[:-1]])[:, None]
    store = Trajectories.from_episodes(spec, [Episode(np.eye(2)[state], action, np.zeros(4000), False)])
    counts = np.array([np.bincount(action[state[:-1] == s, 0], minlength=3) for s in range(2)])
    torch.manual_seed(0)
    bc = trained(BC(spec, BCConfig((), normaliser="none")), store)
    with torch.no_grad():
        assert torch.allclose(
            bc.pi(np.eye(2)).log_p.exp(), torch.tensor(counts / counts.sum(1)[:, None]).float(), atol=0.02
        )


def test_an_online_run_starts_from_a_cloned_actor(dataset: str, tmp_path: Path) -> None:
    """SAC's squashed actor and its normaliser are BC's before the first step."""
    about = {"seed": 0, "training": {"steps": 5, "batch_size": 8, "ema": 0.0}}
    model = {"hidden": [16], "family": "squashed"}
    cloning = {"name": "b", "algorithm": "bc", "dataset": dataset, "model": model, **about}
    run = commands.train(experiment.parse(cloning, "a test"), tmp_path / "bc", quiet=True)
    cloned = checkpoint.load(run)
    online = {"algorithm": "sac", "environment": {"id": "PointMaze_UMaze-v3"}, "model": {"hidden": [16]}}
    begun = loop.build(experiment.parse({**cloning, **online, "start_from": str(run)}, "a test"), None)
    obs = np.random.default_rng(0).normal(size=(5, cloned.spec.obs_width))
    assert np.array_equal(begun.policy().act(obs)[0], cloned.policy().act(obs)[0])
    fresh = loop.build(experiment.parse({**cloning, **online}, "a test"), None)
    assert not np.allclose(fresh.policy().act(obs)[0], cloned.policy().act(obs)[0], atol=1e-3)
