import shutil
from pathlib import Path

import h5py
import minari as real_minari
import numpy as np
import pytest

from offline_cai import collect
from offline_cai.data import minari
from offline_cai.data.cache import fingerprint
from offline_cai.environments.make import register
from offline_cai.errors import Notice, UserError


@pytest.fixture
def copy(dataset: str) -> tuple[str, Path]:
    """A copy of the dataset to damage; its id and its HDF5 file."""
    name = "offline-cai/pointmaze/copy-v0"
    target = minari.dataset_root() / name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(minari.dataset_root() / dataset, target)
    return name, target / "data" / "main_data.hdf5"


def test_minari_itself_loads_what_was_collected(dataset: str) -> None:
    register()
    loaded, recipe = real_minari.load_dataset(dataset), collect.load("debug-umaze")
    assert loaded.total_steps == recipe.steps
    assert loaded.spec.env_spec.id == "PointMaze_UMaze-v3"
    assert loaded.storage.metadata["ref_min_score"] == 23.85 and loaded.storage.metadata["ref_max_score"] == 161.86
    assert real_minari.get_normalized_score(loaded, np.array([161.86])) == pytest.approx(1.0)
    env = loaded.recover_environment(eval_env=True)
    obs, _ = env.reset(seed=3)
    assert obs["desired_goal"].tolist() == [-1.0, 1.0], "the protocol's exact goal"
    env.close()
    assert loaded.recover_environment().spec.kwargs["continuing_task"] is False
    ids = real_minari.list_local_datasets()
    assert dataset in ids


def test_the_store_holds_what_minari_holds(dataset: str) -> None:
    store, loaded = minari.trajectories(dataset), real_minari.load_dataset(dataset)
    assert store.num_episodes == loaded.total_episodes and store.num_steps == loaded.total_steps
    assert store.spec.dt == pytest.approx(0.01)
    for number, (ours, theirs) in enumerate(zip(store.episodes(), loaded.iterate_episodes(), strict=True)):
        assert np.allclose(ours.obs[:, 4:], theirs.observations["observation"], atol=1e-5), number
        assert np.allclose(ours.obs[:, :2], theirs.observations["achieved_goal"], atol=1e-5)
        assert np.array_equal(ours.action, theirs.actions) and np.allclose(ours.reward, theirs.rewards)
        assert ours.terminal == theirs.terminations[-1]
        assert theirs.terminations[-1] or theirs.truncations[-1], "every episode says how it ended"


def test_number_types_may_differ_between_episodes(copy: tuple[str, Path]) -> None:
    """Rewards of 0 are written as integers by some environments until one of them is a fraction."""
    with h5py.File(copy[1], "a") as file:
        whole = np.zeros(len(file["episode_0/rewards"]), dtype=np.int64)
        del file["episode_0/rewards"]
        file["episode_0"].create_dataset("rewards", data=whole)
        file["episode_1/rewards"][-1] = 0.7
    store = minari.trajectories(copy[0])
    assert store.episode(1).reward[-1] == pytest.approx(0.7) and not store.episode(0).reward.any()


def test_conversion_happens_once_and_again_when_the_files_change(dataset: str, copy: tuple[str, Path]) -> None:
    first = minari.trajectories(copy[0])
    assert minari.trajectories(copy[0]).rows.filename == first.rows.filename
    with h5py.File(copy[1], "a") as file:
        file["episode_0/rewards"][0] = 0.5
    again = minari.trajectories(copy[0])
    assert again.rows.filename != first.rows.filename and again.reward[0] == 0.5


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("observations/observation", np.nan, ["observations", "nan", "row 2"]),
        ("actions", 7.0, ["action 7", "outside the bounds"]),
        ("rewards", np.inf, ["rewards", "inf"]),
    ],
)
def test_damaged_numbers_are_named(copy: tuple[str, Path], field: str, value: float, words: list[str]) -> None:
    with h5py.File(copy[1], "a") as file:
        file[f"episode_3/{field}"][2] = value
    with pytest.raises(UserError) as error:
        minari.trajectories(copy[0])
    assert all(word in str(error.value) for word in [copy[0], str(minari.dataset_root()), "episode 3", *words])


