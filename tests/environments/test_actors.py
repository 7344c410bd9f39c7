from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from offline_cai import config
from offline_cai.core import Box, Field, Spec
from offline_cai.environments.actors import Actor
from offline_cai.environments.make import env_spec, make
from offline_cai.environments.rollout import rollout
from offline_cai.environments.vector import Environments
from offline_cai.errors import UserError

SPEC = Spec((Field("observation", 3),), Box((-1.0, -2.0), (1.0, 2.0)))


def arrays(squash: int = 1, relu: int = 0, seed: int = 0, **more: Any) -> dict[str, np.ndarray]:
    """An actor of one hidden layer of width 4, for observations of width 3 and actions of width 2."""
    rng = np.random.default_rng(seed)
    layers = {"W0": (4, 3), "b0": (4,), "W1": (2, 4), "b1": (2,)}
    data = {name: rng.normal(size=shape).astype(np.float32) for name, shape in layers.items()}
    data |= {"relu": np.int8(relu), "squash": np.int8(squash), "log_std": np.array([-0.5, 0.2], dtype=np.float32)}
    return {**data, **more}


def write(path: Path, data: dict[str, Any]) -> Path:
    np.savez(path, **{name: value for name, value in data.items() if value is not None})
    return path


def act(path: Path, obs: np.ndarray, mode: Any = "deterministic", seed: int = 0) -> tuple[np.ndarray, Any]:
    return Actor(path, SPEC, seed, mode).act(obs)


@pytest.mark.parametrize(("relu", "squash", "normalised"), [(1, 1, False), (0, 0, True)])
def test_the_mean_is_the_network_s(tmp_path: Path, relu: int, squash: int, normalised: bool) -> None:
    statistics = {"obs_mean": np.full(3, 0.5), "obs_std": np.full(3, 2.0), "obs_clip": np.float64(0.4)}
    data = arrays(squash, relu, **(statistics if normalised else {}))
    obs = np.random.default_rng(1).normal(size=(5, 3)) * 2
    expected = []
    for x in obs:
        x = np.clip((x - 0.5) / 2.0, -0.4, 0.4) if normalised else x
        hidden = data["W0"] @ x + data["b0"]
        hidden = np.maximum(hidden, 0) if relu else np.tanh(hidden)
        y = data["W1"] @ hidden + data["b1"]
        expected.append((np.tanh(y) if squash else np.clip(y, -1, 1)) * [1.0, 2.0])
    action, log_prob = act(write(tmp_path / "a.npz", data), obs)
    assert np.allclose(action, expected, atol=1e-5) and log_prob is None
    assert np.abs(action).max() > 0.3, "the test would not see a wrong network otherwise"


def test_noise_is_the_slot_s_own(tmp_path: Path) -> None:
    """Row i depends on its observation, the seed, its slot and the time, bit for bit, and on nothing else."""
    path = write(tmp_path / "a.npz", arrays())
    obs = np.random.default_rng(0).normal(size=(300, 4, 3))

    def run(rows: np.ndarray, seed: int = 7) -> np.ndarray:
        actor = Actor(path, SPEC, seed, "stochastic")
        actor.reset(None)
        return np.stack([actor.act(row)[0] for row in rows])

    among = run(obs)
    assert np.array_equal(run(obs[:, :1])[:, 0], among[:, 0]), "alone as among others"
    changed = obs.copy()
    changed[:, 1:] = 0
    assert np.array_equal(run(changed)[:, 0], among[:, 0]), "whatever the others see"
    assert not np.array_equal(run(obs, seed=8), among)
    same = run(np.zeros((300, 4, 3)))
    assert len(np.unique(same[:, :, 0])) == 1200, "no two slots and no two times share their noise"
    actor = Actor(path, SPEC, 7, "stochastic")
    first = actor.act(obs[0])[0]
    actor.reset(np.array([True, False, False, False]))
    assert np.array_equal(actor.act(obs[1])[0], among[1]), "an episode's end does not turn time back"
    actor.reset(None)
    assert np.array_equal(actor.act(obs[0])[0], first)


