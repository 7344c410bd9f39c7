from pathlib import Path

import numpy as np
import pytest

from offline_cai.core import Box, Discrete, Episode, Field, Spec
from offline_cai.data import catalogue, d4rl, minari
from offline_cai.data.describe import describe, duplicates, picture, table
from offline_cai.data.trajectories import Trajectories
from offline_cai.errors import UserError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A D4RL file of two episodes."""
    spec, rng = Spec((Field("observation", 3),), Box((-1.0,), (1.0,))), np.random.default_rng(0)
    episodes = [
        Episode(rng.normal(size=(n + 1, 3)), rng.uniform(-1, 1, (n, 1)), np.ones(n), terminal)
        for n, terminal in [(4, True), (6, False)]
    ]
    d4rl.write(tmp_path / "mine.hdf5", Trajectories.from_episodes(spec, episodes))
    return tmp_path / "mine.hdf5"


def test_one_name_reaches_every_kind(dataset: str, file: Path) -> None:
    assert catalogue.trajectories(dataset).num_steps == 4000
    assert catalogue.trajectories(str(file)).lengths.tolist() == [4, 6]
    assert catalogue.note(dataset)["recipe"]["id"] == dataset and catalogue.note(str(file)) == {}
    found = catalogue.environment(dataset)
    assert found is not None and found[0] == "PointMaze_UMaze-v3" and catalogue.environment(str(file)) is None
    assert catalogue.kind("hopper-medium-v2") == "d4rl" and catalogue.kind(dataset) == "minari"


def test_validation_reads_the_source_and_the_store_again(dataset: str, file: Path) -> None:
    assert catalogue.validate(dataset).num_steps == 4000
    store = catalogue.trajectories(str(file))
    assert store.path is not None
    data = bytearray((store.path / "rows.bin").read_bytes())
    data[5] ^= 1
    (store.path / "rows.bin").write_bytes(data)
    with pytest.raises(UserError, match=r"rows\.bin differs from what was written"):
        catalogue.validate(str(file))


def test_a_description_counts_what_is_inside(store: Trajectories, spec: Spec, tmp_path: Path) -> None:
    twice = Trajectories.from_episodes(spec, [*store.episodes(), store.episode(1)])
    facts = describe(twice)
    assert (facts["episodes"], facts["steps"], facts["duplicated episodes"]) == (4, 19, 1)
    assert facts["ends"] == {"true end": 3, "cut by time": 1}
    assert facts["length"] == {"lowest": 1, "median": 3, "mean": 19 / 4, "highest": 12}
    steps = twice.obs[twice.step_rows()]
    assert np.allclose(facts["observation"]["observation"]["high"], steps[:, 4:].max(0))
    assert facts["share of actions at a bound"] == [0, 0] and duplicates(store) == 0
    text = table(facts)
    assert "true end 3 · cut by time 1" in text and "desired_goal" in text
    picture(twice, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000


# From one format to another -------------------------------------------------------------------------------------------


@pytest.fixture
def logged(tmp_path: Path) -> Trajectories:
    """Three episodes with log-probabilities, and fields in an order that is not Minari's."""
    spec = Spec((Field("position", 3), Field("goal/x", 1)), Box((-1.0, -0.5), (1.0, 0.5)))
    rng = np.random.default_rng(0)
    episodes = [
        Episode(rng.normal(size=(n + 1, 4)), rng.uniform(-0.5, 0.5, (n, 2)), np.ones(n), end, -rng.random(n))
        for n, end in [(4, True), (6, False), (1, True)]
    ]
    return Trajectories.from_episodes(spec, episodes)


def test_any_store_goes_to_every_format_and_back(logged: Trajectories, tmp_path: Path) -> None:
    for target in (f"{tmp_path}/a.hdf5", f"{tmp_path}/a.npz", "formats/all/a-v0"):
        where = catalogue.write(target, logged)
        assert where.exists()
        again = catalogue.trajectories(target)
        columns = logged.spec.columns(*(field.name for field in again.spec.obs))
        assert np.array_equal(again.obs, logged.obs[:, columns]) and again.spec.action == logged.spec.action
        assert np.array_equal(again.rows[:, 4:], logged.rows[:, 4:]), "actions, rewards and log-probabilities"
        assert np.array_equal(again.offsets, logged.offsets) and np.array_equal(again.terminal, logged.terminal)
        assert columns == ([3, 0, 1, 2] if catalogue.kind(target) == "minari" else [0, 1, 2, 3]), "in Minari's order"
        with pytest.raises(UserError, match="exists already"):
            catalogue.check_target(target)


