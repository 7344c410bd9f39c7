"""Evaluation while training: the averaged weights in the protocol's environment."""

import copy
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from offline_cai.core import Algorithm
from offline_cai.evaluation import evaluate as evaluation
from offline_cai.interrupts import Interrupt
from offline_cai.training.experiment import Experiment


class Abandoned(Exception):
    """An evaluation was given up, to stop in time."""


class Practice:
    """Scores weights on starts of its own, the same each time.

    They are other starts than the protocol's, so that a checkpoint chosen here owes nothing to those that judge it. All
    that is random is keyed: training goes on as if nothing had happened.
    """

    def __init__(self, protocol: evaluation.Protocol, algorithm: Algorithm, episodes: int) -> None:
        side_by_side = max(n for n in range(1, protocol.environments + 1) if episodes % n == 0)
        self._protocol = replace(protocol, seed=protocol.seed + 1, episodes=episodes, environments=side_by_side)
        self._algorithm = copy.deepcopy(algorithm).eval()

    @classmethod
    def of(cls, experiment: Experiment, algorithm: Algorithm) -> "Practice | None":
        """What the experiment asks for; None if it does not evaluate while training."""
        c = experiment.training
        if c.evaluate_every is None or experiment.protocol is None:
            return None
        protocol = evaluation.protocol(experiment.protocol).on(experiment.dataset)
        return cls(protocol, algorithm, c.evaluate_episodes)

    def __call__(self, weights: Mapping[str, Tensor], interrupt: Interrupt) -> dict[str, float]:
        """The mean score (normalised if the protocol has references, otherwise the return) and the mean return.

        Raises:
            Abandoned: it was asked to stop.
        """

        def check(steps: int) -> None:
            if interrupt.asked:
                raise Abandoned

        self._algorithm.load_state_dict(dict(weights))
        policy = self._algorithm.policy(seed=self._protocol.seed)
        result = evaluation.evaluate(self._protocol, {"": lambda: policy}, self._algorithm.spec, True, check)[""]
        return {"score": float(result.scores.mean()), "return": float(result.returns.mean())}
