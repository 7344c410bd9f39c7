import numpy as np
import pytest
import torch
from torch import Tensor

from offline_cai.core import Plan, Spec
from offline_cai.errors import UserError
from offline_cai.planning.planner import Planner
from offline_cai.planning.tracking import Tracker


class Propose:
    """Straight plans of 3 rows from the current state, and a record of who asked."""

    def __init__(self, stride: int = 2, actions: bool = False) -> None:
        self.stride, self.actions, self.asked, self.keys = stride, actions, [], []  # type: ignore[var-annotated]

    def __call__(self, obs: np.ndarray, key: Tensor, under_way: Plan | None = None) -> Plan:
        self.asked.append(obs[:, 4].tolist())
        self.keys += key.tolist()
        rows = np.repeat(obs[:, None, 4:8], 3, axis=1) + np.arange(3)[:, None] * 0.01
        action = torch.arange(3 * self.stride * 2).reshape(1, 3, self.stride, 2).repeat(len(obs), 1, 1, 1) / 10
        return Plan.one_each(torch.from_numpy(rows), action if self.actions else None, self.stride)


def observe(*positions: float) -> np.ndarray:
    obs = np.zeros((len(positions), 8))
    obs[:, 4] = positions
    return obs


def test_a_plan_is_cached_until_its_environment_resets(spec: Spec) -> None:
    propose = Propose()
    planner = Planner(spec, ("observation",), propose, 0, Tracker())
    for _ in range(3):
        planner.act(observe(1, 2, 3))
    planner.reset(np.array([False, True, False]))
    planner.act(observe(1, 5, 3))
    planner.reset()
    planner.act(observe(6, 7))
    assert propose.asked == [[1, 2, 3], [5], [6, 7]]
    assert planner.plans_made == 6 and len(set(propose.keys[:4])) == 4, "every plan has noise of its own"
    assert propose.keys[4:] == propose.keys[:2], "and begun anew, the policy draws the same again"


def test_replanning_happens_on_time(spec: Spec) -> None:
    propose = Propose()
    planner = Planner(spec, ("observation",), propose, 0, Tracker(), replan=2)
    for step in range(5):
        planner.act(observe(step))
    assert propose.asked == [[0], [2], [4]]


def test_tracking_aims_one_step_ahead_and_holds_the_end(spec: Spec) -> None:
    planner = Planner(spec, ("observation",), Propose(stride=1), 0, Tracker(kp=10, kd=0))
    aims = [planner.act(observe(0.0))[0][0, 0] for _ in range(5)]
    assert aims == pytest.approx([0.1, 0.2, 0.2, 0.2, 0.2])


def test_actions_are_played_in_order_and_clipped(spec: Spec) -> None:
    planner = Planner(spec, ("observation",), Propose(actions=True), 0, Tracker(), execute="actions")
    played = np.array([planner.act(observe(0.0))[0][0] for _ in range(7)])
    assert played[:6, 0] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert played[:6, 1] == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9, 1.1])
    assert np.array_equal(played[6], played[5]), "the last action is held"


def test_what_cannot_be_executed_is_refused(spec: Spec) -> None:
    with pytest.raises(UserError, match="hold no actions"):
        Planner(spec, ("observation",), Propose(), 0, Tracker(), execute="actions").act(observe(0.0))
    with pytest.raises(UserError, match="seconds per time step"):
        Planner(Spec(spec.obs, spec.action), ("observation",), Propose(), 0, Tracker())
    with pytest.raises(UserError, match=r"replan is 0"):
        Planner(spec, ("observation",), Propose(), 0, Tracker(), replan=0)


class Onward(Propose):
    """It notes what is left of the plan under way, and goes straight to (1, 0) in five rows."""

    def __init__(self) -> None:
        super().__init__()
        self.left: list[Plan | None] = []

    def __call__(self, obs: np.ndarray, key: Tensor, under_way: Plan | None = None) -> Plan:
        self.left.append(under_way)
        rows = np.linspace(obs[:, 4:8], [1.0, 0.0, 0.0, 0.0], 5, axis=1)
        plan = Plan.one_each(torch.from_numpy(rows), None, 2)
        weight = torch.zeros(len(obs), 1)
        return plan._replace(steps=torch.full((len(obs), 1), 40.0), nats={"length": weight}, feasible=weight == 0)


def test_a_proposer_is_told_what_is_left_of_a_timed_plan(spec: Spec) -> None:
    propose = Onward()
    planner = Planner(spec, ("observation",), propose, 0, Tracker(), replan=2, go_on=True)
    for position in (0.0, 0.1, 0.2):
        planner.act(observe(position, 0.0))
    assert len(propose.left) == 2 and propose.left[0] is None
    left = propose.left[1]
    assert left is not None and left.obs.shape == (2, 1, 5, 4)
    assert left.obs[0, 0, :, 0].tolist() == pytest.approx([0.2, 0.5, 0.75, 1, 1]), (
        "two steps are one row; the end holds"
    )
    assert left.obs[1, 0, 0, 0] == 0, "from the present state on"
    planner.reset(np.array([True, False]))
    planner.act(observe(0.5, 0.5))
    assert propose.left[2] is None, "a new episode has no plan under way"


def test_a_proposer_is_told_what_is_left_of_a_path_and_of_its_steps(spec: Spec) -> None:
    propose = Onward()
    planner = Planner(spec, ("observation",), propose, 0, Tracker(), "pursue", replan=1, go_on=True)
    planner.act(observe(0.0))
    planner.act(observe(0.0))
    planner.act(observe(0.5))
    first, later = propose.left[1], propose.left[2]
    assert first is not None and later is not None and first.steps is not None and later.steps is not None
    assert first.obs[0, 0, :, 0].tolist() == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert later.obs[0, 0, :, 0].tolist() == pytest.approx([0.5, 0.625, 0.75, 0.875, 1], abs=0.02)
    assert first.steps.tolist() == [[40]] and later.steps.item() == pytest.approx(20, abs=1)


def test_it_can_say_how_it_chose_and_how_near_its_plans_it_stayed(spec: Spec) -> None:
    planner = Planner(spec, ("observation",), Onward(), 0, Tracker())
    for position in (0.0, 0.125, 0.25):
        obs = observe(position)
        obs[:, 5] = 0.3  # beside the line from the first state
        planner.act(obs)
    total, steps = planner.deviation
    assert steps == 3 and 0 < total / steps < 0.3 and planner.feasible == [1.0] and planner.rejected.total() == 0
