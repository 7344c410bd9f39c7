import numpy as np
import pytest

from offline_cai.errors import UserError
from offline_cai.planning.tracking import Tracker


def test_upsampling_is_exact_for_cubics() -> None:
    """A cubic Hermite spline through values and slopes of a cubic is that cubic."""
    dt, stride = 0.1, 4
    t = np.arange(13) * dt

    def state(t: np.ndarray) -> np.ndarray:
        x, y = 1 + 2 * t - t**2 + 0.5 * t**3, -t + t**2
        return np.stack([x, y, 2 - 2 * t + 1.5 * t**2, -1 + 2 * t], axis=-1)

    states = Tracker().states(state(t[::stride])[None], stride, dt)
    assert states.shape == (1, 13, 4)
    assert np.allclose(states[0], state(t))


def test_stride_one_keeps_the_rows() -> None:
    rows = np.random.default_rng(0).normal(size=(2, 5, 4))
    assert np.array_equal(Tracker().states(rows, 1, 0.1), rows)


def test_actions_are_proportional_and_derivative() -> None:
    tracker = Tracker(position=(1,), velocity=(0,), kp=3.0, kd=2.0)
    assert tracker.action(np.array([[1.0, 0.5]]), np.array([[0.1, 0.2]])) == pytest.approx(3 * 0.8 + 2 * 0.4)
    with pytest.raises(UserError, match="one velocity column"):
        Tracker(position=(0, 1), velocity=(2,))
