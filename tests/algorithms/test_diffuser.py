import dataclasses

import numpy as np
import pytest
import torch

from offline_cai import seeding
from offline_cai.algorithms.diffuser import Diffuser, DiffuserConfig, PlannerConfig
from offline_cai.core import Episode, Known, Spec
from offline_cai.data.trajectories import Trajectories
from offline_cai.data.windows import Windows
from offline_cai.errors import UserError
from offline_cai.planning.tracking import Tracker

SMALL = DiffuserConfig(rows=4, stride=2, channels=8, multipliers=(1, 2), levels=8)


def build(store: Trajectories, **changes: object) -> Diffuser:
    torch.manual_seed(0)
    diffuser = Diffuser(store.spec, dataclasses.replace(SMALL, **changes))  # type: ignore[arg-type]
    diffuser.fit(store.chunks)
    return diffuser


@pytest.mark.parametrize("actions", [False, True])
def test_plans_begin_at_the_state_and_end_at_the_goal(store: Trajectories, actions: bool) -> None:
    obs = np.asarray(store.obs[[0, 3]], dtype=np.float64)
    plan = build(store, actions=actions).plan(obs, torch.tensor([1, 2]))
    assert plan.obs.shape == (2, 4, 4) and plan.stride == 2
    assert np.allclose(plan.obs[:, 0], obs[:, 4:8], atol=1e-4)
    assert np.allclose(plan.obs[:, -1, :2], obs[:, 2:4], atol=1e-4), "desired_goal"
    assert not np.allclose(plan.obs[:, -1, 2:], obs[:, 6:8], atol=1e-2), "the last velocity is the model's"
    assert (plan.action is not None) == actions
    if plan.action is not None:
        assert plan.action.shape == (2, 4, 2, 2)


def test_goal_columns_say_which_numbers_the_goal_fixes(store: Trajectories) -> None:
    obs = np.asarray(store.obs[[0, 3]], dtype=np.float64)
    plan = build(store, goal_columns=(3, 0)).plan(obs, torch.tensor([1, 2]))
    assert np.allclose(plan.obs[:, -1, [3, 0]], obs[:, 2:4], atol=1e-4)


def test_without_a_goal_only_the_first_state_is_known(store: Trajectories) -> None:
    diffuser = build(store, goal_field=None, goal_columns=())
    mask = diffuser.known(np.asarray(store.obs[:1])).mask
    assert mask[0].sum(-1).tolist() == [4, 0, 0, 0]


@pytest.mark.parametrize("prediction", ["x_0", "epsilon"])
def test_training_lowers_the_loss_and_the_denoiser_returns_clean_rows(spec: Spec, prediction: str) -> None:
    """States that stand still: the known first row tells all the others."""
    rng = np.random.default_rng(0)
    still = [np.repeat(rng.normal(size=(1, 8)), 9, axis=0) for _ in range(50)]
    store = Trajectories.from_episodes(spec, [Episode(obs, np.zeros((8, 2)), np.zeros(8), False) for obs in still])
    diffuser = build(store, prediction=prediction, channels=16)
    windows = Windows(store, 4, 2)
    optimiser = torch.optim.Adam(diffuser.parameters(), 5e-3)
    losses = []
    for step in range(300):
        rows = rng.choice(windows.starts, size=32)
        batch = windows.gather(rows, seeding.keys(0, step, torch.arange(32)))
        terms, entries, _ = diffuser(batch)
        loss = terms["loss"] / entries
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:5])
    x = diffuser.codec.encode(windows.gather(windows.starts, torch.arange(len(windows.starts))))
    known, k = Known(x, diffuser._mask(x)), torch.full((len(x),), 3)
    noisy = known.impose(diffuser.schedule.add_noise(x, torch.randn(x.shape), k))
    error = (diffuser.denoise(noisy, k) - x)[~known.mask]
    assert float((error**2).mean()) < 0.25 * float((x**2).mean()), "x_0, whatever the network predicts"


def test_known_entries_carry_no_loss(store: Trajectories) -> None:
    """What the network says about known entries does not matter: their gradient is zero."""
    diffuser = build(store)
    batch = Windows(store, 4, 2).gather(np.array([8, 9]), torch.arange(2))
    seen = []
    original = diffuser.network.forward

    def spy(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        out = original(x, k)
        out.retain_grad()
        seen.append((x, out))
        return out

    diffuser.network.forward = spy  # type: ignore[method-assign]
    diffuser(batch).terms["loss"].backward()
    (x, out), clean = seen[0], diffuser.codec.encode(batch)
    mask = diffuser._mask(clean)
    assert torch.equal(x[mask], clean[mask]), "known entries enter without noise"
    assert (out.grad[mask] == 0).all() and (out.grad[~mask] != 0).all()


def test_the_sampler_of_the_config_is_used(store: Trajectories) -> None:
    obs, key = np.asarray(store.obs[:1]), torch.tensor([1])
    diffuser = build(store)
    calls: list[int] = []
    inner = diffuser.denoise
    diffuser.denoise = lambda x, k: (calls.append(1), inner(x, k))[1]  # type: ignore[method-assign,func-returns-value]
    for planner, count in ((PlannerConfig(steps=3), 3), (PlannerConfig(sampler="ddpm"), 8)):
        diffuser.config = dataclasses.replace(diffuser.config, planner=planner)
        calls.clear()
        diffuser.plan(obs, key)
        assert len(calls) == count
    assert len(diffuser.denoising(obs, key, 4)) == 5


def test_sizes_and_goals_that_do_not_fit_are_named(spec: Spec) -> None:
    with pytest.raises(UserError, match=r"rows is 5.*multiple of 2"):
        Diffuser(spec, dataclasses.replace(SMALL, rows=5))
    for changes, word in (
        ({"goal_columns": (0, 9)}, "columns are .* make 4 columns"),
        ({"stride": 0}, "stride is 0"),
        ({"levels": -1}, "levels is -1"),
        ({"multipliers": ()}, "multipliers"),
        ({"discount": 2.0}, "discount is 2"),
        ({"planner": PlannerConfig(steps=9)}, "more than the 8 noise levels"),
        ({"planner": PlannerConfig(execute="actions")}, "set actions: true"),
        ({"planner": PlannerConfig(tracker=Tracker(position=(0, 7)))}, "make 4 columns"),
    ):
        with pytest.raises(UserError, match=word):
            Diffuser(spec, dataclasses.replace(SMALL, **changes))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="goal_columns names 1"):
        Diffuser(spec, dataclasses.replace(SMALL, goal_columns=(0,)))
    with pytest.raises(UserError, match="did you mean 'desired_goal'"):
        Diffuser(spec, dataclasses.replace(SMALL, goal_field="desired_gaol"))
