from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from offline_cai import seeding
from offline_cai.core import Box, Episode, Field, Spec
from offline_cai.data import replay as replays
from offline_cai.data.replay import Replay, ReplayWindows
from offline_cai.data.trajectories import Trajectories
from offline_cai.data.windows import Windows
from offline_cai.errors import UserError

SPEC = Spec((Field("observation", 3),), Box((-1.0, -1.0), (1.0, 1.0)))


class Script:
    """Lanes with episodes of random lengths; every observation tells its lane, episode and time."""

    def __init__(self, lanes: int, seed: int = 0, longest: int = 12) -> None:
        self.rng, self.lanes, self.longest = np.random.default_rng(seed), lanes, longest
        self.episode, self.time = np.zeros(lanes), np.zeros(lanes)
        self.length = self.rng.integers(1, longest, lanes)
        self.done: list[list[Episode]] = [[] for _ in range(lanes)]
        self.open: list[list[Any]] = [[] for _ in range(lanes)]

    @property
    def obs(self) -> np.ndarray:
        return np.column_stack([np.arange(self.lanes), self.episode, self.time])

    def step(self, replay: Replay) -> None:
        action, reward = self.rng.uniform(-1, 1, (self.lanes, 2)), self.rng.normal(size=self.lanes)
        log_prob, before = self.rng.normal(size=self.lanes), self.obs
        self.time += 1
        obs, ended = self.obs, self.time >= self.length
        terminated = ended & (self.rng.random(self.lanes) < 0.5)
        for i in range(self.lanes):
            self.open[i].append((before[i], action[i], reward[i], log_prob[i]))
            if ended[i]:
                self.done[i].append(self.so_far(i, obs[i], bool(terminated[i])))
                self.open[i] = []
        self.episode, self.time = self.episode + ended, np.where(ended, 0, self.time)
        self.length = np.where(ended, self.rng.integers(1, self.longest, self.lanes), self.length)
        replay.add(action, reward, log_prob, obs, terminated, ended & ~terminated, self.obs)

    def so_far(self, lane: int, last: np.ndarray, terminal: bool = False) -> Episode:
        obs, action, reward, log_prob = (np.array(column) for column in zip(*self.open[lane], strict=True))
        return Episode(np.vstack([obs, last]), action, reward, terminal, log_prob)

    def episodes(self, lanes: range | None = None) -> list[Episode]:
        """All of these lanes, lane by lane, with the ones in progress."""
        found = []
        for i in lanes or range(self.lanes):
            found += self.done[i] + ([self.so_far(i, self.obs[i])] if self.open[i] else [])
        return found


def filled(steps: int, lanes: int = 3, capacity: int = 10_000, **options: Any) -> tuple[Replay, Script]:
    replay, script = Replay(SPEC, lanes, capacity, 0.9, **options), Script(lanes)
    replay.begin(script.obs)
    for _ in range(steps):
        script.step(replay)
    return replay, script


def every_step(replay: Replay, span: int = 0) -> np.ndarray:
    """The rows that can be drawn, in order."""
    return np.unique(replay.draw(np.random.default_rng(0), 20_000, span))


def equal(a: Any, b: Any) -> bool:
    return all(x is y or torch.equal(x.nan_to_num(-7.0), y.nan_to_num(-7.0)) for x, y in zip(a, b, strict=True))


def batch(replay: Replay, n: int = 64, horizon: int = 3, step: int = 0, padding: bool = True) -> Any:
    windows = ReplayWindows(replay, horizon, padding=padding)
    return windows.gather(windows.draw(seeding.rng(0, step), n), torch.arange(n))


def test_it_holds_the_episodes_that_happened() -> None:
    replay, script = filled(200)
    got, wanted = (Trajectories.from_episodes(SPEC, e) for e in (replay.episodes(), script.episodes()))
    assert np.array_equal(got.rows, wanted.rows) and np.array_equal(got.offsets, wanted.offsets)
    assert np.array_equal(got.terminal, wanted.terminal) and got.terminal.any() and not got.terminal.all()