def test_choices_go_to_every_format_and_back(tmp_path: Path) -> None:
    for number, action in enumerate([Discrete((3,), (1,)), Discrete((2, 4), (0, 0))]):
        spec = Spec((Field("observation", 2),), action)
        episode = Episode(np.zeros((3, 2)), np.tile(action.high, (2, 1)), np.ones(2), True)
        store = Trajectories.from_episodes(spec, [episode])
        for target in (f"{tmp_path}/{number}.hdf5", f"{tmp_path}/{number}.npz", f"formats/choices/a-v{number}"):
            catalogue.write(target, store)
            again = catalogue.trajectories(target)
            assert again.spec == spec and np.array_equal(again.rows, store.rows), target


def test_a_minari_dataset_made_of_another_keeps_what_that_one_says(dataset: str) -> None:
    target = "formats/kept/debug-v0"
    catalogue.write(target, catalogue.trajectories(dataset), dataset)
    before, after = minari.load(dataset), minari.load(target)
    assert after.spec.env_spec == before.spec.env_spec and after.observation_space == before.observation_space
    assert after.recover_environment(eval_env=True).spec.max_episode_steps == 40
    assert catalogue.reference(target) == catalogue.reference(dataset) == (23.85, 161.86)
    assert after.storage.metadata["author"] == {"offline_cai"} and after.total_steps == 4000
    assert catalogue.note(target)["recipe"] == catalogue.note(dataset)["recipe"]
    assert "fingerprint" not in catalogue.note(target), "it is not what the recipe collects"
    assert np.array_equal(catalogue.trajectories(target).rows, catalogue.trajectories(dataset).rows)


def test_references_are_the_datasets_or_d4rls_or_none(
    store: Trajectories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    d4rl.write(tmp_path / "hopper-medium-v2.hdf5", store)
    assert catalogue.reference(str(tmp_path / "hopper-medium-v2.hdf5")) == (-20.272305, 3234.3)
    catalogue.write("formats/none/a-v0", store)
    for name in (d4rl.write(tmp_path / "own.hdf5", store), tmp_path / "own.npz", "formats/none/a-v0"):
        assert catalogue.reference(str(name)) is None


def test_targets_are_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'hopper-medium-v2' is D4RL's own name"):
        catalogue.check_target("hopper-medium-v2")
    for wrong in ("out.csv", "folder/", "", str(tmp_path)):
        with pytest.raises(UserError, match=r"no Minari dataset id: .*end in \.hdf5 or \.npz"):
            catalogue.check_target(wrong)


def test_coverage_is_the_share_of_cells_with_a_step() -> None:
    spec = Spec((Field("observation", 3),), Box((-1.0,), (1.0,)))
    corners = np.array([[0, 0, 5], [32, 0, 7], [0, 32, 9], [32, 32, 1], [0.5, 0.9, 1]], dtype=float)
    store = Trajectories.from_episodes(spec, [Episode(corners, np.zeros((4, 1)), np.zeros(4), True)])
    coverage = describe(store)["coverage"]
    assert coverage["share"] == 4 / 1024 and coverage["over"] == ["observation[0]", "observation[1]"]
    line = Spec((Field("x", 1),), Box((-1.0,), (1.0,)))
    still = Trajectories.from_episodes(line, [Episode(np.ones((5, 1)), np.zeros((4, 1)), np.zeros(4), True)])
    assert describe(still)["coverage"] == {"share": 1 / 32, "of cells": "32", "over": ["x"]}


def test_metadata_that_minari_does_not_take_are_named(dataset: str) -> None:
    store, like = catalogue.trajectories(dataset), minari.origin(minari.load(dataset))
    with pytest.raises(UserError, match=r"does not take these metadata: .*'algorithm_name': 7"):
        minari.write("formats/odd/a-v0", store.spec, store.episodes(), **(like | {"algorithm_name": 7}))
    assert not minari.exists("formats/odd/a-v0")
