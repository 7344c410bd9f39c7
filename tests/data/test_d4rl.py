import collections
import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offline_cai.core import Box, Episode, Field, Spec
from offline_cai.data import d4rl, d4rl_download, d4rl_file
from offline_cai.data.d4rl_download import Entry
from offline_cai.data.trajectories import Trajectories
from offline_cai.errors import UserError

Arrays = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLINE_CAI_CACHE", str(tmp_path / "cache"))


def rows(count: int = 8, terminals: tuple[int, ...] = (), timeouts: tuple[int, ...] | None = ()) -> Arrays:
    """Row i has observation [i, -i], action [i / 10] (i modulo 10) and reward 100 + i."""
    i = np.arange(count)
    data = {
        "actions": (i % 10 / 10)[:, None].astype(np.float32),
        "observations": np.stack([i, -i], axis=1).astype(np.float32),
        "rewards": (100 + i).astype(np.float32),
        "terminals": np.isin(i, terminals),
    }
    if timeouts is not None:
        data["timeouts"] = np.isin(i, timeouts)
    return data


def save(path: Path, data: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in data.items():
            file[name] = array
    return path


def with_next(data: Arrays) -> Arrays:
    """Next observations that go on as the next row does, except at an end: there [1000 + row, 0]."""
    following = np.roll(data["observations"], -1, axis=0)
    ends = np.flatnonzero(data["terminals"].astype(bool) | data["timeouts"].astype(bool))
    for row in {*ends, len(following) - 1}:
        following[row] = [1000 + row, 0]
    return data | {"next_observations": following}


def first(store: Trajectories) -> list[tuple[list[float], list[float], list[float], bool]]:
    """First column of observations, rewards, ten times the actions, and the end of each episode."""
    return [
        (e.obs[:, 0].tolist(), e.reward.tolist(), np.rint(e.action[:, 0] * 10).tolist(), e.terminal)
        for e in store.episodes()
    ]


# The two readers, against answers computed by hand from D4RL's code ---------------------------------------------------


@pytest.mark.parametrize(
    ("data", "options", "kept", "terminal_at"),
    [
        (rows(8, (2,), (5,)), {}, [0, 1, 2, 3, 4, 6], [2]),
        (rows(8, (2,), (5,)), {"terminate_on_end": True}, [0, 1, 2, 3, 4, 5, 6], [2]),
        (rows(6, (2, 5), (2,)), {}, [0, 1, 3, 4], []),
        (rows(6, (2, 5), (2,)), {"terminate_on_end": True}, [0, 1, 2, 3, 4], [2]),
        (rows(5, (0, 1), ()), {}, [0, 1, 2, 3], [0, 1]),
        (rows(5, (), (4,)), {}, [0, 1, 2, 3], []),
        # Without time-outs the counter is 0 after a cut, but 1 after a terminal.
        (rows(8, (), None), {"max_episode_steps": 3}, [0, 1, 3, 4, 6], []),
        (rows(8, (2,), None), {"max_episode_steps": 3}, [0, 1, 3, 4, 6], []),
        (rows(8, (1,), None), {"max_episode_steps": 3}, [0, 1, 2, 4, 5], [1]),
        (rows(8, (1,), None), {"max_episode_steps": 3, "terminate_on_end": True}, [0, 1, 2, 3, 4, 5, 6], [1]),
    ],
)
def test_qlearning_dataset_golden(data: Arrays, options: dict, kept: list[int], terminal_at: list[int]) -> None:
    out = d4rl.qlearning_dataset(data, **options)
    assert list(out) == ["observations", "actions", "next_observations", "rewards", "terminals"]
    assert out["observations"].tolist() == [[i, -i] for i in kept]
    assert out["next_observations"].tolist() == [[i + 1, -i - 1] for i in kept]
    assert np.allclose(out["actions"], [[i / 10] for i in kept]) and out["rewards"].tolist() == [100 + i for i in kept]
    assert out["terminals"].tolist() == [i in terminal_at for i in kept]
    assert [out[key].dtype for key in out] == [np.float32] * 4 + [bool]


@pytest.mark.parametrize(("data", "limit"), [(rows(8, (0,), None), 1), (rows(1), None), (rows(3, (), (0, 1)), None)])
def test_qlearning_dataset_without_a_transition_is_what_numpy_makes_of_empty_lists(data: Arrays, limit: int) -> None:
    out = d4rl.qlearning_dataset(data, max_episode_steps=limit)
    assert len(out) == 5 and all(array.shape == (0,) and array.dtype == np.float64 for array in out.values())


def test_qlearning_dataset_takes_next_rows_even_where_the_file_knows_better(tmp_path: Path) -> None:
    path = save(tmp_path / "own.hdf5", with_next(rows(4, (1,), ())) | {"metadata/algorithm": "SAC"})
    assert d4rl.qlearning_dataset(path)["next_observations"][:, 0].tolist() == [1, 2, 3]
    assert d4rl.qlearning_dataset(str(path))["terminals"].tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("data", "limit", "spans"),
    [
        (rows(8, (2,), (5,)), None, [[0, 1, 2], [3, 4, 5]]),
        (rows(6, (2, 5), (2,)), None, [[0, 1, 2], [3, 4, 5]]),
        (rows(4, (), (0, 3)), None, [[0], [1, 2, 3]]),
        (rows(4, (), ()), None, []),
        # Without time-outs the counter starts at 0 once, and at 1 from the second episode on.
        (rows(8, (), None), 3, [[0, 1, 2], [3, 4], [5, 6]]),
        (rows(8, (0,), None), 3, [[0], [1, 2], [3, 4], [5, 6]]),
        (rows(4, (), None), 1, [[0]]),
    ],
)
def test_sequence_dataset_golden(data: Arrays, limit: int | None, spans: list[list[int]]) -> None:
    data = data | {"infos/goal": np.arange(len(data["rewards"])) * 7}
    metadata = {"metadata/algorithm": np.bytes_("SAC"), "metadata/policy": np.zeros((256, 3))}
    out = list(d4rl.sequence_dataset(data | metadata, max_episode_steps=limit))
    assert [episode["observations"][:, 0].tolist() for episode in out] == spans
    for episode, span in zip(out, spans, strict=True):
        assert list(episode) == list(data)
        assert episode["infos/goal"].tolist() == [7 * i for i in span]
        assert episode["rewards"].tolist() == [100 + i for i in span]
        assert all(episode[key].dtype == data[key].dtype for key in data)


