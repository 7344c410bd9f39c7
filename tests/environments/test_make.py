import re

import gymnasium as gym
import pytest

from offline_cai.environments.make import make
from offline_cai.errors import UserError


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ("Hoper-v5", r"Gymnasium knows no environment 'Hoper-v5': did you mean 'Hopper-v5'"),
        ("FetchReach-v9", r"did you mean 'FetchReach-v4'"),
        ("ALE/Pong-v5", r"pip install ale-py, and write ale_py:ALE/Pong-v5\."),
        ("MiniGrid-Empty-8x8-v0", r"pip install minigrid, and write minigrid:MiniGrid-Empty-8x8-v0\."),
        ("nobody/knows-v0", r"install the package that brings it, and write the package's module before it"),
        ("Ant-v3", r"mujoco-py, which is no longer kept up: take Ant-v5 or Ant-v4\.$"),
        ("FetchReach-v1", r"mujoco-py, which is no longer kept up: take FetchReach-v4\.$"),
        ("gymnasium_robotics:FetchReach-v1", r"mujoco-py, which is no longer kept up: take FetchReach-v4\.$"),
        ("not_a_module:Thing-v0", r"the package of the module 'not_a_module' \(pip install not_a_module\)"),
    ],
)
def test_what_is_not_there_is_one_sentence_that_names_the_package(environment: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        make(environment)
    assert len(str(error.value)) < 250


def test_a_simulator_that_is_not_installed_is_named() -> None:
    def broken() -> gym.Env:
        raise gym.error.DependencyNotInstalled('Box2D is not installed, run `pip install "gymnasium[box2d]"`')

    gym.register("NeedsBox2D-v0", entry_point=broken)
    try:
        with pytest.raises(
            UserError, match=re.escape('is not installed: Box2D is not installed, run `pip install "gym')
        ):
            make("NeedsBox2D-v0")
    finally:
        del gym.registry["NeedsBox2D-v0"]