def test_an_end_in_the_middle_is_named(copy: tuple[str, Path]) -> None:
    with h5py.File(copy[1], "a") as file:
        file["episode_1/terminations"][4] = True
    with pytest.raises(UserError, match=r"episode 1: an end is flagged at step 4"):
        minari.trajectories(copy[0])


def test_a_missing_field_and_a_truncated_file_are_named(copy: tuple[str, Path]) -> None:
    with h5py.File(copy[1], "a") as file:
        del file["episode_2/rewards"]
    with pytest.raises(UserError, match=r"copy-v0, episode 2 cannot be read .*minari delete"):
        minari.trajectories(copy[0])
    copy[1].write_bytes(copy[1].read_bytes()[: copy[1].stat().st_size // 2])
    with pytest.raises(UserError, match=r"copy-v0.* cannot be read .*minari delete"):
        minari.trajectories(copy[0])
    (copy[1].parent / "metadata.json").write_text("{")
    with pytest.raises(UserError, match=r"copy-v0.* cannot be read"):
        minari.trajectories(copy[0])


def test_a_missing_dataset_names_the_nearest_and_says_how_to_get_it(
    dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(minari, "online", lambda *args: False)
    with pytest.raises(UserError, match=r"debug-v0.*offline-cai data download .*/debog-v0.*no network"):
        minari.load("offline-cai/pointmaze/debog-v0")
    with pytest.raises(UserError, match="Collect it with `offline-cai collect pointmaze-umaze`"):
        minari.load("offline-cai/pointmaze/umaze-v0")
    with pytest.raises(UserError, match="no Minari dataset id"):
        minari.load("u maze")


def test_without_a_network_the_answer_comes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(address: tuple[str, int], timeout: float) -> None:
        asked.append((address, timeout))
        raise OSError("no route")

    monkeypatch.setattr(minari.socket, "create_connection", refuse)
    monkeypatch.setenv("MINARI_REMOTE", "gcp://bucket")
    with pytest.raises(UserError, match="no network"):
        minari.load("nobody/knows/this-v0")
    assert asked == [(("storage.googleapis.com", 443), 2.0)], "one question with a short time-out, and no retries"


@pytest.mark.parametrize("name", ["no id", "x/y2-v0 ", "a/b", "", "../x-v0", "offline-cai/pointmaze/debug-v0/sub-v0"])
def test_ids_are_checked_before_the_work(dataset: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "rollout", None)
    with pytest.raises(UserError, match=r"no Minari dataset id|would lie inside"):
        collect.collect(collect.load("debug-umaze", {"id": name}), quiet=True)


def test_a_full_disk_is_found_out_before_hdf5_meets_it(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr(minari.shutil, "disk_usage", lambda path: usage)
    flags = {"id": "offline-cai/pointmaze/full-v0", "steps": "100"}
    with pytest.raises(UserError, match=r"0 MiB left, and \d+ MiB have to be free"):
        collect.collect(collect.load("debug-umaze", flags), quiet=True)
    assert not minari.exists("offline-cai/pointmaze/full-v0")


def test_a_damaged_cache_is_made_anew(dataset: str) -> None:
    store = minari.trajectories(dataset)
    assert store.path is not None
    (store.path / "meta.json").write_text("[]")
    with pytest.warns(Notice, match="cannot open .* Delete it and convert again. That is done now"):
        assert minari.trajectories(dataset).num_steps == store.num_steps


def test_stray_files_beside_the_recipes_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "broken.yaml").write_bytes(b"\xff\xfe")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="Collect it with `offline-cai collect pointmaze-umaze`"):
        minari.load("offline-cai/pointmaze/umaze-v0")


def test_an_existing_dataset_is_not_overwritten(dataset: str) -> None:
    before = fingerprint(minari.dataset_root() / dataset)
    with pytest.raises(UserError, match="exists already"):
        collect.collect(collect.load("debug-umaze"), quiet=True)
    assert fingerprint(minari.dataset_root() / dataset) == before


def test_an_interrupted_write_leaves_nothing_behind(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(minari.MinariStorage, "new", fail)
    flags = {"id": "offline-cai/pointmaze/full-v0", "steps": "100"}
    with pytest.raises(UserError, match=r"full-v0.*no space left"):
        collect.collect(collect.load("debug-umaze", flags), quiet=True)
    assert not minari.exists("offline-cai/pointmaze/full-v0")
    assert not list(minari.dataset_root().glob(".writing-*"))