def test_sequence_dataset_leaves_out_metadata_and_knows_the_limit_from_the_name(tmp_path: Path) -> None:
    data = {**rows(300, (), None), "metadata/algorithm": "SAC", "metadata/policy/fc0/weight": np.zeros((2, 3))}
    path = save(tmp_path / "pen-v0_demos_clipped.hdf5", data)
    out = list(d4rl.sequence_dataset(path))
    assert [len(episode["rewards"]) for episode in out] == [100, 99, 99]
    assert list(out[0]) == ["actions", "observations", "rewards", "terminals"]


def slow_qlearning(data: Arrays, limit: int, terminate_on_end: bool) -> Arrays:
    step, out = 0, collections.defaultdict(list)
    for i in range(len(data["rewards"]) - 1):
        done = bool(data["terminals"][i])
        final = data["timeouts"][i] if "timeouts" in data else step == limit - 1
        if final and not terminate_on_end:
            step = 0
            continue
        step = 1 if done or final else step + 1
        row = (data["observations"][i], data["actions"][i], data["observations"][i + 1], data["rewards"][i], done)
        for key, value in zip(
            ("observations", "actions", "next_observations", "rewards", "terminals"), row, strict=True
        ):
            out[key].append(value)
    return {key: np.array(out[key]) for key in ("observations", "actions", "next_observations", "rewards", "terminals")}


