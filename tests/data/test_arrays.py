import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from offline_cai.core import Box, Discrete, Episode, Field, Spec
from offline_cai.data import arrays
from offline_cai.data.trajectories import Trajectories, digests
from offline_cai.errors import Notice, UserError

SPEC = Spec((Field("position", 2), Field("goal", 1)), Box((-1.0,), (1.0,)), dt=0.1)


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLINE_CAI_CACHE", str(tmp_path / "cache"))


def rows(**more: Any) -> dict[str, Any]:
    """Eight rows: one episode ends truly at row 2, one is cut at row 5, and the last is cut by the end of the data."""
    i = np.arange(8)
    return {
        "observations": np.stack([i, -i, i % 3], axis=1).astype(np.float32),
        "actions": (i / 10)[:, None].astype(np.float32),
        "rewards": 100.0 + i,
        "terminals": i == 2,
        "timeouts": i == 5,
    } | more


def first(store: Trajectories) -> list[tuple[list[float], list[float], bool]]:
    return [(e.obs[:, 0].tolist(), e.reward.tolist(), e.terminal) for e in store.episodes()]


def save(path: Path, leave_out: tuple[str, ...] = (), **more: Any) -> Path:
    bounds = {"action_low": -1.0, "action_high": 1.0}
    np.savez(path, **{name: array for name, array in (rows() | bounds | more).items() if name not in leave_out})
    return path


@pytest.mark.parametrize("make", [np.asarray, torch.as_tensor])
def test_rows_by_d4rls_names_become_episodes(make: Any) -> None:
    store = arrays.dataset({name: make(array) for name, array in rows().items()}, SPEC)
    expected = [([0, 1, 2, 2], [100, 101, 102], True), ([3, 4, 5], [103, 104], False), ([6, 7], [106], False)]
    assert first(store) == expected and store.spec == SPEC
    following = np.roll(rows()["observations"], -1, axis=0)
    following[[2, 5, 7], 0] = [70, 80, 90]
    more = rows(next_observations=make(following), log_probs=make(-np.ones(8)), **{"infos/x": np.array(["any"])})
    store = arrays.dataset(more, SPEC)
    assert [e.obs[:, 0].tolist() for e in store.episodes()] == [[0, 1, 2, 70], [3, 4, 5, 80], [6, 7, 90]]
    assert store.log_prob is not None and store.num_steps == 8


def test_a_generator_of_episodes_goes_to_a_new_folder(tmp_path: Path) -> None:
    def episodes() -> Iterator[Episode]:
        for n in (2, 3):
            yield Episode(torch.ones(n + 1, 3, requires_grad=True), torch.zeros(n, 1), torch.arange(n), n == 3)  # type: ignore[arg-type]

    store = arrays.dataset(episodes(), SPEC, tmp_path / "new")
    assert store.path == tmp_path / "new" and store.lengths.tolist() == [2, 3] and store.reward[-2] == 2
    with pytest.raises(UserError, match="new exists already"):
        arrays.dataset(episodes(), SPEC, tmp_path / "new")
    with pytest.raises(UserError, match=r"a dict, not an offline_cai\.core\.Episode"):
        arrays.dataset([{"obs": 1}], SPEC)  # type: ignore[list-item]


@pytest.mark.parametrize("action", [Box((-1.0, -2.0), (1.0, 2.0)), Discrete((3, 2), (1, 0))])
def test_a_file_gives_the_same_store_back_bit_for_bit(action: Box | Discrete, tmp_path: Path) -> None:
    rng, spec = np.random.default_rng(0), Spec(SPEC.obs, action, dt=None)
    episodes = [
        Episode(rng.normal(size=(n + 1, 3)), np.tile(action.high, (n, 1)), rng.normal(size=n), n == 4, -rng.random(n))
        for n in (4, 1, 9)
    ]
    Trajectories.write(tmp_path / "store", spec, episodes)
    path = arrays.write(tmp_path / "sub" / "own.npz", Trajectories.open(tmp_path / "store"))
    again = arrays.trajectories(path)
    assert again.path is not None and again.spec == spec
    assert digests(again.path) == digests(tmp_path / "store")
    with np.load(path, allow_pickle=False) as file:
        assert file["timeouts"].sum() == 2 and file["log_probs"].shape == (14,)


