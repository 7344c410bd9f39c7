"""Rollouts as moving pictures: an episode is done again from its seed and actions, and drawn by its environment.

MuJoCo chooses how to draw when it is imported, so the drawing happens in a process of its own.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gymnasium as gym
import imageio.v3 as imageio
import numpy as np

from offline_cai import config
from offline_cai.environments.rollout import episode_seeds
from offline_cai.environments.vector import Environments
from offline_cai.errors import UserError
from offline_cai.evaluation.evaluate import Protocol

BACKENDS = {"egl": "EGL", "osmesa": "OSMesa"}
"""How MuJoCo draws without a screen: what MUJOCO_GL says, and its name."""
FRAMES = 60
SECONDS = 0.05
"""Simulated time between two frames."""
LARGE = 400
"""Pixels of a picture's height from which it is shown at half its size."""
PATIENCE = 180.0
"""Seconds of wall time that drawing may take."""


def film(protocol: dict[str, Any], actions: np.ndarray) -> tuple[bytes, str]:
    """A GIF of the protocol's first episode under these actions [L, A], and how it was drawn.

    Raises:
        UserError: no way to draw worked; says what each said.
    """
    refused = []
    with TemporaryDirectory() as folder:
        given, picture = Path(folder) / "given.npz", Path(folder) / "film.gif"
        np.savez(given, actions=actions, protocol=np.array(json.dumps(protocol)))
        for backend, name in BACKENDS.items():
            try:
                done = subprocess.run(
                    [sys.executable, "-m", __name__, str(given), str(picture)],
                    env={**os.environ, "MUJOCO_GL": backend},
                    capture_output=True,
                    text=True,
                    timeout=PATIENCE,
                )
                said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            except subprocess.TimeoutExpired:
                said = f"not done after {PATIENCE:.0f} s"
            if picture.is_file():
                return picture.read_bytes(), name
            refused.append(f"{name}: {said.rstrip('.')}")
    raise UserError(f"nothing here can draw {protocol['environment']} off-screen ({'; '.join(refused)}).")


def _main(given: Path, picture: Path) -> None:
    with np.load(given, allow_pickle=False) as data:
        actions, protocol = data["actions"], config.build(Protocol, json.loads(str(data["protocol"])), str(given))
    frames, seconds = _frames(protocol, actions)
    written = picture.with_suffix(".part")
    imageio.imwrite(written, frames, extension=".gif", duration=int(1000 * seconds), loop=0)
    written.rename(picture)


def _frames(protocol: Protocol, actions: np.ndarray) -> tuple[list[np.ndarray], float]:
    """Pictures of the episode, and the simulated seconds from one to the next."""
    shown = replace(protocol, kwargs={**protocol.kwargs, "render_mode": "rgb_array"})
    envs = Environments(shown.make, 1)
    try:
        dt = envs.spec.dt or SECONDS
        every = max(1, round(SECONDS / dt))
        envs.reset(episode_seeds(protocol.seed, [0]))
        frames = [_frame(envs.envs[0])]
        for number, action in enumerate(actions[: every * (FRAMES - 1)], start=1):
            envs.step(action[None])
            if number % every == 0:
                frames.append(_frame(envs.envs[0]))
        return frames, every * dt
    finally:
        envs.close()


def _frame(env: gym.Env) -> np.ndarray:
    """What the environment draws, [height, width, 3] of bytes, each four pixels of a large picture as one."""
    picture: Any = env.render()
    if not isinstance(picture, np.ndarray) or picture.ndim != 3:
        raise UserError("its environment gives no picture")
    height, width, _ = picture.shape
    if height < LARGE:
        return picture
    even = picture[: height // 2 * 2, : width // 2 * 2].reshape(height // 2, 2, width // 2, 2, 3)
    return even.mean((1, 3)).astype(np.uint8)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
    os._exit(0)  # destructors of off-screen contexts complain once the work is done
