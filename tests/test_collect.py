"""Collections: recipes, mixtures, and what is left of one that was stopped."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import minari as real_minari
import numpy as np
import pytest

from offline_cai import behaviours, cli, collect, commands, config
from offline_cai.core import Discrete, Episode
from offline_cai.data import minari
from offline_cai.environments.make import make, register
from offline_cai.environments.maze2d import Maze
from offline_cai.errors import Interrupted, UserError
from offline_cai.evaluation.evaluate import protocol
from offline_cai.training import experiment
from offline_cai.training.gathered import gathered

HOPPER = {"steps": "480", "environments": "2", "parts": "2"}


def episodes(dataset_id: str) -> list[Episode]:
    return list(minari.trajectories(dataset_id).episodes())


def same(one: list[Episode], other: list[Episode]) -> bool:
    return len(one) == len(other) and all(
        np.array_equal(a.obs, b.obs)
        and np.array_equal(a.action, b.action)
        and np.array_equal(a.reward, b.reward)
        and a.terminal == b.terminal
        for a, b in zip(one, other, strict=True)
    )


def counted(monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[int]:
    """The seeds of the rollouts that run from now on; Ctrl-C in the middle of number `stop_at`."""
    ran: list[int] = []
    original = collect.rollout

    def rollout(envs: Any, spec: Any, policy: Any, seed: int, **share: Any) -> list[Episode]:
        if len(ran) == stop_at:
            original(envs, spec, policy, seed, steps=30)
            raise KeyboardInterrupt
        ran.append(seed)
        return original(envs, spec, policy, seed, **share)

    monkeypatch.setattr(collect, "rollout", rollout)
    return ran


@pytest.mark.parametrize("name", config.names("datasets"))
def test_shipped_recipes_are_whole(name: str) -> None:
    recipe = collect.load(name)
    assert recipe.environment == protocol(recipe.protocol).environment
    assert collect.recipe_of(recipe.id) == recipe
    assert sum(p.steps for p in collect.parts(recipe)) * recipe.environments == (recipe.steps or 0)
    for _, behaviour in recipe.behaviours:
        if not isinstance(behaviour, behaviours.FromRun | behaviours.Replayed):
            assert behaviour.name and (behaviour.digest is None or len(behaviour.digest) == 64)
    env = make(recipe.environment, recipe.kwargs)
    assert env.spec is not None and recipe.kwargs.get("max_episode_steps", 1000) == env.spec.max_episode_steps
    assert recipe.kwargs.get("continuing_task", False) is False
    env.close()


@pytest.mark.parametrize(
    ("name", "walls", "goal", "limit"),
    [
        ("umaze", "##### #GOO# ###O# #OOO# #####", (1, 1), 300),
        ("open", "####### #OOOOO# #OOGOO# #OOOOO# #######", (2, 3), 150),
        ("medium", "######## #OO##OO# #OO#OOO# ##OOO### #OO#OOO# #O#OO#O# #OOO#OG# ########", (6, 6), 600),
        (
            "large",
            "############ #OOOO#OOOOO# #O##O#O#O#O# #OOOOOO#OOO# #O####O###O# #OO#O#OOOOO# ##O#O#O#O### #OO#OOO#OGO# "
            "############",
            (7, 9),
            800,
        ),
    ],
)
def test_maze_protocols_are_d4rl_s(name: str, walls: str, goal: tuple[int, int], limit: int) -> None:
    """D4RL's maps, d4rl/pointmaze/maze_model.py, and its numbers of steps, d4rl/pointmaze/__init__.py."""
    env = protocol(f"maze2d-{name}").make()
    rows = walls.split()
    assert rows[goal[0]][goal[1]] == "G"
    assert np.array_equal(Maze.of(env).walls, [[cell == "#" for cell in row] for row in rows])
    assert env.get_wrapper_attr("goal_cell") == goal
    assert env.spec is not None and env.spec.max_episode_steps == limit
    env.close()