def test_actions_are_declared_and_not_guessed(tmp_path: Path) -> None:
    spec = arrays.trajectories(save(tmp_path / "a.npz", action_low=np.array([-2.0]))).spec
    assert spec == Spec((Field("observation", 3),), Box((-2.0,), (1.0,)))
    choices = save(tmp_path / "b.npz", ("action_low", "action_high"), actions=np.arange(8) % 3, action_n=3)
    assert arrays.trajectories(choices).spec.action == Discrete((3,), (0,))
    with pytest.raises(UserError, match=r"c\.npz does not say what an action may be\. Add the arrays 'action_low'"):
        arrays.trajectories(save(tmp_path / "c.npz", ("action_low",)))
    assert arrays.trajectories(save(tmp_path / "d.npz", action_low=-2.0)).spec.action.low == (-2.0,)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"leave_out": ("observations",)}, "has no 'observations'"),
        ({"leave_out": ("terminals",)}, "has no 'terminals'"),
        ({"leave_out": ("timeouts",)}, "has no 'timeouts', so nobody knows where a time limit cut"),
        ({"next_obs": np.zeros((8, 3))}, "no place for 'next_obs'; did you mean 'next_observations'"),
        ({"rewards": np.ones(7)}, "beside 7 rows of 'rewards'"),
        ({"rewards": np.array(["a"] * 8)}, "not numbers"),
        ({"observations": np.array([{}] * 8)}, "Object arrays cannot be loaded"),
        ({"observations": np.zeros((8, 4, 4))}, "flatten each row"),
        ({"observations": np.full((8, 3), np.nan)}, "hold nan"),
        ({"actions": np.full((8, 1), 2.0)}, "outside the bounds"),
        ({"terminals": np.arange(8)}, "a flag is 0 or 1"),
        ({"log_probs": np.ones((8, 2))}, "'log_probs' have to be one finite fraction per row"),
        ({"action_low": np.ones(1)}, r"action_low, action_high do not say .* bounds \[1.0, 1.0\]"),
        ({"action_low": -np.ones(3)}, "do not say what an action may be"),
        ({"spec": "{"}, "'spec' is no spec"),
        (
            {"spec": '{"obs": [["a", 3], ["a", 3]], "action": {"low": [-1], "high": [1]}, "dt": null}'},
            "name of its own",
        ),
        ({"spec": '{"obs": [["a", 5]], "action": {"low": [-1], "high": [1]}, "dt": null}'}, "spec says width 5"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = save(tmp_path / "bad.npz", **change)
    with pytest.raises(UserError, match=words) as error:
        arrays.trajectories(path)
    assert "bad.npz" in str(error.value)


def test_what_is_no_file_of_arrays_is_named(tmp_path: Path) -> None:
    good = save(tmp_path / "good.npz").read_bytes()
    for name, content in {"text": b"hello", "empty": b"", "half": good[: len(good) // 2]}.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}\.npz is no \.npz"):
            arrays.trajectories(tmp_path / f"{name}.npz")
    for missing in (tmp_path / "nowhere.npz", tmp_path):
        with pytest.raises(UserError, match="there is no file"):
            arrays.trajectories(missing)
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive, archive.open("rewards.npy", "w") as member:
        np.lib.format.write_array_header_2_0(member, {"descr": "<f8", "fortran_order": False, "shape": (1 << 60,)})
    with pytest.raises(UserError, match=r"huge\.npz cannot be read"):
        arrays.trajectories(tmp_path / "huge.npz")


def test_repair_leaves_damaged_episodes_out(tmp_path: Path) -> None:
    observations = rows()["observations"]
    observations[4] = np.nan
    path = save(tmp_path / "bad.npz", observations=observations)
    with pytest.raises(UserError, match=r"episode 1: 'observations' hold nan at row 4"):
        arrays.trajectories(path)
    with pytest.warns(Notice, match="1 damaged"):
        repaired = arrays.trajectories(path, repair=True)
    assert repaired.lengths.tolist() == [3, 1] and len(repaired.info["dropped"]) == 1


def test_a_write_that_fails_leaves_nothing(
    store: Trajectories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(arrays, "_write_array", fail)
    with pytest.raises(UserError, match=r"cannot write the file .*own\.npz: no space left"):
        arrays.write(tmp_path / "own.npz", store)
    assert not list(tmp_path.iterdir())
    (tmp_path / "own.npz").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        arrays.write(tmp_path / "own.npz", store)


def test_files_of_one_name_in_two_folders_are_two_datasets(tmp_path: Path) -> None:
    """Copies that keep their times, or files made within a second and unpacked from an archive."""
    import os

    for folder, reward in (("a", 1.0), ("b", 2.0)):
        (tmp_path / folder).mkdir()
        path = save(tmp_path / folder / "data.npz", rewards=np.full(8, reward))
        os.utime(path, (1, 1))
    assert arrays.trajectories(tmp_path / "a" / "data.npz").reward[0] == 1
    assert arrays.trajectories(tmp_path / "b" / "data.npz").reward[0] == 2