def slow_sequence(data: Arrays, limit: int) -> list[Arrays]:
    step, begin, out = 0, 0, []
    for i in range(len(data["rewards"])):
        final = data["timeouts"][i] if "timeouts" in data else step == limit - 1
        if data["terminals"][i] or final:
            out.append({key: np.array([data[key][j] for j in range(begin, i + 1)]) for key in data})
            step, begin = 0, i + 1
        step += 1
    return out


@settings(derandomize=True, max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 40),
    limit=st.integers(1, 8),
    rate=st.sampled_from([0.0, 0.1, 0.5]),
    flags=st.booleans(),
    terminate=st.booleans(),
)
def test_the_readers_equal_slow_ones_on_random_data(
    seed: int, count: int, limit: int, rate: float, flags: bool, terminate: bool
) -> None:
    rng = np.random.default_rng(seed)
    data = {
        "observations": rng.normal(size=(count, 3)).astype(np.float32),
        "actions": rng.normal(size=(count, 2)).astype(np.float32),
        "rewards": rng.normal(size=count).astype(np.float32),
        "terminals": rng.uniform(size=count) < rate,
    }
    if flags:
        data["timeouts"] = rng.uniform(size=count) < rate
    fast = d4rl.qlearning_dataset(data, terminate, max_episode_steps=limit)
    same(fast, slow_qlearning(data, limit, terminate))
    episodes = list(d4rl.sequence_dataset(data, max_episode_steps=limit))
    for ours, theirs in zip(episodes, slow_sequence(data, limit), strict=True):
        same(ours, theirs)


def same(one: Arrays, other: Arrays) -> None:
    assert list(one) == list(other)
    for key in one:
        assert one[key].dtype == other[key].dtype and np.array_equal(one[key], other[key]), key


# The store ------------------------------------------------------------------------------------------------------------


def test_without_next_observations_the_transition_at_a_time_out_is_lost(tmp_path: Path) -> None:
    store = d4rl.trajectories(save(tmp_path / "own.hdf5", rows(9, (2,), (5, 6))))
    assert first(store) == [
        ([0, 1, 2, 2], [100, 101, 102], [0, 1, 2], True),
        ([3, 4, 5], [103, 104], [3, 4], False),
        ([7, 8], [107], [7], False),
    ]
    assert store.spec == Spec((Field("observation", 2),), Box((-1.0,), (1.0,)), None)


def test_with_next_observations_every_row_is_a_transition(tmp_path: Path) -> None:
    store = d4rl.trajectories(save(tmp_path / "own.hdf5", with_next(rows(9, (2,), (5, 6)))))
    assert first(store) == [
        ([0, 1, 2, 1002], [100, 101, 102], [0, 1, 2], True),
        ([3, 4, 5, 1005], [103, 104, 105], [3, 4, 5], False),
        ([6, 1006], [106], [6], False),
        ([7, 8, 1008], [107, 108], [7, 8], False),
    ]


def test_a_terminal_on_the_last_row_and_on_a_time_out_is_a_true_end(tmp_path: Path) -> None:
    store = d4rl.trajectories(save(tmp_path / "own.hdf5", rows(6, (2, 5), (2,))))
    assert first(store) == [
        ([0, 1, 2, 2], [100, 101, 102], [0, 1, 2], True),
        ([3, 4, 5, 5], [103, 104, 105], [3, 4, 5], True),
    ]


def test_without_time_outs_the_limit_cuts_and_counts_from_0_after_every_end(tmp_path: Path) -> None:
    path = save(tmp_path / "own.hdf5", rows(8, (1,), None))
    assert first(d4rl.trajectories(path, max_episode_steps=3)) == [
        ([0, 1, 1], [100, 101], [0, 1], True),
        ([2, 3, 4], [102, 103], [2, 3], False),
        ([5, 6, 7], [105, 106], [5, 6], False),
    ]
    assert d4rl.trajectories(path, max_episode_steps=4).lengths.tolist() == [2, 3, 1], "another limit, another store"
    with pytest.raises(UserError, match=r"own\.hdf5 has no 'timeouts'.*max_episode_steps"):
        d4rl.trajectories(path)
    with pytest.raises(UserError, match="max_episode_steps is 0"):
        d4rl.trajectories(path, max_episode_steps=0)