def test_squashed_log_probabilities_are_torch_s(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    heads = {"log_std": None, "log_std_W": rng.normal(size=(2, 4)) * 0.1, "log_std_b": np.array([-1.0, 0.3])}
    data = arrays(**heads)
    actor = Actor(write(tmp_path / "a.npz", data), SPEC, 0)
    obs = rng.normal(size=(64, 3))
    action, log_prob = actor.act(obs)
    hidden = np.tanh(obs @ data["W0"].T + data["b0"])
    mean, log_std = (hidden @ data[f"{w}"].T + data[f"{b}"] for w, b in (("W1", "b1"), ("log_std_W", "log_std_b")))
    gaussian = torch.distributions.Normal(torch.tensor(mean), torch.tensor(log_std).exp())
    law = torch.distributions.TransformedDistribution(gaussian, torch.distributions.TanhTransform())
    unit = torch.tensor(action / [1.0, 2.0])
    inside = (unit.abs() < 0.999).all(-1)
    assert inside.sum() > 20
    assert log_prob is not None
    assert np.allclose(log_prob[inside], law.log_prob(unit).sum(-1)[inside], atol=1e-3)


def test_clipped_log_probabilities_are_densities_inside_and_masses_on_the_bounds(tmp_path: Path) -> None:
    data = arrays(squash=0, W1=np.zeros((2, 4)), b1=np.array([0.8, 0.0]), log_std=np.log([0.5, 0.4]))
    actor = Actor(write(tmp_path / "a.npz", data), SPEC, 0)
    action, log_prob = actor.act(np.zeros((4000, 3)))
    unit = action / [1.0, 2.0]
    assert log_prob is not None and np.abs(unit).max() == 1
    law = torch.distributions.Normal(torch.tensor([0.8, 0.0]), torch.tensor([0.5, 0.4]))
    above, below = 1 - law.cdf(torch.ones(2)).double().numpy(), law.cdf(-torch.ones(2)).double().numpy()
    density = law.log_prob(torch.tensor(unit)).double().numpy()
    expected = np.where(unit == 1, np.log(above), np.where(unit == -1, np.log(below), density)).sum(-1)
    assert np.allclose(log_prob, expected, atol=1e-4)
    share = float((unit[:, 0] == 1).mean())
    assert share == pytest.approx(above[0], abs=4 * np.sqrt(above[0] * (1 - above[0]) / 4000))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"b1": None}, "array 'b1' is missing"),
        ({"W0": None}, "array 'W0' is missing"),
        ({"squash": None}, "array 'squash' is missing"),
        ({"log_std": None}, "array 'log_std' is missing"),
        ({"obs_mean": np.zeros(3)}, "array 'obs_std' is missing"),
        ({"log_sdt": np.zeros(2)}, "unknown array 'log_sdt'; did you mean 'log_std'"),
        ({"W0": np.zeros((4, 5))}, "'W0' is made for an observation of width 5, but in this environment it has 3"),
        ({"W1": np.zeros((6, 4)), "b1": np.zeros(6)}, "'W1' is made for an action of width 6"),
        ({"W1": np.zeros((2, 9))}, r"'W1' has shape \(2, 9\), not \(2, 4\)"),
        ({"b0": np.zeros(3)}, r"'b0' has shape \(3,\), not \(4,\)"),
        ({"W0": np.zeros(4)}, r"'W0' has shape \(4,\), not \(out, in\)"),
        ({"b0": np.full(4, np.nan)}, "'b0' holds what is no finite number"),
        (
            {"obs_mean": np.zeros(3), "obs_std": np.zeros(3), "obs_clip": np.float64(10)},
            "'obs_std' is not positive everywhere",
        ),
        ({"W0": np.array([{}], dtype=object)}, "cannot read the actor .*allow_pickle"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = write(tmp_path / "broken.npz", {**arrays(), **change})
    with pytest.raises(UserError, match=words) as error:
        Actor(path, SPEC, 0)
    assert "broken.npz" in str(error.value)


def test_truncated_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", arrays())
    (tmp_path / "cut.npz").write_bytes(path.read_bytes()[:300])
    (tmp_path / "text.npz").write_text("no archive")
    np.save(tmp_path / "one.npy", np.zeros(3))
    for name in ("cut.npz", "text.npz", "none.npz", "one.npy"):
        with pytest.raises(UserError, match=rf"cannot read the actor .*{name}"):
            Actor(tmp_path / name, SPEC, 0)
    with pytest.raises(UserError, match="no mode 'stochastik' of an actor; did you mean 'stochastic'"):
        Actor(path, SPEC, 0, "stochastik")  # type: ignore[arg-type]


def test_shipped_actors_are_looked_up_like_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = config.names("datasets/actors")
    assert names == ["halfcheetah-expert", "halfcheetah-medium", "hopper-expert", "hopper-medium"]
    for name in names:
        env = make("Hopper-v5" if name.startswith("hopper") else "HalfCheetah-v5")
        Actor(config.find(name, "datasets/actors"), env_spec(env), 0)
        env.close()
    folder = config.find("hopper-medium.npz", "datasets/actors").parent
    assert "Antonin RAFFIN" in (folder / "LICENSE").read_text() and (folder / "README.md").is_file()
    with pytest.raises(UserError, match="did you mean 'hopper-medium'"):
        config.find("hopper-medum", "datasets/actors")
    (tmp_path / "datasets" / "actors").mkdir(parents=True)
    mine = write(tmp_path / "datasets" / "actors" / "hopper-medium.npz", arrays())
    monkeypatch.chdir(tmp_path)
    assert config.find("hopper-medium", "datasets/actors").resolve() == mine.resolve()


def test_the_hopper_hops() -> None:
    envs = Environments(lambda: make("Hopper-v5"), 2)
    spec = env_spec(envs.envs[0])
    returns = {}
    for name in ("hopper-expert", "hopper-medium"):
        actor = Actor(config.find(name, "datasets/actors"), spec, 0, "deterministic")
        returns[name] = np.mean([e.reward.sum() for e in rollout(envs, spec, actor, seed=0, episodes=1)])
    envs.close()
    assert returns["hopper-expert"] > 2500 > 1500 > returns["hopper-medium"] > 800, returns