def test_a_mixture_is_one_behaviour_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = collect.load("hopper-medium-expert", {**HOPPER, "id": "test/mixture-v0"})
    collect.collect(recipe, quiet=True)
    store, names = minari.trajectories(recipe.id), ["hopper-medium", "hopper-expert"]
    assert store.num_steps == 480
    both = episodes(recipe.id)
    ends = np.cumsum([len(e.reward) for e in both])
    assert 240 in ends, "half of the steps each"
    half = int(np.flatnonzero(ends == 240)[0]) + 1
    for file, own in zip(names, (both[:half], both[half:]), strict=True):
        actor = behaviours.FromFile(f"{file}.npz", mode="deterministic").policy(None, store.spec, 0)  # type: ignore[arg-type]
        error = [np.mean(np.abs(actor.act(e.obs[:-1])[0] - e.action)) for e in own]
        other = behaviours.FromFile(f"{names[1 - names.index(file)]}.npz", "deterministic")
        swapped = other.policy(None, store.spec, 0)  # type: ignore[arg-type]
        wrong = [np.mean(np.abs(swapped.act(e.obs[:-1])[0] - e.action)) for e in own]
        assert np.mean(error) < np.mean(wrong), f"{file} acted in its half"
    starts = np.array([e.obs[0] for e in both])
    assert len(np.unique(starts, axis=0)) == len(starts), "no part repeats another"
    register()
    loaded = real_minari.load_dataset(recipe.id)
    assert (
        loaded.storage.metadata["algorithm_name"] == "actor hopper-medium, stochastic; actor hopper-expert, stochastic"
    )
    assert loaded.storage.metadata["ref_max_score"] == 3234.3


@pytest.mark.parametrize("name", ["debug-umaze", "hopper-medium-expert"])
def test_a_collection_that_was_stopped_goes_on_and_gives_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {**HOPPER, "parts": "2" if name.startswith("hopper") else "4", "steps": "480"}
    whole = collect.load(name, {**flags, "id": f"test/{name}-whole-v0"})
    parted = dataclasses.replace(whole, id=f"test/{name}-parted-v0")
    collect.collect(whole, quiet=True)
    with monkeypatch.context() as patch:
        counted(patch, stop_at=3)
        with pytest.raises(Interrupted, match=r"3 of 4 parts of .* The same command goes on from there"):
            collect.collect(parted, quiet=True)
    assert not minari.exists(parted.id)
    kept = sorted(path.name for path in collect.work_folder(parted).iterdir())
    assert kept == ["part-0000.npz", "part-0001.npz", "part-0002.npz"]
    damaged = collect.work_folder(parted) / "part-0001.npz"
    damaged.write_bytes(damaged.read_bytes()[:-200])
    with monkeypatch.context() as patch:
        ran = counted(patch)
        collect.collect(parted, quiet=True)
    assert ran == [collect.parts(parted)[i].seed for i in (1, 3)], "only what was missing or damaged"
    assert same(episodes(parted.id), episodes(whole.id))
    assert not list(minari.dataset_root().glob(".collecting-*parted*"))
    other = dataclasses.replace(whole, id=f"test/{name}-other-v0", seed=1)
    collect.collect(other, quiet=True)
    assert not same(episodes(other.id), episodes(whole.id))


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_the_command_line_goes_on_after_a_kill_and_after_ctrl_c(
    how: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"steps": "8000", "parts": "20", "id": f"test/stopped-{how.value}-v0"}
    recipe = collect.load("debug-umaze", flags)
    folder = collect.work_folder(recipe)
    command = [sys.executable, "-m", "offline_cai", "collect", "debug-umaze"]
    command += [word for name, value in flags.items() for word in (f"--{name}", value)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(list(folder.glob("part-*.npz"))) >= 2, process)
    os.kill(process.pid, how)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == (-9 if how == signal.SIGKILL else 130)
    if how == signal.SIGINT:
        assert re.search(r"interrupted: \d+ of 20 parts of .* are finished and kept in .*goes on from there", error)
    kept = len(list(folder.glob("part-*.npz")))
    assert 2 <= kept < 20 and not minari.exists(recipe.id)
    assert cli.main(command[3:]) == 0
    assert f"going on with {kept * 400} of 8000 steps" in capsys.readouterr().out
    undisturbed = dataclasses.replace(recipe, id="test/undisturbed-v0")
    if not minari.exists(undisturbed.id):
        collect.collect(undisturbed, quiet=True)
    assert same(episodes(recipe.id), episodes(undisturbed.id))


