"""Reference policies, by name: what a score has to be seen beside."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from offline_cai import config, seeding
from offline_cai.core import Policy, Spec
from offline_cai.data.trajectories import Trajectories
from offline_cai.environments.actors import Actor, Mode
from offline_cai.environments.behaviour import MazeController, RandomPolicy
from offline_cai.environments.maze2d import Maze
from offline_cai.errors import UserError, did_you_mean
from offline_cai.planning.config import PlannerConfig
from offline_cai.planning.occupancy import OccupancyPaths
from offline_cai.planning.planner import Planner


class Setting(NamedTuple):
    """What references are made from: the protocol's maze and the data, if there are any, the arguments of the maze
    controller that collected them (empty: its defaults), and how the planner that they stand beside executes plans."""

    spec: Spec
    maze: Maze | None
    data: Trajectories | None
    behaviour: Mapping[str, Any]
    planner: PlannerConfig
    stride: int
    seed: int


def _maze(s: Setting, name: str) -> Maze:
    if s.maze is None:
        raise UserError(
            f"the reference {name!r} needs a maze, and this protocol's environment has none: leave it out of the "
            "protocol's references."
        )
    return s.maze


def controller(s: Setting) -> Policy:
    """The data-collecting controller as it collected, with its noise."""
    return MazeController(s.spec, _maze(s, "controller"), seeding.seed_of(s.seed, 1), **s.behaviour)


def controller_without_noise(s: Setting) -> Policy:
    """The data-collecting controller without action noise."""
    settings = {**s.behaviour, "noise": 0.0}
    return MazeController(s.spec, _maze(s, "controller without noise"), seeding.seed_of(s.seed, 2), **settings)


def occupancy_path(s: Setting) -> Policy:
    """The shortest path over the data's occupancy grid, tracked or pursued with the planner's own gains."""
    _maze(s, "occupancy path")
    if s.data is None:
        raise UserError("the occupancy path needs a dataset, and this experiment has none.")
    if s.spec.dt is None:
        raise UserError("the occupancy path needs the simulator's seconds per step, and it does not tell them.")
    states = np.asarray(s.data.obs[:, s.data.spec.columns("observation")])
    position, goal = (np.array(s.spec.columns(name)) for name in ("achieved_goal", "desired_goal"))
    paths = OccupancyPaths(states, position, goal, s.stride, s.spec.dt)
    execute: Literal["track", "pursue"] = "pursue" if s.planner.execute == "pursue" else "track"
    return Planner(s.spec, ("observation",), paths, s.seed, s.planner.tracker, execute, pursuit=s.planner.pursuit)


def random(s: Setting) -> Policy:
    """Uniformly random actions."""
    return RandomPolicy(s.spec, seeding.seed_of(s.seed, 3))


def actor(s: Setting, file: str, mode: Mode) -> Policy:
    """An actor of an .npz file: a path, or a name in datasets/actors/."""
    return Actor(config.find(file, "datasets/actors"), s.spec, seeding.seed_of(s.seed, 4), mode)


REFERENCES: Mapping[str, Callable[[Setting], Policy]] = {
    "controller": controller,
    "controller without noise": controller_without_noise,
    "occupancy path": occupancy_path,
    "random": random,
}


ACTORS: Mapping[str, Mode] = {"actor": "stochastic", "actor without noise": "deterministic"}
"""Those of a file, which stands behind a colon: "actor:hopper-medium"."""


def find(name: str) -> Callable[[Setting], Policy]:
    """What makes the reference of a name.

    Raises:
        UserError: there is none; it names the nearest.
    """
    if is_one(name):
        kind, _, file = name.partition(":")
        return REFERENCES[name] if name in REFERENCES else partial(actor, file=file, mode=ACTORS[kind])
    names = [*REFERENCES, *(f"{kind}:FILE" for kind in ACTORS)]
    raise UserError(f"there is no reference policy {name!r}; {did_you_mean(name, names)}")


def is_one(name: str) -> bool:
    kind, _, file = name.partition(":")
    return name in REFERENCES or (kind in ACTORS and bool(file))
