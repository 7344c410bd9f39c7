"""A policy that plans: it asks for plans, caches one per environment, and executes it."""

import time
from collections import Counter
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

Propose = Callable[[np.ndarray, Tensor, Plan | None], Plan]
"""Observations [N, O], random keys [N] and what is left of the plans under way to plans; the best of each is used."""


SHOWN = 6
"""Of the first plans, so many are shown with all of their candidates."""


class _Course:
    """What one environment executes: a plan's rows, the script made of them, and how far it has come."""

    def __init__(self, rows: np.ndarray, stride: int, steps: float | None, script: np.ndarray) -> None:
        self.rows, self.stride, self.steps, self.script = rows, stride, steps, script
        self.time, self.at = 0, 0  # steps since it began; the point of a pursued path that is nearest


class Planner:
    """Executes the plans of `propose` on vectorised environments.

    An environment gets a new plan when it begins an episode, and after `replan` steps if that is not None; with `go_on`
    the proposer is then told what is left of the old one. A plan's noise is keyed by (seed, environment, its episode,
    its plan). When a plan is used up its last row is held. `execute` says how a plan becomes actions: "track" follows
    its states with the tracker, "pursue" their path without their times, "actions" plays its actions without looking at
    the state. `fields` of the observation make a plan's rows, and those of `state` are what is executed by. `clear`
    tells of positions [..., d] whether one may be there: the pursuit then cuts no corner through others.

    Attributes:
        tracker: how planned states are followed.
        pursuit: how paths are pursued.
        plans_made: number of plans so far.
        seconds: wall time that they took.
        effective: the effective sample size of each plan that was chosen among several.
        log_evidence: in nats, of each plan that came with one.
        temperature: of the last plans, where the proposer has one.
        rejected: number of candidates that were not chosen, by the part of the evidence that spoke most against them.
        feasible: share of feasible candidates of each plan, where something says which are.
        first: the first plans, with all of their candidates: those of the first episodes of all environments.
        deviation: sum of the distances between planned and actual positions, and number of steps.
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
        go_on: bool = False,
        state: tuple[str, ...] | None = None,
        clear: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        if execute == "track" and spec.dt is None:
            raise UserError(
                "tracking needs the seconds per time step, and this dataset does not tell them: collect it with "
                "`offline-cai collect`, pursue the plan's path (planner.execute: pursue), or execute its own actions "
                "(actions)."
            )
        if replan is not None and replan < 1:
            raise UserError(f"planner.replan is {replan}; take a number of steps of at least 1, or null for never.")
        self._spec, self._columns = spec, spec.columns(*fields)
        self._state = self._columns if state is None else spec.columns(*state)
        steers = {"track": tracker.columns, "pursue": (pursuit or Pursuit()).columns, "actions": ()}[execute]
        if not all(0 <= column < len(self._state) for column in steers):
            raise UserError(
                f"to {execute} plans takes columns {list(steers)} of the state, but {', '.join(state or fields)} has "
                f"{len(self._state)}: name the fields that hold positions and velocities (planner.state)."
            )
        self.propose, self._seed, self.tracker = propose, seed, tracker
        self._execute, self._replan, self.pursuit, self._go_on = execute, replan, pursuit or Pursuit(), go_on
        self._clear = clear
        if execute != "actions" and len(self.position) != spec.action_width:
            raise UserError(
                f"to {execute} plans pulls along {len(self.position)} positions, but there are {spec.action_width} "
                "actions: only an environment with a force for each position can be driven so. Execute the plan's own "
                "actions instead (planner.execute: actions)."
            )
        self._low, self._high = np.array(spec.box.low), np.array(spec.box.high)
        self._courses: list[_Course | None] = []
        self._episode, self._plan_number = np.zeros((2, 0), dtype=int)
        self.plans_made, self.seconds = 0, 0.0
        self.effective, self.log_evidence, self.feasible = list[float](), list[float](), list[float]()
        self.temperature: float | None = None
        self.rejected = Counter[str]()
        self.first: Plan | None = None
        self.deviation = (0.0, 0)

    @property
    def position(self) -> tuple[int, ...]:
        """The columns of a plan's rows that say where it is."""
        return self.pursuit.position if self._execute == "pursue" else self.tracker.position

    def account(self) -> dict[str, Any]:
        """What the attributes say, for JSON; of SHOWN first plans all candidates, by position and weight."""
        first = None
        if self.first is not None and self.first.nats is not None and self._execute != "actions":
            names, reason = self.first.reasons
            rows = self.first.obs[:SHOWN, :, :, list(self.position)]
            parts = {"rows": rows, "weight": self.first.weight[:SHOWN], "reason": reason[:SHOWN]}
            first = {"names": names, **{name: part.tolist() for name, part in parts.items()}}
        return {
            "plans": self.plans_made,
            "seconds": self.seconds,
            "effective": self.effective,
            "log_evidence": self.log_evidence,
            "temperature": self.temperature,
            "rejected": dict(self.rejected),
            "feasible": self.feasible,
            "deviation": self.deviation,
            "first": first,
        }

    def reset(self, done: np.ndarray | None = None) -> None:
        if done is None or not self._courses:
            self._courses = []
            return
        self._courses = [None if d else course for course, d in zip(self._courses, done, strict=True)]
        self._episode += done
        self._plan_number[done] = 0

    def act(self, obs: np.ndarray) -> tuple[np.ndarray, None]:
        if not self._courses:
            self._courses = [None] * len(obs)
            self._episode, self._plan_number = np.zeros((2, len(obs)), dtype=int)
        due = [i for i, course in enumerate(self._courses) if course is not None and course.time == self._replan]
        going_on = due if self._go_on else []
        anew = [i for i, course in enumerate(self._courses) if course is None or (i in due and not self._go_on)]
        if anew:
            self._plan(obs, anew, None)
        if going_on:
            self._plan(obs, going_on, self._left(obs, going_on))
        action = np.stack([self._action(course, row) for course, row in zip(self._courses, obs, strict=True)])  # type: ignore[arg-type]
        return np.clip(action, self._low, self._high), None

    def _action(self, course: _Course, obs: np.ndarray) -> np.ndarray:
        state, script = obs[self._state], course.script
        course.time += 1
        if self._execute == "pursue":
            course.at = self.pursuit.advance(script, course.at, state)
            self._deviates(script[course.at], state, self.pursuit.position)
            return self.pursuit.action(script, course.at, state, self._clear)
        if self._execute == "actions":
            return script[min(course.time - 1, len(script) - 1)]
        now, following = (script[min(t, len(script) - 1)] for t in (course.time - 1, course.time))
        self._deviates(now[: len(self.tracker.position)], state, self.tracker.position)
        return self.tracker.action(following[None], state[None])[0]

    def _deviates(self, planned: np.ndarray, state: np.ndarray, position: tuple[int, ...]) -> None:
        total, steps = self.deviation
        self.deviation = total + float(np.linalg.norm(planned - state[list(position)])), steps + 1

    def _note(self, plans: Plan) -> None:
        """What the weights of plans say about how they were steered and chosen."""
        self.first = self.first or plans
        self.temperature = plans.temperature
        if plans.log_weight.shape[1] > 1:
            self.effective += effective_sample_size(plans.log_weight).tolist()
        if plans.log_evidence is not None:
            self.log_evidence += plans.log_evidence.tolist()
        if plans.feasible is not None:
            self.feasible += plans.feasible.double().mean(1).tolist()
        names, reason = plans.reasons
        self.rejected.update({name: int((reason == i).sum()) for i, name in enumerate(names)})

    def _left(self, obs: np.ndarray, which: list[int]) -> Plan:
        """What is left of the plans of environments, in as many rows as they have, from the present state on."""
        courses = [self._courses[i] for i in which]
        left = [
            self._rest(course, row[self._columns], row[self._state])  # type: ignore[arg-type]
            for course, row in zip(courses, obs[which], strict=True)
        ]
        rows, steps = zip(*left, strict=True)
        plan = Plan.one_each(torch.from_numpy(np.stack(rows)).float(), None, courses[0].stride)  # type: ignore[union-attr]
        return plan if steps[0] is None else plan._replace(steps=torch.tensor(steps)[:, None])

    def _rest(self, course: _Course, state: np.ndarray, here: np.ndarray) -> tuple[np.ndarray, float | None]:
        """The rows that lie ahead, stretched over all rows where they have no times, and the steps that they take.

        `state` is the present row, `here` what the pursuit reads.
        """
        number = np.arange(len(course.rows), dtype=float)
        if self._execute == "pursue":
            course.at = self.pursuit.advance(course.script, course.at, here)
            begun, share = self.pursuit.progress(course.rows, course.at)
            at = begun + (number[-1] - begun) * number / number[-1]
            left = None if course.steps is None else course.steps * (1 - share)
        else:
            at, left = np.minimum(number + course.time / course.stride, number[-1]), None
        rows = np.stack([np.interp(at, number, column) for column in course.rows.T], axis=1)
        rows[0] = state
        return rows, left

    def _plan(self, obs: np.ndarray, which: list[int], left: Plan | None) -> None:
        """New courses for the environments `which`: desired states or actions, one row per time step, or a path."""
        key = torch.tensor([seeding.key(self._seed, i, self._episode[i], self._plan_number[i]) for i in which])
        began = time.perf_counter()
        plans = self.propose(obs[which], key, left)
        plan = plans.best
        self.seconds += time.perf_counter() - began
        self.plans_made += len(which)
        self._note(plans)
        rows = plan.obs[:, 0].double().numpy()
        if self._execute == "pursue":
            scripts: Any = [self.pursuit.path(row) for row in rows]
        elif self._execute == "track":
            scripts = self.tracker.states(rows, plan.stride, self._spec.dt or 0.0)
        elif plan.action is None:
            raise UserError("these plans hold no actions: train with model.actions: true, or track the planned states.")
        else:
            scripts = plan.action.double().numpy().reshape(len(which), -1, self._spec.action_width)
        for number, i in enumerate(which):
            steps = None if plan.steps is None else float(plan.steps[number, 0])
            self._courses[i] = _Course(rows[number], plan.stride, steps, scripts[number])
            self._plan_number[i] += 1
