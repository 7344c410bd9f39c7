"""Evaluate policies in simulators under a protocol: the same episodes for each, a fixed quota per environment."""

import hashlib
import io
import json
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from tqdm import tqdm

from offline_cai import config
from offline_cai.core import Episode, Explains, Policy, Spec
from offline_cai.data import catalogue, scores
from offline_cai.environments.make import WRAPPERS, env_spec, make
from offline_cai.environments.rollout import Care, rollout
from offline_cai.environments.vector import Environments
from offline_cai.errors import Notice, UserError
from offline_cai.evaluation.statistics import Summary, summarise
from offline_cai.files import write_bytes
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
    """Reference policies evaluated on the same starts, by name; an actor's file as in actor:hopper-medium."""
    workers: int = 0
    """Processes that the environments are shared out to; 0: they run in the evaluating process."""
    timeout: float = 60.0
    """Seconds that a step or a reset may take in a worker process before it counts as hung."""
    episode_seconds: float | None = None
    """Wall time that an episode may take before it is cut, which the results say; null: no limit."""

    def __post_init__(self) -> None:
        if self.episodes < 1 or self.environments < 1 or self.episodes % self.environments:
            raise UserError(
                f"episodes ({self.episodes}) has to be a positive multiple of environments ({self.environments}), so "
                "that each environment runs the same number and short episodes are not favoured."
            )
        if self.workers < 0 or not self.timeout > 0 or not (self.episode_seconds is None or self.episode_seconds > 0):
            raise UserError("workers has to be at least 0, timeout and episode_seconds positive.")
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
    care: Care  # the episodes that were cut or repeated
    account: dict[str, Any]  # what the policy says of how it acted; empty: nothing

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
        return {**asdict(self.summary), **numbers, "repeated": self.care.repeated, "cut": self.care.cut}


def evaluate(
    protocol: Protocol,
    policies: Mapping[str, Callable[[], Policy]],
    trained_on: Spec,
    quiet: bool = False,
    check: Callable[[int], Any] = lambda steps: None,
    keep: Path | None = None,
) -> dict[str, Result]:
    """Run each policy on the protocol's episodes: episode j of environment i starts alike for all of them.

    An episode is repeated once after a fault in its environment, and cut if it takes longer than the protocol allows;
    either is a Notice, and in the result. `check` is called with the number of new steps; it may raise to give up.
    In the folder `keep`, which has to be of this protocol and these policies alone, the results of policies that are
    finished are kept, and taken from when the same evaluation is called for again.

    Raises:
        UserError: the environment is not what the policies were `trained_on`, its episodes have no end, or an
            environment failed twice in one episode.
    """
    reference = protocol.reference
    if protocol.mismatch:
        warnings.warn(protocol.mismatch, Notice, stacklevel=2)
    limit = _limit(protocol, trained_on)
    share, results = protocol.episodes // protocol.environments, {}
    envs = Environments(protocol.make, protocol.environments, protocol.workers, protocol.timeout)
    try:
        for name, build in policies.items():
            began, care, path = time.monotonic(), Care(protocol.episode_seconds), _path(keep, name)
            kept = None if path is None else _read(path)
            if kept is None:
                policy = build()
                with _Bar(name, limit * protocol.episodes, protocol, quiet, check) as bar:
                    episodes = rollout(
                        envs,
                        envs.spec,
                        policy,
                        protocol.seed,
                        episodes=share,
                        progress=bar.advance,
                        finished=bar.finished,
                        care=care,
                    )
                account = policy.account() if isinstance(policy, Explains) else {}
                kept = _Kept(episodes, care, time.monotonic() - began, account)
                if path is not None:
                    _write(path, kept)
            for text in _said(name, kept.care, protocol):
                warnings.warn(text, Notice, stacklevel=2)
            returns = np.array([episode.reward.sum() for episode in kept.episodes])
            normalised = None if reference is None else scores.normalised(returns, *reference)
            results[name] = Result(returns, normalised, kept.seconds, kept.episodes, kept.care, kept.account)
    finally:
        envs.close()
    return results


def _limit(protocol: Protocol, trained_on: Spec) -> int:
    """The steps of an episode at most; a check of the environment before several are made."""
    env = protocol.make()
    limit = env.spec.max_episode_steps if env.spec else None
    spec = env_spec(env)
    env.close()
    require_same_spec(trained_on, spec)
    if limit is None or limit < 1:
        raise UserError(f"{protocol.environment} has no limit of steps: give it one with kwargs.max_episode_steps.")
    return limit


def _said(name: str, care: Care, protocol: Protocol) -> Iterator[str]:
    who = f"of {name!r}" if name else "of the evaluation"
    for fault in care.repeated:
        yield f"an episode {who} was repeated: {fault}"
    if care.cut:
        which = ", ".join(f"{number} of environment {i}" for i, number in care.cut[:3])
        yield (
            f"{len(care.cut)} of {protocol.episodes} episodes {who} were cut after {protocol.episode_seconds:g} s "
            f"(episode {which}{', ...' if len(care.cut) > 3 else ''}): their returns are of what was done by then."
        )


class _Bar:
    """Steps done, and the mean score of the episodes that are finished: early ones are short ones."""

    def __init__(self, name: str, most: int, protocol: Protocol, quiet: bool, check: Callable[[int], Any]) -> None:
        self._bar = tqdm(total=most, desc=f"evaluate {name}", unit="step", disable=quiet, dynamic_ncols=True)
        self._reference, self._check, self._scores = protocol.reference, check, list[float]()

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def advance(self, steps: int) -> None:
        self._bar.update(steps)
        self._check(steps)

    def finished(self, episode: Episode) -> None:
        score = episode.reward.sum()
        self._scores.append(float(score if self._reference is None else scores.normalised(score, *self._reference)))
        self._bar.set_postfix_str(f"score {np.mean(self._scores):.1f} of {len(self._scores)} episodes", refresh=False)


# What is kept of a policy that is finished ----------------------------------------------------------------------------


class _Kept(NamedTuple):
    episodes: list[Episode]
    care: Care
    seconds: float
    account: dict[str, Any]


def _path(folder: Path | None, name: str) -> Path | None:
    return None if folder is None else folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.npz"


def _write(path: Path, kept: _Kept) -> None:
    obs, action, reward, terminal, _ = zip(*kept.episodes, strict=True)
    facts = json.dumps({"seconds": kept.seconds, "account": kept.account, **asdict(kept.care)})
    buffer = io.BytesIO()
    np.savez(
        buffer,
        obs=np.concatenate(obs),
        action=np.concatenate(action),
        reward=np.concatenate(reward),
        length=np.array([len(part) for part in reward]),
        terminal=np.array(terminal),
        facts=np.array(facts),
    )
    write_bytes(path, buffer.getvalue())


def _read(path: Path) -> _Kept | None:
    """None if nothing was kept, or nothing that can be read: then it is done again."""
    try:
        with np.load(path, allow_pickle=False) as data:
            ends = np.cumsum(data["length"])[:-1]
            columns = (np.split(data["obs"], ends + np.arange(1, len(ends) + 1)), np.split(data["action"], ends))
            rows = zip(*columns, np.split(data["reward"], ends), data["terminal"], strict=True)
            facts = json.loads(str(data["facts"]))
            seconds, account = facts.pop("seconds"), facts.pop("account")
            cut = [(i, number) for i, number in facts.pop("cut")]
            episodes = [Episode(*row[:3], bool(row[3])) for row in rows]
            return _Kept(episodes, Care(**facts, cut=cut), seconds, account)
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile):
        return None
