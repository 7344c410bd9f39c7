import numpy as np
import pytest
import torch

from offline_cai.errors import UserError
from offline_cai.planning.occupancy import OccupancyPaths

POSITION, GOAL = np.array([0, 1]), np.array([2, 3])


def corner() -> np.ndarray:
    """States of data that went along two sides of a unit square, at 2 m/s."""
    s = np.linspace(0, 1, 400)
    xy = np.concatenate([np.stack([s, 0 * s], 1), np.stack([1 + 0 * s, s], 1)])
    return np.concatenate([xy, np.tile([2.0, 0.0], (len(xy), 1))], axis=1)


def test_the_path_stays_where_the_data_was_at_the_data_s_speed() -> None:
    paths = OccupancyPaths(corner(), POSITION, GOAL, stride=4, dt=0.01)
    plan = paths(np.array([[0.0, 0.0, 1.0, 1.0]]), torch.zeros(1, dtype=torch.int64))
    rows = plan.obs[0, 0].numpy()
    assert np.allclose(rows[0, :2], [0, 0]) and np.allclose(rows[-1], [1, 1, 0, 0])
    off = np.minimum(np.abs(rows[:, 1]), np.abs(rows[:, 0] - 1))
    assert off.max() < 0.1, "not across the square"
    steps = np.linalg.norm(np.diff(rows[:, :2], axis=0), axis=1)[:-1]
    assert steps.max() <= 2 * 0.04 + 1e-9 and steps.mean() == pytest.approx(2 * 0.04, rel=0.05)
    assert steps.sum() == pytest.approx(2.0, abs=0.15)


def test_plans_of_one_call_share_a_length() -> None:
    paths = OccupancyPaths(corner(), POSITION, GOAL, stride=4, dt=0.01)
    plan = paths(np.array([[0.0, 0.0, 1.0, 1.0], [0.9, 0.0, 1.0, 0.0]]), torch.zeros(2, dtype=torch.int64))
    assert plan.obs.shape[0] == 2 and np.allclose(plan.obs[1, 0, -5:], [1, 0, 0, 0])


def test_no_way_in_the_data_is_an_error() -> None:
    apart = np.concatenate([corner(), corner() + np.array([5, 5, 0, 0])])
    with pytest.raises(UserError, match="no way"):
        OccupancyPaths(apart, POSITION, GOAL, 4, 0.01)(np.array([[0.0, 0.0, 6.0, 6.0]]), torch.zeros(1))
