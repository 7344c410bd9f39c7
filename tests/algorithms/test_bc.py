import numpy as np
import torch
from accelerate import Accelerator

from offline_cai.algorithms.bc import BC, BCConfig
from offline_cai.core import Episode, Spec
from offline_cai.data.trajectories import Trajectories
from offline_cai.data.windows import Windows
from offline_cai.training.experiment import TrainingConfig
from offline_cai.training.loop import TrainingState


def test_it_learns_a_policy_in_raw_units(spec: Spec) -> None:
    """Actions are tanh of a linear function, scaled to bounds of 1 and 2: within reach of the actor."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(8, 2)) * 0.5
    obs = rng.normal(size=(10_001, 8))
    action = np.tanh(obs[:-1] @ weights) * np.array([1.0, 2.0])
    store = Trajectories.from_episodes(spec, [Episode(obs, action, np.zeros(10_000), False)])
    torch.manual_seed(0)
    bc = BC(spec, BCConfig(hidden=(32,)))
    bc.fit(store.obs, store.action)
    state, windows = TrainingState(bc, TrainingConfig(steps=600, clip=None), Accelerator(cpu=True)), Windows(store, 1)
    for step in range(600):
        state.set_learning_rate(step)
        bc.update(windows.gather(rng.integers(10_000, size=128), torch.zeros(128, dtype=torch.int64)), state)
    fresh = rng.normal(size=(500, 8))
    wanted = np.tanh(fresh @ weights) * np.array([1.0, 2.0])
    error = bc.policy().act(fresh)[0] - wanted
    assert (error.std(0) < 0.25 * wanted.std(0)).all()