@pytest.mark.parametrize(("horizon", "stride", "padding"), [(1, 1, True), (4, 1, True), (2, 3, True), (3, 2, False)])
def test_its_windows_are_those_of_the_store(horizon: int, stride: int, padding: bool) -> None:
    replay, script = filled(150)
    store = Trajectories.from_episodes(SPEC, script.episodes())
    theirs = Windows(store, horizon, stride, 0.9, padding)
    rows = every_step(replay, 0 if padding else horizon * stride)
    assert len(rows) == len(theirs.starts), "the same windows exist"
    ours = ReplayWindows(replay, horizon, stride, padding).gather(rows, torch.zeros(len(rows)))
    expected = theirs.gather(theirs.starts, torch.zeros(len(rows)))
    known = ~ours.returns.isnan()
    assert torch.allclose(ours.returns[known], expected.returns[known])
    in_progress = len([1 for lane in script.open if lane])
    assert 0 < (~known).any(1).sum() <= 12 * in_progress, "only of episodes that go on the returns are unknown"
    assert equal(ours._replace(returns=ours.reward), expected._replace(returns=expected.reward))


def test_every_step_is_drawn_alike() -> None:
    store = Trajectories.from_episodes(SPEC, filled(20)[1].episodes())
    replay, _ = filled(40, dataset=store)
    rows, counts = np.unique(replay.draw(np.random.default_rng(1), 180 * 400), return_counts=True)
    assert len(rows) == 60 + 120, "the dataset's steps and the lanes', no more"
    assert abs(counts - 400).max() < 4.5 * 20, "400 each, within 4.5 standard errors"


def test_a_dataset_stays_and_others_are_refused(spec: Spec, store: Trajectories) -> None:
    plain = [e._replace(log_prob=None) for e in filled(20)[1].episodes()]
    data = Trajectories.from_episodes(SPEC, plain)
    replay, _ = filled(500, capacity=60, dataset=data)
    rows = every_step(replay)
    assert (rows < len(data.rows)).sum() == data.num_steps
    got = ReplayWindows(replay, 2).gather(rows[rows < len(data.rows)], torch.zeros(data.num_steps))
    windows = Windows(data, 2, 1, 0.9)
    assert equal(got._replace(log_prob=None), windows.gather(windows.starts, torch.zeros(data.num_steps)))
    assert got.log_prob.isnan()[got.valid].all(), "the dataset told no log-probabilities"
    with pytest.raises(UserError, match="not the environment's"):
        Replay(SPEC, 3, 100, 0.9, store)


def test_only_the_latest_rows_are_drawn_while_lanes_move_and_grow() -> None:
    replay, script = Replay(SPEC, 2, 40, 0.9), Script(2, longest=30)
    replay.begin(script.obs)
    for t in range(400):
        script.step(replay)
        if t % 37 == 36:
            got = ReplayWindows(replay, 1).gather(every_step(replay), torch.zeros(1))
            for lane, episodes in enumerate(script.done):
                cut = [script.so_far(lane, script.obs[lane])] if script.open[lane] else []
                rows = np.vstack([e.obs for e in [*episodes, *cut]])
                rows = rows if cut else np.vstack([rows, script.obs[lane]])
                kept = rows[-20:]
                ours = got.obs[:, 0].numpy()
                assert {tuple(r) for r in ours[ours[:, 0] == lane]} <= {tuple(r) for r in kept}
                steps = sum((kept[i + 1, 2] > kept[i, 2]) for i in range(len(kept) - 1))
                assert (ours[:, 0] == lane).sum() == steps


def test_the_latest_steps_are_pieces_of_episodes() -> None:
    replay, script = filled(100)
    first, lane = replay.latest(15)
    end = replay.rows.end
    assert [int((end[first] - first)[lane == i].sum()) for i in range(3)] == [15, 15, 15]
    assert len(first) > 3 and (np.diff(lane) >= 0).all()
    steps = np.concatenate([np.arange(f, end[f]) for f in first])
    obs = replay.rows.values[steps, :3]
    for i in range(3):
        taken = np.vstack([e.obs[:-1] for e in script.episodes(range(i, i + 1))])
        assert np.array_equal(obs[obs[:, 0] == i], taken[-15:])


def test_windows_that_fit_nowhere_are_refused() -> None:
    replay, _ = filled(3)
    with pytest.raises(UserError, match="no episode in the replay has 50 steps yet"):
        batch(replay, horizon=50, padding=False)
    with pytest.raises(UserError, match="too small for 3 environments"):
        Replay(SPEC, 3, 5, 0.9)


