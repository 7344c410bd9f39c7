import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Text, Tuple
from gymnasium.vector.utils import batch_space

from offline_cai import core
from offline_cai.core import Field
from offline_cai.errors import UserError
from offline_cai.spaces import components, flatten, spec_of, unflatten, unflatten_action

BOX = Box(-1, 1, (2,))
NESTED = Dict(
    {
        "z": Box(-np.inf, np.inf, (2, 3), dtype=np.float64),
        "a": Dict({"n": Box(0, 1, (1,)), "m": Box(0, 1, ())}),
    }
)
EVERY_KIND = Dict({"t": Tuple((Discrete(3, start=-1), MultiBinary((2, 2)))), "m": MultiDiscrete([2, 4]), "b": BOX})


def same(ours: object, theirs: object) -> bool:
    if isinstance(theirs, dict):
        return isinstance(ours, dict) and ours.keys() == theirs.keys() and all(same(ours[k], theirs[k]) for k in ours)
    if isinstance(theirs, tuple):
        return isinstance(ours, tuple) and all(same(a, b) for a, b in zip(ours, theirs, strict=True))
    a, b = np.asarray(ours), np.asarray(theirs)
    return a.dtype == b.dtype and np.array_equal(a, b)


def test_dict_observations_flatten_in_sorted_order_and_back() -> None:
    spec = spec_of(NESTED, BOX)
    assert spec.obs == (Field("a/m", 1), Field("a/n", 1), Field("z", 6))
    rng = np.random.default_rng(0)
    obs = {"z": rng.normal(size=(4, 2, 3)), "a": {"n": rng.random((4, 1)), "m": rng.random(4)}}
    flat = flatten(NESTED, obs)
    assert flat.shape == (4, 8)
    assert np.array_equal(flat[:, 0], obs["a"]["m"])
    back = unflatten(NESTED, flat)
    assert np.array_equal(back["z"], obs["z"])
    assert np.allclose(back["a"]["n"], obs["a"]["n"])
    assert np.allclose(back["a"]["m"], obs["a"]["m"])


def test_a_plain_box_is_one_field() -> None:
    space = Box(-1, 1, (3,), dtype=np.float64)
    assert spec_of(space, BOX).obs == (Field("observation", 3),)
    rows = np.arange(6.0).reshape(2, 3)
    assert np.array_equal(flatten(space, rows), rows)
    assert np.array_equal(unflatten(space, rows), rows)


def test_a_nested_dict_called_observation_keeps_its_names() -> None:
    space = Dict({"observation": Dict({"a": BOX, "b": BOX})})
    spec = spec_of(space, BOX)
    assert [field.name for field in spec.obs] == ["observation/a", "observation/b"]
    rows = np.arange(8.0).reshape(2, 4)
    assert np.array_equal(flatten(space, unflatten(space, rows)), rows)


def test_choices_in_observations_are_one_hot_as_gymnasium_makes_them() -> None:
    spec = spec_of(EVERY_KIND, BOX)
    assert spec.obs == (Field("b", 2), Field("m", 6), Field("t/0", 3), Field("t/1", 4))
    batch = batch_space(EVERY_KIND, 5)
    batch.seed(0)
    values = batch.sample()
    rows = flatten(EVERY_KIND, values)
    for i, row in enumerate(rows):
        one = {"b": values["b"][i], "m": values["m"][i], "t": (values["t"][0][i], values["t"][1][i])}
        parts = [gym.spaces.flatten(EVERY_KIND[name], one[name]) for name in ("b", "m")]
        parts += [gym.spaces.flatten(space, part) for space, part in zip(EVERY_KIND["t"], one["t"], strict=True)]
        assert np.array_equal(row, np.concatenate(parts))
    assert same(unflatten(EVERY_KIND, rows), values)


@pytest.mark.parametrize("bad", [3, -2, 0.5, np.nan])
def test_a_choice_that_a_space_does_not_have_is_named(bad: float) -> None:
    values = {"t": (np.array([0, bad]), np.zeros((2, 2, 2))), "m": np.zeros((2, 2)), "b": np.zeros((2, 2))}
    with pytest.raises(ValueError, match=rf"'t/0' holds {bad:g}, not a whole number from -1 to 1"):
        flatten(EVERY_KIND, values)


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        (Discrete(4), core.Discrete((4,), (0,))),
        (Discrete(4, start=2), core.Discrete((4,), (2,))),
        (MultiDiscrete([2, 3]), core.Discrete((2, 3), (0, 0))),
        (MultiDiscrete([[2, 3], [4, 5]]), core.Discrete((2, 3, 4, 5), (0,) * 4)),
        (MultiBinary(2), core.Discrete((2, 2), (0, 0))),
        (Dict({"b": Discrete(2), "a": MultiDiscrete([3], start=[1])}), core.Discrete((3, 2), (1, 0))),
        (Tuple((BOX, Box(0, 4, (1,)))), core.Box((-1.0, -1.0, 0.0), (1.0, 1.0, 4.0))),
        (Box(-1, 1, (1, 2, 1)), core.Box((-1.0, -1.0), (1.0, 1.0))),
        (Dict({"b": BOX, "a": Box(0, 4, ())}), core.Box((0.0, -1.0, -1.0), (4.0, 1.0, 1.0))),
    ],
)
def test_actions_keep_their_numbers_and_return_as_they_were(space: gym.Space, expected: core.Box) -> None:
    spec = spec_of(BOX, space)
    assert spec.action == expected
    batch = batch_space(space, 6)
    batch.seed(1)
    values = batch.sample()
    numbers = components(space, values)
    assert numbers.shape == (6, spec.action_width)
    assert ((numbers >= spec.action.low) & (numbers <= spec.action.high)).all()
    assert same(unflatten_action(space, numbers), values)
    assert batch.contains(unflatten_action(space, numbers))


@pytest.mark.parametrize(
    ("observation", "action", "word"),
    [
        (Dict({}), BOX, "empty"),
        (Dict({"a/b": BOX}), BOX, "without '/'"),
        (Box(0, 255, (8, 8), dtype=np.uint8), BOX, "'observation' holds images"),
        (Dict({"a": Box(0, 1, (8, 8, 3), dtype=np.float32)}), BOX, "'a' holds images.* no algorithm here .* or make"),
        (Dict({"x": Text(3)}), BOX, "'x' is Text"),
        (BOX, gym.spaces.Sequence(BOX), "Sequence"),
        (BOX, Tuple((BOX, Discrete(2))), "mixes numbers and choices"),
        (BOX, Tuple(()), "nothing to act with"),
        (BOX, Box(-np.inf, np.inf, (1,)), "component 0 has bounds"),
        (BOX, Discrete(2**25), "2\\^24"),
    ],
)
def test_what_is_not_trained_on_is_refused(observation: gym.Space, action: gym.Space, word: str) -> None:
    with pytest.raises(UserError, match=word):
        spec_of(observation, action)
