from pathlib import Path

import h5py
import numpy as np
import pytest

from offline_cai.data import minari_hdf5
from offline_cai.data.minari_hdf5 import RawEpisode

COUNTS, HALVES = np.arange(3), np.arange(3) / 2


def read(path: Path, *written: dict[str, np.ndarray]) -> list[RawEpisode]:
    """Episodes of two steps, zeros but for what `written` says."""
    with h5py.File(path, "w") as file:
        for number, changes in enumerate(written):
            plain = {"observations/a": np.zeros(3), "observations/b": np.zeros((3, 2)), "actions": np.zeros((2, 1))}
            ends = {"terminations": np.zeros(2, dtype=bool), "truncations": np.zeros(2, dtype=bool)}
            for name, array in {**plain, "rewards": np.zeros(2), **ends, **changes}.items():
                file[f"episode_{number}/{name}"] = array
    numbers = np.arange(len(written))
    return list(minari_hdf5.episodes(path, {"observations/a": 1, "observations/b": 2}, {"actions": 1}, numbers))


@pytest.mark.parametrize("first", [np.int64, np.uint8, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("second", [np.int64, np.float16, np.float32, np.float64])
def test_numbers_are_right_whatever_types_they_have(tmp_path: Path, first: type, second: type) -> None:
    contents = [HALVES if np.dtype(kind).kind == "f" else COUNTS for kind in (first, second)]
    one, two = read(
        tmp_path / "x.hdf5",
        {"observations/a": contents[0].astype(first)},
        {"observations/a": contents[1].astype(second)},
    )
    assert one.obs[:, 0].tolist() == contents[0].tolist() and two.obs[:, 0].tolist() == contents[1].tolist()
    assert one.obs.shape == (3, 3) and not one.obs[:, 1:].any()


@pytest.mark.parametrize("kind", [bool, np.int8, np.uint8, np.int64, np.float32, np.float64])
def test_flags_are_right_whatever_type_they_have(tmp_path: Path, kind: type) -> None:
    flags = {"terminations": np.array([0, 1]).astype(kind), "truncations": np.array([1, 0]).astype(kind)}
    plain, other, again = read(tmp_path / "x.hdf5", {}, flags, {})
    assert other.terminations.dtype == bool and other.truncations.dtype == bool
    assert other.terminations.tolist() == [False, True] and other.truncations.tolist() == [True, False]
    assert not plain.terminations.any() and not again.terminations.any()


def test_a_missing_dataset_is_named(tmp_path: Path) -> None:
    read(tmp_path / "x.hdf5", {})
    (error,) = minari_hdf5.episodes(tmp_path / "x.hdf5", {"observations/none": 1}, {"actions": 1}, np.arange(1))
    assert isinstance(error, KeyError) and "none" in str(error)


def test_flags_of_other_values_are_refused(tmp_path: Path) -> None:
    for values in (np.array([0, 2]), np.array([0, 0.5])):
        (error,) = read(tmp_path / f"{values.dtype}.hdf5", {"terminations": values})
        assert isinstance(error, ValueError) and "'terminations' hold other values than 0 and 1" in str(error)


def test_numbers_of_another_kind_are_refused_in_any_episode(tmp_path: Path) -> None:
    for number in (0, 1):
        written: list[dict[str, np.ndarray]] = [{}, {}]
        written[number] = {"rewards": np.array([b"one", b"two"])}
        found = read(tmp_path / f"{number}.hdf5", *written)
        assert [isinstance(e, Exception) for e in found] == [number == 0, number == 1]


def test_episodes_are_counted(tmp_path: Path) -> None:
    read(tmp_path / "x.hdf5", {}, {}, {})
    assert minari_hdf5.count(tmp_path / "x.hdf5") == 3
