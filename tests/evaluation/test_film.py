"""Rollouts that are done again to be drawn."""

import io
from typing import Any

import gymnasium as gym
import imageio.v3 as imageio
import numpy as np
import pytest

from offline_cai import config
from offline_cai.environments.make import env_spec
from offline_cai.environments.rollout import rollout
from offline_cai.environments.vector import Environments
from offline_cai.errors import UserError
from offline_cai.evaluation import evaluate as evaluation
from offline_cai.evaluation import film, references

PROTOCOL = evaluation.protocol("debug-umaze")


@pytest.fixture(scope="module")
def episode() -> Any:
    """The first one of the protocol, of random actions."""
    envs = Environments(PROTOCOL.make, 1)
    env = PROTOCOL.make()
    setting = references.Setting(env_spec(env), None, None, {}, None, 1, 0)  # type: ignore[arg-type]
    found = rollout(envs, envs.spec, references.random(setting), PROTOCOL.seed, episodes=1)[0]
    env.close()
    envs.close()
    return found


def test_the_film_is_of_the_episode_that_was_evaluated(episode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def frame(env: gym.Env) -> np.ndarray:
        seen.append(env.unwrapped.point_env.data.qpos.copy())  # type: ignore[attr-defined]
        return np.zeros((2, 2, 3), dtype=np.uint8)

    monkeypatch.setattr(film, "_frame", frame)
    frames, seconds = film._frames(PROTOCOL, episode.action)
    assert len(frames) == 9 and seconds == pytest.approx(0.05)
    assert np.array_equal(seen, episode.obs[::5, :2])


def test_it_is_drawn_off_screen_in_a_process_of_its_own(episode: Any) -> None:
    try:
        data, how = film.film(config.to_dict(PROTOCOL), episode.action[:11])
    except UserError as error:
        pytest.skip(f"neither EGL nor OSMesa works here: {error}")
    frames = imageio.imread(io.BytesIO(data), index=None, extension=".gif")
    assert how in film.BACKENDS.values() and frames.shape == (3, 240, 240, 3) and frames.std() > 10


def test_what_each_way_to_draw_said_is_told(episode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(film, "BACKENDS", {"crayon": "Crayons"})
    with pytest.raises(UserError, match=r"can draw PointMaze_UMaze-v3 off-screen \(Crayons: .*crayon"):
        film.film(config.to_dict(PROTOCOL), episode.action[:2])
