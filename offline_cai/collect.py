"""Collect a dataset in a simulator, as a recipe in datasets/ says, and write it with Minari.

A collection is made of parts, each a function of the recipe and its number. Finished parts are kept beside the datasets
until the last one is done, so a collection that was stopped goes on where it was and gives the same data.
"""

import hashlib
import json
import os
import shutil
import time
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from offline_cai import behaviours, config, provenance, seeding
from offline_cai.behaviours import Replayed
from offline_cai.core import Episode
from offline_cai.data import minari
from offline_cai.environments.make import env_spec, make
from offline_cai.environments.rollout import rollout
from offline_cai.environments.vector import Environments
from offline_cai.errors import Interrupted, UserError
from offline_cai.evaluation.evaluate import protocol
from offline_cai.interrupts import Interrupt

# Recipes -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """A dataset to collect: a file in datasets/."""

    id: str
    """Minari id: namespace/environment/name-v0."""
    description: str
    """What is in it, in a sentence or two."""
    environment: str
    """Gymnasium id, version included."""
    licence: str
    """Licence of the data."""
    protocol: str | None = None
    """Evaluation protocol: a recipe in eval/; its environment and reference returns go into the dataset. null: none."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of gymnasium.make."""
    behaviour: dict[str, Any] | tuple[dict[str, Any], ...] = field(default_factory=dict)
    """Who acts: `policy` (maze-controller, actor, checkpoint or random) and its arguments; or `policy: replay`, what a
    run gathered. A list of them is a mixture, one after the other, each with its `share` of the steps."""
    steps: int | None = 200_000
    """Time steps, a multiple of environments × parts for each behaviour; null for a replay, which is taken whole."""
    environments: int = 10
    """Environments side by side."""
    parts: int = 1
    """Parts for each behaviour: what a collection that was stopped keeps are whole parts."""
    seed: int = 0
    """Seed of starts, goals and noise."""

    def __post_init__(self) -> None:
        if (self.steps is None) != (self.replay is not None):
            raise UserError(f"steps is {self.steps}; it has to be null for a replay, and a number where somebody acts.")
        if self.steps is None:
            return
        for share, _ in self.behaviours:
            each, grain = self.steps * share, self.environments * self.parts
            if min(self.steps, self.environments, self.parts) < 1 or abs(each / grain - round(each / grain)) > 1e-9:
                raise UserError(
                    f"steps ({self.steps}) has to be a positive multiple of environments × parts "
                    f"({self.environments} × {self.parts})" + (f", and {share} of it too." if share < 1 else ".")
                )

    @property
    def behaviours(self) -> list[tuple[float, behaviours.Behaviour | Replayed]]:
        """(share of the steps, behaviour), in the order of collection.

        Raises:
            UserError: an unknown policy or argument (with a suggestion), or shares that do not sum to 1.
        """
        given = [self.behaviour] if isinstance(self.behaviour, Mapping) else list(self.behaviour)
        found = [
            behaviours.parse(dict(one), f"behaviour[{i}]" if len(given) > 1 else "behaviour")
            for i, one in enumerate(given)
        ]
        if abs(sum(share for share, _ in found) - 1) > 1e-9 or any(share <= 0 for share, _ in found):
            raise UserError(f"the shares of the behaviours are {[share for share, _ in found]}; they have to sum to 1.")
        return found

    @property
    def replay(self) -> Replayed | None:
        """The run whose replay becomes the dataset; None where somebody acts.

        Raises:
            UserError: a replay beside other behaviours.
        """
        found = [behaviour for _, behaviour in self.behaviours if isinstance(behaviour, Replayed)]
        if found and len(self.behaviours) > 1:
            raise UserError("a replay is taken whole, so it is no part of a mixture: let it be the only behaviour.")
        return found[0] if found else None

    @property
    def fingerprint(self) -> str:
        """A hash of what decides the data: the recipe and the files that it acts from."""
        data = {name: value for name, value in config.to_dict(self).items() if (name, value) != ("parts", 1)}
        digests = [digest for _, behaviour in self.behaviours if (digest := behaviour.digest) is not None]
        return _hash({**data, "files": digests} if digests else data)


