import numpy as np
import torch
from accelerate import Accelerator

from offline_cai.algorithms.bc import BC, BCConfig
from offline_cai.core import Box, Episode, Field, Spec
from offline_cai.data.trajectories import Trajectories
from offline_cai.data.windows import Windows
from offline_cai.inference.gaussian import LinearGaussian
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
