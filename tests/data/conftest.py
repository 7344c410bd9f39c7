"""The same few episodes in every format, to be damaged."""

import shutil
import warnings
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
from minari.data_collector import EpisodeBuffer

from offline_cai.core import Box, Episode, Field, Spec
from offline_cai.data import arrays, d4rl
from offline_cai.data.trajectories import Trajectories

LENGTHS, TERMINAL = (5, 3, 6, 4), (True, False, True, False)


def _write_minari(folder: Path, dataset_id: str, storage: str, episodes: list[Episode]) -> None:
    space = gym.spaces.Dict(a=gym.spaces.Box(-9, 9, (2,)), b=gym.spaces.Box(-9, 9, (1,)))
    buffers = []
    for obs, act, reward, terminal, _ in episodes:
        last = np.arange(len(reward)) == len(reward) - 1
        obs, act = np.float32(obs), np.float32(act)
        parts = {"a": obs[:, :2], "b": obs[:, 2:]}
        buffers.append(EpisodeBuffer(None, None, None, parts, act, reward, last & terminal, last & (not terminal)))
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("MINARI_DATASETS_PATH", str(folder))
        warnings.simplefilter("ignore", UserWarning)  # Minari asks for an e-mail address, among others
        spaces = {"observation_space": space, "action_space": gym.spaces.Box(-1, 1, (2,))}
        minari.create_dataset_from_buffers(dataset_id, buffers, data_format=storage, **spaces)


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same episodes as Minari's own/y-v0 and (Arrow) own/arrow-v0, as own.hdf5 (D4RL), own.npz and `store`."""
    rng, episodes = np.random.default_rng(0), []
    for steps, terminal in zip(LENGTHS, TERMINAL, strict=True):
        obs, act = rng.normal(size=(steps + 1, 3)), rng.uniform(-1, 1, (steps, 2))
        episodes.append(Episode(obs, act, rng.normal(size=steps), terminal, rng.normal(size=steps)))
    folder = tmp_path_factory.mktemp("sound")
    _write_minari(folder, "own/y-v0", "hdf5", episodes)
    _write_minari(folder, "own/arrow-v0", "arrow", episodes)
    spec = Spec((Field("observation", 3),), Box((-1.0, -1.0), (1.0, 1.0)))
    store = Trajectories.from_episodes(spec, episodes)
    d4rl.write(folder / "own.hdf5", store)
    arrays.write(folder / "own.npz", store)
    store.save(folder / "store", {"share": 0.5})
    return folder


@pytest.fixture
def copy(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to damage; what is converted goes to a cache of its own."""
    monkeypatch.setenv("OFFLINE_CAI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "data"))
    return Path(shutil.copytree(sound, tmp_path / "data"))
