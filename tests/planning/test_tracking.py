import numpy as np
import pytest

from offline_cai.errors import UserError
from offline_cai.planning.tracking import Pursuit, Tracker


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


def test_pursuit_goes_round_a_corner_without_a_timetable() -> None:
    """A unit mass, from rest, along an L that its plan walks slowly: it arrives sooner, and stays near the path."""
    pursuit = Pursuit(lookahead=0.5, kp=10.0, kd=6.0)
    rows = np.array([[0.0, 0, 0, 0], [2, 0, 0, 0], [2, 2, 0, 0]])
    path, state, at, seen = pursuit.path(rows), np.zeros(4), 0, []
    assert np.allclose(np.linalg.norm(np.diff(path[:-1], axis=0), axis=1), 0.5 / 32, atol=2e-3) and len(path) > 250
    for _ in range(800):
        at = pursuit.advance(path, at, state)
        force = np.clip(pursuit.action(path, at, state), -5, 5)
        state = state + 0.01 * np.concatenate([state[2:], force])
        seen.append(np.linalg.norm(path - state[:2], axis=1).min())
    assert np.linalg.norm(state[:2] - [2, 2]) < 0.02 and max(seen) < 0.3
    assert at >= len(path) - 2
    with pytest.raises(UserError, match="lookahead is 0"):
        Pursuit(lookahead=0)


def test_pursuit_does_not_jump_to_a_later_part_of_the_path_that_comes_near() -> None:
    """There and back along almost the same line: progress goes on by what is ahead alone."""
    pursuit = Pursuit(lookahead=0.5)
    path = pursuit.path(np.array([[0.0, 0, 0, 0], [4, 0, 0, 0], [4, 0.01, 0, 0], [0, 0.01, 0, 0]]))
    assert pursuit.advance(path, 10, np.array([0.2, 0.01, 0, 0])) < 30


@pytest.mark.parametrize("sees", [True, False])
def test_pursuit_with_sight_cuts_no_corner_through_what_is_barred(sees: bool) -> None:
    """A unit mass on a half circle round a disc: with it in sight it stays out, without it goes straight through."""
    pursuit, turn = Pursuit(lookahead=1.5, kp=10.0, kd=6.0), np.linspace(np.pi, 0, 40)
    path = pursuit.path(np.stack([np.cos(turn), np.sin(turn)], axis=1))
    state, at, nearest = np.array([-1.0, 0, 0, 0]), 0, np.inf

    def clear(places: np.ndarray) -> np.ndarray:
        return np.linalg.norm(places, axis=-1) > 0.9

    for _ in range(1500):
        at = pursuit.advance(path, at, state)
        force = np.clip(pursuit.action(path, at, state, clear if sees else None), -5, 5)
        state = state + 0.01 * np.concatenate([state[2:], force])
        nearest = min(nearest, np.linalg.norm(state[:2]))
    assert np.linalg.norm(state[:2] - [1, 0]) < 0.02, "it arrives"
    assert nearest > 0.85 if sees else nearest < 0.7


def test_where_nothing_is_clear_pursuit_follows_its_path_closely() -> None:
    pursuit = Pursuit(lookahead=1.0, kp=1.0, kd=0.0)
    path = pursuit.path(np.array([[0.0, 0.0], [4.0, 0.0]]))
    action = pursuit.action(path, 0, np.zeros(4), lambda places: np.zeros(places.shape[:-1], bool))
    assert action == pytest.approx([5 / 32, 0])
    assert pursuit.action(path, len(path) - 1, np.zeros(4), lambda places: places[..., 0] > 9) == pytest.approx([4, 0])
