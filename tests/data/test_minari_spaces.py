"""Minari datasets of every kind of space and storage, against what Minari itself reads."""

import h5py
import minari as real_minari
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Space, Tuple
from gymnasium.vector.utils import batch_space
from minari.data_collector import EpisodeBuffer

from offline_cai import core
from offline_cai.data import minari
from offline_cai.data.trajectories import Trajectories
from offline_cai.errors import UserError
from offline_cai.spaces import components, flatten

BOX = Box(-1, 1, (2,))
SPACES: dict[str, tuple[Space, Space]] = {
    "box": (Box(-9, 9, (2, 2)), BOX),
    "dict": (Dict({"z": BOX, "a": Dict({"k": Discrete(3), "b": Box(0, 1, ())})}), Discrete(4, start=1)),
    "tuple": (Tuple((BOX, Dict({"m": MultiDiscrete([2, 3])}))), Tuple((BOX, Box(0, 2, (1,))))),
    "choices": (MultiBinary(3), MultiDiscrete([2, 5])),
    "named-actions": (Discrete(6), Dict({"b": Discrete(2), "a": Discrete(3)})),
}


def draw(space: Space, count: int, seed: int) -> object:
    batch = batch_space(space, count)
    batch.seed(seed)
    return batch.sample()


def make(name: str, spaces: tuple[Space, Space], storage: str) -> real_minari.MinariDataset:
    """A dataset of three episodes: 4 steps to a true end, 1 step cut, 7 steps cut."""
    minari.dataset_root().mkdir(parents=True, exist_ok=True)
    buffers = []
    for seed, (steps, terminal) in enumerate([(4, True), (1, False), (7, False)]):
        last = np.arange(steps) == steps - 1
        buffers.append(
            EpisodeBuffer(
                observations=draw(spaces[0], steps + 1, seed),
                actions=draw(spaces[1], steps, seed),
                rewards=np.random.default_rng(seed).normal(size=steps),
                terminations=last & terminal,
                truncations=last & (not terminal),
            )
        )
    return real_minari.create_dataset_from_buffers(
        f"spaces/{storage}/{name}-v0", buffers, observation_space=spaces[0], action_space=spaces[1], data_format=storage
    )


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")


@pytest.mark.parametrize("storage", ["hdf5", "arrow"])
@pytest.mark.parametrize("name", SPACES)
def test_the_store_holds_what_minari_reads(name: str, storage: str) -> None:
    dataset = make(name, SPACES[name], storage)
    store = minari.trajectories(f"spaces/{storage}/{name}-v0")
    assert store.terminal.tolist() == [True, False, False] and store.lengths.tolist() == [4, 1, 7]
    for ours, theirs in zip(store.episodes(), dataset.iterate_episodes(), strict=True):
        assert np.allclose(ours.obs, flatten(SPACES[name][0], theirs.observations), atol=1e-6)
        assert np.allclose(ours.action, components(SPACES[name][1], theirs.actions), atol=1e-6)
        assert np.allclose(ours.reward, theirs.rewards)


def test_names_of_parts_and_choices_of_actions_are_kept() -> None:
    make("kept", SPACES["dict"], "hdf5")
    spec = minari.trajectories("spaces/hdf5/kept-v0").spec
    assert spec.obs == (core.Field("a/b", 1), core.Field("a/k", 3), core.Field("z", 2))
    assert spec.action == core.Discrete((4,), (1,))


def test_filtered_and_split_datasets_are_stores_of_their_own() -> None:
    dataset = make("parts", SPACES["box"], "hdf5")
    whole = minari.trajectories(dataset)
    long = minari.trajectories(dataset.filter_episodes(lambda episode: len(episode.rewards) > 2))
    assert long.lengths.tolist() == [4, 7] and whole.lengths.tolist() == [4, 1, 7]
    first, second = (minari.trajectories(part) for part in real_minari.split_dataset(dataset, sizes=[1, 2], seed=0))
    assert sorted([*first.lengths, *second.lengths]) == [1, 4, 7]
    (shuffled,) = real_minari.split_dataset(dataset, sizes=[3], seed=2)
    assert shuffled.episode_indices.tolist() != [0, 1, 2]
    assert minari.trajectories(shuffled).lengths.tolist() == [[4, 1, 7][i] for i in shuffled.episode_indices]
    assert minari.trajectories("spaces/hdf5/parts-v0").path == whole.path != long.path
    assert minari.trajectories("spaces/hdf5/parts-v0").lengths.tolist() == [4, 1, 7]


def test_a_choice_that_does_not_exist_is_named_with_its_episode() -> None:
    make("bad", SPACES["dict"], "hdf5")
    with h5py.File(minari.dataset_root() / "spaces/hdf5/bad-v0/data/main_data.hdf5", "a") as file:
        file["episode_2/observations/a/k"][3] = 3
    with pytest.raises(UserError, match=r"episode 2 cannot be read .*'a/k' holds 3, not a whole number from 0 to 2"):
        minari.trajectories("spaces/hdf5/bad-v0")


@pytest.mark.parametrize(("value", "words"), [(0.0, "outside the bounds"), (1.5, "no whole number")])
def test_actions_that_are_no_choices_are_named(value: float, words: str) -> None:
    spec = core.Spec((core.Field("observation", 1),), core.Discrete((4,), (1,)))
    episode = core.Episode(np.zeros((3, 1)), np.array([[1.0], [value]]), np.zeros(2), True)
    with pytest.raises(UserError, match=rf"episode 0: action {value:.4g} at row 1.*{words}"):
        Trajectories.from_episodes(spec, [episode])


def test_images_are_refused_by_name() -> None:
    make("image", (Dict({"pixels": Box(0, 255, (8, 8, 3), dtype=np.uint8)}), BOX), "hdf5")
    with pytest.raises(UserError, match="'pixels' holds images"):
        minari.trajectories("spaces/hdf5/image-v0")