def _hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def load(name: str, flags: dict[str, str] | None = None) -> Recipe:
    """A recipe from its name or path."""
    path = config.find(name, "datasets")
    return config.build(Recipe, config.override(config.read(path), flags or {}), str(path))


def recipe_of(dataset_id: str) -> Recipe | None:
    """The shipped recipe that collects a dataset, if there is one."""
    for name in config.names("datasets"):
        with suppress(UserError):  # files that are no recipes are passed over
            recipe = load(name)
            if recipe.id == dataset_id:
                return recipe
    return None


def collected(recipe: Recipe) -> bool:
    """Whether the dataset is here and was collected by this very recipe."""
    if not minari.exists(recipe.id):
        return False
    return minari.metadata(minari.load(recipe.id)).get("fingerprint") == recipe.fingerprint


def controller_arguments(note: Mapping[str, Any]) -> dict[str, float]:
    """Arguments of the maze controller that collected a dataset, from its metadata; empty if none did."""
    given = note.get("recipe", {}).get("behaviour", {})
    for one in [given] if isinstance(given, Mapping) else given:
        _, behaviour = behaviours.parse(dict(one), "behaviour")
        if isinstance(behaviour, behaviours.Controller):
            return asdict(behaviour)
    return {}


# Parts ---------------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A piece of a collection that does not depend on the others."""

    number: int
    behaviour: behaviours.Behaviour
    steps: int  # per environment
    seed: int


class Collected(NamedTuple):
    """What came of a part."""

    episodes: list[Episode]
    seconds: float


def parts(recipe: Recipe) -> list[Part]:
    """The parts of a collection in the order of the data, of a replay none. The first has the recipe's own seed."""
    found: list[Part] = []
    for share, behaviour in recipe.behaviours:
        if recipe.steps is None or isinstance(behaviour, Replayed):
            continue
        steps = round(recipe.steps * share) // (recipe.environments * recipe.parts)
        for number in range(len(found), len(found) + recipe.parts):
            seed = seeding.key(recipe.seed, number) if number else recipe.seed
            found.append(Part(number, behaviour, steps, seed))
    return found


def work_folder(recipe: Recipe) -> Path:
    """Where finished parts are kept meanwhile: one for each recipe and each set of versions, which decide numbers."""
    versions = {name: value for name, value in provenance.versions().items() if name != "machine"}
    name = f"{_prefix(recipe)}{_hash([recipe.fingerprint, versions])}"
    return minari.dataset_root() / name


def _prefix(recipe: Recipe) -> str:
    return f".collecting-{recipe.id.replace('/', '--')}-"


