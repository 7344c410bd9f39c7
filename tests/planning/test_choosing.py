"""Which of several plans is chosen and why, what becomes of the plan under way, and goals that no plan can reach."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from offline_cai import seeding
from offline_cai.core import Chunk, Known, Plan
from offline_cai.diffusion.constraints import Outside
from offline_cai.diffusion.sampler import ddim
from offline_cai.errors import Notice, UserError
from offline_cai.planning.config import EvidenceConfig, PlannerConfig
from offline_cai.planning.sampling import draw
from offline_cai.planning.support import Support, SupportConfig, Supported, dense
from tests.planning.conftest import FREE, GOAL, ROWS, SCHEDULE, WIDTH, denoise, model, nothing

CHOOSE = PlannerConfig(steps=4, candidates=8, evidence=GOAL)
CIRCLE = Outside(columns=(0, 1), centre=(0.0, 0.0), radius=1.0, width=0.1)


def test_the_heaviest_feasible_plan_is_chosen_and_the_others_have_a_reason() -> None:
    nats = {
        "length": torch.tensor([[-1.5, -5.0, -2.0], [0, 0, 0]]),
        "support": torch.tensor([[-9.0, 0, -8], [-3, 0, -1]]),
    }
    weight = sum(nats.values()).log_softmax(1)
    plan = Plan(torch.zeros(2, 3, 4, 2), None, 1, weight, nats=nats)
    assert plan.chosen.tolist() == [1, 1]
    names, reason = plan.reasons
    assert [names[i] for i in reason[0, [0, 2]]] == ["support", "support"] and reason[:, 1].tolist() == [-1, -1]
    barred = plan._replace(feasible=torch.tensor([[True, False, True], [False, False, False]]))
    assert barred.chosen.tolist() == [2, 1], "none is feasible in the second: then the heaviest"
    assert [barred.reasons[0][i] for i in barred.reasons[1][0, :2]] == ["support", "infeasible"]
    odds = math.exp(-0.5)
    assert barred.weight[0].tolist() == pytest.approx([odds / (1 + odds), 0, 1 / (1 + odds)])
    assert torch.allclose(barred.weight[1], weight[1].exp()), "and all of them count"
    assert plan._replace(nats=None).reasons[0] == [] and (plan._replace(nats=None).reasons[1] == -1).all()


def test_candidates_tell_the_parts_of_their_evidence() -> None:
    evidence = dataclasses.replace(GOAL, outside=(CIRCLE,), length=2.0)
    c = dataclasses.replace(CHOOSE, evidence=evidence, candidates=32)
    drawn = draw(model(), *nothing(50), c)
    assert drawn.nats is not None and list(drawn.nats) == ["goals", "constraints", "length"]
    total = torch.stack(list(drawn.nats.values())).sum(0)
    assert torch.allclose(drawn.log_weight, total.log_softmax(1))
    rows = dense(2 * drawn.x.flatten(0, 1))[:, 1:]  # raw units are twice as large; the first row is what it is
    clear = (rows.norm(dim=-1) >= 1 - 1e-4).all(1).view(50, 32)
    assert drawn.feasible is not None and torch.equal(drawn.feasible, clear) and 0 < clear.float().mean() < 1


def test_where_the_data_has_been_is_read_once_for_two_judges() -> None:
    support = Support(SupportConfig(cell=0.1, cells=64))
    half = np.stack(np.meshgrid(np.linspace(-2, 0.5, 81), np.linspace(-2, 2, 81)), -1).reshape(-1, 2).astype(np.float32)
    support.fit(lambda discount=1.0: iter([Chunk(half, half[:, :1], half[:, 0])]), [0, 1])
    c = dataclasses.replace(CHOOSE, evidence=EvidenceConfig(support=10.0), candidates=32)
    drawn_from = model(support=support.double())
    drawn = draw(drawn_from, *nothing(20), c)
    rows = drawn_from.codec.decode(drawn.x.flatten(0, 1))[0]
    nats = Supported(support, 10.0, c.evidence.margin)(rows, torch.zeros(len(rows)), 1.0).view(20, 32)
    assert drawn.nats is not None and torch.allclose(drawn.nats["support"], nats) and nats.std() > 1
    inside = (support.along(rows)[:, 1:] <= 2 * c.evidence.margin).all(1).view(20, 32)
    assert drawn.feasible is not None and torch.equal(drawn.feasible, inside) and 0 < inside.float().mean() < 1


def test_where_no_candidate_is_feasible_a_notice_says_so() -> None:
    c = dataclasses.replace(CHOOSE, evidence=EvidenceConfig(outside=(dataclasses.replace(CIRCLE, radius=9.0),)))
    with pytest.warns(Notice, match="no candidate of a plan keeps all constraints: of its 8 candidates"):
        drawn = draw(model(), *nothing(5), c)
    assert drawn.feasible is not None and not drawn.feasible.any()


def test_what_is_left_of_the_plan_under_way_is_replaced_by_better_ones_alone() -> None:
    known, key = nothing(40)
    near, far = torch.full_like(known.value, 0.75), torch.full_like(known.value, -9.0)
    c = dataclasses.replace(CHOOSE, replan=2, keep=True)
    at_goal = near.clone()
    at_goal[:, -1, 0] = 1.5
    kept, dropped = draw(model(), known, key, c, under_way=at_goal), draw(model(), known, key, c, under_way=far)
    assert kept.x.shape == (40, 9, ROWS, WIDTH) and torch.equal(kept.x[:, 0], at_goal)
    assert (kept.log_weight.argmax(1) == 0).all() and (dropped.log_weight.argmax(1) > 0).all()
    assert torch.equal(kept.x[:, 1:], draw(model(), known, key, CHOOSE).x), "the new ones are as without"
    assert kept.log_evidence is None, "it is no sample of the model"


def test_a_warm_start_stays_near_and_takes_its_share_of_the_steps() -> None:
    calls: list[int] = []

    def counted(x: Tensor, k: Tensor) -> Tensor:
        calls.append(int(k[0]))
        return denoise(x, k)

    known, key = nothing(2000)
    begin = torch.full_like(known.value, 2.0)
    c = PlannerConfig(steps=8, replan=2, warm_start=0.5)
    x = draw(model(denoise=counted), known, key, c, under_way=begin).x[:, 0]
    assert len(calls) == 4 and max(calls) == 15, "half of the levels in half of the steps"
    abar = SCHEDULE.abar[15]
    expected = 2 * abar.sqrt()  # of N(0, I) rows, which DDIM carries over almost as they are
    assert abs(float(x.mean()) - float(expected)) < 0.15 and float(draw(model(), known, key, c).x.mean()) < 0.1


def test_a_goal_far_from_all_data_is_refused_with_the_nearest_place() -> None:
    support = Support(SupportConfig(cell=0.1, cells=64, far=0.5))
    line = np.stack([np.linspace(-2, 2, 400), np.zeros(400)], 1).astype(np.float32)
    support.fit(lambda discount=1.0: iter([Chunk(line, line[:, :1], line[:, 0])]), [0, 1])
    value = torch.zeros(1, ROWS, WIDTH, dtype=torch.float64)
    value[:, -1] = torch.tensor([0.5, 0.6])  # 1, 1.2 in raw units
    with pytest.raises(UserError, match=r"the goal \(1, 1\.2\) is 1\.\d+ from the nearest place .* \((0\.9|1)"):
        draw(model(support=support, goal=(0, 1)), Known(value, FREE.expand_as(value)), torch.tensor([1]), CHOOSE)


def test_constraints_that_cut_the_data_in_two_are_named() -> None:
    support = Support(SupportConfig(cell=0.1, cells=64))
    line = np.stack([np.linspace(-2, 2, 400), np.zeros(400)], 1).astype(np.float32)
    support.fit(lambda discount=1.0: iter([Chunk(line, line[:, :1], line[:, 0])]), [0, 1])
    ends = torch.tensor([-1.5, 0.0]), torch.tensor([1.5, 0.0])
    assert support.connected(*ends) and support.connected(*ends, [dataclasses.replace(CIRCLE, centre=(0.0, 3.0))])
    assert not support.connected(*ends, [CIRCLE])
    mask = torch.zeros(1, ROWS, WIDTH, dtype=torch.bool)
    mask[:, [0, -1]] = True
    value = torch.zeros(1, ROWS, WIDTH, dtype=torch.float64)
    value[0, 0, 0], value[0, -1, 0] = -0.75, 0.75
    c = dataclasses.replace(CHOOSE, evidence=EvidenceConfig(outside=(CIRCLE,), support=10.0))
    with pytest.warns(Notice, match="leave no way from the start of a plan to its goal"):
        draw(model(support=support, goal=(0, 1)), Known(value, mask), torch.tensor([1]), c)


def test_places_beyond_the_grid_are_as_far_as_they_are() -> None:
    support = Support(SupportConfig(cell=0.1, cells=32))
    square = np.random.default_rng(0).uniform(-1, 1, size=(20_000, 2)).astype(np.float32)
    support.fit(lambda discount=1.0: iter([Chunk(square, square[:, :1], square[:, 0])]), [0, 1])
    far = support(torch.tensor([[-5.0, 0.0], [5.0, 0.0], [0.0, -5.0], [0.0, 5.0]]))
    assert (far > 3.5).all() and (far < 4.5).all(), "four metres from the data, on every side"


def test_detours_pass_where_the_constraints_allow_and_one_leg_is_stretched_to_their_rows() -> None:
    support = Support(SupportConfig(cell=0.1, cells=64))
    grid = np.stack(np.meshgrid(np.linspace(-2, 2, 81), np.linspace(-2, 2, 81)), -1).reshape(-1, 2).astype(np.float32)
    support.fit(lambda discount=1.0: iter([Chunk(grid, grid[:, :1], grid[:, 0])]), [0, 1])
    places = support.draw(torch.arange(2000), [CIRCLE])
    assert ((places.norm(dim=1) > 0.9) & (places.abs().amax(1) < 2.2)).all()
    with pytest.raises(UserError, match="no place that the data has visited keeps all constraints"):
        support.draw(torch.arange(2), [dataclasses.replace(CIRCLE, radius=9.0)])
    c = dataclasses.replace(CHOOSE, detours=3)
    drawn = draw(model(support=support.double(), goal=(0, 1)), *nothing(2), c)
    assert drawn.x.shape == (2, 11, 2 * ROWS, WIDTH)
    one, whole = draw(model(), *nothing(2), CHOOSE).x[0, 0], drawn.x[0, 0]
    assert torch.equal(one[[0, -1]], whole[[0, -1]]) and torch.allclose(whole[1], one[0] + (one[1] - one[0]) * 0.4)


def test_detours_whose_middle_is_known_are_drawn_at_once_and_as_one_leg_after_the_other() -> None:
    support = Support(SupportConfig(cell=0.1, cells=64))
    grid = np.stack(np.meshgrid(np.linspace(-2, 2, 81), np.linspace(-2, 2, 81)), -1).reshape(-1, 2).astype(np.float32)
    support.fit(lambda discount=1.0: iter([Chunk(grid, grid[:, :1], grid[:, 0])]), [0, 1])
    calls: list[int] = []

    def mixing(x: Tensor, k: Tensor) -> Tensor:
        calls.append(len(x))
        return denoise(x, k) + 0.3 * x.roll(1, 1)  # what a row becomes depends on the others

    mask = torch.zeros(2, ROWS, WIDTH, dtype=torch.bool)
    mask[:, [0, -1]] = True
    known, key = Known(torch.rand(2, ROWS, WIDTH, dtype=torch.float64), mask), torch.tensor([1, 2])
    drawn_from = model(denoise=mixing, support=support.double(), goal=(0, 1))
    c = dataclasses.replace(CHOOSE, candidates=2, detours=3)
    detours = draw(drawn_from, known, key, c).x[:, 2:]
    assert calls == [16] * 4, "two candidates and three times two legs for each state"
    first, second = (part.flatten(0, 1) for part in detours.split(ROWS, 2))
    assert torch.equal(first[:, -1], second[:, 0])
    own = seeding.split(seeding.split(key, 1)[:, 0], 3).flatten()
    for leg, its_key in zip((first, second), seeding.split(own, 2).unbind(1), strict=True):
        alone = ddim(mixing, SCHEDULE, Known(leg, mask[:1].expand_as(leg)), its_key, c.steps, clip=None)
        torch.testing.assert_close(alone, leg)
    calls.clear()
    mask[:, -1, 1] = False
    x = draw(drawn_from, known, key, c).x[:, 2:]
    assert calls == [4] * 4 + [6] * 8, "the second leg has to wait for the first"
    assert torch.equal(x[:, :, ROWS - 1], x[:, :, ROWS])
