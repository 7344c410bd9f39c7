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
