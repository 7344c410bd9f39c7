"""What a run gathered: the replay of one of its checkpoints, as episodes."""

from pathlib import Path
from typing import NamedTuple

from offline_cai.core import Episode, Spec
from offline_cai.data.replay import Replay
from offline_cai.errors import UserError
from offline_cai.training import checkpoint, experiment
from offline_cai.training.experiment import Experiment
from offline_cai.training.online import Simulation


class Gathered(NamedTuple):
    """Episodes in the order of the environments; those in progress are cut at the checkpoint's step."""

    experiment: Experiment
    environment: Simulation
    step: int
    spec: Spec
    episodes: list[Episode]


def gathered(run: Path | str) -> Gathered:
    """The replay of a run's last checkpoint, or of the checkpoint that is named.

    Raises:
        UserError: there is no whole checkpoint, or the run has no replay, or a segment of it is missing or damaged.
    """
    path = checkpoint.find(run)
    folder, algorithm = path.parents[1], checkpoint.load(path)
    exp = experiment.load(str(folder / "config.yaml"))
    if exp.environment is None or algorithm.needs.source != "replay":
        raise UserError(f"{run} gathered no replay: name a run of an algorithm that keeps one (such as sac).")
    tensors, facts = checkpoint.load_state(path)
    obs = tensors["source/obs"].numpy()
    replay = Replay(algorithm.spec, len(obs), exp.environment.capacity, algorithm.needs.discount)
    replay.load(folder / "replay", facts["source"]["replay"], obs)
    return Gathered(exp, exp.environment, facts["step"], algorithm.spec, list(replay.episodes()))