def _save(path: Path, part: Collected) -> None:
    """Write a part: whole or not at all."""
    columns = {"obs": [e.obs for e in part.episodes], "action": [e.action for e in part.episodes]}
    columns["reward"] = [e.reward for e in part.episodes]
    log_probs = [e.log_prob for e in part.episodes if e.log_prob is not None]
    arrays = {name: np.concatenate(values) for name, values in columns.items()}
    arrays |= {"log_prob": np.concatenate(log_probs)} if log_probs else {}
    arrays["lengths"] = np.array([len(e.reward) for e in part.episodes])
    arrays["terminal"] = np.array([e.terminal for e in part.episodes])
    arrays["seconds"] = np.array(part.seconds)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot keep a part of the collection in {path}: {error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path, steps: int) -> Collected | None:
    """A part that was kept; None if there is none or if it is damaged: it is collected again then."""
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {name: file[name] for name in file.files}
        lengths = data["lengths"]
        if lengths.sum() != steps:
            return None
        rows = np.split(data["obs"], np.cumsum(lengths + 1)[:-1])
        cuts = np.cumsum(lengths)[:-1]
        action, reward = np.split(data["action"], cuts), np.split(data["reward"], cuts)
        log_prob = np.split(data["log_prob"], cuts) if "log_prob" in data else [None] * len(lengths)
        ends = [bool(end) for end in data["terminal"]]
        episodes = [Episode(*one) for one in zip(rows, action, reward, ends, log_prob, strict=True)]
        return Collected(episodes, float(data["seconds"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


# Collecting ----------------------------------------------------------------------------------------------------------


def collect(recipe: Recipe, quiet: bool = False) -> Path:
    """Run the recipe, or what is left of it, and write the Minari dataset; returns its folder.

    Raises:
        UserError: the id exists already (found out before the work), the environment or a policy cannot be made, or a
            replay is not there or from another environment.
        Interrupted: Ctrl-C; finished parts are kept, and the same call goes on from there.
    """
    minari.check_id(recipe.id)
    if minari.exists(recipe.id):
        raise UserError(
            f"the dataset {recipe.id!r} exists already in {minari.dataset_root() / recipe.id} and is not overwritten. "
            f"Remove it with `minari delete {recipe.id}`, or collect under another --id."
        )
    evaluation = None if recipe.protocol is None else protocol(recipe.protocol)
    todo, folder = parts(recipe), work_folder(recipe)
    try:
        note: dict[str, Any] = {"recipe": config.to_dict(recipe), "fingerprint": recipe.fingerprint}
        if recipe.replay is None:
            done = _collect_parts(recipe, todo, folder, quiet)
        else:
            done, source = _take_replay(recipe, recipe.replay)
            note |= source
        env, eval_env = make(recipe.environment, recipe.kwargs), evaluation.make() if evaluation else None
        seconds = sum(part.seconds for part in done)
        target = minari.write(
            recipe.id,
            env_spec(env),
            [episode for part in done for episode in part.episodes],
            env,
            eval_env,
            evaluation.reference if evaluation else None,
            {**note, "seconds": seconds},
            algorithm_name="; ".join(behaviour.name for _, behaviour in recipe.behaviours),
            author="offline_cai",
            description=f"{recipe.description} Licence: {recipe.licence}.",
        )
    except KeyboardInterrupt:
        kept = len(list(folder.glob("part-*.npz")))
        raise Interrupted(
            f"{kept} of {len(todo)} parts of {recipe.id} are finished and kept in {folder}. "
            "The same command goes on from there."
        ) from None
    of_any_settings = _prefix(recipe) + "[0-9a-f]" * 16  # the id is taken now
    for old in minari.dataset_root().glob(of_any_settings):
        shutil.rmtree(old, ignore_errors=True)
    for each in (env, eval_env):
        if each is not None:
            each.close()
    return target


def _take_replay(recipe: Recipe, replay: Replayed) -> tuple[list[Collected], dict[str, Any]]:
    """All that a run gathered, and which experiment it was, up to which step."""
    began, found = time.monotonic(), replay.gathered()
    there = found.environment
    if (there.id, there.kwargs, there.wrapper) != (recipe.environment, recipe.kwargs, None):
        raise UserError(
            f"the run {replay.run} gathered in {there.id}, {there.kwargs}, but the recipe is for {recipe.environment}, "
            f"{recipe.kwargs}: name another run or another --environment, or let `offline-cai data convert "
            f"{replay.run} --to ID` keep the run's own."
        )
    about = {"experiment": config.to_dict(found.experiment), "step": found.step}
    return [Collected(found.episodes, time.monotonic() - began)], about


def _collect_parts(recipe: Recipe, todo: list[Part], folder: Path, quiet: bool) -> list[Collected]:
    """All parts in order, the kept ones from the folder."""
    paths = [folder / f"part-{part.number:04d}.npz" for part in todo]
    kept = [_read(path, part.steps * recipe.environments) for path, part in zip(paths, todo, strict=True)]
    envs = Environments(lambda: make(recipe.environment, recipe.kwargs), recipe.environments)
    finished = []
    before = sum(part.steps * recipe.environments for part, have in zip(todo, kept, strict=True) if have)
    if before and not quiet:
        print(f"going on with {before} of {recipe.steps} steps that were collected before")
    with (
        tqdm(
            total=recipe.steps, initial=before, desc="collect", unit="step", disable=quiet, dynamic_ncols=True
        ) as progress,
        Interrupt() as interrupt,
    ):

        def advance(steps: int) -> None:
            progress.update(steps)
            interrupt.check()

        try:
            for part, path, have in zip(todo, paths, kept, strict=True):
                if have is None:
                    began = time.monotonic()
                    policy = part.behaviour.policy(envs, envs.spec, part.seed)
                    episodes = rollout(envs, envs.spec, policy, part.seed, steps=part.steps, progress=advance)
                    have = Collected(episodes, time.monotonic() - began)
                    _save(path, have)
                finished.append(have)
        finally:
            envs.close()
    return finished