# Segments ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [10_000, 45])
def test_a_loaded_replay_is_the_same_and_stays_so(tmp_path: Path, capacity: int) -> None:
    replay, script = filled(0, capacity=capacity)
    states = []
    for t in range(300):
        script.step(replay)
        if t in (10, 11, 60, 165, 170):
            states.append((replay.save(tmp_path), script.obs, batch(replay), [replay.current(i) for i in range(3)]))
    for state, obs, drawn, current in states:
        again = Replay(SPEC, 3, capacity, 0.9)
        again.load(tmp_path, state, obs)
        assert equal(batch(again), drawn)
        for lane in range(3):
            assert all(np.array_equal(a, b) for a, b in zip(again.current(lane), current[lane], strict=True))
    twin = Script(3)
    first, second = Replay(SPEC, 3, capacity, 0.9), Replay(SPEC, 3, capacity, 0.9)
    first.begin(twin.obs)
    for _ in range(171):
        twin.step(first)
    second.load(tmp_path, states[-1][0], twin.obs)
    first_on, second_on = Script(3, seed=5), Script(3, seed=5)
    for t in range(200):
        first_on.step(first)
        second_on.step(second)
        assert equal(batch(first, 8, step=t), batch(second, 8, step=t))
    assert first.save(tmp_path)["first"] == second.save(tmp_path)["first"]


def test_an_episode_longer_than_the_capacity_is_kept_to_be_rebuilt(tmp_path: Path) -> None:
    replay, script = Replay(SPEC, 2, 20, 0.9), Script(2, longest=3)
    replay.begin(script.obs)
    for _ in range(10):
        script.step(replay)
    script.length[:] = script.time + 100
    for _ in range(90):
        script.step(replay)
        if len(script.open[0]) in (30, 60):
            replay.save(tmp_path)
    again = Replay(SPEC, 2, 20, 0.9)
    again.load(tmp_path, replay.save(tmp_path), script.obs)
    for lane in range(2):
        obs, action = again.current(lane)
        expected = script.so_far(lane, script.obs[lane])
        assert len(action) >= 90 and np.array_equal(obs, expected.obs)
        assert np.array_equal(action, expected.action.astype(np.float32))
    assert len(every_step(again)) == 2 * 9


def test_a_save_writes_only_what_is_new_and_the_same_again_for_the_same(tmp_path: Path) -> None:
    replay, script = filled(400)
    one = replay.save(tmp_path)
    script.step(replay)
    two = replay.save(tmp_path)
    sizes = [(tmp_path / s["file"]).stat().st_size for s in two["segments"]]
    assert two["segments"][:1] == one["segments"] and len(sizes) == 2 and sizes[1] < 1000 < sizes[0]
    assert replay.save(tmp_path) == two and len(list(tmp_path.iterdir())) == 2
    again, script = filled(400)
    assert again.save(tmp_path) == one, "a step that is done again writes the same file"


def test_segments_that_no_state_needs_go(tmp_path: Path) -> None:
    replay, script = filled(0, capacity=60)
    states = []
    for _ in range(20):
        for _ in range(10):
            script.step(replay)
        states.append((replay.save(tmp_path), script.obs, batch(replay)))
        replays.prune(tmp_path, [state for state, *_ in states[-3:]])
    assert len(states[-1][0]["segments"]) <= 4 and len(list(tmp_path.iterdir())) <= 6
    for state, obs, drawn in states[-3:]:
        again = Replay(SPEC, 3, 60, 0.9)
        again.load(tmp_path, state, obs)
        assert equal(batch(again), drawn)


def test_a_damaged_or_missing_segment_is_named(tmp_path: Path) -> None:
    replay, script = filled(50)
    state = replay.save(tmp_path)
    path = tmp_path / state["segments"][0]["file"]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"{path.name} cannot be read: it differs from what was written"):
        Replay(SPEC, 3, 10_000, 0.9).load(tmp_path, state, script.obs)
    path.unlink()
    with pytest.raises(UserError, match=rf"{path.name} cannot be read"):
        Replay(SPEC, 3, 10_000, 0.9).load(tmp_path, state, script.obs)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*safetensors"):
        filled(5)[0].save(tmp_path / "file")
