"""Evaluate policies in simulators under a protocol: the same episodes for each, a fixed quota per environment."""

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import gymnasium as gym
import numpy as np
from tqdm import tqdm

from offline_cai import config
from offline_cai.core import Episode, Policy, Spec
from offline_cai.data import catalogue, scores
from offline_cai.environments.make import WRAPPERS, make
from offline_cai.environments.rollout import rollout
from offline_cai.environments.vector import Environments
from offline_cai.errors import Notice, UserError
from offline_cai.evaluation.statistics import Summary, summarise
from offline_cai.spaces import require_same_spec


@dataclass(frozen=True)
class Protocol:
    """How policies are evaluated: a recipe in eval/."""

    name: str
    """Name of the protocol."""
    environment: str
    """Gymnasium id, version included; "dataset": what the dataset names to evaluate in."""
    score: tuple[float, float] | str | None = None
    """D4RL task whose reference returns normalise the score, or the two returns that score 0 and 100; null: there are
    none, and scores are raw returns."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of gymnasium.make."""
    wrapper: str | None = None
    """One of our environment wrappers around it."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the wrapper."""
    episodes: int = 100
    """Episodes, a multiple of the number of environments."""
    environments: int = 10
    """Environments side by side."""
    seed: int = 1000
    """Seed of the starts, apart from any seed of training or collection."""
    references: tuple[str, ...] = ()
    """Reference policies evaluated on the same starts."""

    def __post_init__(self) -> None:
        if self.episodes < 1 or self.environments < 1 or self.episodes % self.environments:
            raise UserError(
                f"episodes ({self.episodes}) has to be a positive multiple of environments ({self.environments}), so "
                "that each environment runs the same number and short episodes are not favoured."
            )
        if isinstance(self.score, tuple) and not (np.isfinite(self.score).all() and self.score[0] != self.score[1]):
            raise UserError(
                f"the returns {list(self.score)} are no scale: score takes two that differ, or a D4RL task."
            )

    @property
    def reference(self) -> tuple[float, float] | None:
        """The returns that score 0 and 100; None: there are none."""
        return scores.reference(self.score) if isinstance(self.score, str) else self.score

    @property
    def mismatch(self) -> str | None:
        """In words, if the references belong to another environment."""
        return scores.mismatch(self.score, self.environment)

    def on(self, dataset: str | None) -> "Protocol":
        """The protocol for who was trained on `dataset`: its environment and references, where the protocol says so.

        Raises:
            UserError: the dataset names no environment, or one with a wrapper that is not ours.
        """
        if self.environment != "dataset":
            return self
        found = None if dataset is None else catalogue.evaluation_environment(dataset)
        if dataset is None or found is None:
            what = "there is no dataset" if dataset is None else f"the dataset {dataset!r} names no environment"
            raise UserError(f"{what} to evaluate in: choose another protocol of eval/ with --protocol.")
        ours = {wrapper.__name__: name for name, wrapper in WRAPPERS.items()}
        foreign = [wrapper for wrapper, _ in found.wrappers if wrapper not in ours]
        if foreign or len(found.wrappers) > 1:
            names = ", ".join(wrapper for wrapper, _ in found.wrappers)
            raise UserError(
                f"{dataset!r} is evaluated in {found.environment} with {names}, which cannot be made from a name: "
                "choose another protocol with --protocol."
            )
        wrapper, options = (ours[found.wrappers[0][0]], found.wrappers[0][1]) if found.wrappers else (None, {})
        return replace(
            self,
            environment=found.environment,
            kwargs={**found.kwargs, **self.kwargs},
            wrapper=wrapper,
            options=options,
            score=catalogue.reference(dataset) if self.score is None else self.score,
        )

    def make(self) -> gym.Env:
        """Its environment.

        Raises:
            UserError: it cannot be made.
        """
        return make(self.environment, self.kwargs, self.wrapper, **self.options)


def protocol(name: str, flags: Mapping[str, str] | None = None) -> Protocol:
    """A protocol from its name or path."""
    path = config.find(name, "eval")
    return config.build(Protocol, config.override(config.read(path), flags or {}), str(path))


@dataclass(frozen=True)
class Result:
    """One policy under one protocol: an entry per episode, in the order of environments."""

    returns: np.ndarray
    normalised: np.ndarray | None  # None: the protocol has no references to normalise with
    seconds: float
    episodes: list[Episode]

    @property
    def scores(self) -> np.ndarray:
        """What is compared: normalised scores, or returns where there are no references."""
        return self.returns if self.normalised is None else self.normalised

    @property
    def summary(self) -> Summary:
        return summarise(self.scores)

    def to_json(self) -> dict[str, Any]:
        normalised = None if self.normalised is None else self.normalised.tolist()
        numbers = {"returns": self.returns.tolist(), "normalised": normalised, "seconds": self.seconds}
        return {**asdict(self.summary), **numbers}


def evaluate(
    protocol: Protocol,
    policies: Mapping[str, Callable[[], Policy]],
    trained_on: Spec,
    quiet: bool = False,
    check: Callable[[int], Any] = lambda steps: None,
) -> dict[str, Result]:
    """Run each policy on the protocol's episodes: episode j of environment i starts alike for all of them.

    `check` is called with the number of new steps; it may raise to give up.

    Raises:
        UserError: the environment is not what the policies were `trained_on`, or its episodes have no end.
    """
    reference = protocol.reference
    if protocol.mismatch:
        warnings.warn(protocol.mismatch, Notice, stacklevel=2)
    envs = Environments(protocol.make, protocol.environments)
    spec, about = envs.spec, envs.envs[0].spec
    limit = about.max_episode_steps if about else None
    require_same_spec(trained_on, spec)
    if limit is None or limit < 1:
        raise UserError(f"{protocol.environment} has no limit of steps: give it one with kwargs.max_episode_steps.")
    share, results = protocol.episodes // protocol.environments, {}
    most = limit * protocol.episodes
    try:
        for name, build in policies.items():
            began = time.monotonic()
            with tqdm(total=most, desc=f"evaluate {name}", unit="step", disable=quiet, dynamic_ncols=True) as progress:

                def advance(steps: int, bar: tqdm = progress) -> None:
                    bar.update(steps)
                    check(steps)

                episodes = rollout(envs, spec, build(), protocol.seed, episodes=share, progress=advance)
            returns = np.array([episode.reward.sum() for episode in episodes])
            normalised = None if reference is None else scores.normalised(returns, *reference)
            results[name] = Result(returns, normalised, time.monotonic() - began, episodes)
    finally:
        envs.close()
    return results