def test_parts_of_other_settings_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = collect.load("debug-umaze", {"steps": "400", "parts": "2", "id": "test/settings-v0"})
    folders = {collect.work_folder(recipe)}
    for change in ({"seed": 1}, {"behaviour": {"noise": 0.1}}, {"parts": 4}):
        folders.add(collect.work_folder(dataclasses.replace(recipe, **change)))  # type: ignore[arg-type]
    monkeypatch.setattr(collect.provenance, "versions", lambda: {"mujoco": "0"})
    folders.add(collect.work_folder(recipe))
    assert len(folders) == 5


def test_the_fingerprint_follows_the_actor_s_file(tmp_path: Path) -> None:
    path = tmp_path / "actor.npz"
    shutil.copy(config.find("hopper-medium", "datasets/actors"), path)
    recipe = collect.load("hopper-medium", {"behaviour.file": str(path)})
    before = recipe.fingerprint
    shutil.copy(config.find("hopper-expert", "datasets/actors"), path)
    assert recipe.fingerprint != before


def test_a_recipe_of_before_there_were_parts_keeps_its_fingerprint() -> None:
    """Datasets that were collected then are still taken for this recipe's."""
    assert collect.load("pointmaze-umaze").fingerprint == "b56c46408798a6c8"


def test_a_run_of_this_package_collects(run: Path, dataset: str) -> None:
    flags = {"behaviour": f"{{policy: checkpoint, run: {run}, gaussian: 0.1}}", "steps": "200", "id": "test/run-v0"}
    recipe = collect.load("debug-umaze", flags)
    collect.collect(recipe, quiet=True)
    assert minari.trajectories(recipe.id).num_steps == 200
    register()
    about = real_minari.load_dataset(recipe.id).storage.metadata["algorithm_name"]
    assert about == f"policy of the run {run}, gaussian 0.1"
    wrong = collect.load("antmaze-umaze", {"behaviour.run": str(run), "id": "test/ant-v0"})
    with pytest.raises(UserError, match=r"was trained for observations .* but the environment has .*achieved_goal: 2"):
        collect.collect(wrong, quiet=True)


def test_antmaze_needs_a_run() -> None:
    with pytest.raises(UserError, match=r"say which one acts with --behaviour\.run RUN"):
        collect.collect(collect.load("antmaze-umaze"), quiet=True)
    with pytest.raises(UserError, match="nowhere holds no checkpoint"):
        collect.collect(collect.load("antmaze-umaze", {"behaviour.run": "nowhere"}), quiet=True)


PENDULUM = {"environment": "Pendulum-v1", "protocol": "pendulum", "id": "test/pendulum/of-a-recipe-v0"}


