import numpy as np
import pytest

from offline_cai.core import Episode, Spec
from offline_cai.data.selection import select, split
from offline_cai.data.trajectories import Trajectories
from offline_cai.data.windows import Windows
from offline_cai.errors import UserError


@pytest.fixture(scope="module")
def ten(spec: Spec) -> Trajectories:
    """Episode i has i + 1 steps of reward 1, starts at x = i, and ends truly when i is even."""
    episodes = []
    for i in range(10):
        obs = np.full((i + 2, 8), float(i))
        episodes.append(Episode(obs, np.zeros((i + 1, 2)), np.ones(i + 1), i % 2 == 0))
    return Trajectories.from_episodes(spec, episodes)


def test_filters_by_return_length_share_end_and_task(ten: Trajectories) -> None:
    assert select(ten).tolist() == list(range(10))
    assert select(ten, returns=(3, 5)).tolist() == [2, 3, 4]
    assert select(ten, length=(None, 2)).tolist() == [0, 1]
    assert select(ten, top=0.2).tolist() == [8, 9]
    assert select(ten, terminal=False).tolist() == [1, 3, 5, 7, 9]
    assert select(ten, task=([0, 1], [4.0, 4.0], 1.5)).tolist() == [3, 4, 5]
    assert select(ten, terminal=True, returns=(6, None)).tolist() == [6, 8]
    with pytest.raises(UserError, match=r"no episode is left.*returns 1 to 10"):
        select(ten, returns=(11, None))
    with pytest.raises(UserError, match="top share"):
        select(ten, top=0.0)


def test_windows_of_selected_episodes_only(ten: Trajectories) -> None:
    windows = Windows(ten, 1, episodes=select(ten, top=0.1))
    assert set(ten.obs[windows.starts][:, 0]) == {9.0} and len(windows.starts) == 10


def test_splits_are_disjoint_complete_and_follow_the_seed(ten: Trajectories) -> None:
    train, test = split(select(ten), [0.8, 0.2], seed=0)
    assert len(train) == 8 and sorted([*train, *test]) == list(range(10)) and (np.diff(train) > 0).all()
    assert np.array_equal(split(select(ten), [0.8, 0.2], seed=0)[1], test)
    assert any(not np.array_equal(split(select(ten), [0.8, 0.2], seed=s)[1], test) for s in (1, 2, 3))
    for shares in ([0.5, 0.6], [1.0, 0.0], [0.99, 0.01]):
        with pytest.raises(UserError, match=r"shares|empty"):
            split(select(ten), shares, seed=0)
