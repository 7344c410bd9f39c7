"""`offline-cai data`: each command as people see it and as programs read it, and its mistakes."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from offline_cai import cli, commands
from offline_cai.core import Box, Field, Spec
from offline_cai.data import arrays, catalogue, d4rl, minari
from offline_cai.data.trajectories import Trajectories
from offline_cai.environments.rollout import episode_seeds
from offline_cai.training import experiment


@pytest.fixture
def own(store: Trajectories, tmp_path: Path) -> str:
    """A file of own arrays: the three episodes of the common store."""
    return str(arrays.write(tmp_path / "own.npz", store))


def facts(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.main(["data", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def text(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["data", *arguments]) == 0
    return capsys.readouterr().out


def test_list(dataset: str, store: Trajectories, capsys: pytest.CaptureFixture[str]) -> None:
    file = catalogue.d4rl_download.file_of("hopper-medium-v0")
    file.parent.mkdir(parents=True, exist_ok=True)
    d4rl.write(file, store)
    try:
        lines = {line.split()[0]: line.split() for line in text(capsys, "list").splitlines()}
        episodes = str(minari.load(dataset).total_episodes)
        assert lines[dataset][1:] == ["minari", episodes, "4000", str(minari.dataset_root() / dataset)]
        assert lines["offline-cai/hopper/medium-v0"][1:] == ["recipe", *["offline-cai", "collect", "hopper-medium"]]
        assert lines["hopper-medium-v0"][1:] == ["d4rl", str(file)]
        assert facts(capsys, "list")[dataset]["steps"] == 4000
    finally:
        file.unlink()


def test_show_and_stats(own: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shown = text(capsys, "show", own, "--picture", str(tmp_path / "x.png"))
    assert (
        "true end 2 · cut by time 1" in shown and "of cells 32 x 32 · over achieved_goal[0] achieved_goal[1]" in shown
    )
    assert (tmp_path / "x.png").stat().st_size > 5000
    found = facts(capsys, "show", own)
    assert (found["steps"], found["duplicated episodes"], found["length"]["highest"]) == (18, 0, 12)
    assert "no score" in text(capsys, "stats", own)
    assert facts(capsys, "stats", own)["columns"]["reward"]["lowest"] < 0


def test_convert_validate_and_back(own: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    converted = facts(capsys, "convert", own)
    assert Path(converted["written to"]).is_dir() and (converted["episodes"], converted["steps"]) == (3, 18)
    assert converted["seconds"] >= 0 and "dropped" not in converted
    target = str(tmp_path / "own.hdf5")
    assert facts(capsys, "convert", own, "--to", target)["written to"] == target
    assert facts(capsys, "validate", target) == {
        "dataset": target,
        "valid": True,
        "episodes": 3,
        "steps": 18,
        "warnings": [],
    }
    assert np.array_equal(catalogue.trajectories(target).rows, catalogue.trajectories(own).rows)


def test_repair_says_which_episodes_it_drops(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    spec = Spec((Field("observation", 1),), Box((-1.0,), (1.0,)))
    flags = {"terminals": np.zeros(6), "timeouts": np.arange(6) % 3 == 2}
    rewards = np.array([0, 1, 2, 3, np.inf, 5])
    data = {"observations": np.arange(6.0), "actions": np.zeros(6), "rewards": rewards, **flags}
    np.savez(tmp_path / "bad.npz", spec=json.dumps(spec.to_json()), **data)  # type: ignore[arg-type]
    bad, good = str(tmp_path / "bad.npz"), str(tmp_path / "good.npz")
    assert cli.main(["data", "convert", bad, "--to", good]) == 2
    assert "episode 1: 'rewards' hold inf at row 4" in capsys.readouterr().err and not Path(good).exists()
    assert cli.main(["data", "convert", bad, "--to", good, "--repair"]) == 0
    assert "dropped" in capsys.readouterr().out
    assert facts(capsys, "validate", good)["episodes"] == 1
    assert "rewards" in facts(capsys, "convert", bad, "--repair")["dropped"][0]


def test_a_run_s_replay_becomes_a_dataset(
    dataset: str, run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """All that it gathered, with the environment that it gathered in: what algorithms that learn offline then read."""
    online = commands.train(experiment.load("debug-sac"), tmp_path / "sac", quiet=True)
    id_ = "test/pendulum/medium-replay-v0"
    assert facts(capsys, "convert", str(online), "--to", id_)["steps"] == 2 * 40
    store, there = catalogue.trajectories(id_), minari.load(id_)
    assert (store.num_steps, store.num_episodes) == (80, 2) and not store.terminal.any()
    assert there.spec.env_spec.id == "Pendulum-v1" and minari.metadata(there)["experiment"]["algorithm"] == "sac"
    with closing(gym.make("Pendulum-v1")) as env:  # the first episode is what its seed and its actions make
        first, _ = env.reset(seed=episode_seeds(0, [0], 0)[0])
        states = np.array([first] + [env.step(action)[0] for action in store.episode(0).action])
    assert np.allclose(states, store.episode(0).obs, atol=1e-6)
    target = str(tmp_path / "replay.npz")
    assert facts(capsys, "convert", str(online), "--to", target)["steps"] == 80
    assert cli.main(["data", "convert", str(online)]) == 2
    assert "name the dataset that its replay becomes with --to" in capsys.readouterr().err
    assert cli.main(["data", "convert", str(run), "--to", "test/other-v0"]) == 2
    assert "gathered no replay" in capsys.readouterr().err


def test_download_converts_what_it_fetched(
    own: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "download", lambda name, quiet: {"far/maze/one-v0": own}[name])
    assert facts(capsys, "download", "far/maze/one-v0")["steps"] == 18


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["shw"], "invalid choice: 'shw'"),
        ([], "arguments are required: ACTION"),
        (["show"], "arguments are required: NAME; see `offline-cai data show --help`"),
        (["list", "x"], "unrecognized arguments: x"),
        (["list", "--picture", "x"], "unrecognized arguments"),
        (["show", "OWN", "--picture", "OWN"], "exists already and is not overwritten"),
        (["show", "OWN", "--picture", "/nowhere/x.png"], "cannot draw to /nowhere/x.png"),
        (["show", "OWN", "--picture", "new.hello"], "cannot draw to new.hello"),
        (["convert", "OWN", "--to", "OWN"], "exists already"),
        (["convert", "OWN", "--to", "out.csv"], "'out.csv' is no Minari dataset id"),
        (["convert", "OWN", "--to", "OWN/below.npz"], "cannot write the file"),
        (["convert", "OWN", "--to", "OWN/below.hdf5"], "cannot write the D4RL file"),
        (["stats", "nobody/has/this-v0"], "downloaded with `offline-cai data download nobody/has/this-v0`"),
        (["download", "nobody/has/this-v0"], "there is no network here"),
        (["validate", "nowhere.npz"], "there is no file nowhere.npz"),
        (["validate", "nowhere.hdf5"], "there is no D4RL file nowhere.hdf5"),
    ],
)
def test_mistakes_are_one_sentence_and_status_2(
    arguments: list[str],
    words: str,
    own: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(minari, "online", lambda *args: False)
    assert cli.main(["data", *(word.replace("OWN", own) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error
