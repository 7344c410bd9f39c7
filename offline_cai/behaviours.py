"""Who acts while data is collected: what stands in a recipe's `behaviour`."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from offline_cai import config
from offline_cai.core import Policy, Spec
from offline_cai.environments.actors import Actor, Mode
from offline_cai.environments.behaviour import MazeController, Noisy, RandomPolicy
from offline_cai.environments.maze2d import Maze
from offline_cai.environments.vector import Environments
from offline_cai.errors import UserError, did_you_mean
from offline_cai.training import checkpoint
from offline_cai.training.gathered import Gathered, gathered


class Behaviour(Protocol):
    """Who acts: what stands in a recipe's `behaviour` beside `policy` and `share`."""

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str | None:
        """A hash of the file that it acts from, None without one."""
        ...

    def policy(self, environment: Environments, spec: Spec, seed: int) -> Policy: ...


@dataclass(frozen=True)
class Controller:
    """The scripted controller of the point mazes."""

    kp: float = 10.0
    """Action per metre to the next waypoint."""
    kd: float = 1.0
    """Action per metre per second."""
    noise: float = 0.5
    """Standard deviation of the noise on actions."""
    jitter: float = 0.1
    """Metres by which waypoints are moved at most."""
    switch: float = 0.1
    """Metres to a waypoint within which the next one is taken."""

    name = "scripted maze controller"
    digest = None

    def policy(self, environment: Environments, spec: Spec, seed: int) -> Policy:
        return MazeController(spec, _maze(environment), seed, **asdict(self))


@dataclass(frozen=True)
class Random:
    """Uniform actions."""

    name = "random"
    digest = None

    def policy(self, environment: Environments, spec: Spec, seed: int) -> Policy:
        return RandomPolicy(spec, seed)


@dataclass(frozen=True)
class FromFile:
    """An actor from an .npz file, with noise."""

    file: str
    """A path, or a name in datasets/actors/."""
    mode: Mode = "stochastic"
    """stochastic, or deterministic: the mean of its Gaussian."""
    gaussian: float = 0.0
    """Standard deviation of noise added to actions in [-1, 1] space."""
    epsilon: float = 0.0
    """Probability of a uniform action instead."""

    @property
    def name(self) -> str:
        return f"actor {Path(self.file).stem}, {self.mode}{_noise(self.gaussian, self.epsilon)}"

    @property
    def digest(self) -> str:
        return _digest(self._path)

    @property
    def _path(self) -> Path:
        return config.find(self.file, "datasets/actors")

    def policy(self, environment: Environments, spec: Spec, seed: int) -> Policy:
        return _noisy(Actor(self._path, spec, seed, self.mode), spec, seed, self.gaussian, self.epsilon)


@dataclass(frozen=True)
class FromRun:
    """The policy of a run of this package, with noise."""

    run: str | None = None
    """A run's folder or one of its checkpoints."""
    gaussian: float = 0.0
    """Standard deviation of noise added to actions in [-1, 1] space."""
    epsilon: float = 0.0
    """Probability of a uniform action instead."""

    @property
    def name(self) -> str:
        return f"policy of the run {self.run}{_noise(self.gaussian, self.epsilon)}"

    @property
    def digest(self) -> str:
        return _digest(self._checkpoint / "manifest.json")

    @property
    def _checkpoint(self) -> Path:
        if self.run is None:
            raise UserError(
                "this recipe collects with a policy that was trained here, and names none: say which one acts with "
                "--behaviour.run RUN, a run's folder or one of its checkpoints."
            )
        return checkpoint.find(self.run)

    def policy(self, environment: Environments, spec: Spec, seed: int) -> Policy:
        algorithm = checkpoint.load(self._checkpoint)
        if (algorithm.spec.obs, algorithm.spec.action) != (spec.obs, spec.action):
            raise UserError(
                f"the run {self.run} was trained for observations {_fields(algorithm.spec)} and actions of width "
                f"{algorithm.spec.action_width}, but the environment has {_fields(spec)} and {spec.action_width}: "
                "name a run on data of this environment, or another --environment."
            )
        return _noisy(algorithm.policy(seed=seed), spec, seed, self.gaussian, self.epsilon)


@dataclass(frozen=True)
class Replayed:
    """Nobody acts: what an online run of this package gathered is taken whole."""

    run: str | None = None
    """A run's folder or one of its checkpoints, whose replay is the one up to its step."""

    @property
    def name(self) -> str:
        return f"all policies on the way of the run {self.run}"

    @property
    def digest(self) -> str:
        return _digest(checkpoint.find(self._run) / "manifest.json")

    @property
    def _run(self) -> str:
        if self.run is None:
            raise UserError(
                "this recipe makes a dataset of the replay of an online run, and names none: say which one with "
                "--behaviour.run RUN, a run's folder or one of its checkpoints."
            )
        return self.run

    def gathered(self) -> Gathered:
        return gathered(self._run)


BEHAVIOURS: Mapping[str, Callable[..., Behaviour | Replayed]] = {
    "maze-controller": Controller,
    "actor": FromFile,
    "checkpoint": FromRun,
    "random": Random,
    "replay": Replayed,
}


def _maze(environments: Environments) -> Maze:
    return Maze.of(environments.envs[0])


def _noisy(policy: Policy, spec: Spec, seed: int, gaussian: float, epsilon: float) -> Policy:
    return Noisy(policy, spec, seed, gaussian, epsilon) if gaussian or epsilon else policy


def _noise(gaussian: float, epsilon: float) -> str:
    return "".join(f", {name} {value}" for name, value in (("gaussian", gaussian), ("epsilon", epsilon)) if value)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _fields(spec: Spec) -> str:
    return "(" + ", ".join(f"{part.name}: {part.width}" for part in spec.obs) + ")"


def parse(data: dict[str, Any], where: str) -> tuple[float, Behaviour | Replayed]:
    """(share of the steps, behaviour) from what stands in a recipe.

    Raises:
        UserError: an unknown policy or argument, with a suggestion, or a share that is no number.
    """
    policy, share = data.pop("policy", "maze-controller"), data.pop("share", 1.0)
    if policy not in BEHAVIOURS:
        raise UserError(f"{where}: there is no policy {policy!r}; {did_you_mean(str(policy), BEHAVIOURS)}")
    if not isinstance(share, int | float) or isinstance(share, bool):
        raise UserError(f"{where}: share is {share!r}; it has to be a number between 0 and 1.")
    return float(share), config.build(BEHAVIOURS[policy], data, where)  # type: ignore[arg-type]