def test_a_cut_that_is_not_flagged_is_found_and_shuffled_rows_are_refused(tmp_path: Path) -> None:
    data = with_next(rows(9, (), (5,)))
    data["next_observations"][2] = [50, 50]
    store = d4rl.trajectories(save(tmp_path / "own.hdf5", data))
    assert [(episode[0], episode[3]) for episode in first(store)] == [
        ([0, 1, 2, 50], False),
        ([3, 4, 5, 1005], False),
        ([6, 7, 8, 1008], False),
    ]
    data["next_observations"] = data["next_observations"][::-1].copy()
    with pytest.raises(UserError, match=r"again\.hdf5: 'next_observations' differ .* first at row 0"):
        d4rl.trajectories(save(tmp_path / "again.hdf5", data))


COUNT = 2500
FAMILIES: dict[str, tuple[Arrays, list[int]]] = {
    # name or server's name of the file: what it holds besides the rows, and lengths of the episodes expected
    "hopper-medium-v2": (
        with_next(rows(COUNT, (299,), (1299, 2299)))
        | {
            "infos/action_log_probs": np.arange(COUNT, dtype=np.float32),
            "infos/qpos": np.zeros((COUNT, 6)),
            "metadata/algorithm": np.bytes_("SAC"),
            "metadata/policy/fc0/weight": np.zeros((256, 11)),
        },
        [300, 1000, 1000, 200],
    ),
    "hopper_medium": (rows(COUNT, (299,), None) | {"rewards": np.ones((COUNT, 1))}, [300, 999, 999, 199]),
    "maze2d-umaze-sparse-v1": (
        rows(COUNT, (), (90, 143)) | {"infos/goal": np.ones((COUNT, 2)), "infos/qvel": np.ones((COUNT, 2))},
        [90, 52, COUNT - 145],
    ),
    "antmaze-umaze-diverse-v0": (
        rows(COUNT, (300, 301), (1000, 2001)) | {"infos/goal": np.ones((COUNT, 2)), "infos/qpos": np.ones((COUNT, 15))},
        [301, 1, 698, 1000, 497],
    ),
    "kitchen-complete-v0": (
        rows(COUNT, (199, 399), None),
        [200, 200, *[279] * 7, 139],
    ),
    "pen-human-v1": (rows(COUNT, (), tuple(range(99, COUNT, 100))), [99] * 25),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_families_of_d4rl(name: str, tmp_path: Path) -> None:
    data, lengths = FAMILIES[name]
    data = {**data, "terminals": data["terminals"].astype(np.float32)}
    store = d4rl.trajectories(save(tmp_path / f"{name}.hdf5", data))
    assert store.lengths.tolist() == lengths
    assert store.obs.dtype == np.float32 and store.spec.dt is None
    assert (store.log_prob is not None) == (name == "hopper-medium-v2")
    if store.log_prob is not None:
        assert np.array_equal(store.log_prob[store.step_rows()], np.arange(COUNT))


def test_log_probabilities_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    data = rows(8, (2,), (5,))
    odd = [np.zeros((8, 3)), np.zeros(7), np.full(8, np.nan), np.bytes_("none"), np.float32(1)]
    for number, values in enumerate(odd):
        path = save(tmp_path / f"odd-{number}.hdf5", data | {d4rl.LOG_PROB: values})
        assert d4rl.trajectories(path).log_prob is None


def test_conversion_happens_once_and_again_when_the_file_changes(tmp_path: Path) -> None:
    path = save(tmp_path / "own.hdf5", rows(8, (2,), (5,)))
    one = d4rl.trajectories(path)
    assert d4rl.trajectories(path).obs.filename == one.obs.filename
    again = d4rl.trajectories(save(path, rows(9, (2,), (5,))))
    assert again.num_steps == one.num_steps + 1


# Writing --------------------------------------------------------------------------------------------------------------


def test_what_is_written_comes_back(store: Trajectories, tmp_path: Path) -> None:
    path = d4rl.write(tmp_path / "out" / "maze.hdf5", store)
    back = d4rl.trajectories(path)
    assert back.spec == store.spec, "fields, bounds and dt too"
    for name in ("obs", "action", "reward", "offsets", "terminal"):
        assert np.array_equal(getattr(back, name), getattr(store, name)), name
    with h5py.File(path) as file:
        assert sorted(file) == [
            "actions",
            "next_observations",
            "observations",
            "rewards",
            "terminals",
            "timeouts",
        ]
        assert all(dataset.compression == "gzip" and dataset.chunks for dataset in file.values())
        assert np.flatnonzero(file["terminals"]).tolist() == [4, 5]
        assert np.flatnonzero(file["timeouts"]).tolist() == [17]
    assert len(d4rl.qlearning_dataset(path)["rewards"]) == 17


def test_log_probabilities_and_many_rows_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(d4rl, "_SLICE", 7)
    rng = np.random.default_rng(0)
    spec = Spec((Field("observation", 3),), Box((-1.0, -1.0), (1.0, 1.0)))
    store = Trajectories.from_episodes(
        spec,
        [
            Episode(
                rng.normal(size=(n + 1, 3)), rng.uniform(-1, 1, (n, 2)), rng.normal(size=n), end, rng.normal(size=n)
            )
            for n, end in [(20, False), (1, True), (9, False)]
        ],
    )
    back = d4rl.trajectories(d4rl.write(tmp_path / "a.hdf5", store))
    for name in ("obs", "action", "reward", "offsets", "terminal", "log_prob"):
        assert np.array_equal(getattr(back, name), getattr(store, name)), name


def test_an_existing_file_is_not_overwritten_and_a_failed_write_leaves_nothing(
    store: Trajectories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "there.hdf5"
    path.write_text("mine")
    with pytest.raises(UserError, match=r"there\.hdf5 exists already"):
        d4rl.write(path, store)
    assert path.read_text() == "mine"

    def fail(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(d4rl, "_fill", fail)
    with pytest.raises(UserError, match=r"full\.hdf5: no space left"):
        d4rl.write(tmp_path / "full.hdf5", store)
    assert [file.name for file in tmp_path.iterdir()] == ["there.hdf5"]


# Damaged files --------------------------------------------------------------------------------------------------------


def spoil(field: str, value: Any, row: Any = None) -> Arrays:
    data = with_next(rows(8, (2,), (5,)))
    if row is None:
        data[field] = value
    else:
        data[field] = data[field].astype(np.float32)
        data[field][row] = value
    return {name: array for name, array in data.items() if array is not None}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (spoil("terminals", None), "has no 'terminals' (it holds actions"),
        (spoil("rewards", None), "has no 'rewards'"),
        (spoil("actions", np.zeros((7, 1))), "'actions' have shape (7, 1) beside 8 rows"),
        (spoil("timeouts", np.zeros(9, bool)), "'timeouts' have shape (9,) beside 8 rows"),
        (spoil("observations", np.float32(3)), "'observations' have shape () beside 8 rows"),
        (spoil("rewards", np.zeros((8, 2))), "'rewards' have shape (8, 2)"),
        (spoil("rewards", np.zeros(0)), "no rows"),
        (spoil("next_observations", np.zeros((8, 3))), "'next_observations' have shape (8, 3), 'observations' (8, 2)"),
        (spoil("observations", np.zeros((8, 3, 3)), None) | {"next_observations": np.zeros((8, 3, 3))}, "not [rows,"),
        (spoil("actions", np.zeros(8)), "'actions' have shape (8,), not [rows, width]"),
        (spoil("actions", np.array([b"left"] * 8)), "'actions' hold |S4, not numbers"),
        (spoil("observations", np.nan, (4, 1)), "'observations' hold nan at row 4 (1 such"),
        (spoil("next_observations", np.nan, (6, 0)), "'next_observations' hold nan at row 6"),
        (spoil("rewards", -np.inf, 3), "'rewards' hold -inf at row 3"),
        (spoil("actions", 1.5, (4, 0)), "episode 1: action 1.5 at row 1, component 0 is outside the bounds"),
        (spoil("terminals", 2, 6), "'terminals' hold 2.0 at row 6, but a flag is 0 or 1"),
        (spoil("timeouts", 0.5, 1), "'timeouts' hold 0.5 at row 1"),
    ],
)
def test_damaged_fields_are_named(data: Arrays, words: str, tmp_path: Path) -> None:
    path = save(tmp_path / "bad.hdf5", data)
    with pytest.raises(UserError) as error:
        d4rl.trajectories(path)
    assert words in str(error.value) and str(path) in str(error.value)
    assert not list((tmp_path / "cache").rglob("*.npy")), "nothing is kept"


def test_the_readers_check_too(tmp_path: Path) -> None:
    data = rows(8, (2,), (5,))
    for read in (d4rl.qlearning_dataset, d4rl.sequence_dataset):
        with pytest.raises(UserError, match="the data: 'rewards' hold nan at row 0"):
            read(data | {"rewards": np.full(8, np.nan)})
        with pytest.raises(UserError, match="the data has no 'timeouts'"):
            read(rows(8, (2,), None))
    with pytest.raises(UserError, match=r"'infos/goal' has shape \(7,\) beside 8 rows"):
        d4rl.sequence_dataset(data | {"infos/goal": np.zeros(7)})


def test_files_that_are_not_there_or_not_hdf5_are_named(tmp_path: Path, store: Trajectories) -> None:
    (tmp_path / "text.hdf5").write_text("hello")
    for read in (d4rl.trajectories, d4rl.qlearning_dataset, d4rl.sequence_dataset):
        with pytest.raises(UserError, match=r"there is no D4RL file .*nowhere\.hdf5"):
            read(tmp_path / "nowhere.hdf5")
        with pytest.raises(UserError, match=r"there is no D4RL file"):
            read(tmp_path)
        with pytest.raises(UserError, match=r"no dataset 'hoper-medium-v2'; did you mean 'hopper-medium-v2'"):
            read("hoper-medium-v2")
        with pytest.raises(UserError, match=r"text\.hdf5 cannot be read as HDF5"):
            read(tmp_path / "text.hdf5")
    path = d4rl.write(tmp_path / "spec.hdf5", store)
    with h5py.File(path, "a") as file:
        file.attrs["offline_cai"] = "{}"
    with pytest.raises(UserError, match=r"spec\.hdf5, attribute 'offline_cai' is no spec"):
        d4rl.trajectories(path)


def test_truncated_and_scribbled_files_raise_only_user_errors(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.hdf5", with_next(rows(8, (2,), (5,)))).read_bytes()
    rng, refused = np.random.default_rng(0), 0
    for number in range(60):
        damaged = bytearray(whole)
        if number < 20:
            damaged = damaged[: int(rng.integers(len(whole)))]
        else:
            for place in rng.integers(len(whole), size=20):
                damaged[place] = int(rng.integers(256))
        path = tmp_path / f"{number}.hdf5"
        path.write_bytes(damaged)
        try:
            d4rl.trajectories(path)
        except UserError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert number >= 20, "a truncated file is never accepted"
    assert refused > 30


# Downloading ----------------------------------------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    body: bytes = b""
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path == "/missing.hdf5":
            self.send_error(404)
        elif self.path == "/moved.hdf5":
            self.send_response(302)
            self.send_header("Location", "/good.hdf5")
            self.end_headers()
        else:
            self.send_response(200)
            if self.path != "/unknown-length.hdf5":
                self.send_header("Content-Length", str(len(self.body)))
            self.end_headers()
            self.wfile.write(
                {"/broken-off.hdf5": self.body[:-100], "/page.hdf5": b"x" * len(self.body)}.get(self.path, self.body)
            )

    def log_message(self, *args: object) -> None:
        pass


def replace_table(monkeypatch: pytest.MonkeyPatch, urls: dict[str, str]) -> None:
    table = {name: Entry(url, 1000) for name, url in urls.items()}
    for module in (d4rl_download, d4rl_file):
        monkeypatch.setattr(module, "table", lambda: table)
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server of D4RL files; dataset NAME-v0 is its NAME.hdf5."""
    Handler.body, Handler.asked = save(tmp_path / "body.hdf5", rows(2500, (2,), (5,))).read_bytes(), []
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    address = f"http://127.0.0.1:{running.server_port}"
    names = ("good", "missing", "moved", "broken-off", "page", "unknown-length")
    replace_table(monkeypatch, {f"{name}-v0": f"{address}/{name}.hdf5" for name in names})
    yield address
    running.shutdown()
    running.server_close()


def cached() -> list[str]:
    return sorted(file.name for file in d4rl_download.file_of("any").parent.iterdir())


@pytest.mark.parametrize("name", ["good-v0", "moved-v0", "unknown-length-v0"])
def test_a_dataset_is_downloaded_once_and_verified_afterwards(name: str, server: str) -> None:
    file = d4rl.download(name)
    asked = len(Handler.asked)
    assert file.read_bytes() == Handler.body and file == d4rl_download.file_of(name)
    assert cached() == [f"{name}.hdf5", f"{name}.json"], "no temporary file is left"
    note = json.loads(file.with_suffix(".json").read_text())
    assert note["bytes"] == len(Handler.body) and len(note["sha256"]) == 64 and note["url"].startswith(server)
    assert d4rl.trajectories(name).num_steps == 3 + 2 + 2493
    assert len(d4rl.qlearning_dataset(name)["rewards"]) == 2498
    assert len(list(d4rl.sequence_dataset(name))) == 2
    assert len(Handler.asked) == asked


def test_reading_by_name_downloads(server: str) -> None:
    assert d4rl.trajectories("good-v0").num_steps == 2498 and Handler.asked == ["/good.hdf5"]


def test_a_cached_file_that_changed_is_refused_until_it_is_removed(server: str) -> None:
    file = d4rl.download("good-v0")
    data = bytearray(Handler.body)
    data[-1] ^= 1
    file.write_bytes(data)
    for read in (d4rl.download, d4rl.trajectories, d4rl.qlearning_dataset, d4rl.sequence_dataset):
        with pytest.raises(UserError, match=r"good-v0\.hdf5 is not the file that was downloaded .*Remove both"):
            read("good-v0")
    with pytest.raises(UserError, match="is not the file that was downloaded"):
        d4rl.trajectories(file)
    file.unlink()
    assert d4rl.download("good-v0").read_bytes() == Handler.body
    file.with_suffix(".json").write_text("{")
    with pytest.raises(UserError, match="is not the file that was downloaded"):
        d4rl.download("good-v0")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing-v0", "the server answers 404"),
        ("broken-off-v0", "broke off after"),
        ("page-v0", "is no whole HDF5 file"),
    ],
)
def test_a_failed_download_leaves_nothing_behind(name: str, words: str, server: str) -> None:
    for read in (d4rl.download, d4rl.trajectories):
        with pytest.raises(UserError, match=words) as error:
            read(name)
        assert f"{server}/{name.removesuffix('-v0')}.hdf5" in str(error.value) and "by hand" in str(error.value)
    assert cached() == []


def test_without_a_network_the_url_and_the_place_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}/a.hdf5"
    replace_table(monkeypatch, {"a-v0": url})
    with pytest.raises(UserError, match="no connection") as error:
        d4rl.download("a-v0")
    assert url in str(error.value) and str(d4rl_download.file_of("a-v0")) in str(error.value)
    assert d4rl_download.CONNECT_SECONDS <= 5


def test_connecting_is_given_little_time_and_reading_more(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def refuse(address: tuple[str, int], timeout: float, *rest: object) -> None:
        seen.append(timeout)
        raise TimeoutError("timed out")

    monkeypatch.setattr("socket.create_connection", refuse)
    replace_table(monkeypatch, {"a-v0": "http://127.0.0.1:9/a", "b-v0": "https://127.0.0.1:9/b"})
    for name in ("a-v0", "b-v0"):
        with pytest.raises(UserError, match="no connection: timed out"):
            d4rl.download(name)
    assert seen == [d4rl_download.CONNECT_SECONDS] * 2


def test_a_server_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(d4rl_download, "READ_SECONDS", 0.2)
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as silent:
        replace_table(monkeypatch, {"a-v0": f"http://127.0.0.1:{silent.server_port}/a.hdf5"})
        began = time.monotonic()
        with pytest.raises(UserError, match=r"a\.hdf5 \(.*timed out.*by hand"):
            d4rl.download("a-v0")
    assert time.monotonic() - began < d4rl_download.CONNECT_SECONDS


def test_a_file_put_there_by_hand_is_used_and_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    file = save(d4rl_download.file_of("hopper-medium-v0"), rows(2500, (), None))
    assert d4rl.trajectories("hopper-medium-v0").lengths.tolist() == [999, 999, 499]
    assert json.loads(file.with_suffix(".json").read_text())["url"].endswith("gym_mujoco/hopper_medium.hdf5")
    bad = d4rl_download.file_of("hopper-medium-v2")
    bad.write_text("hello")
    with pytest.raises(UserError, match=r"hopper-medium-v2\.hdf5 is no whole HDF5 file"):
        d4rl.trajectories("hopper-medium-v2")


@pytest.mark.parametrize(
    ("name", "url", "steps"),
    [
        ("hopper-medium-v2", "gym_mujoco_v2/hopper_medium-v2.hdf5", 1000),
        ("walker2d-medium-replay-v0", "gym_mujoco/walker_mixed.hdf5", 1000),
        ("maze2d-umaze-v1", "maze2d/maze2d-umaze-sparse-v1.hdf5", 300),
        ("maze2d-large-dense-v1", "maze2d/maze2d-large-dense-v1.hdf5", 800),
        (
            "antmaze-umaze-diverse-v0",
            "ant_maze_new/Ant_maze_u-maze_noisy_multistart_True_multigoal_True_sparse.hdf5",
            700,
        ),
        (
            "antmaze-large-play-v2",
            "ant_maze_v2/Ant_maze_hardest-maze_noisy_multistart_True_multigoal_False_sparse_fixed.hdf5",
            1000,
        ),
        ("kitchen-complete-v0", "kitchen/mini_kitchen_microwave_kettle_light_slider-v0.hdf5", 280),
        ("pen-human-v1", "hand_dapg_v1/pen-human-v1.hdf5", 100),
        ("door-cloned-v0", "hand_dapg/door-demos-v0-bc-combined.hdf5", 200),
        ("bullet-ant-medium-v0", "bullet/bullet-ant_medium.hdf5", 1000),
    ],
)
def test_the_table_is_d4rls(name: str, url: str, steps: int) -> None:
    assert d4rl_download.entry(name) == Entry(f"http://rail.eecs.berkeley.edu/datasets/offline_rl/{url}", steps)
    assert d4rl_download.name_of(Path(url).with_name(f"{name}.hdf5")) == name
    assert d4rl_download.name_of(Path("folder") / Path(url).name) == name


def test_every_dataset_with_a_reference_score_has_a_url() -> None:
    from offline_cai.data import scores

    assert set(scores.table()) <= set(d4rl_download.table())
    assert d4rl_download.name_of(Path("own.hdf5")) is None
