from pathlib import Path

import numpy as np
import pytest

from offline_cai.core import Box, Episode, Field, Spec
from offline_cai.data import catalogue, d4rl
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
