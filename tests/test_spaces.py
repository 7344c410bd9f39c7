import gymnasium as gym
import numpy as np
import pytest

from offline_cai.core import Field
from offline_cai.errors import UserError
from offline_cai.spaces import flatten, spec_of, unflatten

BOX = gym.spaces.Box(-1, 1, (2,))
NESTED = gym.spaces.Dict(
    {
        "z": gym.spaces.Box(-np.inf, np.inf, (2, 3), dtype=np.float64),
        "a": gym.spaces.Dict({"n": gym.spaces.Box(0, 1, (1,)), "m": gym.spaces.Box(0, 1, ())}),
    }
)


def test_dict_observations_flatten_in_sorted_order_and_back() -> None:
    spec = spec_of(NESTED, BOX)
    assert spec.obs == (Field("a/m", 1), Field("a/n", 1), Field("z", 6))
    rng = np.random.default_rng(0)
    obs = {"z": rng.normal(size=(4, 2, 3)), "a": {"n": rng.random((4, 1)), "m": rng.random(4)}}
    flat = flatten(spec, obs)
    assert flat.shape == (4, 8)
    assert np.array_equal(flat[:, 0], obs["a"]["m"])
    back = unflatten(spec, NESTED, flat)
    assert np.array_equal(back["z"], obs["z"])
    assert np.allclose(back["a"]["n"], obs["a"]["n"])
    assert np.allclose(back["a"]["m"], obs["a"]["m"])


def test_a_plain_box_is_one_field() -> None:
    spec = spec_of(gym.spaces.Box(-1, 1, (3,)), BOX)
    assert spec.obs == (Field("observation", 3),)
    rows = np.arange(6.0).reshape(2, 3)
    assert np.array_equal(flatten(spec, rows), rows)
    assert np.array_equal(unflatten(spec, gym.spaces.Box(-1, 1, (3,)), rows), rows)


def test_a_nested_dict_called_observation_keeps_its_names() -> None:
    space = gym.spaces.Dict({"observation": gym.spaces.Dict({"a": BOX, "b": BOX})})
    spec = spec_of(space, BOX)
    assert [field.name for field in spec.obs] == ["observation/a", "observation/b"]
    rows = np.arange(8.0).reshape(2, 4)
    assert np.array_equal(flatten(spec, unflatten(spec, space, rows)), rows)


@pytest.mark.parametrize(
    ("observation", "action", "word"),
    [
        (gym.spaces.Dict({}), BOX, "empty"),
        (gym.spaces.Dict({"a/b": BOX}), BOX, "without '/'"),
        (gym.spaces.Box(0, 255, (8, 8, 3), dtype=np.uint8), BOX, "'observation'"),
        (gym.spaces.Dict({"x": gym.spaces.Discrete(3)}), BOX, "'x'"),
        (BOX, gym.spaces.Discrete(3), "action space"),
    ],
)
def test_what_is_not_trained_on_is_refused(observation: gym.Space, action: gym.Space, word: str) -> None:
    with pytest.raises(UserError, match=word):
        spec_of(observation, action)
