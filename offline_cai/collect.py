"""Collect a dataset in a simulator with a scripted policy, as a recipe in datasets/ says, and write it with Minari."""

import hashlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from offline_cai import config
from offline_cai.data import minari, scores
from offline_cai.environments.behaviour import MazeController
from offline_cai.environments.make import env_spec, make, vectorise
from offline_cai.environments.maze2d import Maze
from offline_cai.environments.rollout import rollout
from offline_cai.errors import UserError
from offline_cai.evaluation.evaluate import protocol


@dataclass(frozen=True)
class Recipe:
    """A dataset to collect: a file in datasets/."""

    id: str
    """Minari id: namespace/environment/name-v0."""
    description: str
    """What is in it, in a sentence or two."""
    environment: str
    """Gymnasium id, version included."""
    protocol: str
    """Evaluation protocol: a recipe in eval/; its environment and reference returns go into the dataset."""
    licence: str
    """Licence of the data."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of gymnasium.make."""
    behaviour: dict[str, float] = field(default_factory=dict)
    """Arguments of the maze controller: kp, kd, noise, jitter, switch."""
    steps: int = 200_000
    """Time steps, a multiple of the number of environments."""
    environments: int = 10
    """Environments side by side."""
    seed: int = 0
    """Seed of starts, goals and noise."""

    def __post_init__(self) -> None:
        if self.environments < 1 or self.steps < 1 or self.steps % self.environments:
            raise UserError(
                f"steps ({self.steps}) has to be a positive multiple of environments ({self.environments})."
            )

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(config.to_dict(self), sort_keys=True).encode()).hexdigest()[:16]


def load(name: str, flags: dict[str, str] | None = None) -> Recipe:
    """A recipe from its name or path."""
    path = config.find(name, "datasets")
    return config.build(Recipe, config.override(config.read(path), flags or {}), str(path))


def recipe_of(dataset_id: str) -> Recipe | None:
    """The shipped recipe that collects a dataset, if there is one."""
    recipes = (load(name) for name in config.names("datasets"))
    return next((recipe for recipe in recipes if recipe.id == dataset_id), None)


def collected(recipe: Recipe) -> bool:
    """Whether the dataset is here and was collected by this very recipe."""
    if not minari.exists(recipe.id):
        return False
    return minari.metadata(minari.load(recipe.id)).get("fingerprint") == recipe.fingerprint


def collect(recipe: Recipe, quiet: bool = False) -> Path:
    """Run the recipe and write the Minari dataset; returns its folder.

    Raises:
        UserError: the id exists already (found out before the work), or the environment cannot be made.
    """
    if minari.exists(recipe.id):
        raise UserError(
            f"the dataset {recipe.id!r} exists already in {minari.dataset_root() / recipe.id} and is not overwritten. "
            f"Remove it with `minari delete {recipe.id}`, or collect under another --id."
        )
    began = time.monotonic()
    evaluation = protocol(recipe.protocol)
    env, eval_env = make(recipe.environment, recipe.kwargs), evaluation.make()
    spec = env_spec(env)
    try:
        controller = MazeController(spec, Maze.of(env), recipe.seed, **recipe.behaviour)
    except TypeError as error:
        raise UserError(f"behaviour of {recipe.id!r}: {error}. It takes kp, kd, noise, jitter and switch.") from None
    envs = vectorise(lambda: make(recipe.environment, recipe.kwargs), recipe.environments)
    share = recipe.steps // recipe.environments
    with tqdm(total=recipe.steps, desc="collect", unit="step", disable=quiet, dynamic_ncols=True) as progress:
        episodes = rollout(envs, spec, controller, recipe.seed, steps=share, progress=progress.update)
    note = {"recipe": config.to_dict(recipe), "fingerprint": recipe.fingerprint, "seconds": time.monotonic() - began}
    folder = minari.write(
        recipe.id,
        spec,
        episodes,
        env,
        eval_env,
        scores.reference(evaluation.score),
        note,
        algorithm_name="scripted maze controller",
        author="offline_cai",
        description=f"{recipe.description} Licence: {recipe.licence}.",
    )
    for each in (envs, env, eval_env):
        each.close()
    return folder
