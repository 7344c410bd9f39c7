"""A policy that plans: it asks for plans, caches one per environment, and executes it."""

import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from offline_cai import seeding
from offline_cai.core import Plan, Spec
from offline_cai.errors import UserError
from offline_cai.inference.smc import effective_sample_size
from offline_cai.planning.tracking import Pursuit, Tracker

Propose = Callable[[np.ndarray, Tensor], Plan]
"""Observations [N, O] and random keys [N] to plans; the best of each is executed."""


class Planner:
    """Executes the plans of `propose` on vectorised environments.

    An environment gets a new plan when it begins an episode, and after `replan` steps if that is not None. A plan's
    noise is keyed by (seed, environment, its episode, its plan). When a plan is used up its last row is held. `execute`
    says how a plan becomes actions: "track" follows its states with the tracker, "pursue" their path without their
    times, "actions" plays its actions without looking at the state.

    Attributes:
        tracker: how planned states are followed.
        plans_made: number of plans so far.
        seconds: wall time that they took.
        effective: the effective sample size of each plan that was chosen among several.
        log_evidence: in nats, of each plan that came with one.
        temperature: of the last plans, where the proposer has one.
    """

    def __init__(
        self,
        spec: Spec,
        fields: tuple[str, ...],
        propose: Propose,
        seed: int,
        tracker: Tracker,
        execute: Literal["track", "pursue", "actions"] = "track",
        replan: int | None = None,
        pursuit: Pursuit | None = None,
    ) -> None:
        if execute == "track" and spec.dt is None:
            raise UserError(
                "tracking needs the seconds per time step, and this dataset does not tell them: collect it with "
                "`offline-cai collect`, or execute the plan's own actions (planner.execute: actions)."
            )
        if replan is not None and replan < 1:
            raise UserError(f"planner.replan is {replan}; take a number of steps of at least 1, or null for never.")
        self._spec, self._columns = spec, spec.columns(*fields)
        self.propose, self._seed, self.tracker = propose, seed, tracker
        self._execute, self._replan, self.pursuit = execute, replan, pursuit or Pursuit()
        self._low, self._high = np.array(spec.box.low), np.array(spec.box.high)
        self._script: list[np.ndarray | None] = []
        self._time, self._episode, self._plan_number, self._at = np.zeros((4, 0), dtype=int)
        self.plans_made, self.seconds = 0, 0.0
        self.effective, self.log_evidence = list[float](), list[float]()
        self.temperature: float | None = None

    def reset(self, done: np.ndarray | None = None) -> None:
        if done is None or not self._script:
            self._script = []
            return
        self._script = [None if d else s for s, d in zip(self._script, done, strict=True)]
        self._episode += done
        self._plan_number[done] = 0

    def act(self, obs: np.ndarray) -> tuple[np.ndarray, None]:
        if not self._script:
            self._script = [None] * len(obs)
            self._time, self._episode, self._plan_number, self._at = np.zeros((4, len(obs)), dtype=int)
        stale = [i for i, s in enumerate(self._script) if s is None or self._time[i] == self._replan]
        if stale:
            self._plan(obs, stale)
        if self._execute == "pursue":
            self._time += 1
            return np.clip(np.stack([self._pursue(i, row) for i, row in enumerate(obs)]), self._low, self._high), None
        ahead = 1 if self._execute == "track" else 0
        step = np.stack([s[min(t + ahead, len(s) - 1)] for s, t in zip(self._script, self._time, strict=True)])  # type: ignore[index, arg-type]
        self._time += 1
        action = self.tracker.action(step, obs[:, self._columns]) if self._execute == "track" else step
        return np.clip(action, self._low, self._high), None

    def _note(self, plans: Plan) -> None:
        """What the weights of plans say about how they were steered."""
        self.temperature = plans.temperature
        if plans.log_weight.shape[1] > 1:
            self.effective += effective_sample_size(plans.log_weight).tolist()
        if plans.log_evidence is not None:
            self.log_evidence += plans.log_evidence.tolist()

    def _pursue(self, i: int, obs: np.ndarray) -> np.ndarray:
        path, state = self._script[i], obs[self._columns]
        assert path is not None
        self._at[i] = self.pursuit.advance(path, self._at[i], state)
        return self.pursuit.action(path, self._at[i], state)

    def _plan(self, obs: np.ndarray, which: list[int]) -> None:
        """New scripts for the environments `which`: desired states or actions, one row per time step."""
        key = torch.tensor([seeding.key(self._seed, i, self._episode[i], self._plan_number[i]) for i in which])
        began = time.perf_counter()
        plans = self.propose(obs[which], key)
        plan = plans.best
        self.seconds += time.perf_counter() - began
        self.plans_made += len(which)
        self._note(plans)
        if self._execute == "pursue":
            scripts: Any = [self.pursuit.path(rows) for rows in plan.obs[:, 0].double().numpy()]
        elif self._execute == "track":
            scripts = self.tracker.states(plan.obs[:, 0].double().numpy(), plan.stride, self._spec.dt or 0.0)
        elif plan.action is None:
            raise UserError("these plans hold no actions: train with model.actions: true, or track the planned states.")
        else:
            scripts = plan.action.double().numpy().reshape(len(which), -1, self._spec.action_width)
        for i, script in zip(which, scripts, strict=True):
            self._script[i], self._time[i], self._at[i] = script, 0, 0
            self._plan_number[i] += 1