def test_what_an_online_run_gathered_becomes_a_dataset(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"an online run, and names none: say which one with --behaviour\.run"):
        collect.collect(collect.load("hopper-medium-replay"), quiet=True)
    with pytest.raises(UserError, match="gathered no replay"):
        collect.collect(collect.load("hopper-medium-replay", {"behaviour.run": str(run)}), quiet=True)
    online = commands.train(experiment.load("debug-sac"), tmp_path / "sac", quiet=True)
    with pytest.raises(UserError, match=r"gathered in Pendulum-v1, {}, but the recipe is for Hopper-v5"):
        collect.collect(collect.load("hopper-medium-replay", {"behaviour.run": str(online)}), quiet=True)
    recipe = collect.load("hopper-medium-replay", {**PENDULUM, "behaviour.run": str(online)})
    collect.collect(recipe, quiet=True)
    assert same(episodes(recipe.id), gathered(online).episodes) and minari.trajectories(recipe.id).num_steps == 80
    there = minari.load(recipe.id)
    note = minari.metadata(there)
    assert collect.collected(recipe) and note["experiment"]["algorithm"] == "sac" and note["step"] == 20
    assert there.spec.env_spec.id == "Pendulum-v1"
    assert there.storage.metadata["algorithm_name"] == f"all policies on the way of the run {online}"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"behaviour": "{policy: maze-controler}"}, r"no policy 'maze-controler'; did you mean 'maze-controller'"),
        ({"behaviour": "{policy: actor}"}, r"the key 'file' is missing"),
        ({"behaviour": "{policy: actor, file: x, mod: y}"}, r"unknown key 'mod'; did you mean 'mode'"),
        ({"behaviour": "{policy: actor, file: x, mode: y}"}, r"'y' is not a choice"),
        ({"behaviour": "[{policy: random}, {policy: random}]"}, r"shares of the behaviours are \[1.0, 1.0\]"),
        ({"behaviour": "[{policy: random, share: half}, {share: 0.5}]"}, r"behaviour\[0\]: share is 'half'"),
        ({"behaviour": "[]"}, r"they have to sum to 1"),
        (
            {"behaviour": "[{policy: random, share: 0.3}, {share: 0.7}]", "steps": "202"},
            r"multiple of environments × parts .* and 0.3 of it",
        ),
        ({"parts": "0"}, r"positive multiple of environments × parts"),
        ({"steps": "null"}, r"steps is None; it has to be null for a replay, and a number where somebody acts"),
        ({"behaviour": "{policy: replay}"}, r"steps is 4000; it has to be null for a replay"),
        ({"behaviour": "[{policy: replay, share: 0.5}, {share: 0.5}]"}, r"a replay is .* no part of a mixture"),
    ],
)
def test_mistakes_in_a_behaviour_are_found_at_once(flags: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        collect.load("debug-umaze", flags)


def test_an_actor_that_is_not_there_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'hopper-medium'"):
        collect.collect(
            collect.load("hopper-medium", {"behaviour.file": "hoper-medium", "id": "test/x-v0"}), quiet=True
        )


def test_the_controller_of_a_dataset_is_read_from_its_metadata(dataset: str) -> None:
    note = minari.metadata(minari.load(dataset))
    assert collect.controller_arguments(note) == {"kp": 10.0, "kd": 1.0, "noise": 0.5, "jitter": 0.1, "switch": 0.1}
    mixture = json.loads('[{"share": 0.5, "policy": "random"}, {"share": 0.5, "noise": 0.2}]')
    assert collect.controller_arguments({"recipe": {"behaviour": mixture}})["noise"] == 0.2
    assert collect.controller_arguments({"recipe": {"behaviour": {"policy": "random"}}}) == {}
    assert collect.controller_arguments({})["noise"] == 0.5


def test_choices_are_collected_and_a_protocol_may_be_missing() -> None:
    recipe = collect.Recipe(
        id="tests/frozenlake/random-v0",
        description="Random walks on a grid.",
        environment="FrozenLake-v1",
        licence="CC0-1.0",
        behaviour={"policy": "random"},
        steps=60,
        environments=2,
    )
    collect.collect(recipe, quiet=True)
    store = minari.trajectories(recipe.id)
    assert store.spec.action == Discrete((4,), (0,)) and store.spec.obs_width == 16
    assert set(np.unique(store.action)) == {0, 1, 2, 3}
    assert (store.obs.sum(axis=1) == 1).all() and (store.obs[store.offsets[:-1], 0] == 1).all(), "one-hot, from cell 0"
    assert real_minari.load_dataset(recipe.id).storage.metadata.get("ref_min_score") is None
